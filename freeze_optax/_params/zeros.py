"""Zero gradients and zero updates of frozen leaves."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from freeze_optax._rows.meshes import reshard_like
from freeze_optax._tree.kinds import is_array, is_numpy_only, number_kind
from freeze_optax._tree.memory import full_in_host_memory, memory_of


class Zeros:
    """Makes zeros like leaves, and computes them only once per shape and dtype.

    In a large model most leaves share their shape with many others. Under a trace these leaves
    share one constant, as tracing time and compile time grow with every equation. Outside a trace
    each leaf gets a buffer of its own, as two leaves that share a buffer can't both be donated. It
    is a copy of the first one, as a copy is three times as fast as new zeros.

    Zeros of a leaf in host memory are there too: JAX adds only arrays in one memory.
    """

    def __init__(self):
        self._made: dict[Any, Any] = {}

    def gradient(self, leaf: Any) -> Any:
        """Returns the gradient of a function that does not depend on `leaf`, or has none there."""
        return self._like(leaf, _gradient)

    def update(self, leaf: Any) -> Any:
        """Returns the update that keeps every bit of `leaf` when it is added.

        The update is -0.0, as `x + -0.0` is x for every x. With 0.0 a negative zero would change:
        `-0.0 + 0.0` is 0.0. To a PRNG key no update can be added.
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
        if is_traced:
            return self._made[key]
        # In JAX 0.7.1 a copy of an array in host memory is in device memory.
        return make(leaf) if memory_of(leaf) else self._made[key].copy()


def _gradient(leaf: Any) -> Any:
    return _full_like(leaf, 0.0)


def _update(leaf: Any) -> Any:
    return _full_like(leaf, -0.0)


def _full_like(leaf: Any, zero: float) -> Any:
    """Returns an array of the shape of `leaf` that can be added, cast, scaled and averaged.

    Not float0, which JAX itself gives for integers: no arithmetic takes it. An integer or a bool
    has zeros of its own dtype, as an accumulator like the params has, and as only these leave it
    as it is. To a PRNG key nothing can be added: it has float32 zeros, and so has what is no array.
    """
    if is_numpy_only(leaf):
        return np.full_like(leaf, complex(zero, zero) if leaf.dtype.kind == "c" else zero)
    kind = number_kind(leaf)
    if kind != "other":
        value = complex(zero, zero) if jnp.iscomplexobj(leaf) else zero if kind == "inexact" else 0
        if memory_of(leaf):
            return full_in_host_memory(leaf, value)
        # JAX 0.12 loses the sharding of a traced leaf, unless there is a mesh in the context.
        return reshard_like(jnp.full_like(leaf, value), leaf)
    shape = leaf.shape if is_array(leaf) else ()
    if is_array(leaf) and leaf.dtype == jax.dtypes.float0:
        # The gradient of an integer: False changes no integer, whatever its dtype.
        return jnp.zeros(shape, bool)
    return jnp.full(shape, zero, jnp.float32)
