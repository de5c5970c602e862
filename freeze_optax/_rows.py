"""Rows of the leading axis of a leaf, for leaves that are frozen in part."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias, final

import jax
import jax.numpy as jnp
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


def flag_of(mask: np.ndarray) -> Flag:
    """The flag of a vector of bools: all and nothing are plain bools."""
    return bool(mask.any()) if mask.all() or not mask.any() else Rows(mask)


def either(a: Flag, b: Flag) -> Flag:
    """Selected by one or the other."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is True or b is True or (b if a is False else a)
    return flag_of(a.mask | b.mask)


def both(a: Flag, b: Flag) -> Flag:
    """Selected by one and the other."""
    return invert(either(invert(a), invert(b)))


def invert(a: Flag) -> Flag:
    """Selected where it was not."""
    return not a if isinstance(a, bool) else ~a


def minus(a: Flag, b: Flag) -> Flag:
    """Selected by one and not by the other."""
    return both(a, invert(b))


def union(flags: Iterable[Flag]) -> Flag:
    """Selected by any."""
    return functools.reduce(either, flags, False)


def public(flag: Flag) -> bool | np.ndarray:
    """A flag as a mask has it: a bool, or a vector of bools."""
    return flag if isinstance(flag, bool) else flag.mask.copy()


def take(x: Any, rows: Rows) -> Any:
    """The rows of an array; abstract arrays too."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((rows.count, *x.shape[1:]), x.dtype)
    if isinstance(x, np.ndarray):
        return x[rows.mask]
    if rows.runs:
        return _joined([jax.lax.slice_in_dim(x, *run) for run in rows.runs])
    return x.at[rows.indices].get(
        indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds"
    )


def put(x: Any, rows: Rows, values: Any) -> Any:
    """The array with other rows; in place where XLA may."""
    if isinstance(x, np.ndarray) and isinstance(values, np.ndarray):
        new = x.copy()
        new[rows.mask] = values
        return new
    new = jnp.asarray(x)
    if rows.runs:
        for first, piece in _pieces(rows.runs, values):
            new = jax.lax.dynamic_update_slice_in_dim(new, piece, first, 0)
        return new
    return new.at[rows.indices].set(
        values, indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds"
    )


def among(values: jax.Array, rows: Rows, fill: float) -> jax.Array:
    """Rows in their places among others that are all `fill`.

    Concatenated where they are a few runs, as XLA takes a slice of that back out for nothing.
    """
    other = complex(fill, fill) if jnp.iscomplexobj(values) else fill

    def filled(count: int) -> jax.Array:
        return jnp.full((count, *values.shape[1:]), other, values.dtype)

    if not rows.runs:
        return put(filled(len(rows.mask)), rows, values)
    pieces: list[jax.Array] = []
    end = 0
    for first, piece in _pieces(rows.runs, values):
        pieces += [filled(first - end), piece]
        end = first + piece.shape[0]
    return _joined([*pieces, filled(len(rows.mask) - end)])


def _pieces(runs: list[tuple[int, int]], values: Any) -> Iterator[tuple[int, Any]]:
    """The rows of each run, with where it begins."""
    start = 0
    for first, stop in runs:
        piece = jax.lax.slice_in_dim(values, start, start + stop - first)
        yield first, piece
        start += stop - first


def _joined(pieces: list[Any]) -> Any:
    present = [piece for piece in pieces if piece.shape[0]]
    return present[0] if len(present) == 1 else jnp.concatenate(present)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def whole(x: Any, part: Any, rows: Rows) -> Any:
    """An array in which `part`, the rows as they are in it, can be differentiated.

    `put(x, rows, part)` would have the same value and derivatives, but copy the whole array.

    Args:
      x: The array.
      part: Its rows, `take(x, rows)`.
      rows: Which they are.
    """
    del part, rows
    return x


@whole.defjvp
def _whole_jvp(rows: Rows, primals: Any, tangents: Any) -> Any:
    x, _ = primals
    return x, put(tangents[0], rows, tangents[1])
