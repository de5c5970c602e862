"""`rates`: a factor for each leaf, by rules, on the updates of an optimizer."""

import contextlib
from collections.abc import Generator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from freeze_optax._select.first_match import FirstMatch
from freeze_optax._select.specs import Spec
from freeze_optax._state.mapped_state import mapped_state
from freeze_optax._state.rates_state import RatesState, rates_in
from freeze_optax._state.whole_params import whole_leaves
from freeze_optax._transform.layerwise import LayerFactors
from freeze_optax._transform.leaf_scalars import mapped_scalars, tree_of_scalars
from freeze_optax._transform.scaling import LARGEST, factor_dtype, is_real, scale_update
from freeze_optax._tree.holes import HOLE, is_hole, is_placeholder
from freeze_optax._tree.kinds import can_train
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.lookahead import map_copies, param_copies


def rates(
    rules: Mapping[Any, Any] | Sequence[tuple[Spec, Any]], default: float | None = 1.0
) -> optax.GradientTransformationExtraArgs:
    """Multiplies the update of each leaf by the factor that the first matching rule gives.

    It goes to the end of the inner chain, so that a factor scales the whole step of a leaf, decay
    included: `fo.freezable(optax.chain(optax.adamw(1e-3), fo.rates(rules)), frozen)`. Factors are
    numbers in the state, so `freeze_optax.adjust` changes them during training and nothing is
    compiled again. `optax.tree_utils.tree_get(opt_state, "factors")` is the tree of them.

    A leaf whose factor is 0 keeps its bits, as a frozen one does, but its moments move on. It saves
    nothing: to save the backward pass and the state of a leaf, freeze it. One thing differs: the
    update of -0.0 is added, which flushes subnormal numbers outside of a jitted step on a CPU.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import freeze_optax as fo
      >>> params = {"embed": jnp.ones(1), "body": jnp.ones(1), "head": jnp.ones(1)}
      >>> inner = optax.chain(optax.sgd(1.0), fo.rates({"body": 0.1, "head": 0.5}))
      >>> tx = fo.freezable(inner, frozen="embed")
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> updates["body"], updates["head"]
      (Array([-0.1], dtype=float32), Array([-0.5], dtype=float32))

    Args:
      rules: A mapping from spec to factor, or a list of pairs. The first rule that selects a leaf
        gives its factor, a finite number, 0 or more. A spec is any that `freeze_optax.mask` takes;
        it selects whole leaves. `freeze_optax.layerwise` makes rules. Factors are read by `init`
        alone, so one that `optax.inject_hyperparams` changes has no effect: use `adjust`.
      default: The factor of leaves that no rule selects. If None, such a leaf is an error.

    Returns:
      A transformation. Its state has one float scalar for each leaf that trains, of float64 where
      the leaf has double precision, else of float32. The update keeps its dtype. A leaf that is
      frozen in part has one factor for what trains of it.

      `init` raises ValueError if a rule wins no leaf, because it selects none or because earlier
      rules select all of them; if a rule selects a part of a leaf; or if a leaf has no factor. What
      is frozen counts here too, so rules do not depend on what is frozen at first.

    Raises:
      TypeError: If `rules` are neither a mapping nor pairs, or a factor is no number.
      ValueError: If a factor is negative, not finite, or no scalar.
    """
    table = FirstMatch("rates", "factor", rules)
    for selector, factor in zip(table.selectors, table.values, strict=True):
        if not isinstance(factor, LayerFactors):
            _check_scalar(factor, f"fo.rates for {selector!r}")
    if default is not None:
        _check_scalar(default, "fo.rates by default")

    def init_fn(params: optax.Params) -> Any:
        if is_placeholder(params):
            return RatesState(mapped_scalars([x.factors for x in rates_in(mapped_state())]))
        copy = param_copies(params)[0]
        leaves = Leaves(copy)
        factors = _factors(table, default, leaves)
        _report(table, leaves, factors)
        pairs = zip(leaves.values, factors, strict=True)
        arrays = [None if f is None else jnp.full((), f, factor_dtype(x)) for x, f in pairs]
        return RatesState(tree_of_scalars(copy, arrays))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        del params, extra
        factors, treedef = jax.tree.flatten(state.factors, is_leaf=is_hole)

        def scale(copy: Any) -> Any:
            pairs = zip(treedef.flatten_up_to(copy), factors, strict=True)
            # A leaf of the factors may stand for an NNX Variable or a box, with one array in it.
            scaled = [x if is_hole(f) else jax.tree.map(_times(f), x) for x, f in pairs]
            return jax.tree.unflatten(treedef, scaled)

        return map_copies(scale, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _times(factor: Any) -> Any:
    return lambda update: scale_update(update, factor)


def check_factor(factor: Any, whose: str) -> None:
    """Raises unless a factor is a finite number, 0 or more; a traced one can't be checked.

    Args:
      factor: The factor.
      whose: What it is a factor of, for the error.

    Raises:
      TypeError: If it is no number.
      ValueError: If it is negative or not finite.
    """
    if isinstance(factor, Tracer):
        return
    if not is_real(factor):
        hint = "; a schedule goes to fo.since_thaw, or to optax.scale_by_schedule"
        raise TypeError(
            f"the factor of {whose} is {factor!r}, not a number{hint if callable(factor) else ''}"
        )
    values = np.asarray(factor)
    # Factors of most leaves are float32, in which a larger number would be infinite.
    if not ((values >= 0) & (values <= LARGEST)).all():
        raise ValueError(
            f"the factor of {whose} is {factor!r}, but a factor is a finite number, 0 or more, of "
            f"at most {LARGEST:.3g}; to climb rather than descend, negate the loss"
        )


def _check_scalar(factor: Any, whose: str) -> None:
    check_factor(factor, whose)
    if np.shape(factor):
        raise ValueError(
            f"the factor of {whose} is an array of shape {np.shape(factor)}, but a factor is one "
            "number for all of a leaf"
        )


def _factors(table: FirstMatch, default: Any, leaves: Leaves) -> list[Any]:
    """Returns the factor of each leaf; None for holes, and for leaves that can't be trained."""
    whole = whole_leaves(leaves)
    winners = table.winners(whole)
    of_rules = [
        value.of_leaves(whole) if isinstance(value, LayerFactors) else None
        for value in table.values
    ]

    def factor(i: int, rule: int | None) -> Any:
        if rule is None:
            return default
        by_leaf = of_rules[rule]
        return table.values[rule] if by_leaf is None else by_leaf[i]

    found: list[tuple[Any, int | None]] = [
        (factor(i, rule), rule) for i, rule in enumerate(winners)
    ]
    if leaves.paths != whole.paths:  # parts of one leaf, say, or the leaves of one group
        by_path = dict(zip(whole.paths, found, strict=True))
        found = [by_path[path] for path in leaves.paths]
    trained = [HOLE if not can_train(leaf) else leaf for leaf in leaves.values]
    if default is None:
        live = leaves.with_holes(map(is_hole, trained))
        table.check_all_have_one([rule for _, rule in found], Leaves(live))
    pairs = zip(found, trained, strict=True)
    return [None if is_hole(leaf) else value for (value, _), leaf in pairs]


Reported = dict[FirstMatch, dict[str, Any]]
"""The factors of each `rates`, by the path of the leaf."""

_collected: ContextVar[Reported | None] = ContextVar("_collected", default=None)


def _report(table: FirstMatch, leaves: Leaves, factors: Sequence[Any]) -> None:
    """Adds factors to those of the enclosing `collect_factors`, if there is one."""
    collected = _collected.get()
    if collected is not None:
        pairs = zip(leaves.paths, factors, strict=True)
        by_path = {path: factor for path, factor in pairs if factor is not None}
        collected.setdefault(table, {}).update(by_path)


@contextlib.contextmanager
def collect_factors() -> Generator[Reported, None, None]:
    """Collects the factors of each `rates` that is initialised inside the `with` block.

    In a state that is made as shapes the factors have no values. This is how a summary has them.
    """
    factors: Reported = {}
    token = _collected.set(factors)
    try:
        yield factors
    finally:
        _collected.reset(token)
