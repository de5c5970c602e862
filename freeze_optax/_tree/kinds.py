"""Kinds of leaf: which leaves are arrays, which hold numbers, and which can be trained."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


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
    if _is_plain_array_type(type(leaf)):
        return _dtype_kind(leaf.dtype)
    if is_array(leaf):
        kind = _dtype_kind(leaf.dtype)
        return "other" if _is_ref_type(type(leaf)) is not False and is_ref(leaf) else kind
    if isinstance(leaf, float | complex):
        return "inexact"
    return "exact" if isinstance(leaf, int) else "other"


@functools.cache
def _is_plain_array_type(cls: type) -> bool:
    """Whether all of a class are arrays and no references, so that no attribute has to tell it."""
    is_array_type = issubclass(cls, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
    return is_array_type and _is_ref_type(cls) is False


def is_array(leaf: Any) -> bool:
    """Returns whether `leaf` has a shape and a dtype, as JAX, NumPy and abstract arrays have."""
    if _is_plain_array_type(type(leaf)):
        return True
    # Classes such as jnp.float32 have these attributes too.
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, type)


def is_ref(leaf: Any) -> bool:
    """Returns whether `leaf` is a reference to an array that changes in place (`jax.new_ref`)."""
    # By name, as the class is private and was called ArrayRef.
    cls = type(leaf)
    is_reference = _is_ref_type(cls)
    return type(leaf.aval).__name__ == "AbstractRef" if is_reference is None else is_reference


@functools.cache
def _is_ref_type(cls: type) -> bool | None:
    """Whether a class is that of references; None for tracers, whose abstract value says it."""
    if issubclass(cls, Tracer):
        return None
    return cls.__module__.startswith("jax.") and cls.__name__ in ("Ref", "ArrayRef", "MutableArray")


def why_lost(leaf: Any) -> str:
    """Says why params in `leaf` can't be trained though they seem to be; empty for other leaves.

    The text continues "the leaf is".
    """
    if not is_array(leaf):
        return ""
    if is_ref(leaf):
        return (
            "a reference (jax.new_ref), which changes in place and has no gradient and no update; "
            "put an array in its place: ref[...]"
        )
    return _why_raw(leaf.dtype) if isinstance(leaf.dtype, np.dtype) else ""


_RAW = {
    1: "np.load gives float8, float4 and small integers so; view it as what it was, "
    "x.view(jnp.float8_e4m3fn), for example",
    2: "np.load gives bfloat16 so; view it as what it was: x.view(jnp.bfloat16)",
}


@functools.cache
def _why_raw(dtype: np.dtype[Any]) -> str:
    is_raw = dtype.type is np.void and dtype.names is None and dtype.subdtype is None
    if not is_raw or dtype.itemsize not in _RAW:
        return ""
    return f"raw bytes, of dtype {dtype.str[1:]}: {_RAW[dtype.itemsize]}"


def rank(leaf: Any) -> int:
    """Returns the number of axes of a leaf; 0 if it is no array."""
    return len(leaf.shape) if is_array(leaf) else 0


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
    # The dtype first, as nearly all leaves end there.
    return _is_storage_dtype(getattr(leaf, "dtype", None)) and is_array(leaf)


def is_scale(leaf: Any) -> bool:
    """Returns whether `leaf` is an array of exponents, the scales of block formats."""
    return is_array(leaf) and leaf.dtype == jnp.float8_e8m0fnu


@functools.cache
def _is_storage_dtype(dtype: Any) -> bool:
    if dtype is None or dtype == jnp.float8_e8m0fnu:
        return False
    if jnp.issubdtype(dtype, jnp.integer) and _dtype_kind(dtype) == "exact":
        return jnp.iinfo(dtype).bits <= 8
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= 8


@functools.cache
def dtype_bits(dtype: Any) -> int:
    """Returns the bits of one element, four for an int4, where NumPy has a whole byte."""
    if dtype.itemsize == 1 and isinstance(dtype, np.dtype):
        for info in (jnp.iinfo, jnp.finfo):
            with contextlib.suppress(ValueError, TypeError):
                return int(info(dtype).bits)
    return 8 * dtype.itemsize
