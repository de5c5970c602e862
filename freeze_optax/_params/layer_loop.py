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

from freeze_optax._params.index_scan import needs_linear_indices, scan_indices, together
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
      are_all: Whether the stack has no other layers.
    """

    arrays: list[Any]
    live: list[Any]
    rows: Any
    start: int
    stop: int
    places: list[tuple[int, int]]
    reader: LayerReader
    are_all: bool = True


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
    start = layers.start
    read, fetch = layers.reader.read, layers.reader.fetch
    first = read(layers.arrays, fetch(layers.arrays, start), start)
    init = _with_settled_dtypes(f, jax.tree.map(jnp.asarray, init), first)
    body, constants = with_constants(functools.partial(_pair, f), init, first)
    looped, has_live = _looped(layers), [x is not None for x in layers.live]
    # What the passes close over lives as long as the program, so it may hold no value of a trace.
    layout = layers._replace(arrays=[], live=[], rows=None)
    forward_loop = functools.partial(_forward_loop, layout, looped, unroll)

    @jax.custom_vjp
    def loop(constants: Any, init: Any, arrays: Any, live: Any, rows: Any) -> Any:
        del live, rows
        fetched = fetch(arrays, start)

        def apply(layer: Any, carry: Any) -> Any:
            return body(carry, layer, *constants)

        carry, ys, last = forward_loop(apply, arrays, fetched, init)
        return carry, ys if last is None else _with_last(ys, last.output)

    def forward(*primals: Any) -> Any:
        perturbed = tuple(tuple(x.perturbed for x in _primals(tree)) for tree in primals[:3])
        constants, init, arrays, _, rows = jax.tree.map(
            lambda x: x.value, primals, is_leaf=_is_primal
        )
        fetched = fetch(arrays, start)
        of_layer = [a or b for a, b in zip(perturbed[2], has_live, strict=True)]
        passes = LayerPasses(
            body,
            constants,
            init,
            read(arrays, fetched, start),
            (perturbed[0], of_layer, None),
        )

        def apply(layer: Any, carry: Any) -> Any:
            (carry, y), kept = passes.forward(constants, layer, carry)
            return carry, (y, kept)

        carry, (ys, kept), last = forward_loop(apply, arrays, fetched, init)
        if last is not None:
            y, last_kept = last.output
            ys, last = _with_last(ys, y), last._replace(output=last_kept)
        return (carry, ys), (constants, arrays, rows, (kept, last), Static((passes, perturbed)))

    def backward(saved: Any, cotangents: Any) -> Any:
        constants, arrays, rows, kept, static = saved
        passes, perturbed = static.value
        carry, ys = instantiated(cotangents)
        backwards = _Backwards(passes, layout, (constants, arrays, *kept), (carry, ys))
        state = backwards.start(perturbed)
        gradients: Any = []
        if rows is None:
            state = backwards.through_all(state, looped, unroll)
        else:
            position = jnp.asarray(layout.stop, jnp.int32), state

            def next_live(position: Any, row: Any) -> Any:
                i, state = backwards.down_to(position, row + 1)
                state, gradients = backwards.layer(state, i - 1, has_live)
                return (i - 1, state), gradients

            position, gradients = jax.lax.scan(next_live, position, rows, reverse=True)
            if any(map(any, perturbed)):
                position = backwards.down_to(position, jnp.zeros((), jnp.int32))
            state = position[1]
        to_carry = backwards.whole_carry(state.carry) if any(map(any, perturbed)) else None
        remaining = iter(gradients)
        of_live = [next(remaining) if flag else None for flag in has_live]
        pairs = zip(state.sums, constants, strict=True)
        sums = [None if x is None else put_in_memory(x, memory_of(like)) for x, like in pairs]
        return sums, to_carry, list(state.stacked), of_live, None

    loop.defvjp(forward, backward, symbolic_zeros=True)
    return loop(constants, init, layers.arrays, layers.live, layers.rows)


def _looped(layers: Layers) -> range:
    """Returns the layers of the loop forward: all, or all but the last, which comes after it.

    The next layer is fetched ahead. From the last one there is none, and an index that stays where
    it is would not be linear.
    """
    start, stop = layers.start, layers.stop
    # Layers in turns are found by index in the backward pass, so what they keep is in one stack.
    # And each of several loops would keep its own last layer on the device.
    may_end_early = layers.reader.streams and layers.rows is None and layers.are_all
    ends_early = may_end_early and stop - start > 1 and needs_linear_indices()
    return range(start, stop - 1 if ends_early else stop)


def _forward_loop(  # noqa: PLR0913, PLR0917
    layers: Layers,
    looped: range,
    unroll: int | bool,
    apply: Callable[[Any, Any], Any],
    arrays: Any,
    fetched: Any,
    init: Any,
) -> Any:
    """Returns the last carry, the outputs of the loop, and the layer after it, or None."""
    read, fetch, last = layers.reader.read, layers.reader.fetch, layers.stop - 1
    is_linear = last not in looped

    def step(state: Any, i: Any) -> Any:
        carry, fetched = state
        # The copy of the next layer runs while this one is computed.
        following = fetch(arrays, i + 1 if is_linear else jnp.minimum(i + 1, last))
        carry, output = apply(read(arrays, fetched, i), carry)
        if following:
            carry, output, following = together(carry, output, following)
        return (carry, following), output

    (carry, fetched), outputs = scan_indices(
        step, (init, fetched), looped, unroll, linear=is_linear
    )
    if not is_linear:
        return carry, outputs, None
    carry, output = apply(read(arrays, fetched, last), carry)
    return carry, outputs, _Last(fetched, output)


class _Last(NamedTuple):
    """The last layer, which is not in the loops.

    Attributes:
      fetched: What was in host memory of it. The backward pass begins with it.
      output: What the layer returned; for the backward pass, of that what it keeps.
    """

    fetched: list[Any]
    output: Any


class _State(NamedTuple):
    """What the backward pass hands from layer to layer.

    Attributes:
      fetched: What was in host memory of the next layer.
      carry: The cotangents of the carry, those of real and complex numbers alone.
      sums: The gradients of the constants so far; None where there is none to compute.
      stacked: The gradients of whole arrays so far; None where there is none to compute.
    """

    fetched: list[Any]
    carry: list[Any]
    sums: list[Any]
    stacked: list[Any]


class _Backwards:
    """The backward pass through one layer, and through several that do not train."""

    def __init__(self, passes: LayerPasses, layers: Layers, saved: Any, cotangents: Any):
        self._passes, self._layers = passes, layers
        self._constants, self._arrays, self._kept, self._last = saved
        self._carry, self._ys = cotangents

    def start(self, perturbed: Sequence[Sequence[bool]]) -> _State:
        """Returns the state above the last layer.

        Args:
          perturbed: For constants, carry and stacked arrays, which of them are differentiated.
        """
        of_constants, _, of_arrays = perturbed
        last, top = self._last, self._layers.stop - 1
        return _State(
            last.fetched if last else self._layers.reader.fetch(self._arrays, top),
            [_strong(x) for x in jax.tree.leaves(self._carry) if not is_float0(x)],
            _zeros_where(of_constants, self._constants),
            _zeros_where(of_arrays, self._arrays),
        )

    def whole_carry(self, real: Sequence[Any]) -> Any:
        """Returns the cotangents of the carry, those of integers too."""
        leaves, structure = jax.tree.flatten(self._carry)
        remaining = iter(real)
        return structure.unflatten(x if is_float0(x) else next(remaining) for x in leaves)

    def down_to(self, position: tuple[Any, _State], row: Any) -> tuple[Any, _State]:
        """Goes down through all layers from this one on, which do not train.

        Args:
          position: The index of the layer above, an int32 scalar, and the state there.
          row: The index of the layer, an int32 scalar.
        """

        def step(position: tuple[Any, _State]) -> tuple[Any, _State]:
            i = position[0] - 1
            return i, self.layer(position[1], i, ())[0]

        return jax.lax.while_loop(lambda position: position[0] > row, step, position)

    def through_all(self, state: _State, looped: range, unroll: int | bool) -> _State:
        """Goes down through all layers; other than `down_to`, it can be differentiated.

        Args:
          state: The state above the last layer.
          looped: The layers of the loop forward.
          unroll: As for `jax.lax.scan`.
        """
        start, stop = self._layers.start, self._layers.stop

        def step(state: _State, i: Any) -> Any:
            return self.layer(state, i, ())[0], None

        def step_ahead(state: _State, i: Any) -> Any:
            following = self._layers.reader.fetch(self._arrays, i - 1)
            return self._layer(state, i, self._kept_of(i), following, ())[0], None

        if not (last := self._last):
            return scan_indices(step, state, looped[::-1], unroll, linear=False)[0]
        following = self._layers.reader.fetch(self._arrays, stop - 2)
        state, _ = self._layer(state, stop - 1, last.output, following, ())
        if below := looped[:0:-1]:
            state = scan_indices(step_ahead, state, below, unroll, linear=True)[0]
        return self._layer(state, start, self._kept_of(start), [], ())[0]

    def layer(self, state: _State, i: Any, has_live: Sequence[bool]) -> tuple[_State, list[Any]]:
        """Goes through layer `i`; returns the gradients of its arrays where it is said."""
        below = jnp.maximum(i - 1, self._layers.start)
        following = self._layers.reader.fetch(self._arrays, below)
        return self._layer(state, i, self._kept_of(i), following, has_live)

    def _kept_of(self, i: Any) -> list[Any]:
        return [_at(x, i - self._layers.start) for x in self._kept]

    def _layer(
        self, state: _State, i: Any, kept: Any, following: list[Any], has_live: Sequence[bool]
    ) -> tuple[_State, list[Any]]:
        layers = self._layers
        layer = layers.reader.read(self._arrays, state.fetched, i)
        y = jax.tree.map(lambda x: _at(x, i - layers.start), self._ys)
        cotangents = self.whole_carry(state.carry), y
        to_constants, to_layer, to_carry = self._passes.backward(
            self._constants, layer, kept, cotangents
        )
        pairs = zip(state.sums, to_constants, strict=True)
        sums = [None if total is None else total + put_in_memory(x, None) for total, x in pairs]
        triples = zip(state.stacked, to_layer, layers.places, strict=True)
        put = jax.lax.dynamic_update_index_in_dim
        stacked = [
            None if x is None else put(x, g, i - first, axis) for x, g, (axis, first) in triples
        ]
        carry = [_strong(x) for x in to_carry if not is_float0(x)]
        if following:
            carry, following = together(carry, following)
        pairs = zip(to_layer, has_live, strict=False)
        return _State(following, carry, sums, stacked), [g for g, flag in pairs if flag]


def _with_settled_dtypes(f: Callable[[Any, Any], Any], init: Any, layer: Any) -> Any:
    """Returns the carry with weakly typed numbers in the dtype that `f` gives them.

    `jax.lax.scan` does so too. But here `f` is traced before it sees the carry.
    """
    leaves, structure = jax.tree.flatten(init)
    if not any(jax.typeof(x).weak_type for x in leaves):
        return init
    after, _ = _pair(functools.partial(jax.eval_shape, f), init, layer)
    if jax.tree.structure(after) != structure:
        return init
    pairs = zip(leaves, jax.tree.leaves(after), strict=True)
    return structure.unflatten(_settled(x, y) for x, y in pairs)


def _settled(x: jax.Array, after: Any) -> jax.Array:
    if not jax.typeof(x).weak_type or x.dtype == after.dtype:
        return x
    return jax.lax.convert_element_type(x, jnp.result_type(x, after.dtype))


def _pair(f: Callable[[Any, Any], Any], carry: Any, layer: Any) -> tuple[Any, Any]:
    result = f(carry, layer)
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise TypeError(
            f"fo.scan needs a function that returns a pair, the next carry and an output (or "
            f"None), not {result!r}"
        )
    return result[0], result[1]


def _with_last(stacked: Any, last: Any) -> Any:
    """Returns the outputs of a loop and of the layer after it, stacked."""

    def joined(x: Any, y: Any) -> Any:
        return jnp.concatenate([x, put_in_memory(jnp.expand_dims(y, 0), memory_of(x))])

    return jax.tree.map(joined, stacked, last)


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
