"""Flax Linen: which module each param belongs to, and states in `flax.serialization`."""

import dataclasses
from typing import Any

import jax
from jax.core import Tracer

from freeze_optax._export.export_state import export_state
from freeze_optax._export.restore_state import restore_state
from freeze_optax._state.freeze_state import FreezeState
from freeze_optax._tree.kinds import is_array
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.modules import Modules

try:
    from flax import linen, serialization
except ImportError as error:
    raise ImportError("freeze_optax.linen needs flax: pip install 'freeze_optax[flax]'") from error

__all__ = ["modules"]

# `to_bytes` and `from_bytes`, and with them `flax.training.checkpoints`, take no class that Flax
# does not know. A state is stored as `export_state` gives it, so `import_state` can read it too.
serialization.register_serialization_state(FreezeState, export_state, restore_state, override=True)


def modules(module: linen.Module, /, *args: Any, **kwargs: Any) -> Modules:
    """Returns the modules of a Linen model by path, so that selectors can ask for their type.

    Linen keeps params apart from the modules that made them. This function traces the model
    abstractly, so it computes nothing and allocates no memory. It records each module that is
    called, whether it is written with `setup` or `nn.compact`, shared, or lifted by `nn.scan`,
    `nn.remat` or `nn.vmap`.

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
      *args: The arguments of its `__call__`. Arrays and `jax.ShapeDtypeStruct`s are traced.
        Anything else is passed on unchanged.
      **kwargs: The same by keyword; also the `method` and `mutable` of `module.init`.

    Returns:
      A dict from paths relative to `variables["params"]` to modules, with `""` for the model
      itself. The modules are not bound: they have the type and the attributes, but no variables.

    Raises:
      TypeError: If `module` is not a Linen module.
      Exception: Any error that the model itself raises for these arguments.
    """
    if not isinstance(module, linen.Module):
        raise TypeError(
            f"linen.modules takes a Linen module and the arguments of its __call__, not a "
            f"{type(module).__name__}"
        )
    leaves, treedef = jax.tree.flatten((args, kwargs))

    def trace() -> tuple[_Recorder, Any]:
        recorder = _Recorder()

        def init(arrays: list[Any]) -> Any:
            traced = iter(arrays)
            args, kwargs = treedef.unflatten(next(traced) if is_array(x) else x for x in leaves)
            with linen.intercept_methods(recorder.intercept), recorder:
                return module.init(jax.random.key(0), *args, **kwargs)

        return recorder, jax.eval_shape(init, [x for x in leaves if is_array(x)])

    recorder, variables = trace()
    if not recorder.covers(variables):
        # A method under `nn.jit` that was traced before does not run again. Without jit it runs.
        # But then a scan runs all of its steps, so this is done only if a module is missing.
        with jax.disable_jit():
            recorder, _ = trace()
    return Modules(recorder.by_path, more=recorder.more)


class _Recorder:
    """Records the modules whose methods are called while a model is initialised.

    Attributes:
      by_path: The first module at each path. A lifted module (`nn.scan`, `nn.remat`) is called once
        more as a wrapper, at the path of the module that contains it.
      more: Further modules at a path that has one already, which `nn.share_scope` puts there.
    """

    def __init__(self):
        self.by_path: dict[str, linen.Module] = {}
        self.more: list[tuple[str, linen.Module]] = []
        self._root: Any = None
        self._foreign = 0

    def __enter__(self) -> None:
        self._root = None

    def __exit__(self, *_: object) -> None:
        self._root = None  # it holds tracers

    def intercept(self, fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """Records a module and calls its method; an interceptor for `linen.intercept_methods`."""
        self._root = self._root or context.module
        # The paths of another model, initialised or applied inside this one, are not ours.
        is_foreign = bool(self._foreign) or self._is_other_root(context.module)
        if not is_foreign:
            self._record(context.module)
        self._foreign += is_foreign
        try:
            return fun(*args, **kwargs)
        finally:
            self._foreign -= is_foreign

    def _is_other_root(self, module: Any) -> bool:
        """Whether a module is the root of another model, not of the recorded one."""
        root = self._root
        is_lifted = isinstance(root, type(module)) or isinstance(module, type(root))
        return not module.path and module.scope is not root.scope and not is_lifted

    def _record(self, module: Any) -> None:
        """Records a module, and before it the modules that it is in."""
        if isinstance(module.parent, linen.Module):  # its own methods may never be called
            self._record(module.parent)
        path = "/".join(module.path)
        if path not in self.by_path:
            self.by_path[path] = _unbound(module)
        elif type(module).__module__ != "flax.linen.transforms":
            recorded = [self.by_path[path], *(other for p, other in self.more if p == path)]
            if not any(isinstance(other, type(module)) for other in recorded):
                self.more.append((path, _unbound(module)))

    def covers(self, variables: Any) -> bool:
        """Whether each of the params belongs to a recorded module."""
        paths = Leaves(variables.get("params", {})).paths
        return all(path.rpartition("/")[0] in self.by_path for path in paths)


def _unbound(module: Any) -> linen.Module:
    """Returns a copy of a module that holds nothing of the trace."""
    fields = [field.name for field in dataclasses.fields(module) if field.init]
    values = {name: getattr(module, name) for name in fields if name not in ("parent", "name")}
    traced = {name: value for name, value in values.items() if _is_traced(value)}
    abstract = {name: jax.tree.map(_abstract, value) for name, value in traced.items()}
    return module.clone(parent=None, _deep_clone=True, **abstract)


def _is_traced(value: Any) -> bool:
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(value))


def _abstract(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, Tracer) else x
