"""The arguments of `rotating`, checked."""

import operator
from typing import Any

import numpy as np

from freeze_optax._rows.subset import Subset
from freeze_optax._state.rotation import Blocks, Rotation
from freeze_optax._tree.kinds import can_train
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.messages import few_clauses, quoted_list


def at_least_one(name: str, value: Any) -> int:
    """Returns a number of layers or steps, or raises if it is none."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"the {name} of fo.rotating is an integer, not {value!r}")
    if value < 1:
        what = (
            "the number of layers that train at a time" if name == "count" else "a number of steps"
        )
        raise ValueError(f"the {name} of fo.rotating is {what}, 1 or more, not {value}")
    return operator.index(value)


def checked_order(order: Any, count: int, key: Any) -> str | Blocks:
    """Returns the order as it is stored, or raises if it is none."""
    if isinstance(order, str):
        if order not in ("random", "ascending", "descending"):
            raise ValueError(
                "the order of fo.rotating is 'random', 'ascending', 'descending' or a list of "
                f"blocks, not {order!r}"
            )
        if order == "random" and key is None:
            raise TypeError(
                "fo.rotating draws its layers by a key: give key=jax.random.key(0), or "
                "order='ascending'"
            )
        return order
    blocks = tuple(tuple(map(operator.index, block)) for block in order)
    wrong = [block for block in blocks if len(set(block)) != count or len(block) != count]
    if wrong or not blocks:
        raise ValueError(
            f"each block of fo.rotating has {count} different layers, as count={count}, but "
            + (f"one is {list(wrong[0])}" if wrong else "there is no block")
        )
    return blocks


def fitting_order(order: str | Blocks, length: int) -> str | Blocks:
    """Returns the order with layers counted from the first, or raises if one does not fit."""
    if isinstance(order, str):
        return order
    for block in order:
        for layer in block:
            if not -length <= layer < length:
                raise ValueError(
                    f"fo.rotating has the layer {layer} in the block {list(block)}, but the stack "
                    f"has {length} layers"
                )
    fitting = tuple(tuple(layer % length for layer in block) for block in order)
    for given, block in zip(order, fitting, strict=True):
        if len(set(block)) < len(block):
            raise ValueError(
                f"fo.rotating has a layer twice in the block {list(given)}, as the stack has "
                f"{length} layers"
            )
    return fitting


def rotation_of(
    leaves: Leaves, frozen: Any, selected: Any, axis: int, count: int, every: int
) -> Rotation:
    """Returns how the layers of the stack take turns, without an order; raises if it can't be."""
    for path, flag in zip(leaves.paths, selected, strict=True):
        if isinstance(flag, Subset):
            raise ValueError(
                f"the stack of fo.rotating has a part of {path!r} ({flag!r}); a stack is of whole "
                "leaves, and `order` says which layers train"
            )
    stack = [i for i, flag in enumerate(selected) if flag and can_train(leaves.values[i])]
    in_part = [leaves.paths[i] for i in stack if isinstance(frozen[i], Subset)]
    if in_part:
        raise ValueError(
            f"{quoted_list(in_part)} is in the stack of fo.rotating and frozen in part; freeze the "
            "leaf, or leave its layers out of `order`"
        )
    trained = tuple(i for i in stack if frozen[i] is False)
    if not trained:
        raise ValueError(
            "nothing of the stack of fo.rotating trains; see `stack` and `frozen` (not "
            "fo.freezable around it)"
        )
    axes = tuple(axis + np.ndim(leaves.values[i]) if axis < 0 else axis for i in trained)
    lengths = {
        leaves.paths[i]: np.shape(leaves.values[i])[a]
        if 0 <= a < np.ndim(leaves.values[i])
        else None
        for i, a in zip(trained, axes, strict=True)
    }
    if len(set(lengths.values())) != 1 or None in lengths.values():
        clauses = [
            f"{path!r} has {'no such axis' if n is None else n}" for path, n in lengths.items()
        ]
        raise ValueError(
            f"the leaves of a stack have the same number of layers along axis {axis}, but "
            + few_clauses(clauses)
        )
    length = next(n for n in lengths.values() if n is not None)
    if count > length:
        raise ValueError(
            f"fo.rotating trains {count} layers at a time, but the stack has {length}: "
            f"{quoted_list(lengths)}"
        )
    return Rotation(trained, axes, length, count, every, "ascending")
