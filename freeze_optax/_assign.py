"""Setting leaves by their path."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from freeze_optax._leaves import Leaves, is_array
from freeze_optax._patterns import listed, nearest


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
      TypeError: If `values` is no mapping, or a leaf or a value is no array or number.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"fo.assign takes a dict {{path: value}}, not a {type(values).__name__}")
    leaves = Leaves(params)
    new = list(leaves.values)
    for path, value in values.items():
        i = _index(path, leaves)
        new[i] = _set(path, new[i], value)
    return leaves.rebuild(new)


def _index(path: str, leaves: Leaves) -> int:
    count = leaves.paths.count(path)
    if count == 1:
        return leaves.paths.index(path)
    if count:
        raise ValueError(f"fo.assign can't tell which of {count} leaves at {path!r} is meant")
    below = [other for other in leaves.paths if other.startswith(f"{path}/")]
    hint = f"it is a node, with {listed(below)}" if below else nearest(path, leaves.paths)
    raise ValueError(f"fo.assign was given {path!r}, which is no leaf; {hint}")


_RANKS = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)


def _rank(dtype: Any) -> int | None:
    """How general the numbers of a dtype are; None for what is no number (a PRNG key)."""
    return next((i for i, group in enumerate(_RANKS) if jnp.issubdtype(dtype, group)), None)


def _set(path: str, leaf: Any, value: Any) -> Any:
    given = value if is_array(value) else np.asarray(value)
    own = np.asarray(leaf) if isinstance(leaf, int | float | complex) else leaf
    if not isinstance(own, jax.Array | np.ndarray | np.generic):
        what = "abstract" if is_array(leaf) else f"a {type(leaf).__name__}"
        raise TypeError(f"fo.assign sets arrays and numbers, but the leaf at {path!r} is {what}")
    _check(path, own, given)
    if isinstance(own, jax.Array):
        return _on_devices_of(own, given)
    new = np.broadcast_to(np.asarray(given), own.shape).astype(own.dtype)
    if own is leaf:
        return new
    return type(leaf)(new.item())


def _check(path: str, own: Any, given: Any) -> None:
    both = f"the leaf {path!r} is {own.dtype}{list(own.shape)}, the value {given.dtype}"
    mine, other = _rank(own.dtype), _rank(given.dtype)
    if other is None and given.dtype != own.dtype:
        raise TypeError(f"{both}{list(given.shape)}; it must be an array or a number")
    if mine is None and given.dtype != own.dtype:
        raise TypeError(f"{both}{list(given.shape)}; it must be of that very dtype")
    try:
        fits = np.broadcast_shapes(given.shape, own.shape) == own.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{both}{list(given.shape)}, which does not broadcast to that shape")
    if mine is None or other is None:
        return
    loses = other > mine
    if other == mine == _RANKS.index(jnp.integer) and not isinstance(given, Tracer):
        exact = np.asarray(given)
        loses = bool((exact.astype(own.dtype) != exact).any())
    if loses:
        raise ValueError(
            f"{both}{list(given.shape)}, which would lose in that dtype; cast it first"
        )


def _on_devices_of(own: jax.Array, given: Any) -> Any:
    if _rank(own.dtype) is not None:
        # A copy, even where the value fits as it is: two leaves set to one array would share its
        # buffer, and donating the params would delete the user's.
        given = jnp.array(given, dtype=own.dtype)
    new = jnp.broadcast_to(given, own.shape)
    if isinstance(own, Tracer) or not own.committed:
        return new
    return jax.device_put(new, own.sharding)
