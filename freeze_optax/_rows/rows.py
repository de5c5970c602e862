"""`Rows`, some rows of the leading axis of a leaf, and flags, which are bools or `Rows`."""

import functools
from collections.abc import Iterable
from typing import Any, TypeAlias, final

import numpy as np

_MOST_RUNS = 8
"""The largest number of runs that are sliced.

Rows in more runs are gathered, because each slice is one equation of the jaxpr.
"""


@final
class Rows:
    """Some of the rows of a leaf, but not all and not none. It is hashable and immutable.

    Attributes:
      mask: One bool for each row of the leaf.
    """

    def __init__(self, mask: np.ndarray):
        self.mask = np.array(mask, bool)
        self.mask.setflags(write=False)
        self._hash = hash(self.mask.tobytes())

    @functools.cached_property
    def indices(self) -> np.ndarray:
        """The indices of the rows, in order."""
        return np.flatnonzero(self.mask)

    @property
    def count(self) -> int:
        """The number of rows."""
        return len(self.indices)

    def fits(self, leaf: Any, partitioned: bool) -> bool:
        """Returns whether the mask has the length of a leaf's leading axis.

        Args:
          leaf: An array, which may be abstract.
          partitioned: Whether a leaf without these rows, with all the others, fits too.
        """
        counts = {len(self.mask), len(self.mask) - self.count if partitioned else -1}
        return leaf.ndim > 0 and leaf.shape[0] in counts

    @functools.cached_property
    def runs(self) -> list[tuple[int, int]] | None:
        """For each run, its first row and the row after its last; None if there are many runs."""
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
        return Rows, (self.mask,)  # A Python hash is valid in one process only.

    def __repr__(self) -> str:
        return f"{self.count} of {len(self.mask)} rows"


Flag: TypeAlias = bool | Rows
"""Whether a leaf is selected, or which of its rows are selected."""


def flag_from_vector(mask: np.ndarray) -> Flag:
    """Returns the flag of a vector of bools: a plain bool if all are equal."""
    return bool(mask.any()) if mask.all() or not mask.any() else Rows(mask)


def flag_or(a: Flag, b: Flag) -> Flag:
    """Returns what is selected by `a` or by `b`."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is True or b is True or (b if a is False else a)
    return flag_from_vector(a.mask | b.mask)


def flag_and(a: Flag, b: Flag) -> Flag:
    """Returns what is selected by `a` and by `b`."""
    return flag_not(flag_or(flag_not(a), flag_not(b)))


def flag_not(a: Flag) -> Flag:
    """Returns what is not selected by `a`."""
    return not a if isinstance(a, bool) else ~a


def flag_minus(a: Flag, b: Flag) -> Flag:
    """Returns what is selected by `a` and not by `b`."""
    return flag_and(a, flag_not(b))


def flag_union(flags: Iterable[Flag]) -> Flag:
    """Returns what is selected by any of the flags."""
    return functools.reduce(flag_or, flags, False)


def flag_vector(flag: Flag, count: int) -> np.ndarray:
    """Returns a flag as a vector of `count` bools, one for each row."""
    return np.full(count, flag) if isinstance(flag, bool) else flag.mask


def flag_to_mask(flag: Flag) -> bool | np.ndarray:
    """Returns a flag in the form of masks: a bool, or a vector of bools."""
    return flag if isinstance(flag, bool) else flag.mask.copy()
