"""The selector of rows of a leaf, along any of its axes."""

from collections.abc import Sequence
from typing import Any, final

import jax
import numpy as np
from jax.core import Tracer

from freeze_optax._rows.flags import Flag, flag_and, flag_from_vector
from freeze_optax._select.selector import Selector
from freeze_optax._select.slices import checked_slice, ends_of
from freeze_optax._select.specs import Spec, as_selector
from freeze_optax._tree.holes import is_hole
from freeze_optax._tree.kinds import can_train, is_array
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.modules import is_sparse_type


@final
class _Rows(Selector):
    _axis = 0  # so that former pickles have it

    def __init__(self, spec: Spec, rows: slice | np.ndarray, axis: int):
        self._selector, self._rows, self._axis = as_selector(spec), rows, axis

    def flags(self, leaves: Leaves) -> list[Flag]:
        selected = self._selector.flags(leaves)
        self._check_dense(leaves, selected)
        triples = zip(leaves.paths, leaves.values, selected, strict=True)
        return [self._flag(path, leaf, flag) for path, leaf, flag in triples]

    def _check_dense(self, leaves: Leaves, selected: Sequence[Flag]) -> None:
        """Raises if a selected leaf is in a sparse matrix, where an array has no row for each row.

        The leading axis of a batched one is that of the matrix, so its rows are right there.
        """
        nodes = Leaves(leaves.tree, stop=lambda x: is_hole(x) or is_sparse_type(type(x)))
        for path, node in zip(nodes.paths, nodes.values, strict=True):
            if not is_sparse_type(type(node)) or (self._axis == 0 and _is_batched(node)):
                continue
            below = leaves.as_stored.flags_below({path})
            if any(a and b is not False for a, b in zip(below, selected, strict=True)):
                raise ValueError(
                    f"{self!r}: {path!r} is a sparse matrix, a {type(node).__name__}, which stores "
                    "entries and no rows; freeze all of it, or make it dense: .todense()"
                )

    def _flag(self, path: str, leaf: Any, flag: Flag) -> Flag:
        shape = getattr(leaf, "shape", ()) if is_array(leaf) else ()
        # An activation function or a step counter beside the arrays is frozen in any case.
        if flag is False or is_hole(leaf) or (not shape and not can_train(leaf)):
            return False
        if not shape:
            raise ValueError(
                f"{self!r}: the leaf {path!r} is a scalar, of shape (), and has no rows"
            )
        axis = self._axis + len(shape) if self._axis < 0 else self._axis
        if not 0 <= axis < len(shape):
            raise ValueError(
                f"{self!r}: the leaf {path!r} is of shape {shape}, so it has no axis {self._axis}"
            )
        problem = _problem(self._rows, shape[axis])
        if problem:
            raise ValueError(f"{self!r}: the leaf {path!r} is of shape {shape}, so {problem}")
        mask = np.zeros(shape[axis], bool)
        mask[self._rows] = True
        # Rows without elements along one axis are also those along another.
        own = flag_from_vector(mask, axis) if all(shape) else bool(mask.size and mask.all())
        return flag_and(flag, own, shape)

    def __repr__(self) -> str:
        rows = self._rows
        if isinstance(rows, slice):
            text = f"slice({', '.join(map(repr, ends_of(rows)))})"
        else:
            text = f"{len(rows)} {'bools' if rows.dtype == bool else 'indices'}"
        axis = f", axis={self._axis}" if self._axis else ""
        return f"rows({self._selector!r}, {text}{axis})"


def _is_batched(matrix: Any) -> bool:
    """Whether the rows of a sparse matrix are those of each of its arrays."""
    arrays = [x for x in jax.tree.leaves(matrix) if is_array(x)]
    return bool(getattr(matrix, "n_batch", 0)) and all(
        x.shape[:1] == matrix.shape[:1] for x in arrays
    )


