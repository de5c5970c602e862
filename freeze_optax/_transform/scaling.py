"""Multiply an update by a factor, where a factor of zero means no update at all."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from freeze_optax._tree.kinds import can_train

_DOUBLE = ("float64", "complex128")

LARGEST = float(np.finfo(np.float32).max)
"""The largest factor. Those of most leaves are float32."""


def is_real(x: Any) -> bool:
    """Returns whether `x` is a real number, or an array of them; a bool is none."""
    if isinstance(x, int | float):
        return not isinstance(x, bool)
    if not isinstance(x, np.generic | np.ndarray | jax.Array):
        return False
    return jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)


def factor_dtype(x: Any) -> Any:
    """Returns the dtype of a factor for a leaf or an update: float64 for doubles, else float32."""
    return jnp.float64 if str(jnp.result_type(x)) in _DOUBLE else jnp.float32


def scale_update(update: Any, factor: jax.Array) -> Any:
    """Returns the update times the factor, in the dtype of the update.

    The product is one of float32, or of float64 for doubles. For a narrower dtype it is rounded
    again.

    If the factor is zero, all of the result is -0.0, whatever the update is: a product would keep
    NaN, and a zero of either sign, and p + 0.0 is not -0.0 where p is.

    Args:
      update: An array of floats or complex numbers. Integers, say, are returned themselves.
      factor: A real scalar.
    """
    if not can_train(update):
        return update
    update = jnp.asarray(update)
    if jnp.issubdtype(update.dtype, jnp.complexfloating):
        # Not the product of complex numbers: inf * (2 + 0j) has NaN in it.
        return jax.lax.complex(scale_update(update.real, factor), scale_update(update.imag, factor))
    # A factor of bfloat16 would be off by up to 0.2 percent, and float8 has no products at all.
    wide = update.astype(factor_dtype(update))
    scaled = (wide * factor.astype(wide.dtype)).astype(update.dtype)
    return jnp.where(factor == 0, jnp.full((), -0.0, update.dtype), scaled)
