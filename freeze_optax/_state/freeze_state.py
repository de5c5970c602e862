"""The optimizer state, which carries its plan as static metadata."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from freeze_optax._rows.rows import Flag
from freeze_optax._state.plan import DROPPED, Plan
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.messages import quoted_list

_T = TypeVar("_T")


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class FreezeState:
    """State of `freezable`: the inner state, and as static metadata what is frozen.

    It is made by `init` and by edits. Passed for any spec it says what is frozen in it.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import freeze_optax as fo
      >>> params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
      >>> state = fo.freezable(optax.sgd(0.1, momentum=0.9), "encoder").init(params)
      >>> state
      FreezeState(frozen=1 of 2 leaves ['encoder'], inner=(TraceState, EmptyState))
      >>> state.inner[0].trace
      {'encoder': MaskedNode(), 'head': Array([0., 0.], dtype=float32)}
      >>> fo.mask(state, params)
      {'encoder': True, 'head': False}

    Attributes:
      inner: The state of the inner transformation for the params with holes
        (`optax.MaskedNode`) at every leaf that keeps no state.
      ages: For each cohort of leaves after the first, its own copy of the counters that belong
        to per-leaf statistics; empty while there is one cohort.
      plan: What is frozen. Static: part of the tree structure, no leaf.
    """

    inner: optax.OptState
    ages: Any = ()
    plan: Plan = dataclasses.field(default_factory=Plan.unknown)

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], Plan]:
        key = jax.tree_util.GetAttrKey
        return ((key("inner"), self.inner), (key("ages"), self.ages)), self.plan

    def tree_flatten(self) -> tuple[tuple[Any, Any], Plan]:
        return (self.inner, self.ages), self.plan

    @classmethod
    def tree_unflatten(cls, plan: Plan, children: tuple[Any, Any]) -> "FreezeState":
        inner, ages = children
        if plan.is_mapped and not plan.is_unknown:
            return cls(inner, _mapped_ages(ages, plan), plan.unmapped())
        return cls(inner, ages, plan)

    def __repr__(self) -> str:
        # Not the arrays: in a notebook they would be all that one sees.
        plan, kinds = self.plan, _kinds(self.inner)
        if plan.is_unknown:
            return f"FreezeState(no plan, inner={kinds})"
        pairs = list(zip(plan.paths, plan.mask, strict=True))
        frozen = [path for path, flag in pairs if flag is True]
        in_part = [path for path, flag in pairs if not isinstance(flag, bool)]
        cohorts = len(set(plan.cohorts) - {DROPPED})
        return (
            f"FreezeState(frozen={len(frozen)} of {len(plan.paths)} leaves"
            + (f" [{quoted_list(frozen, 3)}]" if frozen else "")
            + (f", in part: [{quoted_list(in_part, 3)}]" if in_part else "")
            + (f", parked={len(plan.parked)}" if plan.parked else "")
            + (f", cohorts={cohorts}" if cohorts > 1 else "")
            + f", inner={kinds})"
        )


def _kinds(state: Any) -> str:
    """The names of the states that a chain's is made of."""
    if type(state) in (tuple, list):
        return f"({', '.join(map(_kinds, state))})"
    return type(state).__name__


class ScheduledState(NamedTuple):
    """State of `scheduled`.

    Attributes:
      step: The number of updates so far, int32.
      state: The state of all leaves that some phase trains, and as its plan the phases.
    """

    step: jax.Array
    state: FreezeState

    @property
    def phase(self) -> jax.Array:
        """The index of the phase that the step is in."""
        starts = [start for start, _ in self.state.plan.schedule]
        begun = [(self.step >= start).astype(jnp.int32) for start in starts[1:]]
        return sum(begun, jnp.zeros((), jnp.int32))

    def phases(self, leaves: Leaves) -> list[Sequence[Flag]]:
        """What each phase freezes, in the order of `leaves`, which must be of the same params."""
        plan = self.state.plan
        masks = [plan.mask_of(frozen) for _, frozen in plan.schedule]
        return [plan.in_order_of(leaves, mask, "params") for mask in masks]


class AnyAges:
    """The ages of a state for `optax.tree_map_params`: a leaf, which fits any number of them.

    How many cohorts there are shows in the plan alone, which a placeholder for the params can't
    know. Arrays of no rows would fit every number too, but Orbax refuses to store such.
    """


def _mapped_ages(ages: Any, plan: Plan) -> Any:
    # `transform_non_params` was called on all the ages at once, and may have put one thing
    # (a sharding, say) in the place of them all.
    if max(plan.cohorts, default=DROPPED) < 1:
        return ()
    count = len(plan.layout.counters)
    return ages if type(ages) is tuple and len(ages) == count else (ages,) * count


def states_in(tree: Any) -> list[FreezeState]:
    """All the `FreezeState`s that a tree holds."""
    return _found(FreezeState, tree)


def schedules_in(tree: Any) -> list[ScheduledState]:
    """All the `ScheduledState`s that a tree holds."""
    return _found(ScheduledState, tree)


def _found(kind: type[_T], tree: Any) -> list[_T]:
    nodes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kind))
    return [x for x in nodes if isinstance(x, kind)]
