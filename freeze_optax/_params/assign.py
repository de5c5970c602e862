"""Setting leaves by their path."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from freeze_optax._tree.kinds import is_array
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.messages import nearest_names, quoted_list


def assign(params: Any, values: Mapping[str, Any]) -> Any:
    """Sets leaves, each named by its exact path; dtype and sharding stay the leaf's.

    Examples:
      >>> import jax.numpy as jnp
      >>> import freeze_optax as fo
      >>> params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
      >>> fo.assign(params, {"dense/kernel": jnp.eye(2), "dense/bias": 0.0})["dense"]["bias"]
      Array([0., 0.], dtype=float32)

    Args:
      params: Any pytree.
      values: For each path an array or a scalar, which broadcasts to the shape of the leaf.

    Returns:
      A tree like `params`; the other leaves are the very objects, and `params` is unchanged.

    Raises:
      ValueError: If a path names no leaf, or more than one; if a value does not broadcast to the
        shape of its leaf, or has no like in its dtype (a fraction for an integer). Then nothing
        is set.
      TypeError: If `values` is no mapping of strings, if a leaf or a value is no array or number,
        or if a value is traced, but its leaf no array of JAX. Then nothing is set.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"fo.assign takes a dict {{path: value}}, not a {type(values).__name__}")
    leaves = Leaves(params)
    places: dict[str, list[int]] = {}
    for i, path in enumerate(leaves.paths):
        places.setdefault(path, []).append(i)
    new = list(leaves.values)
    for path, value in values.items():
        i = _index(path, places)
        new[i] = _set(path, new[i], value)
    return leaves.rebuild(new)


def _index(path: str, places: Mapping[str, Sequence[int]]) -> int:
    if not isinstance(path, str):
        raise TypeError(f"fo.assign takes paths, 'dense/kernel' say, but got the key {path!r}")
    found = places.get(path, ())
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"fo.assign can't tell which of {len(found)} leaves at {path!r} is meant")
    below = [other for other in places if other.startswith(f"{path}/")]
    hint = f"it is a node, with {quoted_list(below)}" if below else nearest_names(path, places)
    raise ValueError(f"fo.assign was given {path!r}, which is no leaf; {hint}")


def _set(path: str, leaf: Any, value: Any) -> Any:
    own = np.asarray(leaf) if isinstance(leaf, int | float | complex) else leaf
    if not isinstance(own, jax.Array | np.ndarray | np.generic):
        what = "abstract" if is_array(leaf) else f"a {type(leaf).__name__}"
        raise TypeError(f"fo.assign sets arrays and numbers, but the leaf at {path!r} is {what}")
    given = _array(path, value)
    _check(path, own, given)
    if isinstance(own, jax.Array):
        return _on_devices_of(own, given)
    if isinstance(given, Tracer):
        raise TypeError(
            f"the value for {path!r} is traced, but the leaf is a {type(leaf).__name__}, which "
            "can't be; make the params arrays of JAX"
        )
    new = np.broadcast_to(np.asarray(given), own.shape).astype(own.dtype)
    if isinstance(leaf, np.ndarray):
        return new
    return new[()] if isinstance(leaf, np.generic) else type(leaf)(new.item())


def _array(path: str, value: Any) -> Any:
    try:
        given = value if isinstance(value, jax.Array) else np.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"the value for {path!r} is no array: {error}") from error
    if given.dtype == object:
        raise TypeError(
            f"the value for {path!r} is a {type(value).__name__}, not an array or a number"
        )
    return given


_RANKS = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)


def _rank(dtype: Any) -> int | None:
    """How general the numbers of a dtype are; None for what is no number (a PRNG key)."""
    return next((i for i, group in enumerate(_RANKS) if jnp.issubdtype(dtype, group)), None)


def _check(path: str, own: Any, given: Any) -> None:
    both = (
        f"the leaf {path!r} is {own.dtype}{list(own.shape)}, the value {given.dtype}"
        f"{list(given.shape)}"
    )
    mine, other = _rank(own.dtype), _rank(given.dtype)
    if given.dtype != own.dtype and (mine is None or other is None):
        raise TypeError(f"{both}; only numbers are cast")
    try:
        fits = np.broadcast_shapes(given.shape, own.shape) == own.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{both}, which does not broadcast to that shape")
    if mine is not None and other is not None and (other > mine or _is_beyond(given, own.dtype)):
        raise ValueError(f"{both}, which that dtype can't hold; cast it first")


def _is_beyond(given: Any, dtype: Any) -> bool:
    """Whether a cast wraps an integer or makes a number infinite; not asked of traced values."""
    if isinstance(given, Tracer) or given.dtype == dtype:
        return False
    numbers = np.asarray(given)
    with np.errstate(all="ignore"):
        cast = numbers.astype(dtype)
        if jnp.issubdtype(dtype, jnp.integer):
            return bool((cast != numbers).any())
        # As complex: NumPy knows of no finiteness in the small formats.
        return bool((np.isfinite(numbers) & ~np.isfinite(cast.astype(np.complex128))).any())


def _on_devices_of(own: jax.Array, given: Any) -> Any:
    if isinstance(own, Tracer) or isinstance(given, Tracer):
        cast = given if _rank(own.dtype) is None else jnp.asarray(given, own.dtype)
        return jnp.broadcast_to(cast, own.shape)
    # By way of the host: a copy, as two leaves set to one array would share its buffer and
    # donating the params would delete the user's; and on no device that the leaf is not on.
    if _rank(own.dtype) is None:
        data = jnp.asarray(np.array(jax.random.key_data(given)))
        new = jax.random.wrap_key_data(data, impl=jax.random.key_impl(given))
    else:
        new = jnp.asarray(np.array(given).astype(own.dtype))
    new = jnp.broadcast_to(new, own.shape)
    return jax.device_put(new, own.sharding) if own.committed else new
