"""Stack the layers of a params tree in one node, and take them apart again."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from freeze_optax._rows.exact import run_bitwise
from freeze_optax._rows.meshes import mesh_axes_of, on_automatic_axes, type_sharding
from freeze_optax._select.by_path import Layers, check_patterns
from freeze_optax._tree.globs import expand_braces
from freeze_optax._tree.holes import is_hole
from freeze_optax._tree.key_paths import key_of, path_text
from freeze_optax._tree.kinds import can_train, is_array, why_lost
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.messages import path_differences, quoted_list
from freeze_optax._tree.subtrees import children_by_key, find_nodes, node_at, replace_node
from freeze_optax._tree.variables import is_nnx_object, is_variable_or_box


def stack_layers(params: Any, layers: str = "*", to: str | None = None) -> Any:
    """Stacks layers of the same shapes: one node for all, whose leaves have an axis of layers.

    `freeze_optax.scan`, `jax.lax.scan` and `freeze_optax.rotating` take layers in this form. It is
    what `nn.scan` makes ("scanned layers"). `unstack_layers` is the inverse.

    Examples:
      >>> import jax.numpy as jnp
      >>> import freeze_optax as fo
      >>> params = {"layer_0": jnp.zeros(2), "layer_1": jnp.ones(2), "head": jnp.ones(3)}
      >>> stacked = fo.stack_layers(params, "layer_*", to="layers")
      >>> stacked["layers"].tolist(), list(stacked)
      ([[0.0, 0.0], [1.0, 1.0]], ['layers', 'head'])
      >>> list(fo.unstack_layers(stacked, "layers", to="layer_{0..1}"))
      ['layer_0', 'layer_1', 'head']

    Args:
      params: A pytree, abstract or not: dicts, lists, Equinox modules, an `nnx.State`. Or the
        layers themselves, a list of pytrees.
      layers: A glob, as for `freeze_optax.layers`, that names the layers: nodes with one parent.
        They are stacked in natural order: `layer_2` comes before `layer_10`. By default, all
        children of the root.
      to: The path of the stack, beside the layers: `"encoder/layers"` for `"encoder/layer_*"`. By
        default, the stack takes the place of the parent, which may then hold nothing else.

    Returns:
      A tree like `params` with one node in place of the layers. Each of its arrays has the layers
      along a new leading axis, with every bit and the dtype that they had, in the memory of the
      first layer. Leaves that are no arrays, such as activation functions, are not stacked: they
      stay as they are. Layers that shared a buffer do not share it in the stack.

    Raises:
      ValueError: If the pattern names no node; if the layers have several parents, or differ in
        structure, shapes or dtypes, or in a leaf that is no array; if a leaf is a Python float, a
        reference (`jax.new_ref`), or in a box of metadata that names its axes; or if the stack
        can't be at `to`.
      TypeError: If the pattern or `to` is not a string, or the params are an NNX module.
    """
    check_patterns((layers,), "stack_layers")
    _check_no_module(params, "stack_layers")
    nodes = Layers(layers).nodes(Leaves(params))
    entries = find_nodes(params, nodes, "stack_layers")
    parent, *others = dict.fromkeys(entries[node][:-1] for node in nodes)
    if others:
        raise ValueError(
            f"the layers of a stack have one parent, but {layers!r} names nodes of "
            f"{quoted_list(map(path_text, [parent, *others]))}; stack those of each"
        )
    stack = _stack([node_at(params, entries[node]) for node in nodes], nodes)
    above, place = node_at(params, parent), path_text(parent)
    keys = [entries[node][-1] for node in nodes]
    if to is None or to == place:
        _check_all_children(above, keys, place, nodes)
        return replace_node(params, parent, stack)
    new_key = _key_beside(to, place, nodes[0], "stack")
    named = [key_of(key) for key in keys]
    return replace_node(params, parent, _with_items(above, place, named, [(new_key, stack)]))


def unstack_layers(params: Any, stack: str = "", to: str | Sequence[str] | None = None) -> Any:
    """Takes a stack apart into its layers, the inverse of `stack_layers`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import freeze_optax as fo
      >>> params = {"layers": {"bias": jnp.array([[1.0], [2.0]])}}
      >>> fo.unstack_layers(params, "layers", to="layer_{0..1}")["layer_1"]["bias"].tolist()
      [2.0]
      >>> [layer["bias"].tolist() for layer in fo.unstack_layers(params, "layers")["layers"]]
      [[1.0], [2.0]]

    Args:
      params: A pytree, abstract or not.
      stack: The path of the stack, a node whose arrays have the layers along the leading axis. By
        default, the root.
      to: The paths of the layers, in order: a list of them, or one with braces, such as
        `"encoder/layer_{0..5}"`. They stand beside the stack (if that is at `"encoder/layers"`), or
        in its place (if it is at `"encoder"`). By default, a list of the layers takes the place of
        the stack; in an `nnx.State`, which holds no lists, a dict with the keys of an `nnx.List`.

    Returns:
      A tree like `params` with the layers in place of the stack. What is no array is in each layer.

    Raises:
      ValueError: If nothing is at the path; if its arrays differ in length along the leading axis,
        or there is none; or if the layers can't be at `to`.
      TypeError: If the path is not a string, or the params are an NNX module.
    """
    if not isinstance(stack, str):
        raise TypeError(f"fo.unstack_layers takes the path of a stack, but got {stack!r}")
    _check_no_module(params, "unstack_layers")
    entries = find_nodes(params, [stack], "unstack_layers")[stack]
    layers = _unstack(node_at(params, entries), stack)
    if to is None:
        numbered = dict(enumerate(layers)) if _is_nnx_state(params) and entries else layers
        return replace_node(params, entries, numbered)
    names = expand_braces(to) if isinstance(to, str) else list(to)
    if len(set(names)) != len(layers) or len(names) != len(layers):
        raise ValueError(
            f"the stack {stack!r} has {len(layers)} layers, but {to!r} names {len(set(names))}"
        )
    inside = f"{stack}/" if stack else ""
    if all(name.startswith(inside) and name != inside for name in names):
        keys = [name.removeprefix(inside) for name in names]
        return replace_node(params, entries, dict(zip(keys, layers, strict=True)))
    parent, place = entries[:-1], path_text(entries[:-1])
    keys = [_key_beside(name, place, stack, "layer") for name in names]
    above, own = node_at(params, parent), [key_of(entries[-1])]
    items = list(zip(keys, layers, strict=True))
    return replace_node(params, parent, _with_items(above, place, own, items))


# Where the layers and their stack are in the tree.


def _check_no_module(params: Any, name: str) -> None:
    nodes = jax.tree.leaves(params, is_leaf=is_nnx_object)
    if is_nnx_object(params) or any(map(is_nnx_object, nodes)):
        raise TypeError(
            f"fo.{name} takes a tree of arrays, not an NNX module, whose layers are objects; take "
            "its state: nnx.state(model)"
        )


def _is_nnx_state(tree: Any) -> bool:
    return type(tree).__module__.startswith("flax.nnx") and isinstance(tree, Mapping)


def _check_all_children(above: Any, keys: Sequence[Any], place: str, nodes: Sequence[str]) -> None:
    rest = [path_text(own) for own, _ in children_by_key(above) if own[0] not in keys]
    if rest:
        beside = "/".join([*nodes[0].split("/")[:-1], "layers"])
        raise ValueError(
            f"a stack in place of {place!r} would drop {quoted_list(rest)}, which it holds beside "
            f"the layers; write where the stack goes: to={beside!r}"
        )


def _key_beside(path: str, place: str, sibling: str, what: str) -> str:
    """Returns the key of a path beside another one, or raises if it is not beside it."""
    if not isinstance(path, str):
        raise TypeError(f"the path of a {what} is a string, not {path!r}")
    prefix = f"{place}/" if place else ""
    # Haiku has slashes in its keys, so not all of them separate nodes.
    folder = sibling.rpartition("/")[0]
    name = path.removeprefix(f"{folder}/") if folder else path
    if not name or "/" in name or (path == name and folder):
        beside = f"{folder}/{path.rpartition('/')[2]}" if folder else path.rpartition("/")[2]
        raise ValueError(
            f"the {what} {path!r} has to be beside {sibling!r}, as {beside!r}; move it afterwards"
        )
    return path.removeprefix(prefix)


def _with_items(above: Any, place: str, old: Sequence[Any], items: Sequence[Any]) -> Any:
    """Returns a mapping with items in place of some keys, at the place of the first of them."""
    if not isinstance(above, Mapping):
        raise ValueError(
            f"{place!r} is a {type(above).__name__}, whose children have no names of their own; "
            "leave `to` out"
        )
    mapping: Mapping[Any, Any] = above
    taken = [key for key, _ in items if key in mapping and key not in old]
    if taken:
        raise ValueError(
            f"{place!r} has {quoted_list(map(str, taken))} already; choose other paths"
        )
    new: dict[Any, Any] = {}
    for key, value in mapping.items():
        new.update(items if key == old[0] else () if key in old else [(key, value)])
    # `type(mapping)(…)` of a defaultdict would need its factory.
    return new if type(mapping) is dict else _like_mapping(mapping, new)


def _like_mapping(mapping: Any, items: dict[Any, Any]) -> Any:
    if not isinstance(mapping, dict):
        return type(mapping)(items)
    copy: Any = mapping.copy()
    copy.clear()
    copy.update(items)
    return copy


# Layers and their stack.


def _stack(layers: Sequence[Any], paths: Sequence[str]) -> Any:
    for layer in layers:
        _check_no_named_axes(layer, paths[0])
    columns = [Leaves(layer) for layer in layers]
    first = columns[0]
    for path, other in zip(paths, columns, strict=True):
        if other.paths != first.paths:
            ours, theirs = f"in {paths[0]!r}", f"in {path!r}"
            raise ValueError(
                "the layers of a stack have the same leaves, but these differ: "
                + path_differences(first.paths, other.paths, ours, theirs)
            )
    stacked = [
        _stack_leaf(values, [_joined(path, column.paths[i]) for path in paths])
        for i, (values, column) in enumerate(
            zip(zip(*(x.values for x in columns), strict=True), itertools.repeat(first))
        )
    ]
    for path, other in zip(paths, columns, strict=True):
        if other.treedef != first.treedef:
            raise ValueError(
                f"the layers of a stack have the same structure, but {paths[0]!r} and {path!r} "
                f"have other containers or static fields: {first.treedef} and {other.treedef}"
            )
    return first.rebuild(stacked)


def _joined(*paths: str) -> str:
    return "/".join(filter(None, paths))


_NAMES_OF_AXES = ("names", "sharding", "sharding_names", "out_sharding")


def _check_no_named_axes(layer: Any, path: str) -> None:
    for entries, x in jax.tree_util.tree_leaves_with_path(layer, is_leaf=is_variable_or_box):
        if is_variable_or_box(x):
            metadata = x.get_metadata() if hasattr(x, "get_metadata") else vars(x)
            if any(metadata.get(name) for name in _NAMES_OF_AXES):
                raise ValueError(
                    f"{_joined(path, path_text(entries))!r} is in a {type(x).__name__} that names "
                    "the axes of its array, and a stack has one more; take the array out "
                    "(nn.meta.unbox, nnx.pure), and name the axes of the stack"
                )


def _stack_leaf(values: Sequence[Any], paths: Sequence[str]) -> Any:
    """Returns what stands for a leaf of all layers, or raises if there is no such thing."""
    first = values[0]
    reason = why_lost(first)
    if reason:
        raise ValueError(f"{paths[0]!r} can't be stacked: it is {reason}")
    if not is_array(first) and can_train(first):
        raise ValueError(
            f"{paths[0]!r} is a Python {type(first).__name__}; to stack it, make it an array: "
            "jnp.asarray(…)"
        )
    for path, x in zip(paths, values, strict=True):
        if not _are_alike(first, x):
            raise ValueError(
                f"the layers of a stack are alike, but {paths[0]!r} is {_described(first)}, and "
                f"{path!r} is {_described(x)}"
            )
    if not is_array(first):
        return first
    if all(isinstance(x, np.ndarray | np.generic) for x in values):
        return np.stack(values)  # JAX would shorten float64
    stacked = run_bitwise(lambda *arrays: jnp.stack(arrays), True, *values)
    return _with_sharding(stacked, first, lambda spec: (None, *spec))


def _are_alike(a: Any, b: Any) -> bool:
    if is_array(a) and is_array(b):
        return np.shape(a) == np.shape(b) and a.dtype == b.dtype
    if a is b or (is_hole(a) and is_hole(b)):
        return True
    try:
        return type(a) is type(b) and not is_array(a) and bool(a == b)
    except Exception:  # noqa: BLE001 (a user's class may refuse)
        return False


def _described(x: Any) -> str:
    return f"{x.dtype}{list(np.shape(x))}" if is_array(x) else "a hole" if is_hole(x) else repr(x)


def _with_sharding(new: Any, old: Any, change: Callable[[Any], Sequence[Any]]) -> Any:
    """Returns an abstract array with the sharding of another one, which `eval_shape` drops."""
    sharding = getattr(old, "sharding", None)
    if not (isinstance(new, jax.ShapeDtypeStruct) and isinstance(sharding, NamedSharding)):
        return new
    spec = [*sharding.spec, *[None] * (old.ndim - len(sharding.spec))]
    new_sharding = sharding.update(spec=PartitionSpec(*change(spec)))
    return jax.ShapeDtypeStruct(new.shape, new.dtype, sharding=new_sharding)


def _unstack(node: Any, path: str) -> list[Any]:
    _check_no_named_axes(node, path)
    leaves = Leaves(node)
    lengths = {
        _joined(path, own): np.shape(x)[0] if np.ndim(x) else None
        for own, x in zip(leaves.paths, leaves.values, strict=True)
        if is_array(x)
    }
    if not lengths:
        raise ValueError(f"{path!r} is no stack: it holds no array")
    (first, length), *others = lengths.items()
    for other, its_length in [(first, length), *others]:
        if its_length is None:
            raise ValueError(f"{other!r} has no axis, so it is in no stack of layers")
        if its_length != length:
            raise ValueError(
                f"the arrays of a stack have the same number of layers, but {first!r} has {length} "
                f"along the leading axis, and {other!r} has {its_length}"
            )
    assert length is not None
    return [
        leaves.rebuild(_layer(x, i) if is_array(x) else x for x in leaves.values)
        for i in range(length)
    ]


def _layer(x: Any, i: int) -> Any:
    if isinstance(x, np.ndarray):
        return x[i].copy() if x.ndim > 1 else x[i, ...].copy()
    if mesh_axes_of(x, 0) is None:
        layer = run_bitwise(functools.partial(_index, i), True, x)
        return _with_sharding(layer, x, lambda spec: spec[1:])
    sharding: Any = type_sharding(x)
    of_layer = sharding.update(spec=PartitionSpec(*sharding.spec[1:]))
    return run_bitwise(lambda x: on_automatic_axes(_index, (i,), of_layer, x), True, x)


def _index(i: int, x: Any) -> Any:
    return jax.lax.index_in_dim(x, i, 0, keepdims=False)
