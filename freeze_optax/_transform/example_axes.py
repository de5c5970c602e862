"""Gradients of single examples: they have axes in front of those of their leaf.

Transformations that aggregate such gradients take them (`optax.contrib.dpsgd`, the aggregators of
`optax.experimental`), and give updates of the shape of the params.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from freeze_optax._rows.elements import Elements
from freeze_optax._rows.flags import Flag
from freeze_optax._rows.parts import axes_in_front
from freeze_optax._rows.rows import Rows
from freeze_optax._rows.subset import Subset
from freeze_optax._state.context import LeafKind
from freeze_optax._state.plan import Plan
from freeze_optax._tree.holes import is_hole
from freeze_optax._tree.kinds import number_kind, rank
from freeze_optax._tree.leaves import Leaves

Ranks = Sequence[int | None]
"""The number of axes of each leaf of the params; None where it is not known."""


def leaf_ranks(plan: Plan, params: Leaves | None) -> Ranks:
    """Returns the ranks of the params: of these, or of those that `init` was given if None."""
    planned = [kind and kind[0] for kind in plan.leaf_kinds]
    if params is None:
        return planned
    triples = zip(params.values, planned, plan.mask, strict=True)
    return [_leaf_rank(*triple) for triple in triples]


def _leaf_rank(param: Any, planned: int | None, frozen: Flag) -> int | None:
    if is_hole(param) or param is None:
        return planned
    # A vector of elements does not tell the rank of its leaf.
    if isinstance(frozen, Elements):
        return len(frozen.shape)
    # The params come first: under `jax.vmap` they may have fewer axes than `init` saw.
    return rank(param)


def leaf_of_gradient(grad: Any, leaf_rank: int | None, kind: LeafKind | None) -> Any:
    """Returns an array like the leaf of a gradient: the gradient of the first example alone.

    Args:
      grad: The gradient.
      leaf_rank: The number of axes of the leaf, if known.
      kind: The kind of the leaf, if known. The gradient of an integer may be of another kind
        (float0, a mean), but to a large integer no float can be added without a change.
    """
    in_front = axes_in_front(grad, leaf_rank)
    leaf = grad[(0,) * in_front] if in_front else grad
    numbers = kind and kind[1]
    if grad is None or numbers in (None, "other", number_kind(grad)):
        return leaf
    return np.zeros(np.shape(leaf), bool if numbers == "exact" else np.float32)


def check_gradients_of_rows(plan: Plan, grads: Leaves, ranks: Ranks, params: Leaves | None) -> None:
    """Raises if the gradient of a leaf that is frozen in part does not fit its rows.

    A whole leaf is left to the inner transformation, which takes what it takes without `freezable`.
    """
    for i, (grad, flag, leaf_rank) in enumerate(zip(grads.values, plan.mask, ranks, strict=True)):
        if not isinstance(flag, Subset):
            continue
        shape = np.shape(grad)
        leaf_shape = None if params is None or is_hole(params.values[i]) else params.values[i].shape
        if _fits(flag, shape[axes_in_front(grad, leaf_rank) :], leaf_rank, leaf_shape):
            continue
        of_shape = f"shape {leaf_shape}" if leaf_shape else f"{leaf_rank} axes"
        live = ~flag
        if isinstance(flag, Rows):
            parts = f"all {len(flag.mask)} rows or the {live.count} that train, of a leaf of"
        else:
            parts = f"the whole leaf or the {live!r} that train, in a vector, of a leaf of"
        raise ValueError(
            f"the gradient of {plan.paths[i]!r} is of shape {shape}, but the optimizer state is "
            f"for {parts} {of_shape}; only axes of examples, in front of those of the leaf, may be "
            "added to a gradient of the whole leaf"
        )


def _fits(
    frozen: Subset,
    shape: tuple[int, ...],
    leaf_rank: int | None,
    leaf_shape: tuple[int, ...] | None,
) -> bool:
    """Returns whether a gradient of this shape is one of the whole leaf, or of what trains."""
    live = ~frozen
    if not (frozen.fits(shape) or live.is_compact(shape)):
        return False
    if not isinstance(frozen, Rows):
        return True
    if leaf_shape is None:
        return leaf_rank in (None, len(shape))
    # What differs at most is the number of rows.
    return frozen.with_length(shape, 0) == frozen.with_length(leaf_shape, 0)
