"""Zero gradients and zero updates of frozen leaves."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from freeze_optax._tree.kinds import can_train, is_array, is_numpy_only, number_kind


class Zeros:
    """Makes zeros like leaves, and computes them only once per shape and dtype.

    In a large model most leaves share their shape with many others. Under a trace these leaves
    share one constant, as tracing time and compile time grow with every equation. Outside a trace
    each leaf gets a buffer of its own, as two leaves that share a buffer can't both be donated. It
    is a copy of the first one, as a copy is three times as fast as new zeros.
    """

    def __init__(self):
        self._made: dict[Any, Any] = {}

    def gradient(self, leaf: Any) -> Any:
        """Returns the gradient of a function that does not depend on `leaf`."""
        return self._like(leaf, _gradient)

    def update(self, leaf: Any) -> Any:
        """Returns the update that keeps every bit of `leaf` when it is added.

        The update is -0.0, as `x + -0.0` is x for every x. With 0.0 a negative zero would change:
        `-0.0 + 0.0` is 0.0.
        """
        return self._like(leaf, _update)

    def _like(self, leaf: Any, make: Callable[[Any], Any]) -> Any:
        is_traced = isinstance(leaf, Tracer)
        if not is_traced and not isinstance(leaf, jax.Array):
            return make(leaf)
        placement = None if is_traced else (leaf.sharding, leaf.committed)
        key = (make, leaf.aval, placement)
        if key not in self._made:
            self._made[key] = make(leaf)
            return self._made[key]
        return self._made[key] if is_traced else self._made[key].copy()


def _gradient(leaf: Any) -> Any:
    if can_train(leaf):
        return _full_like(leaf, 0.0)
    return np.zeros(leaf.shape if is_array(leaf) else (), jax.dtypes.float0)


def _update(leaf: Any) -> Any:
    value = {"inexact": -0.0, "exact": 0}.get(number_kind(leaf))
    return _gradient(leaf) if value is None else _full_like(leaf, value)


def _full_like(leaf: Any, value: float) -> Any:
    if is_numpy_only(leaf):
        return np.full_like(leaf, complex(value, value) if leaf.dtype.kind == "c" else value)
    if jnp.iscomplexobj(leaf):
        return jnp.full_like(leaf, complex(value, value))
    return jnp.full_like(leaf, value)
