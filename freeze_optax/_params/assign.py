"""Set leaves by their path."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from freeze_optax._rows.meshes import reshard_like
from freeze_optax._tree.kinds import is_array
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.memory import memory_of, put_in_memory
from freeze_optax._tree.messages import nearest_names, quoted_list


def assign(params: Any, values: Mapping[str, Any]) -> Any:
    """Sets leaves, each named by its exact path, and keeps their dtype and sharding.

    Examples:
      >>> import jax.numpy as jnp
      >>> import freeze_optax as fo
      >>> params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
      >>> fo.assign(params, {"dense/kernel": jnp.eye(2), "dense/bias": 0.0})["dense"]["bias"]
      Array([0., 0.], dtype=float32)

    Args:
      params: Any pytree.
      values: A mapping from the exact path of a leaf to an array or a scalar. The value must
        broadcast to the shape of the leaf, and is cast to its dtype.

    Returns:
      A tree like `params` with the new values. All other leaves are the same objects, and `params`
      is unchanged.

    Raises:
      ValueError: If a path names no leaf, or more than one; if a value does not broadcast to the
        shape of its leaf, or its dtype can't hold the value (a fraction for an integer). Then
        nothing is set.
      TypeError: If `values` is not a mapping with string keys; if a leaf or a value is not an
        array or a number; or if a value is traced, but its leaf is not an array of JAX. Then
        nothing is set.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"fo.assign takes a dict {{path: value}}, not a {type(values).__name__}")
    leaves = Leaves(params)
    indices: dict[str, list[int]] = {}
    for i, path in enumerate(leaves.paths):
        indices.setdefault(path, []).append(i)
    new = list(leaves.values)
    for path, value in values.items():
        i = _index_of(path, indices)
        new[i] = _set(path, new[i], value)
    return leaves.rebuild(new)


def _index_of(path: str, indices: Mapping[str, Sequence[int]]) -> int:
    """Returns the index of the one leaf at a path."""
    if not isinstance(path, str):
        raise TypeError(f"fo.assign takes paths, 'dense/kernel' say, but got the key {path!r}")
    at_path = indices.get(path, ())
    if len(at_path) == 1:
        return at_path[0]
    if at_path:
        raise ValueError(
            f"fo.assign can't tell which of {len(at_path)} leaves at {path!r} is meant"
        )
    below = [other for other in indices if other.startswith(f"{path}/")]
    hint = f"it is a node, with {quoted_list(below)}" if below else nearest_names(path, indices)
    raise ValueError(f"fo.assign was given {path!r}, which is no leaf; {hint}")


def _set(path: str, leaf: Any, value: Any) -> Any:
    """Returns the value as a leaf of the same kind, shape, dtype and sharding as `leaf`."""
    old = np.asarray(leaf) if isinstance(leaf, int | float | complex) else leaf
    if not isinstance(old, jax.Array | np.ndarray | np.generic):
        what = "abstract" if is_array(leaf) else f"a {type(leaf).__name__}"
        raise TypeError(f"fo.assign sets arrays and numbers, but the leaf at {path!r} is {what}")
    array = _as_array(path, value)
    _check_fits(path, old, array)
    if isinstance(old, jax.Array):
        return _on_devices_of(old, array)
    if isinstance(array, Tracer):
        raise TypeError(
            f"the value for {path!r} is traced, but the leaf is a {type(leaf).__name__}, which "
            "can't hold a traced value; make the params arrays of JAX"
        )
    new = np.broadcast_to(np.asarray(array), old.shape).astype(old.dtype)
    if isinstance(leaf, np.ndarray):
        return new
    return new[()] if isinstance(leaf, np.generic) else type(leaf)(new.item())


def _as_array(path: str, value: Any) -> Any:
    try:
        array = value if isinstance(value, jax.Array) else np.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"the value for {path!r} is no array: {error}") from error
    if array.dtype == object:
        raise TypeError(
            f"the value for {path!r} is a {type(value).__name__}, not an array or a number"
        )
    return array


_RANKS = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)


def _rank(dtype: Any) -> int | None:
    """Returns how general the numbers of a dtype are; None if it has no numbers (a PRNG key)."""
    return next((i for i, group in enumerate(_RANKS) if jnp.issubdtype(dtype, group)), None)


def _check_fits(path: str, old: Any, new: Any) -> None:
    """Raises if a new value does not fit the shape or the dtype of its leaf."""
    old_and_new = (
        f"the leaf {path!r} is {old.dtype}{list(old.shape)}, the value {new.dtype}{list(new.shape)}"
    )
    old_rank, new_rank = _rank(old.dtype), _rank(new.dtype)
    if new.dtype != old.dtype and (old_rank is None or new_rank is None):
        raise TypeError(f"{old_and_new}; only numbers are cast")
    try:
        fits = np.broadcast_shapes(new.shape, old.shape) == old.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{old_and_new}, which does not broadcast to that shape")
    if (
        old_rank is not None
        and new_rank is not None
        and (new_rank > old_rank or _is_beyond(new, old.dtype))
    ):
        raise ValueError(f"{old_and_new}, which that dtype can't hold; cast it first")


def _is_beyond(value: Any, dtype: Any) -> bool:
    """Whether a cast wraps an integer, or takes a number beyond the largest of the dtype.

    It is False for traced values.
    """
    if isinstance(value, Tracer) or value.dtype == dtype:
        return False
    numbers = np.asarray(value)
    with np.errstate(all="ignore"):
        cast = numbers.astype(dtype)
        if jnp.issubdtype(dtype, jnp.integer):
            return bool((cast != numbers).any())
        # As complex numbers of 128 bits, since NumPy's functions do not take the small formats.
        numbers, cast = numbers.astype(np.complex128), cast.astype(np.complex128)
        pairs = [(numbers.real, cast.real), (numbers.imag, cast.imag)]
        limits = jnp.finfo(dtype)
        largest, step = float(limits.max), float(limits.eps) * float(limits.max)
        return any(_is_lost(old, new, largest + step) for old, new in pairs)


def _is_lost(old: np.ndarray, new: np.ndarray, limit: float) -> bool:
    """Whether a cast of real numbers gives other infinite or missing ones, or ends far below."""
    # A format without infinity gives its largest number, or none, for what is beyond that.
    is_other = (np.isinf(old) & (new != old)) | (np.isnan(old) != np.isnan(new))
    is_beyond = np.isfinite(old) & (~np.isfinite(new) | (np.abs(old) > limit))
    return bool((is_other | is_beyond).any())


def _on_devices_of(old: jax.Array, value: Any) -> Any:
    """Returns a copy of the value with the shape, dtype and sharding of `old`."""
    if isinstance(old, Tracer) or isinstance(value, Tracer):
        cast = value if _rank(old.dtype) is None else jnp.asarray(value, old.dtype)
        placed = reshard_like(jnp.broadcast_to(cast, old.shape), old)
        return put_in_memory(placed, memory_of(old))
    # The copy goes by way of the host, for two reasons. Without a copy, two leaves set to one array
    # would share its buffer, and donating the params would delete the user's array. And a copy on
    # the device could end on a device that the leaf is not on.
    if _rank(old.dtype) is None:
        data = jnp.asarray(np.array(jax.random.key_data(value)))
        new = jax.random.wrap_key_data(data, impl=jax.random.key_impl(value))
    else:
        new = jnp.asarray(np.array(value).astype(old.dtype))
    new = jnp.broadcast_to(new, old.shape)
    return jax.device_put(new, old.sharding) if old.committed else new
