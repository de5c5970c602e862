"""A loop over stacked layers, of which those that train are known as values.

JAX differentiates a `lax.scan` by layers as a whole: it would compute and keep the gradient of each
layer. Here the backward pass is a loop of our own. From the last layer down, it computes the
gradient of the carry alone, until the next layer that trains, for which it computes that of its
weights too. Its trip counts are values, which a `lax.while_loop` takes, as nothing differentiates
it again. A `lax.switch` inside of a `lax.scan` was rejected: the weights of each layer are kept for
the backward pass, and each layer adds zeros to the gradient of all that train.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

ReadLayer = Callable[[Sequence[Any], Any], Any]
"""Returns layer `i` of the arrays of a stack, as the tree that the user's function takes."""


class _Kept(NamedTuple):
    """What the backward pass of a layer needs to be put together again. Static.

    Attributes:
      structure: The structure of the pullback of one layer, a pytree with arrays as its leaves.
      sources: For each of these arrays the argument that it is, as a pair of the kind of argument
        and an index; None if it was kept.
      perturbed: For constants, carry and stacked arrays, which of them are differentiated.
    """

    structure: Any
    sources: tuple[tuple[str, int] | None, ...]
    perturbed: tuple[tuple[bool, ...], ...]


@jax.tree_util.register_static
class _Static:
    """A node without leaves, so that static values go from the forward to the backward pass."""

    def __init__(self, value: Any):
        self.value = value


class Layers(NamedTuple):
    """The layers of a stack.

    Attributes:
      arrays: The stacked arrays.
      live: For each of them the layers that train, with these in front, or None. The result of the
        loop has their gradient, and its value does not depend on them.
      rows: The indices of these layers, in ascending order.
      length: The number of layers.
      axes: The axis of the layers in each of the stacked arrays.
      read: Reads one layer.
    """

    arrays: list[Any]
    live: list[Any]
    rows: Any
    length: int
    axes: list[int]
    read: ReadLayer


def scan_rotating(
    f: Callable[[Any, Any], tuple[Any, Any]], init: Any, layers: Layers, unroll: int | bool
) -> tuple[Any, Any]:
    """Scans over layers as `jax.lax.scan`, differentiating those that train now.

    What a layer keeps for the backward pass is what `jax.vjp` of `f` keeps, without the weights,
    which are read again. So where `f` is rematerialised (`jax.checkpoint`), only carries are kept.

    Args:
      f: The function of carry and layer.
      init: The first carry.
      layers: The layers.
      unroll: As for `jax.lax.scan`, of the forward pass.
    """
    init = jax.tree.map(jnp.asarray, init)
    read, length = layers.read, layers.length
    body, constants = _with_constants(f, init, read(layers.arrays, 0))

    @jax.custom_vjp
    def loop(constants: Any, init: Any, arrays: Any, live: Any, rows: Any) -> Any:
        del live, rows
        indices = jnp.arange(length, dtype=jnp.int32)

        def step(carry: Any, i: Any) -> Any:
            return body(carry, read(arrays, i), *constants)

        return jax.lax.scan(step, init, indices, unroll=unroll)

    def forward(*primals: Any) -> Any:
        perturbed = tuple(tuple(x.perturbed for x in _primals(tree)) for tree in primals[:3])
        constants, init, arrays, _, rows = jax.tree.map(
            lambda x: x.value, primals, is_leaf=_is_primal
        )
        kept: list[_Kept] = []
        indices = jnp.arange(length, dtype=jnp.int32)

        def step(carry: Any, i: Any) -> Any:
            def of_arguments(constants: Any, carry: Any, layer: Any) -> Any:
                return body(carry, layer, *constants)

            layer = read(arrays, i)
            (carry, y), pull = jax.vjp(of_arguments, constants, carry, layer)
            residuals, structure = jax.tree.flatten(pull)
            # JAX keeps an argument as the object that it is. So the weights can be told from what
            # was computed, and the loop does not keep a copy of those of each layer.
            known = {id(x): ("layer", j) for j, x in enumerate(jax.tree.leaves(layer))}
            known |= {id(x): ("constant", j) for j, x in enumerate(constants)}
            sources = tuple(known.get(id(x)) for x in residuals)
            kept[:] = [_Kept(structure, sources, perturbed)]
            pairs = zip(residuals, sources, strict=True)
            return carry, (y, [x for x, source in pairs if source is None])

        carry, (ys, residuals) = jax.lax.scan(step, init, indices, unroll=unroll)
        return (carry, ys), (constants, arrays, rows, residuals, _Static(kept[0]))

    has_live = [x is not None for x in layers.live]

    def backward(saved: Any, cotangents: Any) -> Any:
        constants, arrays, rows, residuals, static = saved
        carry, ys = jax.tree.map(_without_symbol, cotangents, is_leaf=_is_symbolic_zero)
        backwards = _Backwards(static.value, layers, (constants, arrays, residuals), (carry, ys))
        start = backwards.start(length)

        def next_live(state: _State, row: Any) -> Any:
            return backwards.layer(backwards.down_to(state, row + 1), has_live)

        state, gradients = jax.lax.scan(next_live, start, rows, reverse=True)
        to_carry = None
        if any(map(any, static.value.perturbed)):
            state = backwards.down_to(state, jnp.zeros((), jnp.int32))
            to_carry = backwards.whole_carry(state.carry)
        remaining = iter(gradients)
        of_live = [next(remaining) if flag else None for flag in has_live]
        return list(state.sums), to_carry, list(state.stacked), of_live, None

    loop.defvjp(forward, backward, symbolic_zeros=True)
    return loop(constants, init, layers.arrays, layers.live, layers.rows)


