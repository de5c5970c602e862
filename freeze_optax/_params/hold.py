"""Keeping leaves that no optimizer owns."""

from typing import Any

import jax

from freeze_optax._rows.rows import Flag, Rows
from freeze_optax._rows.take_put import put_rows, take_rows_bitwise
from freeze_optax._select.specs import Spec, as_selector
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.messages import path_differences
from freeze_optax._tree.variables import is_variable


def hold(new: Any, old: Any, where: Spec) -> Any:
    """`new` with the selected leaves of `old`: keeps what no optimizer owns.

    BatchNorm statistics change in the forward pass, not through gradients, so freezing them is a
    choice of its own: hold them. Here the spec counts as it is written; an integer counter that
    is not selected moves on.

    Examples:
      >>> import freeze_optax as fo
      >>> old = {"bn_0": {"mean": 0.0, "steps": 1}, "bn_1": {"mean": 0.0, "steps": 1}}
      >>> new = {"bn_0": {"mean": 0.5, "steps": 2}, "bn_1": {"mean": 0.7, "steps": 2}}
      >>> fo.hold(new, old, "bn_0/mean")
      {'bn_0': {'mean': 0.0, 'steps': 2}, 'bn_1': {'mean': 0.7, 'steps': 2}}

    Args:
      new: A tree.
      old: A tree of the same structure.
      where: The leaves to take from `old`: any spec, see `freeze_optax.mask`.

    Returns:
      A tree of the structure of `new`; the leaves are the very objects.

    Raises:
      ValueError: If the trees differ in structure, or the spec does not fit them; or if a selected
        NNX Variable is in both trees, so that nothing of what it was is left.
    """
    after, before = Leaves(new), Leaves(old)
    if after.treedef != before.treedef:
        raise ValueError(
            "`new` and `old` are different trees: "
            + path_differences(after.paths, before.paths, "in `new`", "in `old`")
        )
    held = as_selector(where).flags(after)
    _check_copied(new, old, after.fill_leaves(held))
    triples = zip(after.values, before.values, held, strict=True)
    return after.rebuild(_held(n, o, flag) for n, o, flag in triples)


def _held(new: Any, old: Any, flag: Flag) -> Any:
    if isinstance(flag, Rows):
        return put_rows(new, flag, take_rows_bitwise(old, flag))
    return old if flag else new


def _check_copied(new: Any, old: Any, held: Any) -> None:
    # `nnx.state` gives the model's own Variables, which go on changing with it.
    trees = [Leaves(tree, stop=is_variable).values for tree in (new, old, held)]
    triples = zip(*trees, strict=True)
    if any(a is b and is_variable(a) and any(jax.tree.leaves(flag)) for a, b, flag in triples):
        raise ValueError(
            "`new` and `old` hold the very same Variables, so what they were is gone; keep a copy "
            "before they change: old = jax.tree.map(jnp.copy, nnx.state(model, nnx.BatchStat))"
        )
