"""Shardings of rows on meshes with explicit axes (`jax.sharding.AxisType.Explicit`).

On such a mesh the sharding of an array is a part of its type. JAX refuses most operations along an
axis that is sharded, and operations on arrays of different shardings. So a function that moves rows
runs on automatic axes here, where XLA shards it as it does on a mesh without explicit axes, and
says what sharding its result has. The alternative, to make the axis of the rows whole on each
device first, would gather the whole leaf.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

MeshAxes = str | tuple[str, ...] | None
"""The mesh axes that one axis of an array is sharded over, as in a `PartitionSpec`."""


def type_sharding(x: Any) -> NamedSharding | None:
    """Returns the sharding in the type of an array; None if its mesh has no explicit axes."""
    if not isinstance(x, jax.Array):
        return None
    sharding: Any = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in (sharding.mesh.axis_types or ()) else None


def is_on_mesh(x: Any) -> bool:
    """Returns whether XLA may have sharded an array, by its type."""
    mesh: Any = jax.typeof(x).sharding.mesh
    return any(kind != AxisType.Manual for kind in mesh.axis_types or ()) and mesh.size > 1


def mesh_axes_of(x: Any, axis: int) -> MeshAxes:
    """Returns the explicit mesh axes that an axis of an array is sharded over."""
    sharding = type_sharding(x)
    return sharding.spec[axis] if sharding and len(sharding.spec) > axis else None


def sharding_of_rows(
    count: int, axis: int, x: Any, like: Any = None, mesh_axes: MeshAxes = None
) -> NamedSharding | None:
    """Returns the sharding of an array of some rows, or of all rows, of a leaf.

    The mesh does not divide every number of rows, and a type has no uneven shards. If the mesh axes
    of the axis of the rows do not divide this number, that axis is not sharded.

    Args:
      count: The number of rows.
      axis: The axis of the rows.
      x: An array of other rows, whose other axes are sharded as those of the result.
      like: An array whose axis of rows is sharded as that of the result; by default `x`. It is
        ignored if it has more or fewer axes than `x`.
      mesh_axes: The mesh axes of the axis of the rows, in place of those of an array.

    Returns:
      A sharding for the type of the array; None if it has none, as no axis of a mesh is explicit.
    """
    whole = type_sharding(like) if np.ndim(like) == x.ndim else None
    sharding = type_sharding(x) or whole
    if sharding is None:
        return None
    own, others = sharding.spec[axis], [*sharding.spec[:axis], *sharding.spec[axis + 1 :]]
    axes = (whole.spec[axis] if whole else own) if mesh_axes is None else mesh_axes
    names, used = _names([axes]), _names(others)
    sizes = [sharding.mesh.shape.get(name, 0) for name in names if name not in used]
    fits = len(sizes) == len(names) and all(sizes) and count % math.prod(sizes) == 0
    others.insert(axis, axes if fits else None)
    return NamedSharding(sharding.mesh, PartitionSpec(*others))


def unsharded(rank: int, *arrays: Any) -> NamedSharding | None:
    """Returns the sharding of an array that each device has all of, beside some arrays.

    Args:
      rank: The number of axes of the array.
      *arrays: The arrays, of which those on a mesh with explicit axes count.

    Returns:
      As `sharding_of_rows`.
    """
    sharding = next(filter(None, map(type_sharding, arrays)), None)
    return sharding and NamedSharding(sharding.mesh, PartitionSpec(*[None] * rank))


def _names(spec: Sequence[MeshAxes]) -> list[str]:
    """Returns the names of the mesh axes in a `PartitionSpec`."""
    return [name for axes in spec for name in ((axes,) if isinstance(axes, str) else axes or ())]


def on_automatic_axes(
    move: Callable[..., Any], static: tuple[Any, ...], sharding: NamedSharding | None, *arrays: Any
) -> Any:
    """Calls `move(*static, *arrays)`, on automatic axes if the result needs a sharding.

    Args:
      move: A function of a module, so that its compiled form is found again.
      static: The first arguments, hashable.
      sharding: The sharding of the result; None for arrays on other meshes, where XLA chooses it.
      *arrays: The other arguments.
    """
    if sharding is None:
        return move(*static, *arrays)
    return _on_automatic_axes(move, static, sharding, *arrays)


# Under jit also in eager mode: outside of it, JAX has no automatic axes on an explicit mesh. It is
# not inlined: JAX 0.10 then can't transpose a slice (its zero is of the mesh around the function).
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _on_automatic_axes(
    move: Callable[..., Any], static: tuple[Any, ...], sharding: NamedSharding, *arrays: Any
) -> Any:
    explicit = tuple(
        name
        for name, kind in zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    )
    moved = functools.partial(move, *static)
    return jax.sharding.auto_axes(moved, axes=explicit, out_sharding=sharding)(*arrays)


def reshard_like(x: Any, like: Any) -> Any:
    """Returns an array with the sharding of another one, if that is a part of its type."""
    sharding = type_sharding(like)
    if sharding is None or type_sharding(x) == sharding:
        return x
    return jax.sharding.reshard(x, sharding)
