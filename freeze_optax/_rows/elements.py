"""`Elements`, single elements of a leaf."""

import functools
import math
from typing import final

import numpy as np

from freeze_optax._rows.subset import Shape, Subset


@final
class Elements(Subset):
    """Some single elements of a leaf of two axes or more, which are no rows along one axis.

    A leaf may have billions of elements, so eight of them are kept in a byte.

    Attributes:
      shape: The shape of the leaf.
      bits: One bit for each element of the leaf, as `np.packbits` gives them.
    """

    def __init__(self, shape: Shape, bits: np.ndarray):
        self.shape, self.bits = tuple(shape), bits
        self.bits.setflags(write=False)
        self._count = int(np.unpackbits(bits, count=math.prod(self.shape)).sum())
        self._others: Elements | None = None
        self._hash = hash((self.shape, self.bits.tobytes()))

    @classmethod
    def from_mask(cls, mask: np.ndarray) -> "Elements":
        """Returns the elements at which a mask of the leaf's shape is True."""
        return cls(mask.shape, np.packbits(mask))

    @property
    def count(self) -> int:
        """The number of elements."""
        return self._count

    def _flat(self) -> np.ndarray:
        return np.unpackbits(self.bits, count=math.prod(self.shape)).view(bool)

    def flat_indices(self) -> np.ndarray:
        """Returns the index of each element in the flattened leaf, in order."""
        return np.flatnonzero(self._flat())

    # Kept, so that all that is traced with it holds one constant, and not one each.
    @functools.cached_property
    def indices(self) -> np.ndarray:
        """The indices of the elements, one row for each, in order. Static data of programs.

        Not those of the flattened leaf: they exceed int32 in a leaf of 2**31 elements, and to
        flatten a leaf moves it where it is sharded, or tiled as on a TPU.
        """
        columns = np.unravel_index(self.flat_indices(), self.shape)
        return np.stack(columns, axis=1).astype(np.int32)

    @property
    def index_bytes(self) -> int:
        """The bytes of `indices`."""
        return self.count * len(self.shape) * np.dtype(np.int32).itemsize

    def fits(self, shape: Shape) -> bool:
        return tuple(shape) == self.shape

    def is_compact(self, shape: Shape) -> bool:
        return tuple(shape) == (self.count,)

    def compact_rank(self, leaf_rank: int) -> int:
        del leaf_rank
        return 1

    def compact_shape(self, shape: Shape) -> tuple[int, ...]:
        del shape
        return (self.count,)

    def mask_of(self, shape: Shape) -> np.ndarray:
        del shape
        mask = self._flat().reshape(self.shape)
        mask.setflags(write=False)
        return mask

    def as_mask(self, leaf_rank: int) -> np.ndarray:
        del leaf_rank
        return self._flat().reshape(self.shape)

    def elements_in(self, size: int) -> int:
        del size
        return self.count

    def __invert__(self) -> "Elements":
        # Kept, as a step inverts what is frozen in many places: the indices of what trains are then
        # computed once, and are one constant of the program.
        if self._others is None:
            self._others = Elements.from_mask(~self.mask_of(self.shape))
            self._others._others = self
        return self._others

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Elements):
            return False
        return self.shape == other.shape and np.array_equal(self.bits, other.bits)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type["Elements"], tuple[Shape, np.ndarray]]:
        return Elements, (self.shape, self.bits)  # A Python hash is valid in one process only.

    def __repr__(self) -> str:
        return f"{self.count:,} of {math.prod(self.shape):,} elements"
