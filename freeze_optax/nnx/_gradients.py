"""Gradients of NNX models, without a backward pass for frozen variables."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from freeze_optax._params.zeros import Zeros
from freeze_optax._rows.flags import Flag
from freeze_optax._rows.subset import Subset
from freeze_optax._rows.take_put import put_among_zeros, take
from freeze_optax._select.selector import Selector, nothing
from freeze_optax._select.specs import Spec, resolve, rotations_in_spec, schedules_in_spec
from freeze_optax._state.freeze_state import states_in
from freeze_optax._state.memories import explain_memories_of_loss
from freeze_optax._tree.key_paths import nodes_of, path_text
from freeze_optax._tree.leaves import Leaves
from freeze_optax.nnx._flax import AS_GRAPH, is_graph_mode, nnx
from freeze_optax.nnx._specs import OnModel
from freeze_optax.nnx._step_counts import check_current
from freeze_optax.nnx._wrt import trainable_filter, variables_of


def value_and_grad(
    fun: Callable[..., Any], frozen: Spec, has_aux: bool = False, wrt: Any = None
) -> Callable[..., Any]:
    """As `nnx.value_and_grad`, but without a backward pass for frozen variables.

    `fun` updates the other state of the model too (BatchNorm statistics, RNG counts), as with NNX.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import freeze_optax as fo
      >>> from flax import nnx
      >>> from freeze_optax import nnx as fnnx
      >>> model = nnx.Sequential(*(nnx.Linear(2, 2, rngs=nnx.Rngs(i)) for i in range(2)))
      >>> tx = fo.freezable(optax.adam(1e-3), "layers/0")
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> loss = lambda model, x: (model(x) ** 2).mean()
      >>> value, grads = fnnx.value_and_grad(loss, frozen=optimizer)(model, jnp.ones((1, 2)))
      >>> updates = optimizer.update(model, grads)

    Args:
      fun: Takes the model first and returns a real scalar; with `has_aux`, (scalar, anything).
      frozen: What not to differentiate: any spec, see `freeze_optax.mask`. It is safest to pass the
        optimizer. Types are read from the model.
      has_aux: Whether `fun` returns a pair.
      wrt: An NNX filter of the variables of the gradient, a type of Variable for example. If None,
        the variables of the optimizer if `frozen` is one or its state, else all `nnx.Param`s.

    Returns:
      A function with the arguments of `fun`, the model by position. It returns the pair of the
      value of `fun` and the gradient, an `nnx.State` that `optimizer.update(model, grads)` takes.
      The gradient has all variables that `wrt` says, with zeros at the frozen ones.

    Raises:
      ValueError: If `frozen` is the state of `freeze_optax.scheduled` or of
        `freeze_optax.rotating`. When called, if the spec does not fit the params, or freezes some
        leaves, but not all, of a tree in a Variable; if no variable of the model is matched by
        `wrt`, or by that of the optimizer; or if `fun` computes with variables in host memory, as
        for `freeze_optax.value_and_grad`.
      IndexError: When called, if `fo.layers(pattern)[i]` names a layer that does not exist.
      TypeError: When called, if the first argument is not an NNX module.
    """
    if schedules_in_spec(frozen):
        raise ValueError(
            "with the state of fo.scheduled, what is frozen changes while the program runs; "
            "differentiate an nnx.State with fo.value_and_grad, which switches"
        )
    if rotations_in_spec(frozen):
        raise ValueError(
            "with the state of fo.rotating, fo.scan has to get the layers of a tree of params; "
            "differentiate an nnx.State with fo.value_and_grad"
        )

    @functools.wraps(fun)
    def value_and_grad_fn(model: nnx.Module, /, *args: Any, **kwargs: Any) -> Any:
        if isinstance(frozen, nnx.Optimizer):
            check_current(frozen)
        leaves = Leaves(_variables_of_gradient(model, frozen, wrt))
        is_bare = isinstance(frozen, nnx.Optimizer) and not states_in(frozen)
        flags = resolve(OnModel(nothing if is_bare else frozen, model), leaves)
        trainable = trainable_filter(leaves, flags)
        try:
            value, gradient = _differentiate(fun, trainable, has_aux, model, *args, **kwargs)
        except (ValueError, TypeError) as error:
            # Not those of the gradient alone: others may be in host memory too.
            everything = Leaves(nnx.state(model, **AS_GRAPH))
            remedy = "freeze_optax.nnx.place(model, frozen, 'device')"
            explain_memories_of_loss(error, everything, remedy)
            raise
        return value, _with_zeros(leaves, flags, gradient)

    return value_and_grad_fn


def _differentiate(
    fun: Callable[..., Any],
    wrt: Any,
    has_aux: bool,
    model: nnx.Module,
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Returns the value of `fun`, and its gradient with respect to the variables of `wrt`."""
    if is_graph_mode():
        argument = nnx.DiffState(0, wrt)
        return nnx.value_and_grad(fun, argnums=argument, has_aux=has_aux)(model, *args, **kwargs)
    # Tree mode takes no part of an argument. The states hold the Variables of the model, and not
    # copies of them, so what `fun` writes reaches the model.
    graph, own, rest = nnx.split(model, wrt, ..., **AS_GRAPH)

    def merged_fun(own: Any, rest: Any, /, *args: Any, **kwargs: Any) -> Any:
        return fun(nnx.merge(graph, own, rest), *args, **kwargs)

    return nnx.value_and_grad(merged_fun, has_aux=has_aux)(own, rest, *args, **kwargs)


