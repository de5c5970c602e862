"""Leaves that cannot be trained: they are frozen under any spec."""

from collections.abc import Sequence

import numpy as np

from freeze_optax._rows.flags import Flag, flag_not
from freeze_optax._rows.subset import Subset
from freeze_optax._tree.kinds import can_train, why_lost
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.quantized import QuantizedNode, quantized_nodes


def with_untrainable(
    raw: Sequence[Flag],
    leaves: Leaves,
    quantized: Sequence[QuantizedNode],
    partitioned: bool = False,
) -> list[Flag]:
    """Returns the flags of what is frozen: what is selected, and all leaves that cannot be trained.

    A quantized node is frozen as a whole, with one exception: where its values are selected and
    another leaf of it is not, the spec tells them apart, and that other leaf trains.

    Args:
      raw: For each leaf, whether it is selected, or which part of it.
      leaves: The leaves of the params.
      quantized: The quantized nodes to keep whole.
      partitioned: Whether a leaf that is frozen in part may consist of what trains alone.

    Raises:
      ValueError: If the rows are of a leaf of another length, or the elements of another shape.
    """
    pairs = zip(raw, leaves.values, strict=True)
    flags = [flag if flag is True or can_train(leaf) else True for flag, leaf in pairs]
    for node in quantized:
        flags[node.stored] = True
        for i in node.companions if raw[node.stored] is not True else ():
            flags[i] = True
    _check_subsets(flags, leaves, partitioned)
    return flags


def check_not_lost(selected: Sequence[Flag], frozen: Sequence[Flag], leaves: Leaves) -> None:
    """Raises if a leaf that is not selected is frozen because of the form that it is in.

    Args:
      selected: For each leaf, whether it is selected, or which part of it.
      frozen: For each leaf, what `with_untrainable` gives.
      leaves: The leaves of the params.

    Raises:
      ValueError: Naming the path, and what to put in the place of the leaf.
    """
    if list(selected) == list(frozen):  # as with a state, in each eager step
        return
    for i, (is_selected, flag) in enumerate(zip(selected, frozen, strict=True)):
        reason = why_lost(leaves.values[i]) if flag is True and is_selected is not True else ""
        if reason:
            raise ValueError(
                f"the leaf {leaves.paths[i]!r} is {reason}; or freeze it by its path, as it can't "
                "be trained so"
            )


def _check_subsets(flags: Sequence[Flag], leaves: Leaves, partitioned: bool) -> None:
    # The error alone reads the paths: their text takes time to make, and this runs in each eager
    # step.
    for i, (flag, leaf) in enumerate(zip(flags, leaves.values, strict=True)):
        if not isinstance(flag, Subset) or flag.fits(leaf.shape):
            continue
        if not (partitioned and (~flag).is_compact(leaf.shape)):
            raise ValueError(
                f"{flag!r} of {leaves.paths[i]!r} are frozen, but the leaf is of shape "
                f"{np.shape(leaf)}"
            )


def can_thaw(selected: Sequence[Flag], leaves: Leaves) -> list[bool]:
    """Returns for each leaf whether `thaw` trains it, where it is selected.

    A leaf of a quantized node trains only if it is selected apart from the node's values.

    Args:
      selected: For each leaf, whether it is selected, or which part of it.
      leaves: The leaves of the params.

    Raises:
      ValueError: As `check_not_lost`.
    """
    flags = list(map(can_train, leaves.values))
    check_not_lost(list(map(flag_not, selected)), [not flag for flag in flags], leaves)
    for node in quantized_nodes(leaves):
        flags[node.stored] = False
        for i in node.companions if selected[node.stored] is not False else ():
            flags[i] = False
    return flags
