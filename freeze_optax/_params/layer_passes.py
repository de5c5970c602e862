"""`LayerPasses`: one layer forward and backward, with nothing of its weights kept in between.

`jax.vjp` keeps what the backward pass needs: activations, but also the weights, or what was
computed of them alone: a quantized layer as floats, say. In a loop over layers that would be a copy
of the whole stack. Here the backward pass gets the layer again, and computes the latter again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters import ad
from jax.interpreters.partial_eval import dce_jaxpr

from freeze_optax._params.dependence import depends_on, without_effects


@jax.tree_util.register_static
class Static:
    """A node without leaves, so that static values go from the forward to the backward pass."""

    def __init__(self, value: Any):
        self.value = value


class LayerPasses:
    """The passes of one layer, which are the same for all layers of a stack.

    Args:
      body: A function of the carry, a layer, and constants.
      constants: The constants: all arrays that it uses beside carry and layer.
      carry: A carry, of which only shapes and dtypes count.
      layer: A layer, likewise.
      differentiated: Which of the constants, and which leaves of the layer, are differentiated, and
        which leaves of the carry; None for all leaves of it. The body need not be differentiable
        with respect to the others.
    """

    def __init__(
        self,
        body: Callable[..., Any],
        constants: Sequence[Any],
        carry: Any,
        layer: Any,
        differentiated: tuple[Sequence[bool], Sequence[bool], Sequence[bool] | None],
    ):
        structures: list[Any] = []
        of_constants, of_layer, of_carry = differentiated
        of_carry = [True] * len(jax.tree.leaves(carry)) if of_carry is None else of_carry
        self._flags = flags = [list(of_constants), list(of_layer), list(of_carry)]

        def forward(constants: Any, layer: Any, carry: Any) -> Any:
            trees = [constants, layer, carry]
            flat = [jax.tree.leaves(tree) for tree in trees]

            def of_arguments(*chosen: Any) -> Any:
                merged = map(_merged, flat, flags, chosen)
                pairs = zip(trees, merged, strict=True)
                constants, layer, carry = (jax.tree.structure(a).unflatten(b) for a, b in pairs)
                return body(carry, layer, *constants)

            outputs, pull = jax.vjp(of_arguments, *map(_chosen, flat, flags))
            residuals, structure = jax.tree.flatten(pull)
            structures[:] = [structure]
            return outputs, residuals

        arguments = (list(constants), layer, carry)
        self._closed, shapes = jax.make_jaxpr(forward, return_shape=True)(*arguments)
        (self._pullback,) = structures
        self._outputs = jax.tree.structure(shapes[0])
        weights = len(jax.tree.leaves(arguments[:2]))
        jaxpr, count = self._closed.jaxpr, len(shapes[1])
        self._count, first = count, len(jaxpr.outvars) - count

        is_of_carry = [i >= weights for i in range(len(jaxpr.invars))]
        self._is_kept = depends_on(jaxpr, is_of_carry)[first:]
        again = [False] * first + [not kept for kept in self._is_kept]
        pruned, self._is_used = dce_jaxpr(without_effects(jaxpr), again)
        self._again = ClosedJaxpr(pruned, self._closed.consts)

    def forward(self, constants: Sequence[Any], layer: Any, carry: Any) -> tuple[Any, list[Any]]:
        """Returns what the body returns, and what to keep for the backward pass."""
        arguments = jax.tree.leaves((list(constants), layer, carry))
        values = jaxpr_as_fun(self._closed)(*arguments)
        split = len(values) - self._count
        pairs = zip(values[split:], self._is_kept, strict=True)
        return self._outputs.unflatten(values[:split]), [x for x, kept in pairs if kept]

    def backward(
        self, constants: Sequence[Any], layer: Any, kept: Sequence[Any], cotangents: Any
    ) -> tuple[Any, Any, Any]:
        """Returns the cotangents of the constants, and of the leaves of layer and carry.

        They are None where nothing is differentiated.

        Args:
          constants: The constants.
          layer: The layer.
          kept: What the forward pass kept.
          cotangents: Those of what the body returned.
        """
        arguments = jax.tree.leaves((list(constants), layer))
        # Nothing here depends on the carry, so the arguments end before it.
        pairs = zip(arguments, self._is_used, strict=False)
        again = iter(jaxpr_as_fun(self._again)(*(x for x, used in pairs if used)))
        of_carry = iter(kept)
        residuals = [next(of_carry) if flag else next(again) for flag in self._is_kept]
        pull: Any = jax.tree.unflatten(self._pullback, residuals)
        to_constants, to_layer, to_carry = (
            _merged([None] * len(flags), flags, chosen)
            for flags, chosen in zip(self._flags, pull(cotangents), strict=True)
        )
        return to_constants, to_layer, to_carry


def _chosen(values: Sequence[Any], flags: Sequence[bool]) -> list[Any]:
    return [x for x, flag in zip(values, flags, strict=True) if flag]


def _merged(values: Sequence[Any], flags: Sequence[bool], chosen: Sequence[Any]) -> list[Any]:
    """Returns the values, with the chosen ones where the flags are set."""
    remaining = iter(chosen)
    return [next(remaining) if flag else x for x, flag in zip(values, flags, strict=True)]


def with_constants(f: Callable[..., Any], *arguments: Any) -> tuple[Callable[..., Any], list[Any]]:
    """Returns a function that takes all arrays that `f` closes over as arguments, and these.

    `jax.closure_convert` returns those alone that may be differentiated. But the passes of a
    `custom_vjp` are traced after a jit around it, so they can't close over any value of its trace.
    """
    closed, shapes = jax.make_jaxpr(f, return_shape=True)(*arguments)
    constants = list(closed.consts)
    structure = jax.tree.structure(shapes)

    def of_arguments(constants: Any, *arguments: Any) -> Any:
        call = jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, constants))
        return call(*jax.tree.leaves(arguments))

    # Traced again, as the function outlives this trace, and the jaxprs of JAX 0.12 hold constants.
    call = jaxpr_as_fun(jax.make_jaxpr(of_arguments)(constants, *arguments))

    def function(carry: Any, layer: Any, *constants: Any) -> Any:
        values = call(*jax.tree.leaves((constants, carry, layer)))
        # Outside of a trace, JAX returns a constant of the function as an array of NumPy.
        return structure.unflatten(
            x if isinstance(x, jax.Array) else jnp.asarray(x) for x in values
        )

    return function, constants


def is_float0(x: Any) -> bool:
    """Returns whether `x` is the cotangent of an integer, with which nothing can be computed."""
    return x.dtype == jax.dtypes.float0


def instantiated(cotangents: Any) -> Any:
    """Returns cotangents with zeros in place of the symbols that a `custom_vjp` gets for them."""
    return jax.tree.map(_without_symbol, cotangents, is_leaf=_is_symbolic_zero)


def _is_symbolic_zero(x: Any) -> bool:
    return isinstance(x, jax.custom_derivatives.SymbolicZero)


def _without_symbol(x: Any) -> Any:
    if not _is_symbolic_zero(x):
        return x
    if x.dtype == jax.dtypes.float0:
        return np.zeros(x.shape, x.dtype)
    # Not of shape and dtype alone: the type has a sharding on explicit axes, and in a
    # `jax.shard_map` the axes over which the zeros vary.
    return ad.instantiate_zeros(ad.Zero(x.aval))
