"""Turn a spec, in any of its forms, into a selector and into flags."""

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, final

import jax
import numpy as np
import optax
from jax.core import Tracer

from freeze_optax._rows.flags import Flag, flag_from_mask, flag_from_vector, flag_union
from freeze_optax._select.by_variable import ByVariable, is_variable_filter
from freeze_optax._select.selector import (
    Path,
    Selector,
    everything,
    nothing,
)
from freeze_optax._select.untrainable import check_not_lost, with_untrainable
from freeze_optax._state.freeze_state import FreezeState, ScheduledState, schedules_in, states_in
from freeze_optax._state.plan import Plan
from freeze_optax._state.rotation import RotatingState
from freeze_optax._tree.holes import is_hole
from freeze_optax._tree.key_paths import ancestors, check_unique, nodes_of
from freeze_optax._tree.kinds import can_train
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.messages import quoted_list
from freeze_optax._tree.node_types import nodes_of_type
from freeze_optax._tree.quantized import quantized_nodes

Spec: TypeAlias = Any
"""What an argument named `frozen` or `where` accepts. Any tree of bools is one, so it is `Any`."""


@final
class _Union(Selector):
    """Selects what any of the specs selects."""

    def __init__(self, specs: Sequence[Any]):
        self._parts = [as_selector(spec) for spec in specs]

    @property
    def is_by_path(self) -> bool:
        return all(part.is_by_path for part in self._parts)

    def flags(self, leaves: Leaves) -> Sequence[Flag]:
        columns = [part.flags(leaves) for part in self._parts]
        if not columns:
            return nothing.flags(leaves)
        rows = zip(leaves.values, *columns, strict=True)
        return [flag_union(flags, np.shape(leaf)) for leaf, *flags in rows]

    def __repr__(self) -> str:
        return repr(self._parts)


@final
class _Planned(Selector):
    """Selects what is frozen in an optimizer state.

    Args:
      plan: The plan of the state.
      is_masked: Whether a transformation around it (`optax.masked`, `optax.partition`) hands it
        only some leaves, so that its holes may be trained by another one.
    """

    def __init__(self, plan: Plan, is_masked: bool = False):
        self._plan, self._is_masked = plan, is_masked

    def flags(self, leaves: Leaves) -> Sequence[Flag]:
        leaves = leaves.as_stored
        if not self._is_masked:
            return self._plan.flags(leaves, "tree")
        remedy = (
            "its fo.freezable is inside of optax.partition or optax.masked, which handed it some "
            "leaves alone; put it around: fo.freezable(optax.partition(…), frozen)"
        )
        try:
            flags = self._plan.flags(leaves, "tree")
        except ValueError as error:
            raise ValueError(f"{error}; {remedy}") from None
        if others := self._others(leaves):
            raise ValueError(
                f"the state does not say whether {quoted_list(others)} is frozen, as {remedy}"
            )
        return flags

    def _others(self, leaves: Leaves) -> list[str]:
        """Returns the paths of the leaves that the transformation never saw."""
        kinds = self._plan.context.leaf_kinds
        if kinds is None:
            return []
        ordered = self._plan.in_order_of(leaves, kinds, "tree", overwritten=())
        triples = zip(leaves.paths, leaves.values, ordered, strict=True)
        return [path for path, x, kind in triples if kind is None and can_train(x)]

    def __repr__(self) -> str:
        return repr(self._plan)


@final
class _Mask(Selector):
    """Selects what is True in a tree of bools."""

    def __init__(self, mask: Any):
        self._mask = mask

    def flags(self, leaves: Leaves) -> Sequence[Flag]:
        mask = self._mask
        is_list = type(mask) in (list, tuple) and type(leaves.tree) not in (list, tuple)
        # A list of bools is no union, which would be all or nothing. It is a mask of a list.
        if is_list and not all(isinstance(x, bool | np.bool_) for x in mask):
            return _Union(mask).flags(leaves)
        pairs = zip(match_by_path(mask, leaves, "mask"), leaves.paths, leaves.values, strict=True)
        return [is_hole(leaf) or _as_flag(*entry, path, leaf) for entry, path, leaf in pairs]

    def __repr__(self) -> str:
        return f"mask of {len(jax.tree.leaves(self._mask))} leaves"


