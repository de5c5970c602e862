"""`RowsByValue`: rows of one axis whose indices are an array, so that one program serves any."""

from typing import Any, final

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from freeze_optax._rows.exact import run_bitwise, run_in_place, run_move
from freeze_optax._rows.host_rows import row_of_host, with_row_replaced
from freeze_optax._rows.meshes import mesh_axes_of, on_automatic_axes, type_sharding
from freeze_optax._rows.remembered import remember_compact
from freeze_optax._tree.memory import memory_of, put_in_memory


@final
class RowsByValue:
    """Some rows of one axis of an array, as data; `Rows` is a static mask.

    Args:
      indices: The indices of the rows, a vector of int32, in ascending order and without repeats.
      length: The length of the axis.
      axis: The axis.
    """

    def __init__(self, indices: jax.Array, length: int, axis: int):
        self.indices, self.length, self.axis = indices, length, axis

    # By identity: the values are not known while a function is traced.
    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, RowsByValue)
            and self.indices is other.indices
            and self.axis == other.axis
        )

    def __hash__(self) -> int:
        return hash((id(self.indices), self.axis))

    @property
    def count(self) -> int:
        """The number of the rows."""
        return self.indices.shape[0]

    def take(self, x: Any) -> Any:
        """Returns the rows of an array, which may be abstract; each device has all of them.

        They are in device memory: the array may be too large for it, but these rows train.
        """
        if self._is_on_host(x):
            rows = [row_of_host(x, self.indices[j], self.axis) for j in range(self.count)]
            return jnp.stack([put_in_memory(row, None) for row in rows], self.axis)
        indices, sharding = self.indices, self._sharding(x)
        return run_move(
            lambda x: on_automatic_axes(_take, (self.axis,), sharding, x, indices), True, x
        )

    def put(self, x: Any, values: Any) -> Any:
        """Returns the array with new values for the rows; all other rows keep every bit."""
        if self._is_on_host(x):
            return run_in_place(self._put_each, x, put_in_memory(values, None))
        indices, sharding = self.indices, type_sharding(x)
        return run_bitwise(
            lambda x, values: on_automatic_axes(_put, (self.axis,), sharding, x, values, indices),
            True,
            x,
            values,
        )

    def put_among_zeros(self, values: Any, fill: float, like: Any) -> Any:
        """Returns an array with the values in their rows and zeros elsewhere.

        Args:
          values: The values of the rows.
          fill: The zero, 0.0 or -0.0.
          like: The array whose rows they are. The result has its sharding.
        """
        shape = (*values.shape[: self.axis], self.length, *values.shape[self.axis + 1 :])
        static = (self.axis, shape, str(fill))
        whole = on_automatic_axes(
            _put_among_zeros, static, type_sharding(like), values, self.indices
        )
        remember_compact(whole, self, values)
        return whole

    def _is_on_host(self, x: Any) -> bool:
        return memory_of(x) is not None and mesh_axes_of(x, self.axis) is None

    def _put_each(self, x: Any, values: Any) -> Any:
        # Not a scatter, which JAX does not take in host memory beside indices on the device.
        for j in range(self.count):
            row = jax.lax.slice_in_dim(values, j, j + 1, axis=self.axis)
            x = with_row_replaced(x, row, self.indices[j], self.axis)
        return x

    def _sharding(self, x: Any) -> NamedSharding | None:
        sharding: Any = type_sharding(x)
        if sharding is None:
            return None
        spec = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
        spec[self.axis] = None
        return sharding.update(spec=PartitionSpec(*spec))


def _index(axis: int, indices: Any) -> tuple[Any, ...]:
    return (*[slice(None)] * axis, indices)


_MODES: dict[str, Any] = {
    "mode": "promise_in_bounds",
    "unique_indices": True,
    "indices_are_sorted": True,
}


def _take(axis: int, x: Any, indices: Any) -> Any:
    return x.at[_index(axis, indices)].get(**_MODES)


def _put(axis: int, x: Any, values: Any, indices: Any) -> Any:
    return x.at[_index(axis, indices)].set(values, **_MODES)


def _put_among_zeros(
    axis: int, shape: tuple[int, ...], fill: str, values: Any, indices: Any
) -> Any:
    zero = float(fill)
    is_complex = jnp.issubdtype(values.dtype, jnp.complexfloating)
    zeros = jnp.full(shape, complex(zero, zero) if is_complex else zero, values.dtype)
    return _put(axis, zeros, values, indices)
