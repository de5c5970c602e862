"""NNX filters as specs: they select the Variables that they match."""

from types import EllipsisType
from typing import Any, final

import jax

from freeze_optax._select.selector import Selector
from freeze_optax._tree.holes import is_hole
from freeze_optax._tree.key_paths import key_of, path_text
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.messages import quoted_list
from freeze_optax._tree.variables import is_variable, is_variable_type


class VariableFilter:
    """Base class of the NNX filters of this package."""


def is_variable_filter(x: Any) -> bool:
    """Returns whether `x` is a filter of NNX, and not a predicate or a tag of a user.

    A function is a spec already: it takes the tree and returns a mask. A str is a path.
    """
    if isinstance(x, type):
        return is_variable_type(x)
    # By name, as flax may not be installed.
    is_of_nnx = type(x).__module__ == "flax.nnx.filterlib"
    return isinstance(x, EllipsisType | VariableFilter) or (is_of_nnx and callable(x))


@final
class ByVariable(Selector):
    """Selects the Variables that an NNX filter matches, by their paths and types."""

    def __init__(self, variable_filter: Any):
        self._filter = variable_filter

    def flags(self, leaves: Leaves) -> list[bool]:
        nodes, _ = jax.tree_util.tree_flatten_with_path(
            leaves.tree, is_leaf=lambda x: is_hole(x) or is_variable(x)
        )
        variables = [(keys, node) for keys, node in nodes if is_variable(node)]
        if not variables and any(not is_hole(node) for _, node in nodes):
            raise ValueError(
                f"{self!r} is an NNX filter, which selects Variables, but the tree, a "
                f"{type(leaves.tree).__name__}, holds none; give it the model or an nnx.State"
            )
        matched = {path_text(keys) for keys, node in variables if self._matches(keys, node)}
        if variables and not matched and type(self._filter).__name__ != "Nothing":
            kinds = dict.fromkeys(type(node).__name__ for _, node in variables)
            raise ValueError(
                f"{self!r} matches no variable; there are variables of the types "
                f"{quoted_list(kinds)}; an NNX filter does not see modules: for a type of module "
                "write fo.of_type(...)"
            )
        return leaves.flags_below(matched)

    def _matches(self, keys: tuple[Any, ...], variable: Any) -> bool:
        if isinstance(self._filter, EllipsisType):
            return True
        if isinstance(self._filter, type):
            return isinstance(variable, self._filter)
        return bool(self._filter(tuple(map(key_of, keys)), variable))

    def __repr__(self) -> str:
        is_type = isinstance(self._filter, type)
        return self._filter.__name__ if is_type else repr(self._filter)
