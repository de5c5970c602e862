"""The axis that `jax.vmap` adds: a state of several models has it, that of one model has not."""

from collections.abc import Iterable

Shape = tuple[int, ...]

UNDER_VMAP = (
    "as jax.vmap(tx.init) gives for stacked params; call this under jax.vmap too, as in "
    "jax.vmap(lambda state, params: fo.thaw(state, params, where))(state, params)"
)
"""The end of an error about such an axis of a state."""


def extra_axis(pairs: Iterable[tuple[Shape, Shape]]) -> int | None:
    """Returns the length of the leading axis that the first shape of each pair has, or None.

    Args:
      pairs: Pairs of an actual shape and the expected one.
    """
    pairs = list(pairs)
    if not all(actual and actual[1:] == expected for actual, expected in pairs):
        return None
    lengths = {actual[0] for actual, _ in pairs}
    return lengths.pop() if len(lengths) == 1 else None
