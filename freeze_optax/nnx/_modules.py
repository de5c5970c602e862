"""The modules of an NNX model by path, and the other paths of its shared Variables."""

from typing import Any

from freeze_optax._tree.key_paths import path_text
from freeze_optax._tree.modules import KeyPath, Modules, children_of, walk_nodes
from freeze_optax._tree.variables import is_variable
from freeze_optax.nnx._flax import AS_GRAPH, nnx


def require_module(module: Any) -> None:
    """Raises TypeError unless `module` is an NNX module."""
    if not isinstance(module, nnx.Module):
        raise TypeError(f"an NNX module is needed here, not a {type(module).__name__}")


def modules(module: nnx.Module, /) -> Modules:
    """Returns the modules of an NNX model by path, so that selectors can ask for their type.

    The functions of this module that take the model need no such table. `freeze_optax.freezable`
    needs one inside an `nnx.Optimizer`, which passes it an `nnx.State`: variables without their
    modules. For the same reason NNX's own filter `OfType(nnx.BatchNorm)` matches nothing there.

    Examples:
      >>> import optax
      >>> import freeze_optax as fo
      >>> from flax import nnx
      >>> from freeze_optax import nnx as fnnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(2, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs))
      >>> table = fnnx.modules(model)
      >>> list(table)
      ['', 'layers', 'layers/0', 'layers/1']
      >>> tx = fo.freezable(optax.adam(1e-3), fo.of_type(nnx.BatchNorm, modules=table))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    Args:
      module: The model.

    Returns:
      A dict from paths to the module objects of the model, with `""` for the model itself. A shared
      module is under each of its paths. An `nnx.State` has the params of a shared Variable once, at
      one of its paths. The table knows the other paths too, so selectors find them by any path.

    Raises:
      TypeError: If `module` is not an NNX module.
    """
    require_module(module)
    by_path: dict[str, nnx.Module] = {}
    variables: list[tuple[str, Any]] = []
    paths: dict[int, list[str]] = {}
    for path, node in walk_nodes(module, _children):
        if isinstance(node, nnx.Module):
            by_path[path] = node
        elif is_variable(node):
            variables.append((path, node))
            paths.setdefault(id(node), []).append(path)
    shared = [group for group in paths.values() if len(group) > 1]
    aliases: dict[str, str] = {}
    if shared:
        state_paths = {
            path_text(entries) for entries, _ in nnx.to_flat_state(nnx.state(module, **AS_GRAPH))
        }
        for group in shared:
            stored = [path for path in group if path in state_paths]
            aliases.update((path, stored[0]) for path in group if stored and path not in stored)
    return Modules(by_path, aliases, variables)


def _children(node: Any) -> list[tuple[KeyPath, Any]] | None:
    # To jax an object of a class with `pytree=False` is a leaf. NNX looks into its attributes.
    below = children_of(node)
    if below is None and isinstance(node, nnx.Pytree):
        return [((k,), v) for k, v in sorted(vars(node).items()) if not k.startswith("_pytree__")]
    return below
