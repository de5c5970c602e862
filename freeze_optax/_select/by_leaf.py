"""The selectors by a label of a leaf, or by the leaf itself: `labelled` and `where`."""

from collections.abc import Callable
from typing import Any, final

import numpy as np

from freeze_optax._select.selector import Selector
from freeze_optax._select.specs import is_function, match_by_path, takes
from freeze_optax._tree.holes import is_hole
from freeze_optax._tree.kinds import is_array
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.messages import nearest_names


@final
class _Labelled(Selector):
    def __init__(self, labels: Any, names: tuple[Any, ...]):
        self._labels, self._names = labels, names

    def flags(self, leaves: Leaves) -> list[bool]:
        labels = self._labels(leaves.tree) if is_function(self._labels) else self._labels
        pairs = match_by_path(labels, leaves, "label tree")
        for path, label in pairs:
            if is_array(label):
                raise TypeError(f"the label at {path!r} is an array, not a name or another key")
        leaf_labels = [label for _, label in pairs]
        present = dict.fromkeys(str(label) for label in leaf_labels if not is_hole(label))
        # A label function gives a hole for a hole, so a label may have no leaf in this tree.
        has_holes = any(map(is_hole, leaf_labels))
        for name in self._names:
            if name not in leaf_labels and not has_holes:
                raise ValueError(
                    f"label {name!r} is at no leaf; {nearest_names(str(name), present)}"
                )
        return [label in self._names for label in leaf_labels]

    def __repr__(self) -> str:
        return f"labelled({', '.join(map(repr, self._names))})"


def labelled(labels: Any, *names: Any) -> Selector:
    """Selects the leaves whose label, in an optax-style label tree, is one of the names.

    It takes the label trees and label functions that were written for `optax.partition`
    (`multi_transform`).

    Examples:
      >>> import jax
      >>> import freeze_optax as fo
      >>> params = {"body": {"w": 1.0}, "head": {"w": 2.0}}
      >>> fo.labelled({"body": "cold", "head": "hot"}, "cold")(params)
      {'body': {'w': True}, 'head': {'w': False}}

    Args:
      labels: A tree of labels, of the structure of the params or a prefix of it (matched by key
        path); or a function that takes the params and returns such a tree.
      *names: The labels to select.

    Returns:
      The selector. Applied to a tree, it raises ValueError if the labels do not fit the tree, or
      if one of the names is at no leaf; and TypeError if a label is an array.

    Raises:
      ValueError: If there is no name.
    """
    if not names:
        raise ValueError("fo.labelled needs the labels to select: fo.labelled(labels, 'frozen')")
    return _Labelled(labels, names)


@final
class _Where(Selector):
    def __init__(self, predicate: Callable[[str, Any], bool]):
        self._predicate = predicate

    def flags(self, leaves: Leaves) -> list[bool]:
        if not takes(self._predicate, 2):
            raise TypeError(
                f"fo.where takes a function of two arguments, path and leaf, but that of {self!r} "
                "takes others"
            )
        return [self._ask(p, x) for p, x in zip(leaves.paths, leaves.values, strict=True)]

    def _ask(self, path: str, leaf: Any) -> bool:
        if is_hole(leaf):
            return False
        answer = self._predicate(path, leaf)
        if not isinstance(answer, bool | np.bool_):
            raise TypeError(
                f"the predicate of {self!r} gave {answer!r} at {path!r}; it must give True or False"
            )
        return bool(answer)

    def __repr__(self) -> str:
        return f"where({getattr(self._predicate, '__qualname__', self._predicate)})"


def where(predicate: Callable[[str, Any], bool]) -> Selector:
    """Selects the leaves for which `predicate(path, leaf)` is True.

    Examples:
      >>> import freeze_optax as fo
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
      >>> fo.where(lambda path, leaf: leaf.ndim > 1)(params)
      {'bias': False, 'kernel': True}

    Args:
      predicate: A function that takes the key path as text and the leaf, and returns a bool. The
        leaf is a tracer under jit, and a `jax.ShapeDtypeStruct` in an abstract tree. The function
        is not called for holes.

    Returns:
      The selector. Applied to a tree, it raises TypeError if the predicate does not take two
      arguments, or, naming the path, if it returns anything but a bool. It is no error if no leaf
      is selected: a typo in the predicate freezes nothing, and `freeze_optax.summary` shows it.

    Raises:
      TypeError: If `predicate` is not callable.
    """
    if not callable(predicate):
        raise TypeError(
            f"fo.where takes a function of path and leaf, not {predicate!r}; a glob goes to fo.path"
        )
    return _Where(predicate)