@final
class _Function(Selector):
    """Selects what is True in the mask that a function gives for the tree."""

    def __init__(self, function: Callable[[Any], Any]):
        self._function = function

    def flags(self, leaves: Leaves) -> Sequence[Flag]:
        if not takes(self._function, 1):
            raise TypeError(
                f"a function as a spec takes the tree alone, but {self!r} takes other arguments; "
                "a function of path and leaf goes to fo.where"
            )
        try:
            mask = self._function(leaves.tree)
        except Exception as error:
            error.add_note(
                f"freeze_optax called {self!r} with the whole tree, as a function that is a spec "
                "gives a mask of it; a function of path and leaf goes to fo.where"
            )
            raise
        return as_mask(mask).flags(leaves)

    def __repr__(self) -> str:
        return getattr(self._function, "__qualname__", repr(self._function))


def takes(function: Callable[..., Any], count: int) -> bool:
    """Whether a function takes this many arguments; True also where Python can't tell."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # some functions in C have no signature
        return True
    return True


def match_by_path(tree: Any, leaves: Leaves, what: str) -> list[tuple[str, Any]]:
    """Finds for each leaf the leaf of `tree` at the same path, or at the nearest path above it.

    Args:
      tree: A tree of the structure of the params, or a prefix of it. It is matched by key path, so
        its containers may be of other types.
      leaves: The leaves of the params.
      what: The name of the tree in an error.

    Returns:
      A pair of path and leaf of `tree`, for each of the leaves.

    Raises:
      ValueError: If a leaf of either tree has no counterpart. The error names these leaves.
    """
    entries = Leaves(tree)
    if entries.treedef == leaves.treedef:
        return list(zip(entries.paths, entries.values, strict=True))
    matched = _match_prefix(entries, leaves)
    if matched is not None:
        return matched
    table = dict(zip(entries.paths, entries.values, strict=True))
    check_unique(entries.paths, what)
    check_unique([path for path in leaves.paths if path in table], what)
    above = [
        next((node for node in (*ancestors(path), "") if node in table), None)
        for path in leaves.paths
    ]
    missing = [path for path, node in zip(leaves.paths, above, strict=True) if node is None]
    unused = sorted(set(entries.paths).difference(node for node in above if node is not None))
    if unused:  # It is no mistake to name a node without leaves.
        leafless = _leafless(leaves.tree)
        unused = [path for path in unused if path not in leafless]
    if missing or unused:
        parts = [f"nothing for {quoted_list(missing)} of the tree"] if missing else []
        parts += [f"{quoted_list(unused)}, which the tree does not have"] if unused else []
        has_bools = any(getattr(x, "dtype", type(x)) in (bool, np.bool_) for x in entries.values)
        hint = "" if has_bools or what != "mask" else "; it holds no bools, and no FreezeState"
        hint = "; to freeze nothing write fo.nothing" if tree is None else hint
        if has_bools and what == "mask" and type(tree) in (list, tuple):
            hint = "; a list of bools is a mask of a list: for all leaves write one bool"
        raise ValueError(f"the {what} does not fit the tree: it has {', and '.join(parts)}{hint}")
    return [(node, table[node]) for node in above if node is not None]


def _match_prefix(entries: Leaves, leaves: Leaves) -> list[tuple[str, Any]] | None:
    """Repeats each leaf of a prefix tree for the leaves below it; None if it is not such a tree."""
    try:
        subtrees = entries.treedef.flatten_up_to(leaves.tree)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    triples = zip(entries.paths, entries.values, subtrees, strict=True)
    pairs = [(path, value) for path, value, tree in triples for _ in Leaves(tree).values]
    return pairs if len(pairs) == len(leaves.values) else None


def _leafless(tree: Any) -> frozenset[str]:
    """Returns the paths of all nodes without leaves, also of those inside of other such nodes."""
    outer = set(Leaves(tree, stop=lambda x: not jax.tree.leaves(x, is_leaf=is_hole)).paths)
    inner = Leaves(tree, stop=lambda x: jax.tree.structure(x).num_nodes == 1).paths
    return frozenset(node for node in nodes_of(inner) if outer.intersection(ancestors(node)))


def _as_flag(path: str, value: Any, leaf_path: str, leaf: Any) -> Flag:
    """Returns the flag of a leaf for the value that the mask has at `path`."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    shape = getattr(value, "shape", None)
    if shape is not None and getattr(value, "dtype", None) == np.bool_:
        if isinstance(value, Tracer):
            raise TypeError(
                f"the mask at {path!r} is traced, but what is frozen is settled before tracing; "
                "make the mask of Python bools"
            )
        if not shape and isinstance(value, np.ndarray | jax.Array):
            return bool(value)
        leaf_shape = getattr(leaf, "shape", ())
        if leaf_shape and isinstance(value, np.ndarray | jax.Array):
            return _as_part(np.asarray(value), leaf_shape, path, leaf_path)
    kind = f"{type(value).__name__}{getattr(value, 'shape', '')}"
    hint = "; for labels write fo.labelled(labels, name)" if isinstance(value, str) else ""
    if not path and not isinstance(value, str):
        hint = "; a spec is a path glob, a selector, a mask, an optimizer state, or a list of these"
    if isinstance(value, re.Pattern):
        hint = f"; write fo.regex({value.pattern!r})"
    raise TypeError(f"the mask at {path!r} is {kind}, not a bool{hint}")


