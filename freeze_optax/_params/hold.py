"""Keep leaves that change outside the optimizer."""

from collections.abc import Sequence
from typing import Any

import jax

from freeze_optax._rows.flags import Flag
from freeze_optax._rows.subset import Subset
from freeze_optax._rows.take_put import put_bitwise, take_bitwise
from freeze_optax._select.specs import Spec, as_selector
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.messages import path_differences
from freeze_optax._tree.variables import is_variable


def hold(new: Any, old: Any, where: Spec) -> Any:
    """Returns `new` with the selected leaves of `old`, to freeze leaves that no optimizer updates.

    BatchNorm statistics change in the forward pass and not through gradients. So `freezable` does
    not freeze them; `hold` does. The raw spec counts here: an integer counter that is not selected
    keeps its new value.

    Examples:
      >>> import freeze_optax as fo
      >>> old = {"bn_0": {"mean": 0.0, "steps": 1}, "bn_1": {"mean": 0.0, "steps": 1}}
      >>> new = {"bn_0": {"mean": 0.5, "steps": 2}, "bn_1": {"mean": 0.7, "steps": 2}}
      >>> fo.hold(new, old, "bn_0/mean")
      {'bn_0': {'mean': 0.0, 'steps': 2}, 'bn_1': {'mean': 0.7, 'steps': 2}}

    Args:
      new: A pytree, after the forward pass.
      old: A pytree of the same structure, from before.
      where: Which leaves to take from `old`: any spec, see `freeze_optax.mask`. Where it selects
        some rows or elements of a leaf, only these are taken.

    Returns:
      A tree of the structure of `new`. Its leaves are the same objects as in `new` or `old`; only
      a leaf that is selected in part is a new array. `new` and `old` are unchanged.

    Raises:
      ValueError: If the trees differ in structure, or the spec does not fit them; if a leaf that is
        selected in part has another shape or dtype in `old`; or if a selected
        NNX Variable is in both trees, so that its old value is lost.
      IndexError: If a layer is not there (`fo.layers(pattern)[i]`).
      TypeError: If a mask holds anything but bools.
    """
    new_leaves, old_leaves = Leaves(new), Leaves(old)
    if new_leaves.treedef != old_leaves.treedef:
        raise ValueError(
            "`new` and `old` are different trees: "
            + path_differences(new_leaves.paths, old_leaves.paths, "in `new`", "in `old`")
        )
    held = as_selector(where).flags(new_leaves)
    _check_copied(new, old, new_leaves.fill_leaves(held))
    _check_parts_alike(new_leaves, old_leaves, held)
    triples = zip(new_leaves.values, old_leaves.values, held, strict=True)
    return new_leaves.rebuild(_hold_leaf(n, o, flag) for n, o, flag in triples)


def _hold_leaf(new: Any, old: Any, flag: Flag) -> Any:
    if isinstance(flag, Subset):
        return put_bitwise(new, flag, take_bitwise(old, flag))
    return old if flag else new


def _check_parts_alike(new: Leaves, old: Leaves, held: Sequence[Flag]) -> None:
    """Raises if a leaf of which a part is taken has another shape or dtype in `old`."""
    columns = zip(new.paths, new.values, old.values, held, strict=True)
    for path, *values in ((path, n, o) for path, n, o, flag in columns if isinstance(flag, Subset)):
        of_new, of_old = (f"{x.dtype}{list(x.shape)}" for x in values)
        if of_new != of_old:
            raise ValueError(
                f"{path!r} is {of_new} in `new` and {of_old} in `old`; to keep a part of a leaf, "
                "give both the same shape and dtype"
            )


def _check_copied(new: Any, old: Any, held: Any) -> None:
    """Raises if a selected Variable of `new` is the same object in `old`."""
    # `nnx.state` returns the model's own Variables, which change when the model changes.
    trees = [Leaves(tree, stop=is_variable).values for tree in (new, old, held)]
    triples = zip(*trees, strict=True)
    if any(a is b and is_variable(a) and any(jax.tree.leaves(flag)) for a, b, flag in triples):
        raise ValueError(
            "`new` and `old` hold the same Variables, so their old values are lost; keep a copy "
            "before they change: old = jax.tree.map(jnp.copy, nnx.state(model, nnx.BatchStat))"
        )
