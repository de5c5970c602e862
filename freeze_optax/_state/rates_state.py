"""`RatesState`, the state of `rates`: a factor for each leaf."""

from typing import Any, NamedTuple

from freeze_optax._tree.node_types import nodes_of_type


class RatesState(NamedTuple):
    """State of `freeze_optax.rates`.

    Attributes:
      factors: A tree like the params, with a float scalar for each leaf that trains or is parked,
        and holes (`optax.MaskedNode`) elsewhere. A leaf in parts has a scalar for each part.
    """

    factors: Any


def rates_in(tree: Any) -> list[RatesState]:
    """Returns all `RatesState`s in a tree."""
    return nodes_of_type(RatesState, tree)