def _as_part(value: np.ndarray, leaf_shape: tuple[int, ...], path: str, leaf_path: str) -> Flag:
    """Returns the flag for an array of bools at `path` in a mask."""
    if value.shape == leaf_shape[:1] and all(leaf_shape):
        return flag_from_vector(value)
    if value.ndim == 1 and value.shape != leaf_shape[:1]:
        raise ValueError(
            f"the mask at {path!r} has {len(value)} bools, one for each row, but the leaf "
            f"{leaf_path!r} is of shape {leaf_shape}"
        )
    pairs = zip(value.shape, leaf_shape, strict=False)
    is_vector = value.ndim == 1
    if not is_vector and (value.ndim != len(leaf_shape) or any(a not in (1, b) for a, b in pairs)):
        raise ValueError(
            f"the mask at {path!r} is of shape {value.shape}, but the leaf {leaf_path!r} is of "
            f"shape {leaf_shape}; give a bool for each element, or arrays of length 1 along the "
            "axes along which all is alike"
        )
    if not all(leaf_shape):
        return bool(value.size and value.all())
    varying = [axis for axis, length in enumerate(value.shape) if length > 1]
    if len(varying) == 1:
        return flag_from_vector(value.ravel(), *varying)
    return flag_from_mask(np.broadcast_to(value, leaf_shape))


def is_function(x: Any) -> bool:
    """Whether to call `x`; a callable pytree (an Equinox module) is read as a tree instead."""
    return callable(x) and jax.tree_util.all_leaves([x])


