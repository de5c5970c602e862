"""Flax Linen: which module each param belongs to."""

from typing import Any

import jax

from freeze_optax._leaves import is_array
from freeze_optax._modules import Modules

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
    """
    if not isinstance(module, linen.Module):
        raise TypeError(
            f"linen.modules takes a Linen module and the arguments of its __call__, not a "
            f"{type(module).__name__}"
        )
    found: dict[str, linen.Module] = {}

    def note(fun: Any, args: Any, kwargs: Any, context: linen.module.InterceptorContext) -> Any:
        path = "/".join(context.module.path)
        # The first at a path: a lifted module (nn.scan, nn.remat) is seen once more as a wrapper
        # at the path of the module that it stands in.
        if path not in found:
            found[path] = context.module.clone(parent=None)
        return fun(*args, **kwargs)

    leaves, treedef = jax.tree.flatten((args, kwargs))

    def init(arrays: list[Any]) -> Any:
        given = iter(arrays)
        args, kwargs = treedef.unflatten(next(given) if is_array(x) else x for x in leaves)
        with linen.intercept_methods(note):
            return module.init(jax.random.key(0), *args, **kwargs)

    jax.eval_shape(init, [x for x in leaves if is_array(x)])
    return Modules(found)
