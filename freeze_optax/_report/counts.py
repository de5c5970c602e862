"""What leaves come to: parameters and bytes, trainable and frozen."""

import dataclasses
import math
import operator
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from freeze_optax._rows.rows import Flag
from freeze_optax._tree.kinds import is_array, number_kind

Status: TypeAlias = Literal["trainable", "frozen", "partial"]


def count_elements(leaf: Any) -> int:
    """How many parameters a leaf is: one for each element, none if it is no array or number."""
    if is_array(leaf):
        # A shape may hold NumPy's integers, which wrap, and which JSON does not know.
        return math.prod(map(operator.index, leaf.shape))
    return int(number_kind(leaf) != "other")


def leaf_bytes(leaf: Any) -> int:
    """The bytes of a leaf, as jax counts them: abstract ones, keys and Python numbers too."""
    if not is_array(leaf):
        return jnp.result_type(leaf).itemsize if count_elements(leaf) else 0
    return count_elements(leaf) * leaf.dtype.itemsize


def total_bytes(tree: Any) -> int:
    """The bytes of all leaves of a tree."""
    return sum(map(leaf_bytes, jax.tree.leaves(tree)))


@dataclasses.dataclass(frozen=True)
class Counts:
    """What params come to, in numbers and in bytes.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import freeze_optax as fo
      >>> params = {"encoder": jnp.ones(3), "head": jnp.ones(2)}
      >>> summary = fo.summary(params, "encoder", optax.sgd(0.1, momentum=0.9))
      >>> summary.total, summary.trainable, summary.frozen
      (5, 2, 3)
      >>> summary.trainable_bytes, summary.frozen_bytes, summary.state_bytes, summary.saved_bytes
      (8, 12, 8, 12)

    Attributes:
      total: How many there are, as every element of an array counts as one.
      trainable: How many of them train.
      frozen: How many don't.
      trainable_bytes: Bytes of those that train.
      frozen_bytes: Bytes of those that don't.
      state_bytes: Bytes of their optimizer state; None if not known.
      saved_bytes: Bytes more that it would take with nothing frozen; None if not known.
    """

    total: int = 0
    trainable: int = 0
    frozen: int = 0
    trainable_bytes: int = 0
    frozen_bytes: int = 0
    state_bytes: int | None = 0
    saved_bytes: int | None = 0


@dataclasses.dataclass(frozen=True)
class LeafCounts(Counts):
    """The counts of some leaves; tallies add up.

    Attributes:
      live: As `trainable`, but what shares a buffer counts each time.
      still: As `frozen`, but likewise.
    """

    live: int = 0
    still: int = 0

    @classmethod
    def of_leaf(cls, leaf: Any, flag: Flag, is_alias: bool) -> "LeafCounts":
        """One leaf.

        Args:
          leaf: An array, abstract or not, or anything else.
          flag: Whether it is frozen, or which of its rows are.
          is_alias: Whether it has been counted already, at another path.
        """
        count, size = count_elements(leaf), leaf_bytes(leaf)
        if isinstance(flag, bool):
            still, still_size = (count, size) if flag else (0, 0)
        else:
            still, still_size = (n // len(flag.mask) * flag.count for n in (count, size))
        live, live_size = count - still, size - still_size
        if is_alias:
            return cls(live=live, still=still)
        return cls(count, live, still, live_size, still_size, live=live, still=still)

    def with_state(self, state_bytes: int | None, saved_bytes: int | None) -> "LeafCounts":
        """The same, with these bytes of optimizer state."""
        return dataclasses.replace(self, state_bytes=state_bytes, saved_bytes=saved_bytes)

    @classmethod
    def sum(cls, tallies: Iterable["LeafCounts"]) -> "LeafCounts":
        """All of them together."""
        columns = zip(*map(_values, [cls(), *tallies]), strict=True)
        values: list[Any] = [None if None in column else sum(column) for column in columns]
        return cls(*values)

    def times(self, count: int) -> "LeafCounts":
        """So many of these."""
        values: list[Any] = [None if x is None else count * x for x in _values(self)]
        return LeafCounts(*values)

    @property
    def status(self) -> Status:
        """Whether all of it trains, nothing, or a part."""
        if self.live and self.still:
            return "partial"
        return "trainable" if self.live else "frozen"

    def to_dict(self) -> dict[str, Any]:
        """The counts by their names."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Counts)}


def _values(tally: LeafCounts) -> tuple[Any, ...]:
    # Not dataclasses.astuple, which copies deeply: that is slow for trees of many thousand leaves.
    return tuple(vars(tally).values())
