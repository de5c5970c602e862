"""`FreezeState`, the state of `freezable`, and `ScheduledState`, the state of `scheduled`.

A `FreezeState` carries its plan as static metadata.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from freeze_optax._rows.flags import Flag
from freeze_optax._state.mapped_state import mapped_state
from freeze_optax._state.own_plan import OwnPlan
from freeze_optax._state.plan import DROPPED, Plan
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.messages import quoted_list
from freeze_optax._tree.node_types import nodes_of_type


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class FreezeState(OwnPlan):
    """State of `freezable`: the inner state, and static metadata that records what is frozen.

    `init` and the edits (`freeze`, `thaw` and the others) make it. It is also a spec: wherever a
    spec is accepted, the state selects the leaves that are frozen in it.

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
      ages: For each cohort after the first, a separate copy of the counters that belong to
        per-leaf statistics. It is empty while there is one cohort.
      plan: What is frozen. It is static: a part of the tree structure, not a leaf.
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
        # The arrays are left out: in a notebook they would hide everything else.
        plan, inner_types = self.plan, _type_names(self.inner)
        if plan.is_unknown:
            return f"FreezeState(no plan, inner={inner_types})"
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
            + f", inner={inner_types})"
        )


def _type_names(state: Any) -> str:
    """Returns the type name of a state; for the state of a chain, the type names in it."""
    if type(state) in (tuple, list):
        return f"({', '.join(map(_type_names, state))})"
    return type(state).__name__


class ScheduledState(NamedTuple):
    """State of `scheduled`.

    Attributes:
      step: The number of updates so far, an int32 scalar.
      state: The state of all leaves that some phase trains. Its plan holds the phases.
    """

    step: jax.Array
    state: FreezeState

    @property
    def phase(self) -> jax.Array:
        """The index of the phase that `step` is in, an int32 scalar."""
        starts = [start for start, _ in self.state.plan.schedule]
        begun = [(self.step >= start).astype(jnp.int32) for start in starts[1:]]
        return sum(begun, jnp.zeros((), jnp.int32))

    def switch_index(self) -> jax.Array:
        """Returns `phase`, to switch by; raises ValueError if the state is that of many models."""
        if np.ndim(self.step):
            raise ValueError(
                f"the state of fo.scheduled has one more axis, of length {np.shape(self.step)[0]}, "
                "than that of one model, as jax.vmap(tx.init) gives for stacked params; call the "
                "whole step under jax.vmap too"
            )
        return self.phase

    def phases(self, leaves: Leaves) -> list[Sequence[Flag]]:
        """Returns what each phase freezes, in the order of `leaves`.

        Args:
          leaves: The leaves of the same params.

        Returns:
          For each phase, one flag for each leaf.

        Raises:
          ValueError: If the paths differ, naming those that differ.
        """
        plan = self.state.plan
        masks = [plan.mask_of(frozen) for _, frozen in plan.schedule]
        return [plan.in_order_of(leaves, mask, "params", overwritten=False) for mask in masks]


class _AnyAges:
    """A leaf that takes the place of ages, for `optax.tree_map_params`.

    It fits one array of ages, or any number of them in a tuple.
    """


def ages_of_mapped_state() -> Any:
    """Returns leaves in the place of the ages of the state that `optax.tree_map_params` maps.

    The number of ages depends on the cohorts, which only that state holds. One leaf for all ages
    would do without it, but then `transform_non_params` would be called on a tuple of arrays, or on
    an empty one. Always the same number of arrays, without rows if there is one cohort, would do
    too, but Orbax refuses to store arrays without rows.
    """
    states = states_in(mapped_state())
    counts = {len(state.ages) if isinstance(state.ages, tuple) else None for state in states}
    count = counts.pop() if len(counts) == 1 else None
    # With several states of different numbers, it is not known which of them this is for.
    return _AnyAges() if count is None else (_AnyAges(),) * count


def _mapped_ages(ages: Any, plan: Plan) -> Any:
    """Returns one value for each counter, where `optax.tree_map_params` mapped the ages."""
    # `transform_non_params` was called once on all the ages. It may have put a single value (a
    # sharding, say) in their place.
    if max(plan.cohorts, default=DROPPED) < 1:
        return ()
    count = len(plan.layout.counters)
    return ages if type(ages) is tuple and len(ages) == count else (ages,) * count


def states_in(tree: Any) -> list[FreezeState]:
    """Returns all `FreezeState`s in a tree."""
    return nodes_of_type(FreezeState, tree)


def schedules_in(tree: Any) -> list[ScheduledState]:
    """Returns all `ScheduledState`s in a tree."""
    return nodes_of_type(ScheduledState, tree)