def _variables_of_gradient(model: nnx.Module, frozen: Spec, wrt: Any) -> Any:
    """Returns the variables of the gradient."""
    if wrt is None and isinstance(frozen, nnx.Optimizer):
        wrt = frozen.wrt
    states = [] if isinstance(frozen, Selector | str) else states_in(frozen)
    if wrt is not None or len(states) != 1:
        return variables_of(model, nnx.Param if wrt is None else wrt)
    nodes = nodes_of(states[0].plan.paths)  # for a Variable that holds a tree
    return nnx.state(model, lambda path, _: path_text(path) in nodes, **AS_GRAPH)


def _with_zeros(leaves: Leaves, frozen: Sequence[Flag], gradient: Any) -> Any:
    """Returns the gradient with zeros at all that is frozen."""
    zeros, by_path = Zeros(), dict(nnx.to_flat_state(gradient))
    complete = Leaves(
        nnx.from_flat_state(
            (path, by_path[path] if path in by_path else _zeros_like(variable, zeros))
            for path, variable in nnx.to_flat_state(leaves.tree)
        )
    )
    return complete.rebuild(
        put_among_zeros(take(x, ~flag), ~flag, 0.0, x) if isinstance(flag, Subset) else x
        for x, flag in zip(complete.values, frozen, strict=True)
    )


def _zeros_like(variable: Any, zeros: Zeros) -> Any:
    """Returns a variable with zeros in the place of its leaves, for a gradient."""
    leaves = Leaves(variable)
    return leaves.fill_leaves(map(zeros.gradient, leaves.values))


def grad(
    fun: Callable[..., Any], frozen: Spec, has_aux: bool = False, wrt: Any = None
) -> Callable[..., Any]:
    """As `value_and_grad`, without the value.

    Examples:
      >>> from flax import nnx
      >>> from freeze_optax import nnx as fnnx
      >>> model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
      >>> grads = fnnx.grad(lambda model: model.bias.sum() ** 2, frozen="kernel")(model)
      >>> grads["kernel"][...].any()
      Array(False, dtype=bool)

    Args:
      fun: As for `value_and_grad`.
      frozen: As for `value_and_grad`.
      has_aux: As for `value_and_grad`.
      wrt: As for `value_and_grad`.

    Returns:
      A function with the arguments of `fun` that returns the gradient; with `has_aux`, the pair of
      the gradient and the auxiliary value.

    Raises:
      TypeError, ValueError, IndexError: As for `value_and_grad`.
    """
    with_value = value_and_grad(fun, frozen, has_aux=has_aux, wrt=wrt)

    @functools.wraps(fun)
    def grad_fn(model: nnx.Module, /, *args: Any, **kwargs: Any) -> Any:
        value, grads = with_value(model, *args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return grad_fn