def _problem(rows: slice | np.ndarray, count: int) -> str:
    """Says why rows do not fit a leaf with `count` rows; empty if they do."""
    if isinstance(rows, slice):
        beyond = [end for end in (rows.start, rows.stop) if end is not None and abs(end) > count]
        return f"{beyond[0]} is out of range" if beyond else ""
    if rows.dtype == bool:
        return "" if len(rows) == count else f"it takes {count} bools, not {len(rows)}"
    beyond = rows[(rows < -count) | (rows >= count)]
    return f"row {beyond[0]} is out of range" if beyond.size else ""


def rows(
    spec: Spec, rows: slice | Sequence[int] | Sequence[bool] | np.ndarray, axis: int = 0
) -> Selector:
    """Selects rows, along one axis, of each leaf that a spec selects.

    Use it to train only the new tokens of an embedding, the new columns of an output head, some
    heads of attention, or the last layers of a model whose layers are stacked in one array.

    The optimizer gets an array of the rows that train, and keeps state for these rows alone. An
    optimizer that treats each element alone (Adam, momentum) updates these rows as it would without
    the other rows. An optimizer that does not (factored, orthogonalised, with trust ratios) sees
    this array as the whole leaf. Under jit, XLA may fuse the selection of rows from a whole
    gradient with the operations after it, and the result then differs in the last bit. With
    `holes=True` it does not differ. Rows that are thawed or parked later are an array of their own
    in the state. Statistics that can't be split by rows (factored ones) make such an edit an error.

    Rows in a few runs are sliced, scattered rows are gathered. Under jit, the gradient of an
    embedding of which some rows train is made for these rows alone, if the loss does nothing but
    look rows up in it. To save the backward pass of stacked layers too, see `freeze_optax.scan`.

    Rows of one leaf along different axes can be combined (`|`, `&`, `-`). What then trains, if it
    is no rows along one axis, is single elements, see `freeze_optax.elements`.

    On a mesh with explicit axes, the array of some rows is sharded as the leaf. If the mesh does
    not divide their number, the axis of the rows is not sharded.

    `freeze_optax.apply_updates` writes only the rows that train, in place if the params are
    donated. `optax.apply_updates`, which `TrainState` and `nnx.Optimizer` call, adds -0.0 to the
    frozen rows. `optax.masked` and `optax.partition` do not support rows.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import freeze_optax as fo
      >>> params = {"embed": jnp.zeros((5, 2)), "head": jnp.zeros((2, 5))}
      >>> old_tokens = fo.rows("embed", slice(0, 3)) | fo.rows("head", slice(0, 3), axis=1)
      >>> old_tokens(params)["embed"].tolist()
      [True, True, True, False, False]
      >>> old_tokens(params)["head"].tolist()
      [[True, True, True, False, False]]
      >>> state = fo.freezable(optax.adam(1e-3), old_tokens).init(params)
      >>> mu = optax.tree_utils.tree_get(state, "mu")
      >>> mu["embed"].shape, mu["head"].shape
      ((2, 2), (2, 2))

    Args:
      spec: Which leaves: any spec, see `freeze_optax.mask`.
      rows: Which rows of each leaf: a slice, ints, or a vector with one bool for each row.
      axis: The axis along which they are counted; a negative one is counted from the last.

    Returns:
      The selector. In its mask each such leaf has a NumPy array of bools. For the leading axis it
      is a vector with one for each row, for another axis an array that has the length 1 along all
      other axes. If all rows or no rows are selected, it is a plain bool. Applied to a tree, it
      raises ValueError, naming path and shape, if a leaf has no such axis, if rows are out of range
      (the ends of a slice too), if the number of bools is not the number of rows, or if a leaf that
      could train is a scalar.

    Raises:
      TypeError: If `rows` is none of these, or is traced; or if `axis` is not an integer.
      ValueError: If `rows` is a slice with a step of 0.
    """
    if isinstance(axis, bool) or not isinstance(axis, int | np.integer):
        raise TypeError(f"the axis of rows is an integer, not {axis!r}")
    if isinstance(rows, slice):
        return _Rows(spec, checked_slice(rows, "rows are"), int(axis))
    return _Rows(spec, _index_vector(rows), int(axis))


def _index_vector(rows: Any) -> np.ndarray:
    """Returns the rows as a vector of ints or bools."""
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
