"""Rows of the leading axis of a leaf, for leaves that are frozen in part."""

import functools
from collections.abc import Iterable
from typing import Any, TypeAlias, final

import numpy as np

_MOST_RUNS = 8
"""Up to so many runs of rows are sliced; more are gathered, as each slice is an equation."""


@final
class Rows:
    """Some, but neither all nor none, of the rows of a leaf; hashable, and never changes.

    Attributes:
      mask: One bool for each row.
    """

    def __init__(self, mask: np.ndarray):
        self.mask = np.array(mask, bool)
        self.mask.setflags(write=False)
        self._hash = hash(self.mask.tobytes())

    @functools.cached_property
    def indices(self) -> np.ndarray:
        """The rows, in order."""
        return np.flatnonzero(self.mask)

    @property
    def count(self) -> int:
        """How many rows these are."""
        return len(self.indices)

    def fits(self, leaf: Any, partitioned: bool) -> bool:
        """Whether a leaf has so many rows; if `partitioned`, also whether it has all but these."""
        counts = {len(self.mask), len(self.mask) - self.count if partitioned else -1}
        return leaf.ndim > 0 and leaf.shape[0] in counts

    @functools.cached_property
    def runs(self) -> list[tuple[int, int]] | None:
        """The first row of each run and the one after its last; None if there are many runs."""
        edges = np.flatnonzero(np.diff(self.mask, prepend=False, append=False)).tolist()
        runs = list(zip(edges[::2], edges[1::2], strict=True))
        return runs if len(runs) <= _MOST_RUNS else None

    def __invert__(self) -> "Rows":
        return Rows(~self.mask)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and np.array_equal(self.mask, other.mask)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return Rows, (self.mask,)  # Python's hashes are of one process only.

    def __repr__(self) -> str:
        return f"{self.count} of {len(self.mask)} rows"


Flag: TypeAlias = bool | Rows
"""Whether a leaf is selected, or which of its rows are."""


def flag_from_vector(mask: np.ndarray) -> Flag:
    """The flag of a vector of bools: all and nothing are plain bools."""
    return bool(mask.any()) if mask.all() or not mask.any() else Rows(mask)


def flag_or(a: Flag, b: Flag) -> Flag:
    """Selected by one or the other."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is True or b is True or (b if a is False else a)
    return flag_from_vector(a.mask | b.mask)


def flag_and(a: Flag, b: Flag) -> Flag:
    """Selected by one and the other."""
    return flag_not(flag_or(flag_not(a), flag_not(b)))


def flag_not(a: Flag) -> Flag:
    """Selected where it was not."""
    return not a if isinstance(a, bool) else ~a


def flag_minus(a: Flag, b: Flag) -> Flag:
    """Selected by one and not by the other."""
    return flag_and(a, flag_not(b))


def flag_union(flags: Iterable[Flag]) -> Flag:
    """Selected by any."""
    return functools.reduce(flag_or, flags, False)


def flag_vector(flag: Flag, count: int) -> np.ndarray:
    """A flag as a bool for each of so many rows."""
    return np.full(count, flag) if isinstance(flag, bool) else flag.mask


def flag_to_mask(flag: Flag) -> bool | np.ndarray:
    """A flag as a mask has it: a bool, or a vector of bools."""
    return flag if isinstance(flag, bool) else flag.mask.copy()
