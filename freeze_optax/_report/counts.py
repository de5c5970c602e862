"""Counts of leaves: parameters and bytes, trainable and frozen."""

import dataclasses
import math
import operator
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from freeze_optax._former_names import with_present_names
from freeze_optax._rows.flags import Flag
from freeze_optax._tree.kinds import dtype_bits, is_array, number_kind

Status: TypeAlias = Literal["trainable", "frozen", "partial"]


def count_elements(leaf: Any) -> int:
    """Returns the number of parameters in a leaf; 0 if it is neither an array nor a number."""
    if is_array(leaf):
        # A shape may hold NumPy integers. Their products overflow, and JSON cannot store them.
        return math.prod(map(operator.index, leaf.shape))
    return int(number_kind(leaf) != "other")


def leaf_bytes(leaf: Any) -> int:
    """Returns the bytes of a leaf, also of an abstract array or a number.

    Elements of less than a byte (int4, float4) are packed, as files and accelerators have them.
    """
    return _bytes_of(leaf, count_elements(leaf))


def _bytes_of(leaf: Any, count: int) -> int:
    """Returns the bytes of some elements of a leaf."""
    if not is_array(leaf):
        return jnp.result_type(leaf).itemsize * count if count else 0
    return -(-count * dtype_bits(leaf.dtype) // 8)


def total_bytes(tree: Any) -> int:
    """Returns the bytes of all leaves of a tree."""
    return sum(map(leaf_bytes, jax.tree.leaves(tree)))


@dataclasses.dataclass(frozen=True)
class Counts:
    """Counts of params: how many there are, how many train, and their bytes.

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
      total: The number of parameters. Every element of an array counts as one.
      trainable: The number of parameters that train.
      frozen: The number of parameters that do not train.
      trainable_bytes: The bytes of the parameters that train.
      frozen_bytes: The bytes of the parameters that do not train.
      state_bytes: The bytes of their optimizer state; None if not known.
      saved_bytes: How many bytes more that state would have with nothing frozen; None if not known.
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
    """The counts of some leaves, which can be added.

    Attributes:
      trainable_with_aliases: As `trainable`, but each of the leaves that share a buffer counts.
      frozen_with_aliases: As `frozen`, but each of the leaves that share a buffer counts.
      trainable_host_bytes: The bytes of the parameters that train and are in host memory.
      frozen_host_bytes: The bytes of the frozen parameters in host memory.
      state_host_bytes: The bytes of their statistics in host memory, as far as known.
      host_with_aliases: The number of parameters in host memory, also of each alias.
      state_on_host: The number of parameters with statistics in host memory, also of each alias.
      factors: The different factors of those that train, see `freeze_optax.rates`, in order.
    """

    trainable_with_aliases: int = 0
    frozen_with_aliases: int = 0
    trainable_host_bytes: int = 0
    frozen_host_bytes: int = 0
    state_host_bytes: int = 0
    host_with_aliases: int = 0
    state_on_host: int = 0
    factors: tuple[float, ...] = ()

    def __setstate__(self, state: dict[str, Any]) -> None:
        former = {"live": "trainable_with_aliases", "still": "frozen_with_aliases"}
        # Pickles of earlier versions lack the attributes that were added later.
        self.__dict__.update({**vars(LeafCounts()), **with_present_names(state, former)})

    @classmethod
    def of_leaf(cls, leaf: Any, flag: Flag, is_alias: bool) -> "LeafCounts":
        """Returns the counts of one leaf.

        Args:
          leaf: An array, abstract or not, or anything else.
          flag: Whether it is frozen, or which part of it is.
          is_alias: Whether it shares a buffer with a leaf that is counted already.
        """
        count, size = count_elements(leaf), leaf_bytes(leaf)
        if isinstance(flag, bool):
            frozen, frozen_size = (count, size) if flag else (0, 0)
        else:
            frozen = flag.elements_in(count)
            frozen_size = _bytes_of(leaf, frozen)
        trainable, trainable_size = count - frozen, size - frozen_size
        if is_alias:
            return cls(trainable_with_aliases=trainable, frozen_with_aliases=frozen)
        return cls(
            count,
            trainable,
            frozen,
            trainable_size,
            frozen_size,
            trainable_with_aliases=trainable,
            frozen_with_aliases=frozen,
        )

    def with_state(
        self, state_bytes: int | None, saved_bytes: int | None, factors: tuple[float, ...] = ()
    ) -> "LeafCounts":
        """Returns the same counts with these bytes of optimizer state, and factors if it trains."""
        return dataclasses.replace(
            self,
            state_bytes=state_bytes,
            saved_bytes=saved_bytes,
            factors=factors if self.trainable_with_aliases else (),
        )

    def with_memory(self, is_on_host: bool, state_host_bytes: int) -> "LeafCounts":
        """Returns the same counts of one leaf, with what is in host memory.

        Args:
          is_on_host: Whether the leaf is.
          state_host_bytes: How many bytes of its statistics are.
        """
        if not is_on_host and not state_host_bytes:
            return self
        count = self.trainable_with_aliases + self.frozen_with_aliases
        return dataclasses.replace(
            self,
            trainable_host_bytes=self.trainable_bytes if is_on_host else 0,
            frozen_host_bytes=self.frozen_bytes if is_on_host else 0,
            state_host_bytes=state_host_bytes,
            host_with_aliases=count if is_on_host else 0,
            state_on_host=count if state_host_bytes else 0,
        )

    @classmethod
    def sum(cls, counts: Iterable["LeafCounts"]) -> "LeafCounts":
        """Returns the sum of counts; None in one of them makes None in the sum."""
        counts = [cls(), *counts]
        columns = zip(*map(_values, counts), strict=True)
        values: list[Any] = [None if None in column else sum(column) for column in columns]
        factors = {factor for one in counts for factor in one.factors}
        return cls(*values, factors=tuple(sorted(factors)))

    def times(self, count: int) -> "LeafCounts":
        """Returns the counts of `count` such groups of leaves."""
        values: list[Any] = [None if x is None else count * x for x in _values(self)]
        return LeafCounts(*values, factors=self.factors)

    @property
    def status(self) -> Status:
        """Whether all of the leaves train, none of them, or a part."""
        if self.trainable_with_aliases and self.frozen_with_aliases:
            return "partial"
        return "trainable" if self.trainable_with_aliases else "frozen"

    @property
    def host_bytes(self) -> int:
        """The bytes in host memory, of the parameters and of their statistics."""
        return self.param_host_bytes + self.state_host_bytes

    @property
    def param_host_bytes(self) -> int:
        """The bytes of the parameters in host memory."""
        return self.trainable_host_bytes + self.frozen_host_bytes

    @property
    def is_partly_on_host(self) -> bool:
        """Whether some of the leaves, or the statistics of some, are in host memory, not of all."""
        count = self.trainable_with_aliases + self.frozen_with_aliases
        return any(0 < on_host < count for on_host in (self.host_with_aliases, self.state_on_host))

    def to_dict(self) -> dict[str, Any]:
        """Returns the counts by their names."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Counts)}


def _values(counts: LeafCounts) -> tuple[Any, ...]:
    # Not dataclasses.astuple, which copies deeply: that is slow for trees of many thousand leaves.
    return tuple(value for name, value in vars(counts).items() if name != "factors")
