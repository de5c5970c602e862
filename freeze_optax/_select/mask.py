"""Masks and labels: what a spec comes to on a tree."""

from typing import Any

from freeze_optax._rows.rows import flag_to_mask
from freeze_optax._select.specs import Spec, as_selector, resolve
from freeze_optax._tree.leaves import Leaves


def mask(spec: Spec, tree: Any) -> Any:
    """What is frozen in `tree`, as a tree of Python bools.

    The resolved mask of any spec: True at each leaf it selects, and at each that cannot be
    trained whatever it says (integers, bools, PRNG keys, anything that is neither an array nor a
    Python float or complex number).

    Examples:
      >>> import jax
      >>> import freeze_optax as fo
      >>> params = {"encoder": {"w": 1.0}, "head": {"w": 2.0}, "step": 7}
      >>> fo.mask("encoder", params)
      {'encoder': {'w': True}, 'head': {'w': False}, 'step': True}
      >>> fo.mask({"encoder": False, "head": True, "step": False}, params)
      {'encoder': {'w': False}, 'head': {'w': True}, 'step': True}

    Args:
      spec: A selector, a path glob, a bool, a mask of the structure of `tree` or a prefix of it
        (matched by key path), a function from a tree to a mask, a `FreezeState` or a tree with
        one, or a list or tuple of these for their union.
      tree: Any pytree; leaves may be abstract (`jax.ShapeDtypeStruct`).

    Returns:
      The structure of `tree` with a Python bool at each leaf, True for frozen; a NumPy vector of
      bools, one for each row, where a leaf is frozen in part. Holes (`optax.MaskedNode`) stay.

    Raises:
      ValueError: If a pattern selects nothing, or a mask or state is of another tree.
      IndexError: If a layer is not there (`fo.layers(pattern)[i]`).
      TypeError: If a mask holds anything but bools.
    """
    leaves = Leaves(tree)
    return leaves.fill_leaves(map(flag_to_mask, resolve(spec, leaves)))


def labels(spec: Spec, tree: Any) -> Any:
    """`"frozen"` or `"trainable"` at each leaf, as `optax.partition` wants them.

    Examples:
      >>> import freeze_optax as fo
      >>> fo.labels("encoder", {"encoder": {"w": 1.0}, "head": {"w": 2.0}})
      {'encoder': {'w': 'frozen'}, 'head': {'w': 'trainable'}}

    Args:
      spec: As for `freeze_optax.mask`.
      tree: Any pytree; leaves may be abstract.

    Returns:
      The structure of `tree` with a label at each leaf. `Selector.labels` is the same as a
      function of the tree.

    Raises:
      ValueError: If a pattern selects nothing, a mask or state is of another tree, or a leaf is
        frozen in part.
      IndexError: If a layer is not there (`fo.layers(pattern)[i]`).
      TypeError: If a mask holds anything but bools.
    """
    return as_selector(spec).labels(tree)
