"""Find the modules of a tree and their fields, for the selectors by module."""

from collections.abc import Container, Iterable, Mapping
from typing import Any

import jax

from freeze_optax._tree.key_paths import nodes_of, path_text
from freeze_optax._tree.kinds import is_array
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.messages import quoted_list
from freeze_optax._tree.modules import Modules, children_of, is_module, walk_nodes
from freeze_optax._tree.variables import is_variable

Table = Mapping[str, Any] | None


class FoundModules:
    """The modules of a tree, from the tree itself or from a table, and their fields.

    Attributes:
      nodes: Pairs of path and node: the modules, and for a tree its containers too.
    """

    def __init__(self, table: Table, leaves: Leaves, name: str):
        table = leaves.modules if table is None else table
        self._leaves, self._name, self._table = leaves, name, table
        self._aliases = table.aliases if isinstance(table, Modules) else None
        self._paths = nodes_of(path for path, _ in leaves.all_paths(self._aliases))
        if table is None:
            self.nodes = list(walk_nodes(leaves.tree))
        else:
            self.nodes = [*table.items(), *(table.more if isinstance(table, Modules) else ())]
            self._check_table()

    def _check_table(self) -> None:
        """Raises if the tree has none of the paths of the table."""
        table_paths = [path for path, _ in self.nodes if path]
        if table_paths and not any(path in self._paths for path in table_paths):
            raise ValueError(
                f"the modules of {self._name} are not of this tree: it has nothing at "
                f"{quoted_list(table_paths, 3)}, but {quoted_list(self._leaves.paths, 3)}; params "
                "go without the collection's name: variables['params']"
            )

    @property
    def modules(self) -> list[tuple[str, Any]]:
        """The pairs of path and module, without mere containers."""
        modules = [(path, node) for path, node in self.nodes if is_module(node)]
        if not modules:
            raise ValueError(
                f"{self._name} looks for modules, but the tree, a "
                f"{type(self._leaves.tree).__name__}, holds none; where params are kept apart from "
                "them, pass modules=linen.modules(module, *args) or modules=nnx.modules(model), "
                "both of freeze_optax"
            )
        return modules

    @property
    def variables(self) -> list[tuple[str, Any]]:
        """The pairs of path and NNX Variable."""
        return [(path, node) for path, node in self.nodes if is_variable(node)]

    def field(self, path: str, module: Any, name: str) -> str | None:
        """Returns the path of a module's direct field; None if the module has no such field.

        A field that is None or empty has a path too. A static field (a number of features, for
        example) has none, as it holds no leaves.
        """
        by_name = field_path(path, name)
        if by_name in self._paths and "/" not in name:
            return by_name
        if name not in _attributes(module):
            return None
        # A class that is registered without keys names its children by index. So the child is found
        # by its value.
        value = getattr(module, name)
        children = [] if self._table is not None else children_of(module) or []
        keys_of_value = [
            path_text(keys) for keys, child in children if child is value and child is not None
        ]
        if keys_of_value:
            return field_path(path, keys_of_value[0])
        return None if self._is_static(value) else by_name

    def _is_static(self, value: Any) -> bool:
        """Whether a value that is not in the tree is static, that is neither None nor empty."""
        value_leaves = jax.tree.leaves(value)
        # A module in a table may have arrays that are not params: the statistics of BatchNorm.
        return bool(value_leaves) and (self._table is None or not any(map(is_array, value_leaves)))

    def has_instead(self, path: str, module: Any, missing: str) -> str:
        """Returns a clause for an error: the fields that a module has in place of a missing one."""
        start = len(path) + 1 if path else 0
        below = [p[start:] for p in self._paths if p.startswith(path and path + "/")]
        names = dict.fromkeys(name for name in below if name and "/" not in name)
        static = f", and its {missing!r} is static" if missing in _attributes(module) else ""
        return f"has {quoted_list(names) or 'no leaves'}{static}"

    def below(self, nodes: Iterable[str]) -> list[bool]:
        """Returns for each leaf whether it is at or below one of the nodes."""
        return self._leaves.flags_below(set(nodes), self._aliases)


def _attributes(module: Any) -> Container[str]:
    """Returns the names of the attributes of an instance, without methods and properties."""
    slots = getattr(type(module), "_fields", ()) or getattr(type(module), "__slots__", ())
    return {*getattr(module, "__dict__", ()), *slots}


def field_path(path: str, field: str) -> str:
    """Returns the path of a field of the module at `path`."""
    return f"{path}/{field}" if path else field


def check_table(modules: Any, name: str) -> Table:
    """Returns the table that was passed to `fo.name`, or raises if it is not one."""
    if modules is None or (
        isinstance(modules, Mapping) and all(isinstance(k, str) for k in modules)
    ):
        return modules
    raise TypeError(
        f"the modules of fo.{name} are a table {{path: module}}, not a {type(modules).__name__}; "
        "freeze_optax.nnx.modules(model) and freeze_optax.linen.modules(module, *args) give one"
    )


def is_names(x: Any) -> bool:
    """Whether `x` is a collection of strings, and not a string."""
    return isinstance(x, tuple | list | set | frozenset) and all(isinstance(n, str) for n in x)
