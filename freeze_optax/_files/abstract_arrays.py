"""Abstract arrays for what a header describes: a shape and a dtype, without contents."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MOST_AXES = 64
"""NumPy allows no more axes. Without a limit, the product of a million sizes takes hours."""


def as_abstract_array(shape: Sequence[Any], dtype: Any) -> jax.ShapeDtypeStruct | None:
    """Returns an abstract array of this shape and dtype; None for text, dates, records and objects.

    Raises:
      ValueError: If the shape is not valid.
    """
    check_axes(len(shape))
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"it holds an array of the shape {tuple(shape)}")
    dtype = np.dtype(dtype)
    # NumPy counts a time span as a number, but not a bfloat16, which jnp.issubdtype counts. For the
    # formats that ml_dtypes adds to NumPy, not all of which an older JAX knows, `isbuiltin` is 2.
    is_number = jnp.issubdtype(dtype, np.number) and dtype.kind != "m"
    if not (is_number or dtype == np.bool_ or dtype.isbuiltin == 2):
        return None
    return jax.ShapeDtypeStruct(tuple(shape), dtype.newbyteorder("="))


def check_axes(count: int) -> None:
    """Raises ValueError if an array has more than `MOST_AXES` axes."""
    if count > MOST_AXES:
        raise ValueError(f"it holds an array of {count:,} axes, over the limit of {MOST_AXES}")
