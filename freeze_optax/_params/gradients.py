"""Gradients with respect to the trainable leaves only."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.interpreters.partial_eval import dce_jaxpr

from freeze_optax._params.layer_stack import LayerStack, collect_scanned, row_tokens
from freeze_optax._params.live_lookups import value_and_grad_of_rows, whole_tables
from freeze_optax._params.zeros import Zeros
from freeze_optax._rows.flags import Flag, flag_or
from freeze_optax._rows.subset import Subset
from freeze_optax._rows.take_put import put, put_among_zeros, take, with_live_subset
from freeze_optax._select.specs import (
    Spec,
    as_selector,
    resolve,
    rotations_in_spec,
    schedules_in_spec,
)
from freeze_optax._state.memories import explain_memories_of_loss
from freeze_optax._state.rotation import RotatingState
from freeze_optax._tree.holes import HOLE
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.messages import quoted_list
from freeze_optax._tree.overwritten import overwritten


def value_and_grad(
    fun: Callable[..., Any], frozen: Spec, has_aux: bool = False, holes: bool = False
) -> Callable[..., Any]:
    """Differentiates `fun` in its first argument, without a backward pass for frozen leaves.

    The function works as `jax.value_and_grad`, with one difference: integers, PRNG keys and leaves
    that are not arrays are allowed. They count as frozen.

    Examples:
      >>> import freeze_optax as fo
      >>> params = {"encoder": 2.0, "head": 3.0}
      >>> loss = lambda params, x: params["encoder"] * params["head"] * x
      >>> value, grads = fo.value_and_grad(loss, frozen="encoder")(params, 10.0)
      >>> float(value), float(grads["encoder"]), float(grads["head"])
      (60.0, 0.0, 20.0)

    Args:
      fun: A function that takes the params as its first argument and returns a real scalar; with
        `has_aux`, a pair of that scalar and any pytree.
      frozen: Which leaves not to differentiate: any spec, see `freeze_optax.mask`. Pass the
        optimizer state, so that gradients and updates agree on what is frozen.
      has_aux: Whether `fun` returns a pair.
      holes: Whether the gradient has `optax.MaskedNode()` at frozen leaves instead of zeros. These
        holes cost no memory, even as the carry of a scan.

    Returns:
      A function that takes the arguments of `fun` and returns a pair, the value of `fun` and the
      gradient. The gradient has the structure of the params. At frozen leaves it has zeros, or
      holes with `holes=True`. Integers and bools have zeros of their own dtype, not JAX's float0,
      so the gradient can be added, cast, averaged over devices and measured as any other. PRNG keys
      and leaves that are not arrays have float32 zeros. In Flax's collection
      `_overwrite_with_gradient` (the scales of fp8 layers), where the gradient is the next value, a
      frozen leaf has its present value, also with `holes=True`. Where a leaf is frozen in part, the
      gradient has zeros at the frozen rows or elements, or with `holes=True` only what trains: an
      array of those rows, or a vector of those elements.

    Raises:
      ValueError: At once, for the state of `scheduled` together with `holes`, or for two such
        states. At the call, if the spec does not fit the params; or if `fun` computes with leaves
        in host memory (see `freeze_optax.place`) and does not copy them to the device.
      IndexError: At the call, if a layer is not there (`fo.layers(pattern)[i]`).
      TypeError: If a transformation is passed as `frozen`. At the call, if a mask holds anything
        but bools.
    """
    selector = as_selector(frozen)
    schedules = schedules_in_spec(frozen)
    if len(schedules) > 1:
        raise ValueError(
            f"a gradient follows the phases of one state of fo.scheduled, not of {len(schedules)}"
        )
    rotations = rotations_in_spec(frozen)
    if len(rotations) + len(schedules) > 1:
        raise ValueError(
            "a gradient follows one state of fo.rotating, not several, nor one of fo.scheduled too"
        )
    if schedules and holes:
        raise ValueError(
            "with the state of fo.scheduled, what is frozen changes while the program runs, but "
            "the structure of its gradients can't change; leave holes out"
        )

    @functools.wraps(fun)
    def value_and_grad_fn(params: Any, /, *args: Any, **kwargs: Any) -> Any:
        leaves = Leaves(params)

        def of_params(params: Any) -> Any:
            return fun(params, *args, **kwargs)

        def differentiate(flags: Sequence[Flag]) -> Any:
            try:
                if rotations:
                    return value_and_grad_of_turn(
                        of_params, rotations[0], params, flags, has_aux, holes
                    )
                return _value_and_grad(of_params, leaves, flags, has_aux, holes)
            except (ValueError, TypeError) as error:
                explain_memories_of_loss(error, leaves)
                raise

        always_frozen = resolve(selector, leaves)
        if not schedules:
            return differentiate(always_frozen)
        (state,) = schedules
        index, shapes = state.switch_index(), list(map(np.shape, leaves.values))
        phases = [
            functools.partial(differentiate, list(map(flag_or, always_frozen, phase, shapes)))
            for phase in state.phases(leaves)
        ]
        return jax.lax.switch(index, phases)

    return value_and_grad_fn


def value_and_grad_of_turn(
    fun: Callable[[Any], Any],
    state: RotatingState,
    params: Any,
    flags: Sequence[Flag],
    has_aux: bool,
    holes: bool,
) -> tuple[Any, Any]:
    """Differentiates `fun` with respect to the layers that train now, and all else that trains."""
    leaves = Leaves(params)
    pairs = zip(state.rows_in_order(leaves), flags, strict=True)
    rows = [None if flag is True else own for own, flag in pairs]
    pairs = zip(leaves.values, rows, strict=True)
    # Zeros, as the layers that train have their values in the whole leaf already.
    live = Leaves(leaves.rebuild(jnp.zeros_like(own.take(x)) if own else x for x, own in pairs))
    tokens = row_tokens(state.rows)

    def of_live(tree: Any) -> Any:
        columns = zip(Leaves(tree).values, leaves.values, leaves.paths, rows, strict=True)
        return fun(
            leaves.rebuild(
                LayerStack.of_turn(whole, x, own, tokens, path) if own else x
                for x, whole, path, own in columns
            )
        )

    with collect_scanned() as scanned:
        value, gradients = _value_and_grad(of_live, live, flags, has_aux, holes)
    check_scanned(of_live, live, [own is not None for own in rows], scanned, has_aux)
    if holes:
        return value, gradients
    gradient_leaves = Leaves(gradients)
    columns = zip(gradient_leaves.values, leaves.values, rows, strict=True)
    return value, gradient_leaves.rebuild(
        own.put_among_zeros(x, 0.0, whole) if own else x for x, whole, own in columns
    )


def check_scanned(
    fun: Callable[[Any], Any],
    live: Leaves,
    in_stack: Sequence[bool],
    scanned: set[str],
    has_aux: bool,
) -> None:
    """Raises ValueError if the value does not depend on a leaf whose layers take turns.

    Its gradient would be zero, and nothing would say so.

    Args:
      fun: The function of the params, with the layers that train now in place of the stack.
      live: The leaves of these params.
      in_stack: Which of them are layers that take turns.
      scanned: The paths of those that `freeze_optax.scan` got.
      has_aux: Whether `fun` returns a pair.
    """
    # A function that jit has traced before does not call `scan` again. So what is missing in
    # `scanned` is looked for in the equations too.
    missing = [
        i
        for i, (path, own) in enumerate(zip(live.paths, in_stack, strict=True))
        if own and path not in scanned
    ]
    if not missing:
        return

    def of_missing(arrays: list[Any]) -> Any:
        values = dict(zip(missing, arrays, strict=True))
        tree = live.rebuild(values.get(i, x) for i, x in enumerate(live.values))
        return fun(tree)[0] if has_aux else fun(tree)

    arrays = [live.values[i] for i in missing]
    jaxpr = jax.make_jaxpr(of_missing)(arrays).jaxpr
    _, is_used = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    unused = [live.paths[i] for i, used in zip(missing, is_used, strict=True) if not used]
    if unused:
        raise ValueError(
            f"the loss does not hand {quoted_list(unused)} to fo.scan, so the layers that train "
            "now would get no gradient; write fo.scan(f, carry, layers) with these leaves of the "
            "params that the loss gets"
        )


def _value_and_grad(
    fun: Callable[[Any], Any], leaves: Leaves, flags: Sequence[Flag], has_aux: bool, holes: bool
) -> tuple[Any, Any]:
    tables = whole_tables(leaves.values, flags)
    arguments = [False if rows else flag for flag, rows in zip(flags, tables, strict=True)]

    # Only the trainable leaves are an argument. JAX treats what the function closes over as a
    # constant, so it builds no backward pass for it, whatever its dtype.
    def of_trainable(trainable: list[Any]) -> Any:
        remaining = iter(trainable)
        pairs = zip(leaves.values, arguments, strict=True)
        return fun(
            leaves.rebuild(
                x if flag is True else _live_leaf(x, flag, remaining) for x, flag in pairs
            )
        )

    live = [
        _live_part(x, flag)
        for x, flag in zip(leaves.values, arguments, strict=True)
        if flag is not True
    ]
    rows = [rows for rows, flag in zip(tables, flags, strict=True) if flag is not True]
    value, gradients = value_and_grad_of_rows(of_trainable, rows, has_aux)(live)
    zeros, remaining = Zeros(), iter(gradients)

    def gradient(x: Any, flag: Flag, is_overwritten: bool) -> Any:
        if is_overwritten:  # by what is returned here
            new = None if flag is True else next(remaining)
            return _copy(x) if flag is True else put(x, ~flag, new) if flag else new
        if holes:
            return HOLE if flag is True else next(remaining)
        return zeros.gradient(x) if flag is True else _among_zeros(next(remaining), flag, x)

    triples = zip(leaves.values, flags, overwritten(leaves), strict=True)
    new = [gradient(*triple) for triple in triples]
    return value, leaves.rebuild(new) if holes else leaves.fill_leaves(new)


def _live_part(leaf: Any, frozen: Flag) -> Any:
    """Returns what trains of a leaf; the leaf itself if all does."""
    return take(leaf, ~frozen) if isinstance(frozen, Subset) else leaf


def _live_leaf(leaf: Any, frozen: Flag, remaining: Iterator[Any]) -> Any:
    """Returns the whole leaf that `fun` needs, made with the next trainable argument."""
    live = next(remaining)
    return with_live_subset(leaf, live, ~frozen) if isinstance(frozen, Subset) else live


def _copy(leaf: Any) -> Any:
    """Returns the leaf, in a buffer of its own, so that the params can be donated beside it."""
    is_concrete = isinstance(leaf, jax.Array | np.ndarray) and not isinstance(leaf, Tracer)
    return leaf.copy() if is_concrete else leaf


def _among_zeros(gradient: Any, frozen: Flag, leaf: Any) -> Any:
    if not isinstance(frozen, Subset):
        return gradient
    return put_among_zeros(gradient, ~frozen, 0.0, leaf)


def grad(
    fun: Callable[..., Any], frozen: Spec, has_aux: bool = False, holes: bool = False
) -> Callable[..., Any]:
    """Differentiates `fun` as `value_and_grad` does, and leaves the value out.

    Examples:
      >>> import freeze_optax as fo
      >>> loss = lambda params: params["encoder"] * params["head"]
      >>> fo.grad(loss, frozen="encoder", holes=True)({"encoder": 2.0, "head": 3.0})
      {'encoder': MaskedNode(), 'head': Array(2., dtype=float32, weak_type=True)}

    Args:
      fun: As for `value_and_grad`.
      frozen: As for `value_and_grad`: any spec, see `freeze_optax.mask`.
      has_aux: As for `value_and_grad`.
      holes: As for `value_and_grad`.

    Returns:
      A function that takes the arguments of `fun` and returns the gradient; with `has_aux`, the
      pair of the gradient and the auxiliary value. The gradient is that of `value_and_grad`.

    Raises:
      ValueError: As `value_and_grad`, at once or at the call.
      IndexError: As `value_and_grad`, at the call.
      TypeError: As `value_and_grad`, at once or at the call.
    """
    fun_with_grad = value_and_grad(fun, frozen, has_aux=has_aux, holes=holes)

    @functools.wraps(fun)
    def grad_fn(params: Any, /, *args: Any, **kwargs: Any) -> Any:
        value, grads = fun_with_grad(params, *args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return grad_fn
