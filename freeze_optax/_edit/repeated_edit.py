"""`RepeatedEdit`: an edit that a loop repeats in each step, known again by what it depends on."""

import functools
import operator
from typing import Any

import jax
import numpy as np

from freeze_optax._select.selector import Selector
from freeze_optax._state.plan import Plan


class RepeatedEdit:
    """An edit of a plan by a selector that reads paths alone.

    A loop that calls `set_frozen(state, params, phases.at(step))` in each step changes the plan now
    and then. Between, the edit is compared with the one before, and nothing is resolved.

    Args:
      edit: The name of the edit, and the text of the selector.
      plan: The plan to edit.
      params: The structure of the params, and what each leaf is.
    """

    def __init__(self, edit: tuple[str, str], plan: Plan, params: tuple[Any, ...]):
        self._edit, self._plan, self._params = edit, plan, params

    def keeps_plan(self) -> bool:
        """Returns whether the edit is known to leave the plan as it is."""
        known = self._plan.context.known_mask(self._edit, self._params)
        return known is not None and known == self._plan.mask

    def remember(self) -> None:
        """Keeps that the edit leaves the plan as it is."""
        self._plan.context.remember_mask(self._edit, self._params, self._plan.mask)


def repeated_edit(verb: str, selector: Selector, plan: Plan, params: Any) -> RepeatedEdit | None:
    """Returns the edit, or None if more than paths and kinds of leaf decides what it comes to.

    Args:
      verb: The name of the edit.
      selector: The selector. One that looks at leaves or modules is asked in each step.
      plan: The plan to edit. What a part of a leaf comes to depends on the other parts.
      params: The params.
    """
    if not selector.is_by_path or plan.part_table is not None:
        return None
    # Without a function that says where to stop, as that would be called for each node.
    leaves, treedef = jax.tree.flatten(params)
    forms = _forms(leaves)
    return None if forms is None else RepeatedEdit((verb, repr(selector)), plan, (treedef, forms))


def _forms(leaves: list[Any]) -> tuple[Any, ...] | None:
    """Returns the shape, dtype and class of each leaf; None if one is of a class of its own."""
    # Nearly all trees hold arrays of one class. Then no Python runs for each leaf. Those of the
    # next step have the same abstract values, so they compare as fast.
    if all(map(_is_jax_array_type, set(map(type, leaves)))):
        return tuple(map(operator.attrgetter("aval"), leaves))
    forms = tuple(map(_form, leaves))
    return None if None in forms else forms


def _form(leaf: Any) -> Any:
    cls = type(leaf)
    if _is_jax_array_type(cls):
        return leaf.aval
    if issubclass(cls, np.ndarray | np.generic | jax.ShapeDtypeStruct):
        return (cls, leaf.shape, leaf.dtype)
    # A function among the params, or a number. What has a dtype is of a class that we do not know.
    return None if hasattr(leaf, "dtype") else (cls,)


@functools.cache
def _is_jax_array_type(cls: type) -> bool:
    return issubclass(cls, jax.Array)
