"""`MeasuredState`, the state of `measured`: the norms of each leaf, or of each group of leaves."""

from typing import Any, NamedTuple

import jax

MEASURES = ("gradient", "update", "gradient_change", "update_change")
"""The averages that a vector of norms holds, in their order, after the number of steps."""

LENGTH = 1 + len(MEASURES) + 2
"""The length of a vector of norms: the steps, the averages, the norms of the last step."""


class MeasuredState(NamedTuple):
    """State of `freeze_optax.measured`.

    Attributes:
      norms: A tree like the params, with a float32 vector for each leaf that trains or is parked,
        and holes (`optax.MaskedNode`) elsewhere. A leaf in parts has a vector for each part. Of
        groups, a dict with a vector for each label. A vector holds the number of measured steps,
        the averages in the order of `MEASURES`, and the two norms of the last step.
      state: The state of the transformation that is measured.
    """

    norms: Any
    state: Any


def is_measured(x: Any) -> bool:
    """Returns whether `x` is a `MeasuredState`."""
    return isinstance(x, MeasuredState)


def measured_in(tree: Any) -> list[MeasuredState]:
    """Returns all `MeasuredState`s in a tree, also those inside of another one."""
    outer = [x for x in jax.tree.leaves(tree, is_leaf=is_measured) if is_measured(x)]
    return [one for node in outer for one in (node, *measured_in(node.state))]
