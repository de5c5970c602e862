"""One update for all leaves of a group."""

import collections
import functools
import operator
from collections.abc import Iterable
from typing import Any

import jax
import optax

from freeze_optax._rows.parts import is_hole_or_parts
from freeze_optax._state.shared_buffers import TIED, Group, check_group, report_ties
from freeze_optax._transform.extra_arguments import adapt_extra_arguments
from freeze_optax._transform.inner_transformation import as_transformation
from freeze_optax._tree.holes import HOLE, is_hole, is_placeholder
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.lookahead import map_copies, param_copies
from freeze_optax._tree.messages import nearest_names, quoted_list


def tie(
    inner: optax.GradientTransformation, *groups: Iterable[str]
) -> optax.GradientTransformationExtraArgs:
    """Trains the leaves of each group as one: summed gradients, one state, one update for all.

    JAX keeps no aliases: two leaves that start as one array part at the first step. With their
    gradients summed and one update they stay equal, as one shared parameter would be. It goes
    inside: `freezable(tie(inner, *groups), frozen)`. Leaves that still share their buffer can't be
    donated; copy them first, `jax.tree.map(jnp.copy, params)`.

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
      *groups: The paths of leaves of one shape and dtype, two or more in each group;
        `fo.tied_paths(params)` gives those that share a buffer.

    Returns:
      A transformation whose state is that of `inner` for the first leaf of each group and all
      that is in none. `init` and `update` raise ValueError if a path names no leaf, if the leaves
      of a group differ in shape or dtype, or only some of them are there.

    Raises:
      TypeError: If `inner` is no transformation, or a group holds anything but strings.
      ValueError: If a group has fewer than two paths, or a path is in two groups.
    """
    inner = as_transformation("tie", inner)
    tied = _Tied(_check_groups(groups))

    def init_fn(params: optax.Params) -> Any:
        if is_placeholder(params):
            return inner.init(params)
        report_ties(tied.groups)
        tied.check(Leaves(param_copies(params)[0], stop=is_hole_or_parts))
        return inner.init(map_copies(tied.drop, params))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        own = _for_inner(extra, tied, Leaves(updates, stop=is_hole_or_parts).treedef)
        moved, state = inner.update(tied.sum(updates), state, map_copies(tied.drop, params), **own)
        return map_copies(tied.spread, moved), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Tied:
    """What becomes of the leaves of a group: the first in the tree stands for the others."""

    def __init__(self, groups: tuple[Group, ...]):
        self.groups = groups
        self._indices = functools.lru_cache(maxsize=64)(self._find)

    def _find(self, paths: tuple[str, ...]) -> list[list[int]]:
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
        """Raises where leaves of a group can't be one."""
        for group in self._indices(leaves.paths):
            _check_holes(leaves, group)
            _check_alike(leaves, group)

    def drop(self, tree: Any) -> Any:
        """The tree with a hole for each leaf but the first of a group."""
        leaves = Leaves(tree, stop=is_hole_or_parts)
        others = {i for group in self._indices(leaves.paths) for i in group[1:]}
        return leaves.with_holes(i in others for i in range(len(leaves.values)))

    def sum(self, gradients: Any) -> Any:
        """The gradients with their sum at the first leaf of each group, and holes at the others."""
        leaves = Leaves(gradients, stop=is_hole_or_parts)
        values = list(leaves.values)
        for group in self._indices(leaves.paths):
            _check_holes(leaves, group)
            first, *others = group
            for other in others:
                values[first] = jax.tree.map(operator.add, values[first], values[other])
                values[other] = HOLE
        return leaves.rebuild(values)

    def spread(self, tree: Any) -> Any:
        """The tree with the first leaf of each group at the others too."""
        leaves = Leaves(tree, stop=is_hole_or_parts)
        values = list(leaves.values)
        for first, *others in self._indices(leaves.paths):
            for other in others:
                values[other] = values[first]
        return leaves.rebuild(values)


def _for_inner(extra: dict[str, Any], tied: _Tied, structure: Any) -> dict[str, Any]:
    """Extra arguments as `inner` should see them, with one leaf for each group."""

    def is_like_params(value: Any) -> bool:
        own = Leaves(value, stop=is_hole_or_parts).treedef
        return own == structure and not jax.tree_util.treedef_is_leaf(own)

    def tree(name: str, value: Any) -> Any:
        # A line search takes the slope along the shared leaf from the gradient.
        return tied.sum(value) if name == "grad" else tied.drop(value)

    return adapt_extra_arguments(extra, is_like_params, tree, tied.spread, tied.sum)


def _check_groups(groups: tuple[Iterable[str], ...]) -> tuple[Group, ...]:
    seen = set[str]()
    checked: list[Group] = []
    for given in groups:
        is_group = isinstance(given, Iterable) and not isinstance(given, str)
        group = tuple(given) if is_group else ()
        if not is_group or not all(isinstance(path, str) for path in group):
            raise TypeError(
                f"fo.tie takes groups of paths, one argument each, but got {given!r}: write "
                "fo.tie(inner, ('embed', 'head')), or fo.tie(inner, *fo.tied_paths(params))"
            )
        if len(group) < 2:
            raise ValueError(f"a group of fo.tie needs two paths or more, not {list(group)}")
        counts = collections.Counter(group)
        twice = sorted(path for path in counts if path in seen or counts[path] > 1)
        if twice:
            raise ValueError(f"{quoted_list(twice)} is in the groups of fo.tie more than once")
        seen.update(group)
        checked.append(group)
    return tuple(checked)


def _check_holes(leaves: Leaves, group: list[int]) -> None:
    check_group([(leaves.paths[i], is_hole(leaves.values[i])) for i in group], TIED)


def _check_alike(leaves: Leaves, group: list[int]) -> None:
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
    # One for each part of a leaf that is frozen by rows.
    parts = jax.tree.leaves(jax.eval_shape(lambda: value))
    return ", ".join(f"{part.dtype}{list(part.shape)}" for part in parts)
