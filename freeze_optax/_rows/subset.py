"""`Subset`, a part of a leaf: some rows along one axis, or single elements."""

import abc
from collections.abc import Sequence

import numpy as np

Shape = Sequence[int]


class Subset(abc.ABC):
    """Some of the elements of a leaf, but not all and not none. It is hashable and immutable.

    An array of the subset alone is its *compact* array: the rows, or a vector of the elements in
    the order of the leaf (the last axis runs fastest).
    """

    @property
    @abc.abstractmethod
    def count(self) -> int:
        """The number of rows, or of elements."""

    @abc.abstractmethod
    def fits(self, shape: Shape) -> bool:
        """Returns whether a leaf of this shape has these rows, or elements."""

    @abc.abstractmethod
    def is_compact(self, shape: Shape) -> bool:
        """Returns whether an array of this shape may be the compact array."""

    @abc.abstractmethod
    def compact_rank(self, leaf_rank: int) -> int:
        """Returns the number of axes of the compact array, of a leaf with `leaf_rank` axes."""

    @abc.abstractmethod
    def compact_shape(self, shape: Shape) -> tuple[int, ...]:
        """Returns the shape of the compact array, of a leaf of this shape."""

    @abc.abstractmethod
    def mask_of(self, shape: Shape) -> np.ndarray:
        """Returns a bool for each element of a leaf of this shape; the array is read-only."""

    @abc.abstractmethod
    def as_mask(self, leaf_rank: int) -> np.ndarray:
        """Returns the subset in the form of masks.

        Args:
          leaf_rank: The number of axes of the leaf.

        Returns:
          A new array of bools that broadcasts to the leaf: a vector for rows of the leading axis;
          for rows of another axis, an array of the leaf's rank, of length 1 along all other axes;
          for elements, an array of the leaf's shape.
        """

    @abc.abstractmethod
    def elements_in(self, size: int) -> int:
        """Returns the number of elements, of a leaf that has `size` elements."""

    @abc.abstractmethod
    def __invert__(self) -> "Subset": ...
