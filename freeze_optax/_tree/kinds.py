"""Kinds of leaf: which leaves are arrays, which hold numbers, and which can be trained."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np


@functools.cache
def _dtype_kind(dtype: Any) -> str:
    # This format has exponents only, for the scales of block formats. Its smallest number is not 0,
    # so it has neither a zero gradient nor an update that changes nothing.
    if dtype == jnp.float8_e8m0fnu:
        return "other"
    if isinstance(dtype, np.dtype) and dtype.kind == "m":  # a duration: to NumPy an integer
        return "other"
    if jnp.issubdtype(dtype, jnp.inexact):
        return "inexact"
    exact = jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.bool_)
    return "exact" if exact else "other"


def number_kind(leaf: Any) -> str:
    """Returns the kind of numbers that a leaf holds.

    Args:
      leaf: An array, a Python number, or anything else.

    Returns:
      `"inexact"` (float, complex), `"exact"` (integer, bool) or `"other"`.
    """
    if is_array(leaf):
        return _dtype_kind(leaf.dtype)
    if isinstance(leaf, float | complex):
        return "inexact"
    return "exact" if isinstance(leaf, int) else "other"


def is_array(leaf: Any) -> bool:
    """Returns whether `leaf` has a shape and a dtype, as JAX, NumPy and abstract arrays have."""
    # Classes such as jnp.float32 have these attributes too.
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, type)


def is_numpy_only(leaf: Any) -> bool:
    """Returns whether `leaf` is a NumPy float that JAX lacks: longer, or in another byte order."""
    dtype = leaf.dtype if isinstance(leaf, np.ndarray | np.generic) else None
    if dtype is None or dtype.kind not in "fc":
        return False
    return not dtype.isnative or dtype.itemsize > (8 if dtype.kind == "f" else 16)


def can_train(leaf: Any) -> bool:
    """Returns whether a gradient step can change `leaf`: float and complex arrays and numbers."""
    return number_kind(leaf) == "inexact"


def is_storage(leaf: Any) -> bool:
    """Returns whether `leaf` is an array of a dtype that quantized weights are stored in.

    These are the integers and floats of at most eight bits, but not the exponents that are scales.
    """
    return is_array(leaf) and _is_storage_dtype(leaf.dtype)


def is_scale(leaf: Any) -> bool:
    """Returns whether `leaf` is an array of exponents, the scales of block formats."""
    return is_array(leaf) and leaf.dtype == jnp.float8_e8m0fnu


@functools.cache
def _is_storage_dtype(dtype: Any) -> bool:
    if dtype == jnp.float8_e8m0fnu:
        return False
    if jnp.issubdtype(dtype, jnp.integer) and _dtype_kind(dtype) == "exact":
        return jnp.iinfo(dtype).bits <= 8
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= 8
