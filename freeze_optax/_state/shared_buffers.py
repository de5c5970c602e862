"""Groups of leaves that share one buffer, or that `tie` keeps equal."""

import contextlib
import functools
from collections.abc import Generator, Iterable, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from freeze_optax._rows.flags import Flag
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.messages import quoted_list

Group = tuple[str, ...]
"""The paths of the leaves of a group."""


def tied_paths(params: Any) -> list[Group]:
    """Returns the groups of paths whose leaves share one buffer.

    Examples:
      >>> import jax.numpy as jnp
      >>> import freeze_optax as fo
      >>> table = jnp.ones((3, 2))
      >>> fo.tied_paths({"embed": table, "head": {"bias": jnp.ones(3), "kernel": table}})
      [('embed', 'head/kernel')]

    Args:
      params: Any pytree. A jitted function returns a separate buffer for each leaf, so call this
        function before the first step.

    Returns:
      A group for each buffer that is at more than one path, in the order of the tree. Abstract
      leaves (`jax.ShapeDtypeStruct`, tracers) have no buffer, so they are never in a group. Arrays
      without elements are never in a group either.
    """
    leaves = Leaves(params)
    return [tuple(leaves.paths[i] for i in group) for group in _groups(leaves)]


def first_of_buffer(leaves: Leaves) -> dict[int, int]:
    """Returns, for each leaf that shares the buffer of an earlier leaf, the first such leaf.

    Args:
      leaves: The leaves of the params.

    Returns:
      A dict from the index of a leaf to the index of the first leaf with the same buffer.
    """
    return {i: group[0] for group in _groups(leaves) for i in group[1:]}


def _groups(leaves: Leaves) -> list[list[int]]:
    """Returns the indices of the leaves that share a buffer, in groups."""
    if _has_own_addresses(leaves.values):  # as in nearly all trees
        return []
    # First by the address alone: few leaves share one, and the other properties take time to read.
    same_address = _group_by_key((i, _address(leaf)) for i, leaf in enumerate(leaves.values))
    return _group_by_key((i, _buffer(leaves.values[i])) for group in same_address for i in group)


def _has_own_addresses(values: list[Any]) -> bool:
    """Whether all are arrays on one device, each at an address of its own; False if in doubt."""
    if any(map(_is_tracer_type, set(map(type, values)))):
        return False
    try:
        return len({x.unsafe_buffer_pointer() for x in values}) == len(values)
    except Exception:  # noqa: BLE001
        return False


def _group_by_key(keys: Iterable[tuple[int, Any]]) -> list[list[int]]:
    """Returns the groups of two or more indices with the same key; None is not a key."""
    firsts: dict[Any, int] = {}
    groups: dict[int, list[int]] = {}
    for i, key in keys:
        first = firsts.setdefault(key, i)
        if first != i and key is not None:
            groups.setdefault(first, [first]).append(i)
    return sorted(groups.values())


def _address(leaf: Any) -> Any:
    """Returns a key that is equal for leaves that share memory, and may be equal for others."""
    if _is_tracer_type(type(leaf)):
        return None
    try:
        return leaf.unsafe_buffer_pointer()
    except Exception:  # noqa: BLE001
        if isinstance(leaf, np.ndarray):
            return leaf.__array_interface__["data"][0]
        return _pointers(leaf) if isinstance(leaf, jax.Array) else None


@functools.cache
def _is_tracer_type(cls: type) -> bool:
    return issubclass(cls, Tracer)


def _buffer(leaf: Any) -> Any:
    """Returns a key that is equal exactly where leaves share memory, shape, dtype and strides."""
    if not leaf.size:
        return None
    if isinstance(leaf, np.ndarray):
        start, _ = leaf.__array_interface__["data"]
        return (start, leaf.shape, leaf.strides, leaf.dtype)
    return (_pointers(leaf), leaf.shape, leaf.dtype)


def _pointers(leaf: jax.Array) -> Any:
    """Returns the devices and pointers of the shards of an array, or its `id` if it has none."""
    try:
        if len(leaf.devices()) == 1:
            (device,) = leaf.devices()
            return (device.id, leaf.unsafe_buffer_pointer())
        shards = leaf.addressable_shards
        pointers = [(shard.device.id, shard.data.unsafe_buffer_pointer()) for shard in shards]
        return tuple(pointers) or id(leaf)
    except Exception:  # noqa: BLE001
        # The array is deleted, or is in another process, or its platform or its extended dtype
        # (PRNG keys) gives no pointer.
        return id(leaf)


SHARED = "they share one buffer; freeze all or none of them, or give one its own with jnp.copy"
TIED = "fo.tie ties them; freeze all or none of them"


def check_ties(leaves: Leaves, frozen: Sequence[Flag]) -> None:
    """Raises if one of the leaves that share a buffer is frozen and another is not.

    Args:
      leaves: The leaves of the params.
      frozen: For each leaf, whether it is frozen.

    Raises:
      ValueError: Naming both leaves.
    """
    if len(set(frozen)) > 1:
        for group in _groups(leaves):
            check_group([(leaves.paths[i], frozen[i]) for i in group], SHARED)


def check_group(group: Sequence[tuple[str, Flag]], why: str) -> None:
    """Raises if some leaves of a group are frozen and others are not.

    Args:
      group: The path of each leaf, with whether the leaf is frozen.
      why: Why the leaves are a group, and what to do.

    Raises:
      ValueError: Naming the frozen leaves and the others.
    """
    if len({flag for _, flag in group}) < 2:
        return
    frozen = [path for path, flag in group if flag]
    trained = [path for path, flag in group if flag is not True]
    parts = [f"of {path!r} {flag!r}" for path, flag in group if not isinstance(flag, bool)]
    in_part = f" ({', '.join(parts)})" if parts else ""
    raise ValueError(
        f"{quoted_list(frozen)} would be frozen{in_part} and {quoted_list(trained)} trained, "
        f"but {why}"
    )


_collected: ContextVar[list[Group] | None] = ContextVar("collected", default=None)


def report_ties(groups: Sequence[Group]) -> None:
    """Adds groups to the list of the enclosing `collect_ties`, if there is one."""
    collected = _collected.get()
    if collected is not None:
        collected.extend(groups)


@contextlib.contextmanager
def collect_ties() -> Generator[list[Group], None, None]:
    """Collects the groups of each `tie` that is initialised inside the `with` block.

    An edit has only the outermost `init`. This is how it finds the `tie`s inside.
    """
    groups = list[Group]()
    token = _collected.set(groups)
    try:
        yield groups
    finally:
        _collected.reset(token)
