"""The root mean square of an array, whatever its dtype and the size of its numbers."""

from typing import Any

import jax
import jax.numpy as jnp


def in_wide_dtype(x: Any) -> jax.Array:
    """Returns an array in a dtype of 32 bits or more: squares overflow in float16, and in others.

    Not by promotion: float8 has none, and strict promotion allows none.
    """
    x = jnp.asarray(x)
    return x if x.dtype.itemsize > 2 else x.astype(jnp.float32)


def scale_and_rest(x: Any) -> tuple[jax.Array, jax.Array]:
    """Returns two numbers whose product is the root mean square of the sizes of the elements.

    The squares are those of the array divided by its largest element, so none is too large or too
    small for the dtype.
    """
    sizes = jnp.abs(in_wide_dtype(x))
    largest = sizes.max()
    is_ordinary = (largest > 0) & (largest < jnp.inf)
    scale = jnp.where(is_ordinary, largest, jnp.ones_like(largest))
    return scale, jnp.sqrt(jnp.mean(jnp.square(sizes / scale)))


def product(pair: tuple[jax.Array, jax.Array]) -> float:
    """Returns the number that `scale_and_rest` returns in two parts."""
    return float(pair[0]) * float(pair[1])


_jitted = jax.jit(scale_and_rest)


def root_mean_square(x: Any) -> float:
    """Returns the root mean square of the sizes of the elements of an array in device memory."""
    return product(_jitted(x))
