"""`Rows`, some rows of a leaf along one of its axes."""

import functools
from typing import final

import numpy as np

from freeze_optax._rows.subset import Shape, Subset

_MOST_RUNS = 8
"""The largest number of runs that are sliced.

Rows in more runs are gathered, because each slice is one equation of the jaxpr.
"""


@final
class Rows(Subset):
    """Some of the rows of a leaf along one axis, but not all and not none.

    Attributes:
      mask: One bool for each row of the leaf.
      axis: The axis of the leaf, counted from 0.
    """

    def __init__(self, mask: np.ndarray, axis: int = 0):
        self.mask, self.axis = np.array(mask, bool), axis
        self.mask.setflags(write=False)
        self._hash = hash((axis, self.mask.tobytes()))

    @functools.cached_property
    def indices(self) -> np.ndarray:
        """The indices of the rows, in order."""
        return np.flatnonzero(self.mask)

    @property
    def count(self) -> int:
        """The number of rows."""
        return len(self.indices)

    @functools.cached_property
    def runs(self) -> list[tuple[int, int]] | None:
        """For each run, its first row and the row after its last; None if there are many runs."""
        edges = np.flatnonzero(np.diff(self.mask, prepend=False, append=False)).tolist()
        runs = list(zip(edges[::2], edges[1::2], strict=True))
        return runs if len(runs) <= _MOST_RUNS else None

    def fits(self, shape: Shape) -> bool:
        return len(shape) > self.axis and shape[self.axis] == len(self.mask)

    def is_compact(self, shape: Shape) -> bool:
        return len(shape) > self.axis and shape[self.axis] == self.count

    def compact_rank(self, leaf_rank: int) -> int:
        return leaf_rank

    def compact_shape(self, shape: Shape) -> tuple[int, ...]:
        return self.with_length(shape, self.count)

    def with_length(self, shape: Shape, length: int) -> tuple[int, ...]:
        """Returns a shape with another number of rows."""
        return (*shape[: self.axis], length, *shape[self.axis + 1 :])

    def mask_of(self, shape: Shape) -> np.ndarray:
        return np.broadcast_to(self._aligned(len(shape)), shape)

    def as_mask(self, leaf_rank: int) -> np.ndarray:
        return self._aligned(leaf_rank).copy() if self.axis else self.mask.copy()

    def _aligned(self, leaf_rank: int) -> np.ndarray:
        return self.mask.reshape(self.with_length((1,) * leaf_rank, len(self.mask)))

    def elements_in(self, size: int) -> int:
        return size // len(self.mask) * self.count

    def __invert__(self) -> "Rows":
        return Rows(~self.mask, self.axis)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rows):
            return False
        return self.axis == other.axis and np.array_equal(self.mask, other.mask)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type["Rows"], tuple[np.ndarray, int]]:
        return Rows, (self.mask, self.axis)  # A Python hash is valid in one process only.

    def __repr__(self) -> str:
        of_axis = f" along axis {self.axis}" if self.axis else ""
        return f"{self.count} of {len(self.mask)} rows{of_axis}"
