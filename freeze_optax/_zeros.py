"""Zeros for leaves that do not change."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from freeze_optax._leaves import can_train


class Zeros:
    """Makes zeros like leaves; under a trace, once per shape and dtype.

    Tracing and compile time grow with every equation, and in a large model most leaves share
    their shape with many others. Outside a trace each leaf gets a buffer of its own, as two
    leaves on one buffer could not both be donated.
    """

    def __init__(self):
        self._made: dict[Any, Any] = {}

    def gradient(self, leaf: Any) -> Any:
        """The gradient of something that does not depend on `leaf`."""
        if not can_train(leaf):
            return np.zeros(np.shape(leaf) if hasattr(leaf, "shape") else (), jax.dtypes.float0)
        return self._cached(leaf, 0.0)

    def update(self, leaf: Any) -> Any:
        """What leaves `leaf` as it is, bit for bit, when it is added.

        That is -0.0: `-0.0 + 0.0` is 0.0, but `x + -0.0` is x for every x.
        """
        if can_train(leaf):
            return self._cached(leaf, -0.0)
        if isinstance(leaf, int) or _is_number(leaf):
            return self._cached(leaf, 0)
        return self.gradient(leaf)

    def _cached(self, leaf: Any, value: float) -> Any:
        if not isinstance(leaf, Tracer):
            return _full_like(leaf, value)
        key = (leaf.aval, value)
        if key not in self._made:
            self._made[key] = _full_like(leaf, value)
        return self._made[key]


def _is_number(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return isinstance(dtype, np.dtype) and dtype != jax.dtypes.float0 and hasattr(leaf, "shape")


def _full_like(leaf: Any, value: float) -> Any:
    if jnp.iscomplexobj(leaf):
        return jnp.full_like(leaf, complex(value, value))
    return jnp.full_like(leaf, value)
