"""The modules of a tree and their fields, for the selectors that ask for them."""

from collections.abc import Container, Iterable, Mapping
from typing import Any

import jax

from freeze_optax._tree.key_paths import nodes_of, path_text
from freeze_optax._tree.kinds import is_array
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.messages import quoted_list
from freeze_optax._tree.modules import Modules, children_of, is_module, walk_nodes

Table = Mapping[str, Any] | None


class FoundModules:
    """The modules of a tree, and which of their fields it has."""

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
        below = [path for path, _ in self.nodes if path]
        if below and not any(path in self._paths for path in below):
            raise ValueError(
                f"the modules of {self._name} are not of this tree: it has nothing at "
                f"{quoted_list(below, 3)}, but {quoted_list(self._leaves.paths, 3)}; params go "
                "without the collection's name: variables['params']"
            )

    @property
    def modules(self) -> list[tuple[str, Any]]:
        """The paths and modules, without mere containers."""
        modules = [(path, node) for path, node in self.nodes if is_module(node)]
        if not modules:
            raise ValueError(
                f"{self._name} looks for modules, but the tree, a "
                f"{type(self._leaves.tree).__name__}, holds none; where params are kept apart from "
                "them, pass modules=linen.modules(module, *args) or modules=nnx.modules(model), "
                "both of freeze_optax"
            )
        return modules

    def field(self, path: str, module: Any, name: str) -> str | None:
        """The path of a module's direct field, be it None or empty; None if it has no such.

        A static one, a number of features say, is none that holds leaves.
        """
        own = field_path(path, name)
        if own in self._paths and "/" not in name:
            return own
        if name not in _attributes(module):
            return None
        # Of a class that is registered without keys, only the value tells which child it is.
        value = getattr(module, name)
        below = [] if self._table is not None else children_of(module) or []
        same = [path_text(keys) for keys, child in below if child is value and child is not None]
        if same:
            return field_path(path, same[0])
        return None if self._is_static(value) else own

    def _is_static(self, value: Any) -> bool:
        """Whether a value that is nowhere in the tree is more than nothing: None, or empty."""
        inside = jax.tree.leaves(value)
        # A module in a table may have arrays that are no params: the statistics of BatchNorm.
        return bool(inside) and (self._table is None or not any(map(is_array, inside)))

    def has_instead(self, path: str, module: Any, missing: str) -> str:
        """A clause for an error: the fields that a module has in place of one it has not."""
        start = len(path) + 1 if path else 0
        below = [p[start:] for p in self._paths if p.startswith(path and path + "/")]
        names = dict.fromkeys(name for name in below if name and "/" not in name)
        static = f", and its {missing!r} is static" if missing in _attributes(module) else ""
        return f"has {quoted_list(names) or 'no leaves'}{static}"

    def below(self, nodes: Iterable[str]) -> list[bool]:
        """For each leaf, whether it is at or below one of the nodes."""
        return self._leaves.flags_below(set(nodes), self._aliases)


def _attributes(module: Any) -> Container[str]:
    """The names of what an instance holds; methods and properties are none of it."""
    slots = getattr(type(module), "_fields", ()) or getattr(type(module), "__slots__", ())
    return {*getattr(module, "__dict__", ()), *slots}


def field_path(path: str, field: str) -> str:
    """The path of a field."""
    return f"{path}/{field}" if path else field


def check_table(modules: Any, name: str) -> Table:
    if modules is None or (
        isinstance(modules, Mapping) and all(isinstance(k, str) for k in modules)
    ):
        return modules
    raise TypeError(
        f"the modules of fo.{name} are a table {{path: module}}, not a {type(modules).__name__}; "
        "freeze_optax.nnx.modules(model) and freeze_optax.linen.modules(module, *args) give one"
    )


def is_names(x: Any) -> bool:
    return isinstance(x, tuple | list | set | frozenset) and all(isinstance(n, str) for n in x)
