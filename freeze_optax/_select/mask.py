"""Resolve a spec on a tree, to a mask or to labels."""

from typing import Any

from freeze_optax._rows.flags import flags_to_masks
from freeze_optax._select.specs import Spec, as_selector, resolve
from freeze_optax._tree.leaves import Leaves


def mask(spec: Spec, tree: Any) -> Any:
    """Resolves a spec on `tree`, and returns a tree of Python bools, True for frozen.

    The mask is True at each leaf that the spec selects. It is also True at each leaf that cannot be
    trained, whatever the spec says: integers, bools, PRNG keys, and anything that is neither an
    array nor a Python float or complex number. The leaves of a quantized array, its values of a few
    bits and their scales, are frozen together, unless the spec selects the values and not a scale.
    `spec(tree)`, where the spec is a selector, is the mask without these rules.

    Examples:
      >>> import jax
      >>> import freeze_optax as fo
      >>> params = {"encoder": {"w": 1.0}, "head": {"w": 2.0}, "step": 7}
      >>> fo.mask("encoder", params)
      {'encoder': {'w': True}, 'head': {'w': False}, 'step': True}
      >>> fo.mask({"encoder": False, "head": True, "step": False}, params)
      {'encoder': {'w': False}, 'head': {'w': True}, 'step': True}

    Args:
      spec: Any spec: a selector, a path glob, a bool, a mask of the structure of `tree` or a
        prefix of it (matched by key path), a function from a tree to a mask, a `FreezeState` or a
        tree with one, an NNX filter or a type of NNX Variable, or a list or tuple of these for
        their union.
      tree: Any pytree; leaves may be abstract (`jax.ShapeDtypeStruct`).

    Returns:
      A tree of the structure of `tree`, with a Python bool at each leaf, True for frozen. Where a
      leaf is frozen in part, it has a NumPy array of bools that broadcasts to the leaf: a vector,
      one bool for each row, for rows of the leading axis; an array of length 1 along all other axes
      for rows of another axis; an array of the leaf's shape for single elements. Such arrays in a
      mask are read in the same way. Holes (`optax.MaskedNode`) stay. `tree` is unchanged.

    Raises:
      ValueError: If a pattern selects nothing, or a mask or state is of another tree.
      IndexError: If a layer is not there (`fo.layers(pattern)[i]`).
      TypeError: If a mask holds anything but bools, or the spec is a class.
    """
    leaves = Leaves(tree)
    return leaves.fill_leaves(flags_to_masks(resolve(spec, leaves), leaves.values))


def labels(spec: Spec, tree: Any) -> Any:
    """Resolves a spec on `tree`, and returns the label `"frozen"` or `"trainable"` for each leaf.

    `optax.partition` takes such labels.

    Examples:
      >>> import freeze_optax as fo
      >>> fo.labels("encoder", {"encoder": {"w": 1.0}, "head": {"w": 2.0}})
      {'encoder': {'w': 'frozen'}, 'head': {'w': 'trainable'}}

    Args:
      spec: As for `mask`.
      tree: As for `mask`.

    Returns:
      A tree of the structure of `tree`, with a label at each leaf. `Selector.labels` gives the
      same, as a function of the tree. `tree` is unchanged.

    Raises:
      ValueError: As `mask`; also if a leaf is frozen in part.
      IndexError: As `mask`.
      TypeError: As `mask`.
    """
    return as_selector(spec).labels(tree)
