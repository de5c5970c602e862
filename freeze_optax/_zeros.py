"""Zeros for leaves that do not change."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from freeze_optax._leaves import can_train, is_array, kind


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
            return np.zeros(leaf.shape if is_array(leaf) else (), jax.dtypes.float0)
        return self._cached(leaf, 0.0)

    def update(self, leaf: Any) -> Any:
        """What leaves `leaf` as it is, bit for bit, when it is added.

        That is -0.0: `-0.0 + 0.0` is 0.0, but `x + -0.0` is x for every x.
        """
        zeros = {"inexact": -0.0, "exact": 0}
        value = zeros.get(kind(leaf))
        return self.gradient(leaf) if value is None else self._cached(leaf, value)

    def _cached(self, leaf: Any, value: float) -> Any:
        if not isinstance(leaf, Tracer):
            return _full_like(leaf, value)
        key = (leaf.aval, str(value))  # 0.0 == -0.0
        if key not in self._made:
            self._made[key] = _full_like(leaf, value)
        return self._made[key]


def _full_like(leaf: Any, value: float) -> Any:
    if jnp.iscomplexobj(leaf):
        return jnp.full_like(leaf, complex(value, value))
    return jnp.full_like(leaf, value)
