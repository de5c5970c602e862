"""The selectors by the module of a leaf: `of_type`, `by_module` and `declared`."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, final

import numpy as np

from freeze_optax._select.found_modules import FoundModules, Table, check_table, is_names
from freeze_optax._select.selector import Selector
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.messages import nearest_names, quoted_list
from freeze_optax._tree.variables import is_variable_type


@final
class _OfType(Selector):
    def __init__(self, types: tuple[type, ...], fields: tuple[str, ...], modules: Table):
        self._types, self._fields, self._modules = types, fields, modules

    def flags(self, leaves: Leaves) -> list[bool]:
        found = FoundModules(self._modules, leaves, repr(self))
        of_type = [(path, node) for path, node in found.nodes if isinstance(node, self._types)]
        for cls in self._types:
            if not any(isinstance(node, cls) for _, node in of_type):
                kind = "variable" if is_variable_type(cls) else "module"
                nodes = found.variables if is_variable_type(cls) else found.modules
                present = dict.fromkeys(type(node).__name__ for _, node in nodes)
                raise ValueError(
                    f"{self!r}: no {kind} is a {cls.__name__}; "
                    f"{nearest_names(cls.__name__, present)}"
                )
        for field in self._fields:
            if not any(found.field(path, node, field) for path, node in of_type):
                path, node = of_type[0]
                raise ValueError(
                    f"{self!r}: no such module has a field {field!r}; {path!r}, a "
                    f"{type(node).__name__}, {found.has_instead(path, node, field)}"
                )
        nodes = [path for path, _ in of_type]
        if self._fields:
            pairs = itertools.product(of_type, self._fields)
            field_paths = [found.field(path, node, name) for (path, node), name in pairs]
            nodes = [path for path in field_paths if path is not None]
        flags = found.below(nodes)
        if not any(flags):
            raise ValueError(f"{self!r} selects no leaf: the tree has none at {quoted_list(nodes)}")
        return flags

    def __repr__(self) -> str:
        fields = f", fields={self._fields!r}" if self._fields else ""
        return f"of_type({', '.join(cls.__name__ for cls in self._types)}{fields})"


def of_type(
    *types: type, fields: Iterable[str] = (), modules: Mapping[str, Any] | None = None
) -> Selector:
    """Selects the leaves under each module that is an instance of one of the types.

    Nested modules count too, and so do NNX Variables (`nnx.LoRAParam`). The types are read from the
    tree itself, if it holds its modules (Equinox, NNX modules, any class that is registered as a
    pytree). Otherwise they are read from the table `modules`.

    Examples:
      >>> import jax
      >>> import equinox as eqx
      >>> import freeze_optax as fo
      >>> model = eqx.nn.MLP(2, 2, width_size=2, depth=1, key=jax.random.key(0))
      >>> biases = fo.mask(fo.of_type(eqx.nn.Linear, fields=("bias",)), model)
      >>> biases.layers[0].weight, biases.layers[0].bias
      (False, True)

    Args:
      *types: Classes; instances of their subclasses count.
      fields: Names of direct fields, `("kernel",)` for example: select only these fields of the
        modules. If empty, select all of each module.
      modules: A table `{path: module}`, for params that are kept apart from their modules.
        `freeze_optax.linen.modules` and `freeze_optax.nnx.modules` make one.

    Returns:
      The selector. Applied to a tree, it raises ValueError if no module is an instance of one of
      the types; if no such module has one of the fields (a static field does not count); if the
      modules or fields have no leaf; or if the table is of other params.

    Raises:
      TypeError: If there is no type; if a type is not a class; if a field is not a string; or if
        `modules` is not a table.
    """
    not_types = [x for x in types if not isinstance(x, type)]
    if not_types or not types:
        what = f"but got {not_types[0]!r}" if not_types else "and got none"
        raise TypeError(f"fo.of_type takes classes, one argument each, {what}")
    names = fields if isinstance(fields, str) or not isinstance(fields, Iterable) else tuple(fields)
    if not is_names(names):
        raise TypeError(f"the fields of fo.of_type are strings, ('kernel',) say, not {fields!r}")
    return _OfType(types, tuple(names), check_table(modules, "of_type"))


@final
class _ByModule(Selector):
    def __init__(self, function: Callable[[Any, str], Any], modules: Table):
        self._function, self._modules = function, modules

    def flags(self, leaves: Leaves) -> list[bool]:
        found = FoundModules(self._modules, leaves, repr(self))
        nodes = [
            node for path, module in found.modules for node in self._select_in(found, path, module)
        ]
        return found.below(nodes)

    def _select_in(self, found: FoundModules, path: str, module: Any) -> list[str]:
        """Returns the paths of the nodes that the function selects in one module."""
        answer = self._function(module, path)
        if isinstance(answer, bool | np.bool_):
            return [path] if answer else []
        if not is_names(answer):
            raise TypeError(
                f"the function of {self!r} gave {answer!r} at {path!r}, a {type(module).__name__}; "
                "it must give True, False or a tuple of names of fields, ('kernel',) say"
            )
        fields = {name: found.field(path, module, name) for name in answer}
        for name, field in fields.items():
            if field is None:
                raise ValueError(
                    f"the function of {self!r} named the field {name!r} at {path!r}, but this "
                    f"{type(module).__name__} {found.has_instead(path, module, name)}"
                )
        return [field for field in fields.values() if field is not None]

    def __repr__(self) -> str:
        return f"by_module({getattr(self._function, '__qualname__', self._function)})"


def by_module(
    fn: Callable[[Any, str], bool | Iterable[str]], modules: Mapping[str, Any] | None = None
) -> Selector:
    """Selects the part of each module that `fn(module, path)` returns: all, nothing or some fields.

    It follows the request for `trainable` in Optimisers.jl
    (https://github.com/FluxML/Optimisers.jl/issues/43), with two differences: the function stands
    outside the model, and it selects what is frozen.

    Examples:
      >>> import jax
      >>> import equinox as eqx
      >>> import freeze_optax as fo
      >>> model = eqx.nn.MLP(2, 2, width_size=2, depth=1, key=jax.random.key(0))
      >>> def frozen(module, path):
      ...     return ("weight",) if isinstance(module, eqx.nn.Linear) else False
      >>> mask = fo.mask(fo.by_module(frozen), model)
      >>> mask.layers[0].weight, mask.layers[0].bias
      (True, False)

    Args:
      fn: A function that takes a module and its path (`""` for the root). It returns True to
        select the whole subtree, False to select nothing by itself, or the names of direct fields.
        It is called for nested modules too, whatever it returns for the outer one. It is not
        called for dicts, lists, tuples and other mere containers.
      modules: As for `of_type`: a table `{path: module}`.

    Returns:
      The selector. Applied to a tree, it raises TypeError, naming the path, if `fn` returns
      anything else. It raises ValueError if a module does not have a named field, or has it as a
      static one; if the tree holds no module; or if the table is of other params. It is no error if
      a field is None (no bias) or empty, or if no leaf is selected.

    Raises:
      TypeError: If `fn` is not callable, or `modules` is not a table.
    """
    if not callable(fn):
        raise TypeError(f"fo.by_module takes a function of a module and its path, not {fn!r}")
    return _ByModule(fn, check_table(modules, "by_module"))


@final
class _Declared(Selector):
    def __init__(self, modules: Table):
        self._modules = modules

    def flags(self, leaves: Leaves) -> list[bool]:
        found = FoundModules(self._modules, leaves, repr(self))
        nodes: list[str] = []
        missing: dict[tuple[type, str], tuple[str, Any]] = {}
        present = set[tuple[type, str]]()
        for path, module in found.modules:
            for cls, field in _declared_by(type(module)):
                node = found.field(path, module, field)
                if node is None:
                    missing.setdefault((cls, field), (path, module))
                else:
                    present.add((cls, field))
                    nodes.append(node)
        # One module without the field may be right (a mask is optional). If no module has it, the
        # declaration is a mistake.
        for (cls, field), (path, module) in missing.items():
            if (cls, field) not in present:
                raise ValueError(
                    f"{cls.__name__}.frozen_fields names {field!r}, but no module has it: {path!r} "
                    f"{found.has_instead(path, module, field)}"
                )
        return found.below(nodes)

    def __repr__(self) -> str:
        return "declared()"


def _declared_by(cls: type) -> list[tuple[type, str]]:
    """Returns the fields that a class and its bases declare, each with the declaring class."""
    declared: list[tuple[type, str]] = []
    for base in cls.__mro__:
        fields = vars(base).get("frozen_fields", ())
        if not is_names(fields):
            raise TypeError(
                f"{base.__name__}.frozen_fields is {fields!r}; it must be a tuple of names of "
                "fields, ('mask',) say"
            )
        declared += [(base, field) for field in fields]
    return declared


def declared(modules: Mapping[str, Any] | None = None) -> Selector:
    """Selects the fields that a module's own class declares as never trained.

    A class declares them in the class attribute `frozen_fields`. A subclass inherits those of its
    bases, and may add others. It is the counterpart of `trainable` in Flux and Optimisers.jl.

    Examples:
      >>> import equinox as eqx
      >>> import jax.numpy as jnp
      >>> import freeze_optax as fo
      >>> class Masked(eqx.Module):
      ...     weight: jnp.ndarray
      ...     mask: jnp.ndarray
      ...     frozen_fields = ("mask",)
      >>> fo.mask(fo.declared(), Masked(jnp.ones(2), jnp.ones(2)))
      Masked(weight=False, mask=True)

    Args:
      modules: As for `of_type`: a table `{path: module}`.

    Returns:
      The selector. Applied to a tree, it raises ValueError if no module has a field that its class
      declares (a static field does not count), if the tree holds no module, or if the table is of
      other params. It raises TypeError if `frozen_fields` is not a tuple of strings. It is no error
      if a field is None or empty, or if no class declares a field.

    Raises:
      TypeError: If `modules` is not a table.
    """
    return _Declared(check_table(modules, "declared"))
