"""Gradients with respect to the trainable leaves only."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from freeze_optax._params.zeros import Zeros
from freeze_optax._rows.rows import Flag, Rows, flag_or
from freeze_optax._rows.take_put import scatter_rows, take_rows, with_live_rows
from freeze_optax._select.specs import Spec, as_selector, resolve, schedules_in_spec
from freeze_optax._tree.holes import HOLE
from freeze_optax._tree.leaves import Leaves


def value_and_grad(
    fun: Callable[..., Any], frozen: Spec, has_aux: bool = False, holes: bool = False
) -> Callable[..., Any]:
    """Differentiates `fun` in its first argument with no backward pass for frozen leaves.

    As `jax.value_and_grad`, except that integer, PRNG key and non-array leaves need nothing
    special: they are frozen.

    Examples:
      >>> import freeze_optax as fo
      >>> params = {"encoder": 2.0, "head": 3.0}
      >>> loss = lambda params, x: params["encoder"] * params["head"] * x
      >>> value, grads = fo.value_and_grad(loss, frozen="encoder")(params, 10.0)
      >>> float(value), float(grads["encoder"]), float(grads["head"])
      (60.0, 0.0, 20.0)

    Args:
      fun: Takes the params first, and gives a real scalar; with `has_aux`, a pair of that and
        anything.
      frozen: What not to differentiate: any spec, see `freeze_optax.mask`. Passing the optimizer
        state keeps gradients and updates in agreement.
      has_aux: Whether `fun` gives a pair.
      holes: Whether frozen leaves get `optax.MaskedNode()`, which costs no memory even as the
        carry of a scan, instead of zeros.

    Returns:
      A function of the arguments of `fun` that gives the pair of its value and the gradient. The
      gradient has the structure of the params: zeros at frozen leaves, or holes; where the
      dtype has no gradient, zeros of dtype `jax.dtypes.float0`. Where a leaf is frozen in part it
      has zeros at those rows, or with `holes` the rows that train alone.

    Raises:
      ValueError: At once with the state of `scheduled` and `holes`, or with two such states; when
        called, if the spec does not fit the params.
      IndexError: When called, if a layer is not there (`fo.layers(pattern)[i]`).
    """
    selector = as_selector(frozen)
    schedules = schedules_in_spec(frozen)
    if len(schedules) > 1:
        raise ValueError(
            f"a gradient follows the phases of one state of fo.scheduled, not of {len(schedules)}"
        )
    if schedules and holes:
        raise ValueError(
            "with the state of fo.scheduled, what is frozen changes while the program runs, and "
            "the structure of its gradients can't; leave holes out"
        )

    @functools.wraps(fun)
    def value_and_grad_fn(params: Any, /, *args: Any, **kwargs: Any) -> Any:
        leaves = Leaves(params)

        def of_params(params: Any) -> Any:
            return fun(params, *args, **kwargs)

        def differentiate(flags: Sequence[Flag]) -> Any:
            return _value_and_grad(of_params, leaves, flags, has_aux, holes)

        always = resolve(selector, leaves)
        if not schedules:
            return differentiate(always)
        (state,) = schedules
        phases = [
            functools.partial(differentiate, list(map(flag_or, always, phase)))
            for phase in state.phases(leaves)
        ]
        return jax.lax.switch(state.phase, phases)

    return value_and_grad_fn


def _value_and_grad(
    fun: Callable[[Any], Any], leaves: Leaves, flags: Sequence[Flag], has_aux: bool, holes: bool
) -> tuple[Any, Any]:
    # Only the trainable leaves are an argument: what is closed over is a constant to the
    # differentiation, which then builds no backward pass for it, whatever its dtype.
    def of_trainable(trainable: list[Any]) -> Any:
        moving = iter(trainable)
        both = zip(leaves.values, flags, strict=True)
        return fun(
            leaves.rebuild(x if flag is True else _live_leaf(x, flag, moving) for x, flag in both)
        )

    live = [
        _live_rows(x, flag)
        for x, flag in zip(leaves.values, flags, strict=True)
        if flag is not True
    ]
    value, moved = jax.value_and_grad(of_trainable, has_aux=has_aux)(live)
    zeros, moving = Zeros(), iter(moved)
    both = zip(leaves.values, flags, strict=True)
    if holes:
        return value, leaves.rebuild(HOLE if flag is True else next(moving) for _, flag in both)
    return value, leaves.fill_leaves(
        zeros.gradient(x) if flag is True else _with_zero_rows(next(moving), flag)
        for x, flag in both
    )


def _live_rows(leaf: Any, frozen: Flag) -> Any:
    return take_rows(leaf, ~frozen) if isinstance(frozen, Rows) else leaf


def _live_leaf(leaf: Any, frozen: Flag, moving: Iterator[Any]) -> Any:
    return with_live_rows(leaf, next(moving), ~frozen) if isinstance(frozen, Rows) else next(moving)


def _with_zero_rows(gradient: Any, frozen: Flag) -> Any:
    return scatter_rows(gradient, ~frozen, 0.0) if isinstance(frozen, Rows) else gradient


def grad(
    fun: Callable[..., Any], frozen: Spec, has_aux: bool = False, holes: bool = False
) -> Callable[..., Any]:
    """As `value_and_grad`, without the value.

    Examples:
      >>> import freeze_optax as fo
      >>> loss = lambda params: params["encoder"] * params["head"]
      >>> fo.grad(loss, frozen="encoder", holes=True)({"encoder": 2.0, "head": 3.0})
      {'encoder': MaskedNode(), 'head': Array(2., dtype=float32, weak_type=True)}

    Args:
      fun: Takes the params first, and gives a real scalar; with `has_aux`, a pair of that and
        anything.
      frozen: What not to differentiate: any spec, see `freeze_optax.mask`.
      has_aux: Whether `fun` gives a pair.
      holes: Whether frozen leaves get `optax.MaskedNode()` instead of zeros.

    Returns:
      A function of the arguments of `fun` that gives the gradient; with `has_aux`, the pair of
      gradient and auxiliary value.

    Raises:
      ValueError: At once with the state of `scheduled` and `holes`, or with two such states; when
        called, if the spec does not fit the params.
      IndexError: When called, if a layer is not there (`fo.layers(pattern)[i]`).
    """
    both = value_and_grad(fun, frozen, has_aux=has_aux, holes=holes)

    @functools.wraps(fun)
    def grad_fn(params: Any, /, *args: Any, **kwargs: Any) -> Any:
        value, grads = both(params, *args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return grad_fn
