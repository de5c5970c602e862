"""Groups of leaves that share a buffer, or are to stay equal."""

import contextlib
from collections.abc import Generator, Iterable, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from freeze_optax._rows.rows import Flag
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.messages import quoted_list

Group = tuple[str, ...]


def tied_paths(params: Any) -> list[Group]:
    """The groups of paths whose leaves share one buffer.

    Examples:
      >>> import jax.numpy as jnp
      >>> import freeze_optax as fo
      >>> table = jnp.ones((3, 2))
      >>> fo.tied_paths({"embed": table, "head": {"bias": jnp.ones(3), "kernel": table}})
      [('embed', 'head/kernel')]

    Args:
      params: Any pytree. A jitted function returns a buffer of its own for each leaf, so ask
        before the first step.

    Returns:
      A group for each buffer that stands at more than one path, in the order of the tree. Abstract
      leaves (`jax.ShapeDtypeStruct`, tracers) have no buffer, and are never tied; nor are arrays
      without elements.
    """
    leaves = Leaves(params)
    return [tuple(leaves.paths[i] for i in group) for group in _groups(leaves)]


def first_of_buffer(leaves: Leaves) -> dict[int, int]:
    """For each leaf whose buffer another before it has, the index of the first of these."""
    return {i: group[0] for group in _groups(leaves) for i in group[1:]}


def _groups(leaves: Leaves) -> list[list[int]]:
    # By address alone first: few leaves have one in common, and of all the rest takes time to ask.
    near = _group_by_key((i, _address(leaf)) for i, leaf in enumerate(leaves.values))
    return _group_by_key((i, _buffer(leaves.values[i])) for group in near for i in group)


def _group_by_key(keys: Iterable[tuple[int, Any]]) -> list[list[int]]:
    """The groups of more than one index with the same key; None is no key."""
    firsts: dict[Any, int] = {}
    groups: dict[int, list[int]] = {}
    for i, key in keys:
        first = firsts.setdefault(key, i)
        if first != i and key is not None:
            groups.setdefault(first, [first]).append(i)
    return sorted(groups.values())


def _address(leaf: Any) -> Any:
    """What two leaves that share their memory have in common, among others."""
    if isinstance(leaf, Tracer):
        return None
    try:
        return leaf.unsafe_buffer_pointer()
    except Exception:  # noqa: BLE001
        if isinstance(leaf, np.ndarray):
            return leaf.__array_interface__["data"][0]
        return _pointers(leaf) if isinstance(leaf, jax.Array) else None


def _buffer(leaf: Any) -> Any:
    """What two leaves have in common if and only if they share their memory, in one form."""
    if not leaf.size:
        return None
    if isinstance(leaf, np.ndarray):
        start, _ = leaf.__array_interface__["data"]
        return (start, leaf.shape, leaf.strides, leaf.dtype)
    return (_pointers(leaf), leaf.shape, leaf.dtype)


def _pointers(leaf: jax.Array) -> Any:
    try:
        if len(leaf.devices()) == 1:
            (device,) = leaf.devices()
            return (device.id, leaf.unsafe_buffer_pointer())
        shards = leaf.addressable_shards
        pointers = [(shard.device.id, shard.data.unsafe_buffer_pointer()) for shard in shards]
        return tuple(pointers) or id(leaf)
    except Exception:  # noqa: BLE001
        # Deleted, of another process, or of a platform or an extended dtype (PRNG keys) that
        # tells no pointer.
        return id(leaf)


SHARED = "they share one buffer; freeze all or none of them, or give one its own with jnp.copy"
TIED = "fo.tie ties them; freeze all or none of them"


def check_ties(leaves: Leaves, frozen: Sequence[Flag]) -> None:
    """Raises where one of the leaves that share a buffer is frozen and another is not.

    Args:
      leaves: The leaves of the params.
      frozen: For each of them whether it is frozen.

    Raises:
      ValueError: Naming both.
    """
    if len(set(frozen)) > 1:
        for group in _groups(leaves):
            check_group([(leaves.paths[i], frozen[i]) for i in group], SHARED)


def check_group(group: Sequence[tuple[str, Flag]], why: str) -> None:
    """Raises where some leaves of a group are frozen and others are not.

    Args:
      group: Their paths, each with whether it is frozen.
      why: What makes them a group, and what to do.

    Raises:
      ValueError: Naming both.
    """
    if len({flag for _, flag in group}) < 2:
        return
    still = [path for path, flag in group if flag]
    moving = [path for path, flag in group if flag is not True]
    parts = [f"of {path!r} {flag!r}" for path, flag in group if not isinstance(flag, bool)]
    only = f" ({', '.join(parts)})" if parts else ""
    raise ValueError(
        f"{quoted_list(still)} would be frozen{only} and {quoted_list(moving)} trained, but {why}"
    )


_collected: ContextVar[list[Group] | None] = ContextVar("noted", default=None)


def report_ties(groups: Sequence[Group]) -> None:
    """Tells whoever is asking by `noted_ties` of groups."""
    noted = _collected.get()
    if noted is not None:
        noted.extend(groups)


@contextlib.contextmanager
def collect_ties() -> Generator[list[Group], None, None]:
    """Collects the groups of each `tie` that is initialised meanwhile.

    So an edit, which has nothing but the outermost `init`, learns what `tie`s there are in it.
    """
    groups = list[Group]()
    token = _collected.set(groups)
    try:
        yield groups
    finally:
        _collected.reset(token)
