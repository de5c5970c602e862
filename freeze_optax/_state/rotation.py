"""How the layers of a stack take turns, and `RotatingState`, the state of `rotating`."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from freeze_optax._rows.rows_by_value import RowsByValue
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.lookahead import map_copies

Blocks = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Rotation:
    """How the layers of a stack take turns. It is static, a part of the plan.

    Attributes:
      leaves: The indices of the leaves of the stack, in the order of the params. Leaves of it that
        never train are not among them.
      axes: For each of these leaves, the axis of the layers.
      length: The number of layers.
      count: How many train at a time.
      every: The number of steps that they train.
      order: `"ascending"`, `"descending"`, `"random"`, or the blocks one after the other.
    """

    leaves: tuple[int, ...]
    axes: tuple[int, ...]
    length: int
    count: int
    every: int
    order: str | Blocks

    def rows_of(self, leaf: int, rows: Any) -> RowsByValue | None:
        """Returns the rows of a leaf that train, or None if the leaf is in no stack.

        Args:
          leaf: The index of the leaf.
          rows: The layers that train.
        """
        if leaf not in self.leaves:
            return None
        return RowsByValue(rows, self.length, self.axes[self.leaves.index(leaf)])

    def block(self, turn: Any, before: Any, key: Any) -> jax.Array:
        """Returns the layers that train in a turn, an int32 vector in ascending order.

        Args:
          turn: The index of the turn, an int32 scalar.
          before: The layers that trained in the turn before it; None in the first turn.
          key: The PRNG key, for a random order.
        """
        offsets = jnp.arange(self.count, dtype=jnp.int32)
        if self.order == "random":
            # The layers of the turn before come last, so only where others do not suffice.
            ranks = jax.random.uniform(jax.random.fold_in(key, turn), (self.length,))
            if before is not None:
                ranks = ranks.at[before].add(1.0)
            return jnp.sort(jnp.argsort(ranks)[: self.count].astype(jnp.int32))
        if self.order in ("ascending", "descending"):
            # Modulo first, so that the product does not overflow in a long run.
            start = jnp.asarray(turn % self.length, jnp.int32) * self.count
            if self.order == "descending":
                start = self.length - self.count - start
            return jnp.sort((start + offsets) % self.length)
        blocks = np.sort(np.asarray(self.order, np.int32), axis=1)
        return jnp.asarray(blocks)[turn % len(blocks)]


class RotatingState(NamedTuple):
    """State of `rotating`.

    Attributes:
      step: The number of updates so far, an int32 scalar.
      rows: The layers that train now, an int32 vector in ascending order.
      key: The PRNG key of a random order; `()` for any other order.
      state: The state of the layers that train now and of all other leaves. Its plan holds the
        `Rotation`.
    """

    step: Any
    rows: Any
    key: Any
    state: Any

    @property
    def rotation(self) -> Rotation:
        """How the layers take turns."""
        return self.state.plan.rotation

    def rows_of(self, leaf: int) -> RowsByValue | None:
        """Returns the rows of a leaf that train now; None if the leaf is in no stack.

        Args:
          leaf: The index of the leaf, in the plan's order.
        """
        return self.rotation.rows_of(leaf, jax.tree.leaves(self.rows)[0])

    def rows_in_order(self, leaves: Leaves) -> list[RowsByValue | None]:
        """Returns the rows that train now of each leaf, in the order of `leaves`."""
        plan = self.state.plan
        rows = [self.rows_of(i) for i in range(len(plan.paths))]
        return list(plan.in_order_of(leaves, rows, "params", overwritten=None))

    def take(self, tree: Any) -> Any:
        """Returns a tree like the params with the layers that train now in place of the stack.

        A leaf that has these layers alone already stays as it is.
        """
        return map_copies(self._take_copy, tree)

    def _take_copy(self, tree: Any) -> Any:
        leaves = Leaves(tree)
        pairs = zip(leaves.values, self.rows_in_order(leaves), strict=True)
        return leaves.rebuild(_taken(x, rows) for x, rows in pairs)


def _taken(x: Any, rows: RowsByValue | None) -> Any:
    shape: Sequence[int] = np.shape(x)
    if rows is None or len(shape) <= rows.axis or shape[rows.axis] != rows.length:
        return x
    return rows.take(x)
