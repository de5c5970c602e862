"""Stacked params and states, as `jax.vmap` makes them, in an `update` outside of `jax.vmap`."""

import numpy as np

from freeze_optax._state.freeze_state import FreezeState
from freeze_optax._state.plan import Plan
from freeze_optax._tree.kinds import rank
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.messages import quoted_list

_REMEDY = (
    "jax.vmap(tx.init) makes the states of stacked params, and jax.vmap(tx.update)(gradients, "
    "state, params) updates them"
)


def is_stacked(plan: Plan, leaves: Leaves) -> bool:
    """Returns whether a leaf of params or gradients has more axes than at `init`."""
    # Counting axes is cheap enough for each update. Shapes differ for other reasons: inside
    # `shard_map` for example.
    pairs = zip(leaves.values, plan.leaf_kinds, strict=True)
    return any(kind is not None and rank(x) > kind[0] for x, kind in pairs)


def check_not_stacked(plan: Plan, inner_state: object) -> None:
    """Raises ValueError if the counters and clocks of a state have one more axis."""
    try:
        length = plan.layout.extra_axis(inner_state)
    except ValueError:  # a state that can't be edited has no layout
        return
    if length is not None:
        raise ValueError(
            f"the state has one more axis, of length {length}, than that of one model; {_REMEDY}"
        )


def check_kept_shapes(before: FreezeState, after: FreezeState) -> None:
    """Raises ValueError if an update of stacked params changed the shape of the state.

    Then the gradients of many models were broadcast with the statistics of one. Stacked params are
    no error by themselves: statistics without counters may be stacked as they are.
    """
    check_not_stacked(before.plan, before.inner)
    old, new = Leaves(before.inner), Leaves(after.inner)
    if old.treedef != new.treedef:
        return
    pairs = zip(old.paths, old.values, new.values, strict=True)
    grown = [path for path, x, y in pairs if np.ndim(y) > np.ndim(x)]
    if grown:
        raise ValueError(
            f"the params or gradients have more axes than at init, but the state is that of one "
            f"model: the update would give {quoted_list(grown)} another axis; {_REMEDY}"
        )
