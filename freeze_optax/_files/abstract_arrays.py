"""Arrays that a header describes: a shape and a dtype, without contents."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MOST_AXES = 64
"""As many as an array of NumPy may have. The product of a million numbers takes hours."""


def as_abstract_array(shape: Sequence[Any], dtype: Any) -> jax.ShapeDtypeStruct | None:
    """An array that was told of, None for one of text, dates, records or Python objects.

    Raises:
      ValueError: If the shape is none.
    """
    check_axes(len(shape))
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"it holds an array of the shape {tuple(shape)}")
    dtype = np.dtype(dtype)
    # To NumPy a time span is a number, and a bfloat16 none.
    is_number = jnp.issubdtype(dtype, np.number) and dtype.kind != "m"
    if not (is_number or dtype == np.bool_):
        return None
    return jax.ShapeDtypeStruct(tuple(shape), dtype.newbyteorder("="))


def check_axes(count: int) -> None:
    if count > MOST_AXES:
        raise ValueError(f"it holds an array of {count:,} axes, over the limit of {MOST_AXES}")
