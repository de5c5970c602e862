"""Flags: whether a leaf is selected, or which part of it is."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import numpy as np

from freeze_optax._rows.elements import Elements
from freeze_optax._rows.rows import Rows
from freeze_optax._rows.subset import Shape, Subset

Flag: TypeAlias = bool | Subset
"""Whether a leaf is selected, or which of its rows or elements are selected.

What `flag_from_mask` gives is the same for the same elements. So two flags are equal exactly if
they select the same.
"""


def flag_from_vector(mask: np.ndarray, axis: int = 0) -> Flag:
    """Returns the flag of a bool for each row along an axis: a plain bool if all are equal."""
    return bool(mask.any()) if mask.all() or not mask.any() else Rows(mask, axis)


def flag_from_mask(mask: np.ndarray) -> Flag:
    """Returns the flag of a bool for each element: a bool or rows where it is not finer."""
    if mask.all() or not mask.any():
        return bool(mask.any())
    varying = [axis for axis in range(mask.ndim) if (mask != mask.take([0], axis)).any()]
    if len(varying) > 1:
        return Elements.from_mask(mask)
    (axis,) = varying
    return Rows(mask[(0,) * axis + (slice(None),) + (0,) * (mask.ndim - axis - 1)], axis)


def flag_or(a: Flag, b: Flag, shape: Shape | None = None) -> Flag:
    """Returns what is selected by `a` or by `b`.

    Args:
      a: A flag.
      b: Another flag of the same leaf.
      shape: The shape of the leaf, where the two may be rows along different axes.
    """
    if isinstance(a, bool) or isinstance(b, bool):
        return a is True or b is True or (b if a is False else a)
    if isinstance(a, Rows) and isinstance(b, Rows) and a.axis == b.axis:
        return flag_from_vector(a.mask | b.mask, a.axis)
    shape = shape_of_elements((a, b), shape)
    return flag_from_mask(a.mask_of(shape) | b.mask_of(shape))


def shape_of_elements(subsets: Iterable[Subset], shape: Shape | None = None) -> Shape:
    """Returns the shape of the leaf that subsets are of: that of the elements among them.

    Args:
      subsets: The subsets.
      shape: The shape of the leaf if none of them has elements.
    """
    known = next((one.shape for one in subsets if isinstance(one, Elements)), shape)
    if known is None:
        raise ValueError("rows along different axes make elements only of a leaf of known shape")
    return known


def flag_and(a: Flag, b: Flag, shape: Shape | None = None) -> Flag:
    """Returns what is selected by `a` and by `b`; the arguments are as for `flag_or`."""
    return flag_not(flag_or(flag_not(a), flag_not(b), shape))


def flag_not(a: Flag) -> Flag:
    """Returns what is not selected by `a`."""
    return not a if isinstance(a, bool) else ~a


def flag_minus(a: Flag, b: Flag, shape: Shape | None = None) -> Flag:
    """Returns what is selected by `a` and not by `b`; the arguments are as for `flag_or`."""
    return flag_and(a, flag_not(b), shape)


def flag_union(flags: Iterable[Flag], shape: Shape | None = None) -> Flag:
    """Returns what is selected by any of the flags."""
    return functools.reduce(functools.partial(flag_or, shape=shape), flags, False)


def combine_flags(
    function: Callable[[Flag, Flag, Shape], Flag],
    first: Iterable[Flag],
    second: Iterable[Flag],
    leaves: Iterable[Any],
) -> list[Flag]:
    """Returns `flag_or`, `flag_and` or `flag_minus` of the flags of each leaf.

    Args:
      function: One of these.
      first: The flag of each leaf.
      second: Another flag of each leaf.
      leaves: The leaves, for their shapes.
    """
    triples = zip(first, second, leaves, strict=True)
    return [function(a, b, _shape_if_split(a, b, leaf)) for a, b, leaf in triples]


def _shape_if_split(a: Flag, b: Flag, leaf: Any) -> Shape:
    return () if isinstance(a, bool) or isinstance(b, bool) else np.shape(leaf)


def flag_within(inner: Subset, outer: Subset | None, shape: Shape | None = None) -> Flag:
    """Returns which elements of the compact array of a subset belong to a smaller subset.

    Args:
      inner: The smaller subset.
      outer: The larger one, which contains it; None for the whole leaf.
      shape: As for `flag_or`.
    """
    if outer is None:
        return inner
    if isinstance(inner, Rows) and isinstance(outer, Rows) and inner.axis == outer.axis:
        return flag_from_vector(inner.mask[outer.mask], inner.axis)
    shape = shape_of_elements((inner, outer), shape)
    within = inner.mask_of(shape)[outer.mask_of(shape)]
    return flag_from_mask(within.reshape(outer.compact_shape(shape)))


def flags_to_masks(flags: Iterable[Flag], leaves: Iterable[Any]) -> list[bool | np.ndarray]:
    """Returns the flag of each leaf in the form of masks: a bool, or as `Subset.as_mask`."""
    pairs = zip(flags, leaves, strict=True)
    return [x if isinstance(x, bool) else x.as_mask(np.ndim(leaf)) for x, leaf in pairs]


def flag_along(flag: Flag, axis: int, shape: Shape) -> np.ndarray:
    """Returns for each row along an axis whether all of its elements are selected.

    Args:
      flag: The flag of a leaf.
      axis: The axis, counted from 0.
      shape: The shape of the leaf.
    """
    if isinstance(flag, bool):
        return np.full(shape[axis], flag)
    others = tuple(i for i in range(len(shape)) if i != axis)
    return np.logical_and.reduce(flag.mask_of(shape), axis=others)
