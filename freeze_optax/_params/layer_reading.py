"""Reading of layers out of stacked arrays, whatever mesh and memory these are in."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec

from freeze_optax._rows.host_rows import row_of_host
from freeze_optax._rows.meshes import (
    is_on_mesh,
    mesh_axes_of,
    on_automatic_axes,
    type_sharding,
)
from freeze_optax._tree.memory import copied_to_device, memory_of


def axes_and_length(
    paths: Sequence[str], arrays: Sequence[Any], axis: int
) -> tuple[list[int], int]:
    """Returns the axis of the layers in each array, and their number; raises if it differs.

    Args:
      paths: The key paths of the arrays.
      arrays: The stacked arrays.
      axis: The axis as the user gave it.
    """
    axes = [axis + np.ndim(x) if axis < 0 else axis for x in arrays]
    pairs = zip(arrays, axes, strict=True)
    lengths = [np.shape(x)[a] if 0 <= a < np.ndim(x) else None for x, a in pairs]
    distinct = dict.fromkeys(lengths)
    length = next(iter(distinct), None)
    if length is None or len(distinct) > 1:
        which = "leading axis" if axis == 0 else f"length of axis {axis}"
        examples = map(lengths.index, distinct)
        shapes = ", ".join(f"{np.shape(arrays[i])} of {paths[i]!r}" for i in examples)
        what = f"they have the shapes {shapes}" if arrays else "was given no array"
        raise ValueError(f"fo.scan needs leaves with the same {which}, but {what}")
    return axes, length


def can_gather(arrays: Sequence[Any], axes: Sequence[int]) -> bool:
    """Returns whether layers along the leading axis can be gathered, on one device, at no cost."""
    return not any(axes) and not any(is_on_mesh(x) for x in arrays if isinstance(x, jax.Array))


def gather_layers(indices: np.ndarray, x: Any) -> jax.Array:
    """Returns some layers along the leading axis."""
    modes: Any = {"unique_indices": True, "indices_are_sorted": True}
    return jnp.asarray(x).at[indices].get(mode="promise_in_bounds", **modes)


def in_front(x: jax.Array, axis: int) -> jax.Array:
    """Returns an array with the axis of the layers in front."""
    return jnp.moveaxis(x, axis, 0)


def layer_at(x: jax.Array, i: jax.Array, axis: int) -> jax.Array:
    """Returns one layer, which each device needs."""
    if mesh_axes_of(x, axis) is None:
        return jax.lax.dynamic_index_in_dim(x, i, axis, keepdims=False)
    sharding: Any = type_sharding(x)
    others = [*sharding.spec[:axis], *sharding.spec[axis + 1 :]]
    of_layer = sharding.update(spec=PartitionSpec(*others))
    return on_automatic_axes(_gather_layer, (axis,), of_layer, x, i)


def _gather_layer(axis: int, x: jax.Array, i: jax.Array) -> jax.Array:
    # XLA sends one layer for a gather, but the whole stack for a dynamic slice.
    index = (slice(None),) * axis
    return x.at[(*index, i[None])].get(mode="promise_in_bounds")[(*index, 0)]


def layers_between(start: int, stop: int, x: jax.Array, axis: int) -> jax.Array:
    """Returns some layers, all of them on each device, as `jax.lax.scan` needs them."""
    if mesh_axes_of(x, axis) is None:
        return in_front(jax.lax.slice_in_dim(x, start, stop, axis=axis), axis)
    sharding: Any = type_sharding(x)
    others = [*sharding.spec[:axis], *sharding.spec[axis + 1 :]]
    of_layers = sharding.update(spec=PartitionSpec(None, *others))
    return on_automatic_axes(_slice_layers, (start, stop, axis), of_layers, x)


def _slice_layers(start: int, stop: int, axis: int, x: jax.Array) -> jax.Array:
    return in_front(jax.lax.slice_in_dim(x, start, stop, axis=axis), axis)


class LayerReader:
    """Reads layer after layer, for a loop that may fetch the next one ahead.

    Args:
      rebuild: A function that makes a layer out of its leaves.
      places: For each of the stacked arrays the axis of the layers, and the index of its first one.
      streamed: Which of them are in host memory, and copied to the device layer by layer.
    """

    def __init__(
        self,
        rebuild: Callable[[list[Any]], Any],
        places: Sequence[tuple[int, int]],
        streamed: Sequence[bool],
    ):
        self._rebuild, self._places, self._streamed = rebuild, places, streamed

    @property
    def streams(self) -> bool:
        """Whether anything is copied to the device layer by layer."""
        return any(self._streamed)

    def fetch(self, arrays: Sequence[Any], i: Any) -> list[Any]:
        """Returns what is streamed of layer `i`, on the device."""
        triples = zip(arrays, self._places, self._streamed, strict=True)
        return [
            copied_to_device(row_of_host(x, i - first, axis, layer_at))
            for x, (axis, first), is_streamed in triples
            if is_streamed
        ]

    def read(self, arrays: Sequence[Any], fetched: Sequence[Any], i: Any) -> Any:
        """Returns layer `i`, as the user's function takes it.

        Args:
          arrays: The stacked arrays.
          fetched: What `fetch` returned for this layer.
          i: The index of the layer.
        """
        remaining = iter(fetched)
        triples = zip(arrays, self._places, self._streamed, strict=True)
        return self._rebuild(
            [
                next(remaining) if is_streamed else layer_at(x, i - first, axis)
                for x, (axis, first), is_streamed in triples
            ]
        )


def host_arrays(arrays: Sequence[Any]) -> list[bool]:
    """Returns which arrays are in host memory, as far as their types tell.

    If none of them tell, all may be: the types of JAX 0.7.1 do not name the memory, nor do those of
    a function that is compiled ahead for a `jax.ShapeDtypeStruct`. To copy what is on the device
    already costs little.
    """
    on_host = [memory_of(x) is not None for x in arrays]
    return on_host if any(on_host) else [isinstance(x, Tracer) for x in arrays]


def streamed_arrays(
    paths: Sequence[str], arrays: Sequence[Any], axes: Sequence[int], constant: Sequence[bool]
) -> list[bool]:
    """Returns which arrays are copied to the device layer by layer: constants in host memory.

    Args:
      paths: The key paths of the arrays.
      arrays: The stacked arrays.
      axes: The axis of the layers in each of them.
      constant: Which of them the loop does not differentiate.

    Raises:
      ValueError: If the axis of the layers of such an array is sharded.
    """
    pairs = zip(constant, host_arrays(arrays), strict=True)
    streamed = [flag and host for flag, host in pairs]
    for path, x, axis, flag in zip(paths, arrays, axes, streamed, strict=True):
        if flag and (mesh_axes := mesh_axes_of(x, axis)) is not None:
            raise ValueError(
                f"{path!r} is in host memory, and axis {axis}, that of its layers, is sharded over "
                f"{mesh_axes!r}; fo.scan(..., stream=True) copies a layer from the memory of each "
                "device's own host, so shard another axis of it"
            )
    return streamed


def concatenate_outputs(outputs: Sequence[Any]) -> Any:
    """Returns the outputs of all runs of layers, along a leading axis."""
    if len(outputs) == 1:
        return outputs[0]
    return jax.tree.map(lambda *ys: jnp.concatenate(ys), *outputs)
