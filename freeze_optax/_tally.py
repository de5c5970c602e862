"""What leaves come to: parameters and bytes, trainable and frozen."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from freeze_optax._leaves import is_array, kind
from freeze_optax._rows import Flag

Status: TypeAlias = Literal["trainable", "frozen", "partial"]


def elements(leaf: Any) -> int:
    """How many parameters a leaf is: one for each element, none if it is no array or number."""
    if is_array(leaf):
        return math.prod(leaf.shape)
    return int(kind(leaf) != "other")


def nbytes(leaf: Any) -> int:
    """The bytes of a leaf, as jax counts them: abstract ones, keys and Python numbers too."""
    if not is_array(leaf):
        return jnp.result_type(leaf).itemsize if elements(leaf) else 0
    return elements(leaf) * leaf.dtype.itemsize


def total_bytes(tree: Any) -> int:
    """The bytes of all leaves of a tree."""
    return sum(map(nbytes, jax.tree.leaves(tree)))


@dataclasses.dataclass(frozen=True)
class Tally:
    """What some leaves come to; tallies add up.

    Attributes:
      trainable: Parameters that train, each element of an array being one.
      frozen: Parameters that don't.
      trainable_bytes: Bytes of those that train.
      frozen_bytes: Bytes of those that don't.
      state_bytes: Bytes of their optimizer state, None if that is not known.
      saved_bytes: Bytes that this state would take more, were nothing frozen.
      live: As `trainable`, but what shares a buffer counts each time.
      still: As `frozen`, but likewise.
    """

    trainable: int = 0
    frozen: int = 0
    trainable_bytes: int = 0
    frozen_bytes: int = 0
    state_bytes: int | None = 0
    saved_bytes: int | None = 0
    live: int = 0
    still: int = 0

    @classmethod
    def of(cls, leaf: Any, flag: Flag, is_alias: bool) -> "Tally":
        """One leaf.

        Args:
          leaf: An array, abstract or not, or anything else.
          flag: Whether it is frozen, or which of its rows are.
          is_alias: Whether it has been counted already, at another path.
        """
        count, size = elements(leaf), nbytes(leaf)
        if isinstance(flag, bool):
            still, still_size = (count, size) if flag else (0, 0)
        else:
            still, still_size = (n // len(flag.mask) * flag.count for n in (count, size))
        live, live_size = count - still, size - still_size
        if is_alias:
            return cls(live=live, still=still)
        return cls(live, still, live_size, still_size, live=live, still=still)

    def with_state(self, state_bytes: int | None, saved_bytes: int | None) -> "Tally":
        """The same, with these bytes of optimizer state."""
        return dataclasses.replace(self, state_bytes=state_bytes, saved_bytes=saved_bytes)

    @classmethod
    def sum(cls, tallies: Iterable["Tally"]) -> "Tally":
        """All of them together."""
        columns = zip(*map(_values, [cls(), *tallies]), strict=True)
        return cls._of_values(None if None in column else sum(column) for column in columns)

    def times(self, count: int) -> "Tally":
        """So many of these."""
        return self._of_values(None if x is None else count * x for x in _values(self))

    @classmethod
    def _of_values(cls, values: Iterable[Any]) -> "Tally":
        return cls(*values)

    @property
    def total(self) -> int:
        """All parameters."""
        return self.trainable + self.frozen

    @property
    def status(self) -> Status:
        """Whether all of it trains, nothing, or a part."""
        if self.live and self.still:
            return "partial"
        return "trainable" if self.live else "frozen"

    def to_dict(self) -> dict[str, Any]:
        """The counts by their names."""
        names = ("total", "trainable", "frozen", "trainable_bytes", "frozen_bytes")
        names += ("state_bytes", "saved_bytes")
        return {name: getattr(self, name) for name in names}


def _values(tally: Tally) -> tuple[Any, ...]:
    # Not dataclasses.astuple, which copies deeply: that is slow for trees of many thousand leaves.
    return tuple(vars(tally).values())
