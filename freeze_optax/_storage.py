"""Leaves of any dtype as arrays of those that every file format knows."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from freeze_optax._leaves import is_array


def encode(leaf: Any) -> tuple[Any, dict[str, Any]]:
    """A leaf as an array of a dtype that NumPy knows, and what to note of it.

    Args:
      leaf: An array or a Python number.

    Returns:
      The leaf itself where it may be stored as it is, else its bits; and its shape and dtype.
    """
    # A Python number, set by hand, gets the dtype that it will have after the next update.
    array = leaf if is_array(leaf) else jnp.asarray(leaf)
    entry = {"shape": list(array.shape), "dtype": str(array.dtype)}
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(array), {**entry, "key": str(jax.random.key_impl(array))}
    stored = _stored_dtype(array.dtype)
    if stored == array.dtype:
        return array, entry
    if jnp.issubdtype(array.dtype, jnp.integer):
        return array.astype(stored), entry
    bits = jax.lax.bitcast_convert_type(array, f"uint{jnp.finfo(array.dtype).bits}")
    return bits.astype(stored), entry


def decode(array: Any, entry: Mapping[str, Any]) -> Any:
    """The leaf again.

    Args:
      array: The array that was stored, from NumPy or JAX; whatever, for one without elements.
      entry: What `encode` noted.

    Returns:
      The leaf, on no certain device unless it is sharded over several.

    Raises:
      ValueError: If the array is another one than was noted, naming the path.
    """
    name, shape = entry["dtype"], tuple(entry["shape"])
    impl = entry.get("key")
    if impl:
        key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=impl)))
        stored, shape = np.dtype(key.dtype), (*shape, *key.shape)
    else:
        stored = _stored_dtype(jnp.dtype(name))
    if 0 in shape:
        array = np.zeros(shape, stored)
    if not is_array(array) or array.shape != shape or array.dtype != stored:
        what = f"{array.dtype}{list(array.shape)}" if is_array(array) else type(array).__name__
        raise ValueError(
            f"the export is damaged: {entry['path']!r} is {what}, not {stored}{list(shape)}"
        )
    if isinstance(array, np.ndarray) or len(array.sharding.device_set) == 1:
        array = jnp.asarray(np.asarray(array))
    return jax.random.wrap_key_data(array, impl=impl) if impl else _from_bits(array, name)


def _from_bits(array: jax.Array, name: str) -> jax.Array:
    if array.dtype == jnp.dtype(name):
        return array
    if jnp.issubdtype(jnp.dtype(name), jnp.integer):
        return array.astype(name)
    bits = array.astype(f"uint{jnp.finfo(name).bits}")
    return jax.lax.bitcast_convert_type(bits, jnp.dtype(name))


def _stored_dtype(dtype: Any) -> np.dtype[Any]:
    """The dtype that an array is stored with: its own, or that of its bits."""
    if dtype.kind in "biufc" and dtype.isbuiltin == 1:
        return dtype
    if jnp.issubdtype(dtype, jnp.integer):
        return np.dtype(np.int8 if jnp.issubdtype(dtype, jnp.signedinteger) else np.uint8)
    return np.dtype(f"uint{max(8, jnp.finfo(dtype).bits)}")
