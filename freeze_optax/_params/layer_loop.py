"""A loop over stacked layers whose backward pass reads them again.

JAX differentiates a `lax.scan` over layers as a whole. It would compute and keep the gradient of
each layer, and keep a copy of each layer that was read out of the stack. Here the backward pass is
a loop of our own. From the last layer down, it computes the gradient of the carry, and that of the
weights for the layers that train. Where these are known as values (`freeze_optax.rotating`), its
trip counts are values too, which a `lax.while_loop` takes, as nothing differentiates it again. A
`lax.switch` inside of a `lax.scan` was rejected: the weights of each layer are kept for the
backward pass, and each layer adds zeros to the gradient of all that train.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from freeze_optax._params.layer_passes import (
    LayerPasses,
    Static,
    instantiated,
    is_float0,
    with_constants,
)
from freeze_optax._params.layer_reading import LayerReader
from freeze_optax._tree.memory import memory_of, put_in_memory


class Layers(NamedTuple):
    """Some consecutive layers of a stack.

    Attributes:
      arrays: The stacked arrays.
      live: For each of them the layers that train, with these in front, or None. The result of the
        loop has their gradient, and its value does not depend on them.
      rows: The indices of these layers, in ascending order; None if no array has such layers.
      start: The index of the first layer.
      stop: The index after the last layer.
      places: For each of the stacked arrays the axis of the layers, and the index of its first one.
      reader: Reads one layer.
    """

    arrays: list[Any]
    live: list[Any]
    rows: Any
    start: int
    stop: int
    places: list[tuple[int, int]]
    reader: LayerReader


def scan_layers(
    f: Callable[[Any, Any], tuple[Any, Any]], init: Any, layers: Layers, unroll: int | bool
) -> tuple[Any, Any]:
    """Scans over layers as `jax.lax.scan`, and reads them again in the backward pass.

    What a layer keeps for the backward pass is what `jax.vjp` of `f` keeps, without what does not
    depend on the carry. So where `f` is rematerialised (`jax.checkpoint`), only carries are kept.

    Args:
      f: The function of carry and layer.
      init: The first carry.
      layers: The layers.
      unroll: As for `jax.lax.scan`.
    """
    init = jax.tree.map(jnp.asarray, init)
    start, stop = layers.start, layers.stop
    read, fetch = layers.reader.read, layers.reader.fetch
    first = read(layers.arrays, fetch(layers.arrays, start), start)
    body, constants = with_constants(functools.partial(_pair, f), init, first)

    def forward_loop(arrays: Any, fetched: Any, init: Any, apply: Callable[[Any, Any], Any]) -> Any:
        def step(state: Any, i: Any) -> Any:
            carry, fetched = state
            # The copy of the next layer runs while this one is computed.
            following = fetch(arrays, jnp.minimum(i + 1, stop - 1))
            carry, output = apply(read(arrays, fetched, i), carry)
            return (carry, following), output

        indices = jnp.arange(start, stop, dtype=jnp.int32)
        (carry, _), outputs = jax.lax.scan(step, (init, fetched), indices, unroll=unroll)
        return carry, outputs

    @jax.custom_vjp
    def loop(constants: Any, init: Any, arrays: Any, live: Any, rows: Any) -> Any:
        del live, rows
        fetched = fetch(arrays, start)

        def apply(layer: Any, carry: Any) -> Any:
            return body(carry, layer, *constants)

        return forward_loop(arrays, fetched, init, apply)

    def forward(*primals: Any) -> Any:
        perturbed = tuple(tuple(x.perturbed for x in _primals(tree)) for tree in primals[:3])
        constants, init, arrays, _, rows = jax.tree.map(
            lambda x: x.value, primals, is_leaf=_is_primal
        )
        fetched = fetch(arrays, start)
        passes = LayerPasses(body, constants, init, read(arrays, fetched, start))

        def apply(layer: Any, carry: Any) -> Any:
            (carry, y), kept = passes.forward(constants, layer, carry)
            return carry, (y, kept)

        carry, (ys, kept) = forward_loop(arrays, fetched, init, apply)
        return (carry, ys), (constants, arrays, rows, kept, Static((passes, perturbed)))

    has_live = [x is not None for x in layers.live]

    def backward(saved: Any, cotangents: Any) -> Any:
        constants, arrays, rows, kept, static = saved
        passes, perturbed = static.value
        carry, ys = instantiated(cotangents)
        backwards = _Backwards(passes, layers, (constants, arrays, kept), (carry, ys))
        state = backwards.start(perturbed)
        gradients: Any = []
        if rows is None:
            state = backwards.through_all(state, unroll)
        else:

            def next_live(state: _State, row: Any) -> Any:
                return backwards.layer(backwards.down_to(state, row + 1), has_live)

            state, gradients = jax.lax.scan(next_live, state, rows, reverse=True)
            if any(map(any, perturbed)):
                state = backwards.down_to(state, jnp.zeros((), jnp.int32))
        to_carry = backwards.whole_carry(state.carry) if any(map(any, perturbed)) else None
        remaining = iter(gradients)
        of_live = [next(remaining) if flag else None for flag in has_live]
        pairs = zip(state.sums, constants, strict=True)
        sums = [None if x is None else put_in_memory(x, memory_of(like)) for x, like in pairs]
        return sums, to_carry, list(state.stacked), of_live, None

    loop.defvjp(forward, backward, symbolic_zeros=True)
    return loop(constants, init, layers.arrays, layers.live, layers.rows)


class _State(NamedTuple):
    """What the backward pass hands from layer to layer.

    Attributes:
      i: The index of the layer above, an int32 scalar.
      fetched: What was in host memory of the layer below that one.
      carry: The cotangents of the carry, those of real and complex numbers alone.
      sums: The gradients of the constants so far; None where there is none to compute.
      stacked: The gradients of whole arrays so far; None where there is none to compute.
    """

    i: jax.Array
    fetched: list[Any]
    carry: list[Any]
    sums: list[Any]
    stacked: list[Any]


class _Backwards:
    """The backward pass through one layer, and through several that do not train."""

    def __init__(self, passes: LayerPasses, layers: Layers, saved: Any, cotangents: Any):
        self._passes, self._layers = passes, layers
        self._constants, self._arrays, self._kept = saved
        self._carry, self._ys = cotangents

    def start(self, perturbed: Sequence[Sequence[bool]]) -> _State:
        """Returns the state above the last layer.

        Args:
          perturbed: For constants, carry and stacked arrays, which of them are differentiated.
        """
        of_constants, _, of_arrays = perturbed
        stop = self._layers.stop
        return _State(
            jnp.asarray(stop, jnp.int32),
            self._layers.reader.fetch(self._arrays, stop - 1),
            [_strong(x) for x in jax.tree.leaves(self._carry) if not is_float0(x)],
            _zeros_where(of_constants, self._constants),
            _zeros_where(of_arrays, self._arrays),
        )

    def whole_carry(self, real: Sequence[Any]) -> Any:
        """Returns the cotangents of the carry, those of integers too."""
        leaves, structure = jax.tree.flatten(self._carry)
        remaining = iter(real)
        return structure.unflatten(x if is_float0(x) else next(remaining) for x in leaves)

    def down_to(self, state: _State, row: Any) -> _State:
        """Goes down through all layers from this one on, which do not train."""
        return jax.lax.while_loop(
            lambda state: state.i > row, lambda state: self.layer(state, ())[0], state
        )

    def through_all(self, state: _State, unroll: int | bool) -> _State:
        """Goes down through all layers; other than `down_to`, it can be differentiated."""
        count = self._layers.stop - self._layers.start

        def step(state: _State, _: Any) -> Any:
            return self.layer(state, ())[0], None

        return jax.lax.scan(step, state, None, count, unroll=unroll)[0]

    def layer(self, state: _State, has_live: Sequence[bool]) -> tuple[_State, list[Any]]:
        """Goes through the next layer; returns the gradients of its arrays where it is said."""
        layers, i = self._layers, state.i - 1
        following = layers.reader.fetch(self._arrays, jnp.maximum(i - 1, layers.start))
        layer = layers.reader.read(self._arrays, state.fetched, i)
        kept = [_at(x, i - layers.start) for x in self._kept]
        y = jax.tree.map(lambda x: _at(x, i - layers.start), self._ys)
        cotangents = self.whole_carry(state.carry), y
        to_constants, to_layer, to_carry = self._passes.backward(
            self._constants, layer, kept, cotangents
        )
        gradients = jax.tree.leaves(to_layer)
        pairs = zip(state.sums, to_constants, strict=True)
        sums = [None if total is None else total + put_in_memory(x, None) for total, x in pairs]
        triples = zip(state.stacked, gradients, layers.places, strict=True)
        put = jax.lax.dynamic_update_index_in_dim
        stacked = [
            None if x is None else put(x, g, i - first, axis) for x, g, (axis, first) in triples
        ]
        carry = [_strong(x) for x in jax.tree.leaves(to_carry) if not is_float0(x)]
        pairs = zip(gradients, has_live, strict=False)
        return _State(i, following, carry, sums, stacked), [g for g, flag in pairs if flag]


def _pair(f: Callable[[Any, Any], Any], carry: Any, layer: Any) -> tuple[Any, Any]:
    result = f(carry, layer)
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise TypeError(
            f"fo.scan needs a function that returns a pair, the next carry and an output (or "
            f"None), not {result!r}"
        )
    return result[0], result[1]


def _zeros_where(flags: Sequence[bool], arrays: Sequence[Any]) -> list[Any]:
    """Returns zeros in device memory, where also the gradients of host arrays are summed."""
    pairs = zip(arrays, flags, strict=True)
    return [jnp.zeros_like(put_in_memory(x, None)) if flag else None for x, flag in pairs]


def _at(x: Any, i: Any) -> Any:
    if is_float0(x):
        return np.zeros(x.shape[1:], jax.dtypes.float0)
    return jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)


def _strong(x: Any) -> jax.Array:
    """Returns an array whose dtype is no weak type, as the carry of a loop keeps its type."""
    return jax.lax.convert_element_type(x, x.dtype)


def _is_primal(x: Any) -> bool:
    return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)


def _primals(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=_is_primal)
