"""Flax Linen: which module each param belongs to."""

import dataclasses
from typing import Any

import jax
from jax.core import Tracer

from freeze_optax._tree.kinds import is_array
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.modules import Modules

try:
    from flax import linen
except ImportError as error:
    raise ImportError("freeze_optax.linen needs flax: pip install 'freeze_optax[flax]'") from error

__all__ = ["modules"]


def modules(module: linen.Module, /, *args: Any, **kwargs: Any) -> Modules:
    """The modules of a Linen model by path, so that selectors can ask for their type.

    Linen keeps params apart from the modules that made them. This traces the model abstractly,
    without computing anything or allocating memory, and notes each module that takes part,
    whether written with `setup` or `nn.compact`, shared, or lifted by `nn.scan`, `nn.remat` or
    `nn.vmap`.

    Examples:
      >>> import jax
      >>> from flax import linen as nn
      >>> import freeze_optax as fo
      >>> from freeze_optax import linen
      >>> model = nn.Sequential([nn.Dense(2), nn.LayerNorm()])
      >>> x = jax.ShapeDtypeStruct((1, 3), "float32")
      >>> table = linen.modules(model, x)
      >>> list(table)
      ['', 'layers_0', 'layers_1']
      >>> params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
      >>> fo.of_type(nn.LayerNorm, modules=table)(params)["layers_1"]
      {'bias': True, 'scale': True}

    Args:
      module: The model, not bound.
      *args: The arguments of its `__call__`: arrays or `jax.ShapeDtypeStruct`s, which are traced,
        and anything else, which is passed on as it is.
      **kwargs: The same by keyword; also the `method` and `mutable` of `module.init`.

    Returns:
      A dict from paths relative to `variables["params"]`, `""` for the model itself, to modules.
      These are not bound: they have the type and the attributes, but no variables.

    Raises:
      TypeError: If `module` is no Linen module.
      Exception: What the model itself raises of these arguments.
    """
    if not isinstance(module, linen.Module):
        raise TypeError(
            f"linen.modules takes a Linen module and the arguments of its __call__, not a "
            f"{type(module).__name__}"
        )
    leaves, treedef = jax.tree.flatten((args, kwargs))

    def trace() -> tuple[_Notes, Any]:
        notes = _Notes()

        def init(arrays: list[Any]) -> Any:
            given = iter(arrays)
            args, kwargs = treedef.unflatten(next(given) if is_array(x) else x for x in leaves)
            with linen.intercept_methods(notes.intercept), notes:
                return module.init(jax.random.key(0), *args, **kwargs)

        return notes, jax.eval_shape(init, [x for x in leaves if is_array(x)])

    notes, variables = trace()
    if not notes.cover(variables):
        # What `nn.jit` has traced before is not run again. Without jit it is, but then a scan
        # takes as long as its steps, so only where something is missing.
        with jax.disable_jit():
            notes, _ = trace()
    return Modules(notes.found, more=notes.more)


class _Notes:
    """The modules whose methods are called while a model is initialised.

    Attributes:
      found: The first module at each path. A lifted module (`nn.scan`, `nn.remat`) is seen once
        more as a wrapper at the path of the module that it stands in.
      more: Others at the same path, as `nn.share_scope` puts them.
    """

    def __init__(self):
        self.found: dict[str, linen.Module] = {}
        self.more: list[tuple[str, linen.Module]] = []
        self._root: Any = None
        self._foreign = 0

    def __enter__(self) -> None:
        self._root = None

    def __exit__(self, *_: object) -> None:
        self._root = None  # It holds tracers.

    def intercept(self, fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """Notes a module and calls its method; an interceptor for `linen.intercept_methods`."""
        self._root = self._root or context.module
        # A model that is initialised or applied inside of this one has paths of its own.
        is_foreign = bool(self._foreign) or self._is_other_root(context.module)
        if not is_foreign:
            self._note(context.module)
        self._foreign += is_foreign
        try:
            return fun(*args, **kwargs)
        finally:
            self._foreign -= is_foreign

    def _is_other_root(self, module: Any) -> bool:
        root = self._root
        is_lifted = isinstance(root, type(module)) or isinstance(module, type(root))
        return not module.path and module.scope is not root.scope and not is_lifted

    def _note(self, module: Any) -> None:
        if isinstance(module.parent, linen.Module):  # whose own methods may never be called
            self._note(module.parent)
        path = "/".join(module.path)
        if path not in self.found:
            self.found[path] = _unbound(module)
        elif type(module).__module__ != "flax.linen.transforms":
            known = [self.found[path], *(other for p, other in self.more if p == path)]
            if not any(isinstance(other, type(module)) for other in known):
                self.more.append((path, _unbound(module)))

    def cover(self, variables: Any) -> bool:
        """Whether there is a module for each of the params."""
        paths = Leaves(variables.get("params", {})).paths
        return all(path.rpartition("/")[0] in self.found for path in paths)


def _unbound(module: Any) -> linen.Module:
    """A copy that holds nothing of the trace."""
    fields = [field.name for field in dataclasses.fields(module) if field.init]
    values = {name: getattr(module, name) for name in fields if name not in ("parent", "name")}
    traced = {name: value for name, value in values.items() if _is_traced(value)}
    abstract = {name: jax.tree.map(_abstract, value) for name, value in traced.items()}
    return module.clone(parent=None, _deep_clone=True, **abstract)


def _is_traced(value: Any) -> bool:
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(value))


def _abstract(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, Tracer) else x