def as_selector(spec: Spec) -> Selector:
    """Returns the selector for a spec.

    Args:
      spec: Any spec, see `freeze_optax.mask`.

    Returns:
      A selector. It checks masks and states against the tree when it is applied.

    Raises:
      ValueError: If a tree holds more than one `FreezeState`.
      TypeError: If the spec is a transformation or a class.
    """
    if isinstance(spec, Selector):
        return spec
    if isinstance(spec, str):
        return Path((spec,))
    if isinstance(spec, FreezeState):
        return _Planned(spec.plan)
    if isinstance(spec, optax.GradientTransformation):
        raise TypeError(
            "a transformation is not a spec; pass the optimizer state that its init gives"
        )
    if is_variable_filter(spec):
        return ByVariable(spec)
    if isinstance(spec, type):
        raise TypeError(
            f"the class {spec.__name__} is not a spec; fo.of_type({spec.__name__}) selects what is "
            "under its instances"
        )
    if type(spec) in (list, tuple) and (not spec or any(map(_is_spec, spec))):
        return _Union(spec)
    return _Function(spec) if is_function(spec) else _of_tree(spec)


def _is_spec(part: Any) -> bool:
    """Whether a list with this part is a list of specs, and not a mask."""
    return isinstance(part, Selector | str) or is_function(part) or is_variable_filter(part)


def state_in_spec(spec: Spec) -> FreezeState | None:
    """Returns the state if the spec is a state, or a list of one state alone; None otherwise."""
    while type(spec) is list and len(spec) == 1:
        (spec,) = spec
    selector = as_selector(spec)
    return states_in(spec)[0] if isinstance(selector, _Planned) else None


def _of_tree(tree: Any) -> Selector:
    """Returns the selector for a mask, or for a tree that holds a `FreezeState`."""
    states = states_in(tree)
    if not states:
        return as_mask(tree)
    if type(tree) is list or (type(tree) is tuple and any(map(_holds_bools, tree))):
        return _Union(tree)
    if len(states) > 1:
        raise ValueError(
            f"a {type(tree).__name__} with {len(states)} FreezeStates does not say which to "
            "follow; pass one of them, or a list of them for their union"
        )
    masked = nodes_of_type(optax.MaskedState, tree)
    return _Planned(states[0].plan, is_masked=any(map(states_in, masked)))


def _holds_bools(tree: Any) -> bool:
    """Whether a tree beside a state is a mask, as no optimizer keeps Python bools."""
    return any(isinstance(leaf, bool) for leaf in jax.tree.leaves(tree))


def schedules_in_spec(spec: Spec) -> list[ScheduledState]:
    """Returns the states of `scheduled` in a spec; a selector or a string holds none."""
    return [] if isinstance(spec, Selector | str) else schedules_in(spec)


def rotations_in_spec(spec: Spec) -> list[RotatingState]:
    """Returns the states of `rotating` in a spec; a selector or a string holds none."""
    return [] if isinstance(spec, Selector | str) else nodes_of_type(RotatingState, spec)


def as_mask(spec: Any) -> Selector:
    """Returns the selector for a bool or a tree of bools."""
    if isinstance(spec, bool | np.bool_):
        return everything if spec else nothing
    return _Mask(spec)


def resolve(spec: Spec, leaves: Leaves, partitioned: bool = False) -> list[Flag]:
    """Returns the flags of what is frozen: what a spec selects, and all that cannot be trained.

    Args:
      spec: Any spec, see `freeze_optax.mask`.
      leaves: The leaves of the params.
      partitioned: Whether a leaf that is frozen in part may consist of what trains alone.

    Raises:
      ValueError: If the spec does not fit, or if a leaf that is not selected would silently not
        train (see `check_not_lost`).
    """
    selector = as_selector(spec)
    selected = selector.flags(leaves)
    # A state was resolved at `init`. One of an older version may train a part of a quantized node.
    nodes = [] if isinstance(selector, _Planned) else quantized_nodes(leaves)
    frozen = with_untrainable(selected, leaves, nodes, partitioned)
    check_not_lost(selected, frozen, leaves)
    return frozen


def untrainable(leaves: Leaves) -> list[Flag]:
    """Returns the flags of the leaves that are frozen under any spec, without an error for any."""
    return with_untrainable([False] * len(leaves.values), leaves, quantized_nodes(leaves))
