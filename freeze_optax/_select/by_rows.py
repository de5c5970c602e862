"""The selector of a part of a leaf."""

from collections.abc import Sequence
from typing import Any, final

import numpy as np
from jax.core import Tracer

from freeze_optax._rows.rows import Flag, flag_and, flag_from_vector
from freeze_optax._select.selector import Selector
from freeze_optax._select.slices import checked_slice, ends_of
from freeze_optax._select.specs import Spec, as_selector
from freeze_optax._tree.holes import is_hole
from freeze_optax._tree.kinds import can_train, is_array
from freeze_optax._tree.leaves import Leaves


@final
class _Rows(Selector):
    def __init__(self, spec: Spec, rows: slice | np.ndarray):
        self._selector, self._rows = as_selector(spec), rows

    def flags(self, leaves: Leaves) -> list[Flag]:
        selected = self._selector.flags(leaves)
        triples = zip(leaves.paths, leaves.values, selected, strict=True)
        return [self._part(path, leaf, flag) for path, leaf, flag in triples]

    def _part(self, path: str, leaf: Any, flag: Flag) -> Flag:
        shape = getattr(leaf, "shape", ()) if is_array(leaf) else ()
        # An activation function or a step counter beside the arrays is frozen anyway.
        if flag is False or is_hole(leaf) or (not shape and not can_train(leaf)):
            return False
        if not shape:
            raise ValueError(
                f"{self!r}: the leaf {path!r} is a scalar, of shape (), and has no rows"
            )
        mask = np.zeros(shape[0], bool)
        odd = _problem(self._rows, shape[0])
        if odd:
            raise ValueError(f"{self!r}: the leaf {path!r} is of shape {shape}, so {odd}")
        mask[self._rows] = True
        return flag_and(flag, flag_from_vector(mask))

    def __repr__(self) -> str:
        rows = self._rows
        if isinstance(rows, slice):
            text = f"slice({', '.join(map(repr, ends_of(rows)))})"
        else:
            text = f"{len(rows)} {'bools' if rows.dtype == bool else 'indices'}"
        return f"rows({self._selector!r}, {text})"


def _problem(rows: slice | np.ndarray, count: int) -> str:
    """What is wrong with rows for a leaf of so many; empty if nothing is."""
    if isinstance(rows, slice):
        beyond = [end for end in (rows.start, rows.stop) if end is not None and abs(end) > count]
        return f"{beyond[0]} is out of range" if beyond else ""
    if rows.dtype == bool:
        return "" if len(rows) == count else f"it takes {count} bools, not {len(rows)}"
    beyond = rows[(rows < -count) | (rows >= count)]
    return f"row {beyond[0]} is out of range" if beyond.size else ""


def rows(spec: Spec, rows: slice | Sequence[int] | Sequence[bool] | np.ndarray) -> Selector:
    """Selects rows of the leading axis of each leaf that a spec selects.

    To train only the new tokens of an embedding, or the last layers of a model whose layers are
    stacked in one array. The optimizer then sees, and keeps state for, the array of the rows that
    train. One that treats elements alone (Adam, momentum) does to these rows what it would do
    without the others; to one that does not (factored, orthogonalised, with trust ratios) this
    array is all there is. Under jit XLA may fuse the taking of rows out of a whole gradient with
    what follows, which then differs in the last bit; with `holes=True` it does not.
    Rows that are thawed, or parked, later are an array of their own in the state, and statistics
    that can't be told apart by rows (factored ones) make such an edit an error.

    Rows in a few runs are sliced; scattered ones are gathered, and then it is cheaper to
    differentiate with `holes=True`, which gives the gradient of those rows alone. To save the
    backward pass of stacked layers too, see `freeze_optax.scan`.

    `freeze_optax.apply_updates` writes the rows that train alone, in place where the params are
    donated; that of optax, which `TrainState` and `nnx.Optimizer` call, adds -0.0 to the others.
    `optax.masked` and `optax.partition` know nothing of rows.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import freeze_optax as fo
      >>> params = {"embed": jnp.zeros((5, 2)), "head": jnp.zeros(2)}
      >>> old_tokens = fo.rows("embed", slice(0, 3))
      >>> old_tokens(params)["embed"].tolist(), old_tokens(params)["head"]
      ([True, True, True, False, False], False)
      >>> state = fo.freezable(optax.adam(1e-3), old_tokens).init(params)
      >>> optax.tree_utils.tree_get(state, "mu")["embed"].shape
      (2, 2)

    Args:
      spec: The leaves: any spec, see `freeze_optax.mask`.
      rows: Which rows of each: a slice, ints, or a vector with a bool for each row.

    Returns:
      The selector. In its mask such a leaf has a NumPy vector of bools, or a plain bool where
      all rows or none are selected. Applied to a tree, it raises ValueError, naming path and
      shape, if rows are out of range (of a slice too), bools are not as many as rows, or a leaf
      that could train is a scalar.

    Raises:
      TypeError: If `rows` is neither of these.
      ValueError: If it is a slice with a step of 0.
    """
    if isinstance(rows, slice):
        return _Rows(spec, checked_slice(rows, "rows are"))
    return _Rows(spec, _index_vector(rows))


def _index_vector(rows: Any) -> np.ndarray:
    if isinstance(rows, Tracer):
        raise TypeError("the rows are traced, but what is frozen is settled before tracing")
    try:
        vector = np.array(rows)
    except (TypeError, ValueError):
        vector = np.asarray(None)
    if vector.ndim == 1 and not vector.size and vector.dtype != bool:
        return vector.astype(int)
    if vector.ndim != 1 or vector.dtype.kind not in "biu":
        raise TypeError(
            f"rows are a slice, ints or a vector of bools, not {rows!r}; for one row write [row]"
        )
    return vector
