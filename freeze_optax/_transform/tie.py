"""Train several leaves as one shared parameter."""

import collections
import functools
import operator
from collections.abc import Iterable
from typing import Any

import jax
import optax

from freeze_optax._rows.parts import is_hole_or_parts
from freeze_optax._state.own_plan import OwnPlan
from freeze_optax._state.shared_buffers import TIED, Group, check_group, report_ties
from freeze_optax._transform.extra_arguments import adapt_extra_arguments
from freeze_optax._transform.inner_transformation import as_transformation
from freeze_optax._tree.holes import HOLE, is_hole, is_placeholder
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.lookahead import map_copies, param_copies
from freeze_optax._tree.memory import run_on_device
from freeze_optax._tree.messages import nearest_names, quoted_list
from freeze_optax._tree.node_types import nodes_of_type


def tie(
    inner: optax.GradientTransformation, *groups: Iterable[str]
) -> optax.GradientTransformationExtraArgs:
    """Trains the leaves of each group as one: summed gradients, one state, one update for all.

    JAX keeps no aliases: two leaves that start as one array become different at the first step.
    With the sum of their gradients and one update they stay equal, as one shared parameter would.
    `tie` goes inside of `freezable`: `freezable(tie(inner, *groups), frozen)`. Leaves that still
    share their buffer can't be donated. Copy them first: `jax.tree.map(jnp.copy, params)`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import freeze_optax as fo
      >>> params = {"embed": jnp.ones(2), "head": jnp.ones(2)}
      >>> tx = fo.freezable(fo.tie(optax.sgd(0.5), ("embed", "head")))
      >>> grads = {"embed": jnp.array([1.0, 0.0]), "head": jnp.array([1.0, 1.0])}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> updates
      {'embed': Array([-1. , -0.5], dtype=float32), 'head': Array([-1. , -0.5], dtype=float32)}

    Args:
      inner: Any optax transformation.
      *groups: Groups of key paths, two or more in each group. The leaves of a group have the same
        shape and dtype. `fo.tied_paths(params)` gives the groups that share a buffer.

    Returns:
      A transformation. Its state is the state of `inner` for the first leaf of each group, and for
      all leaves that are in no group. `update` gives the same update to all leaves of a group.

      `init` and `update` raise ValueError if a path names no leaf, or more than one, or if only
      some leaves of a group are there. `init` raises ValueError also if the leaves of a group
      differ in shape or dtype, or if `inner` is a `freezable`.

    Raises:
      TypeError: If `inner` is not a transformation, or a group holds anything but strings.
      ValueError: If a group has fewer than two paths, or a path occurs twice in the groups.
    """
    inner = as_transformation("tie", inner)
    tied = _Tied(_check_groups(groups))

    def init_fn(params: optax.Params) -> Any:
        if is_placeholder(params):
            return inner.init(params)
        report_ties(tied.groups)
        tied.check(Leaves(param_copies(params)[0], stop=is_hole_or_parts))
        state = inner.init(map_copies(tied.drop, params))
        if nodes_of_type(OwnPlan, state):
            raise ValueError(
                "fo.tie was given a transformation that freezes by itself, which would have all "
                "leaves of a group but one as frozen; write fo.freezable(fo.tie(inner, *groups), "
                "frozen)"
            )
        return state

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        structure = Leaves(updates, stop=is_hole_or_parts).treedef
        inner_extra = _adapt_extra(extra, tied, structure)
        inner_updates, state = inner.update(
            tied.sum(updates), state, map_copies(tied.drop, params), **inner_extra
        )
        return map_copies(tied.spread, inner_updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


_add = functools.partial(run_on_device, operator.add)


class _Tied:
    """Maps trees between the user's params and those of `inner`, with one leaf for each group.

    This leaf is the first one of the group in the order of the tree.
    """

    def __init__(self, groups: tuple[Group, ...]):
        self.groups = groups
        self._indices = functools.lru_cache(maxsize=64)(self._find_indices)

    def _find_indices(self, paths: tuple[str, ...]) -> list[list[int]]:
        """Returns the indices of the leaves of each group."""
        index = {path: i for i, path in enumerate(paths)}
        counts = collections.Counter(paths)
        for path in (path for group in self.groups for path in group):
            if path not in index:
                raise ValueError(
                    f"fo.tie was given {path!r}, which is no leaf; {nearest_names(path, paths)}"
                )
            if counts[path] > 1:
                raise ValueError(
                    f"fo.tie can't tell which of {counts[path]} leaves at {path!r} is meant"
                )
        return [sorted(index[path] for path in group) for group in self.groups]

    def check(self, leaves: Leaves) -> None:
        """Raises if leaves of a group can't be trained as one."""
        for group in self._indices(leaves.paths):
            _check_holes(leaves, group)
            _check_alike(leaves, group)

    def drop(self, tree: Any) -> Any:
        """Returns the tree with holes at all leaves of a group but the first."""
        leaves = Leaves(tree, stop=is_hole_or_parts)
        others = {i for group in self._indices(leaves.paths) for i in group[1:]}
        return leaves.with_holes(i in others for i in range(len(leaves.values)))

    def sum(self, gradients: Any) -> Any:
        """Returns the gradients, summed at the first leaf of each group; holes at the others."""
        leaves = Leaves(gradients, stop=is_hole_or_parts)
        values = list(leaves.values)
        for group in self._indices(leaves.paths):
            _check_holes(leaves, group)
            first, *others = group
            for other in others:
                values[first] = jax.tree.map(_add, values[first], values[other])
                values[other] = HOLE
        return leaves.rebuild(values)

    def spread(self, tree: Any) -> Any:
        """Returns the tree with the first leaf of each group copied to the others."""
        leaves = Leaves(tree, stop=is_hole_or_parts)
        values = list(leaves.values)
        for first, *others in self._indices(leaves.paths):
            for other in others:
                values[other] = values[first]
        return leaves.rebuild(values)


def _adapt_extra(extra: dict[str, Any], tied: _Tied, structure: Any) -> dict[str, Any]:
    """Returns the extra arguments as `inner` needs them, with one leaf for each group."""

    def is_like_params(value: Any) -> bool:
        treedef = Leaves(value, stop=is_hole_or_parts).treedef
        return treedef == structure and not jax.tree_util.treedef_is_leaf(treedef)

    def to_inner(name: str, value: Any) -> Any:
        # A line search reads the slope along a shared leaf from `grad`. That slope is the sum.
        return tied.sum(value) if name == "grad" else tied.drop(value)

    return adapt_extra_arguments(extra, is_like_params, to_inner, tied.spread, tied.sum)


def _check_groups(groups: tuple[Iterable[str], ...]) -> tuple[Group, ...]:
    """Returns the groups as tuples of paths, or raises if they are not groups of paths."""
    seen = set[str]()
    checked: list[Group] = []
    for argument in groups:
        is_group = isinstance(argument, Iterable) and not isinstance(argument, str)
        group = tuple(argument) if is_group else ()
        if not is_group or not all(isinstance(path, str) for path in group):
            raise TypeError(
                f"fo.tie takes groups of paths, one argument each, but got {argument!r}: write "
                "fo.tie(inner, ('embed', 'head')), or fo.tie(inner, *fo.tied_paths(params))"
            )
        if len(group) < 2:
            raise ValueError(f"a group of fo.tie needs two paths or more, not {list(group)}")
        counts = collections.Counter(group)
        repeated = sorted(path for path in counts if path in seen or counts[path] > 1)
        if repeated:
            raise ValueError(f"{quoted_list(repeated)} is in the groups of fo.tie more than once")
        seen.update(group)
        checked.append(group)
    return tuple(checked)


def _check_holes(leaves: Leaves, group: list[int]) -> None:
    """Raises if a group has holes at some of its leaves, but not at all."""
    check_group([(leaves.paths[i], is_hole(leaves.values[i])) for i in group], TIED)


def _check_alike(leaves: Leaves, group: list[int]) -> None:
    """Raises if the leaves of a group differ in shape or dtype."""
    if is_hole(leaves.values[group[0]]):
        return
    first, *others = [(leaves.paths[i], _shape_and_dtype(leaves.values[i])) for i in group]
    for other in others:
        if other[1] != first[1]:
            raise ValueError(
                f"{first[0]!r} is {first[1]} and {other[0]!r} {other[1]}; leaves that fo.tie ties "
                "have one shape and dtype"
            )


def _shape_and_dtype(value: Any) -> str:
    # A leaf that is frozen in part has a shape and a dtype for each of its parts.
    parts = jax.tree.leaves(jax.eval_shape(lambda: value))
    return ", ".join(f"{part.dtype}{list(part.shape)}" for part in parts)