def _with_constants(f: Callable[..., Any], *arguments: Any) -> tuple[Callable[..., Any], list[Any]]:
    """Returns a function that takes all arrays that `f` closes over as arguments, and these.

    `jax.closure_convert` returns those alone that may be differentiated. But the passes of a
    `custom_vjp` are traced after a jit around it, so they can't close over any value of its trace.
    """
    jaxpr, shapes = jax.make_jaxpr(f, return_shape=True)(*arguments)
    constants = list(jaxpr.consts)
    structure = jax.tree.structure(shapes)

    def function(carry: Any, layer: Any, *constants: Any) -> Any:
        call = jaxpr_as_fun(ClosedJaxpr(jaxpr.jaxpr, constants))
        return structure.unflatten(call(*jax.tree.leaves((carry, layer))))

    return function, constants


class _State(NamedTuple):
    """What the backward pass hands from layer to layer.

    Attributes:
      i: The index of the layer above, an int32 scalar.
      carry: The cotangents of the carry, those of real and complex numbers alone.
      sums: The gradients of the constants so far; None where there is none to compute.
      stacked: The gradients of whole arrays so far; None where there is none to compute.
    """

    i: jax.Array
    carry: list[Any]
    sums: list[Any]
    stacked: list[Any]


class _Backwards:
    """The backward pass through one layer, and through several that do not train."""

    def __init__(self, kept: _Kept, layers: Layers, saved: Any, cotangents: Any):
        self._kept, self._read, self._axes = kept, layers.read, layers.axes
        self._constants, self._arrays, self._residuals = saved
        self._carry, self._ys = cotangents

    def start(self, length: int) -> _State:
        """Returns the state above the last layer."""
        of_constants, _, of_arrays = self._kept.perturbed
        return _State(
            jnp.asarray(length, jnp.int32),
            [_strong(x) for x in jax.tree.leaves(self._carry) if not _is_float0(x)],
            _zeros_where(of_constants, self._constants),
            _zeros_where(of_arrays, self._arrays),
        )

    def whole_carry(self, real: Sequence[Any]) -> Any:
        """Returns the cotangents of the carry, those of integers too."""
        leaves, structure = jax.tree.flatten(self._carry)
        remaining = iter(real)
        return structure.unflatten(x if _is_float0(x) else next(remaining) for x in leaves)

    def down_to(self, state: _State, row: Any) -> _State:
        """Goes down through all layers from this one on, which do not train."""
        return jax.lax.while_loop(
            lambda state: state.i > row, lambda state: self.layer(state, ())[0], state
        )

    def layer(self, state: _State, has_live: Sequence[bool]) -> tuple[_State, list[Any]]:
        """Goes through the next layer; returns the gradients of its arrays where it is said."""
        i, kept = state.i - 1, self._kept
        layer = jax.tree.leaves(self._read(self._arrays, i))
        remaining = (_at(x, i) for x in self._residuals)
        arguments = {"layer": layer, "constant": self._constants}
        residuals = [
            next(remaining) if source is None else arguments[source[0]][source[1]]
            for source in kept.sources
        ]
        pull: Any = jax.tree.unflatten(kept.structure, residuals)
        y = jax.tree.map(lambda x: _at(x, i), self._ys)
        to_constants, to_carry, to_layer = pull((self.whole_carry(state.carry), y))
        gradients = jax.tree.leaves(to_layer)
        pairs = zip(state.sums, to_constants, strict=True)
        sums = [None if total is None else total + x for total, x in pairs]
        triples = zip(state.stacked, gradients, self._axes, strict=True)
        put = jax.lax.dynamic_update_index_in_dim
        stacked = [None if x is None else put(x, g, i, axis) for x, g, axis in triples]
        carry = [_strong(x) for x in jax.tree.leaves(to_carry) if not _is_float0(x)]
        pairs = zip(gradients, has_live, strict=False)
        return _State(i, carry, sums, stacked), [g for g, flag in pairs if flag]


def _zeros_where(flags: Sequence[bool], arrays: Sequence[Any]) -> list[Any]:
    return [jnp.zeros_like(x) if flag else None for x, flag in zip(arrays, flags, strict=True)]


def _at(x: Any, i: Any) -> Any:
    if _is_float0(x):
        return np.zeros(x.shape[1:], jax.dtypes.float0)
    return jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)


def _strong(x: Any) -> jax.Array:
    """Returns an array whose dtype is no weak type, as the carry of a loop keeps its type."""
    return jax.lax.convert_element_type(x, x.dtype)


def _is_float0(x: Any) -> bool:
    return x.dtype == jax.dtypes.float0


def _is_symbolic_zero(x: Any) -> bool:
    return isinstance(x, jax.custom_derivatives.SymbolicZero)


def _without_symbol(x: Any) -> Any:
    if not _is_symbolic_zero(x):
        return x
    make = np.zeros if x.dtype == jax.dtypes.float0 else jnp.zeros
    return make(x.shape, x.dtype)


def _is_primal(x: Any) -> bool:
    return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)


def _primals(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=_is_primal)
