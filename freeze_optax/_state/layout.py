"""`Layout`: where an optimizer state holds the statistics of each leaf, counters and clocks."""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import numpy as np

from freeze_optax._state.measured_state import MeasuredState
from freeze_optax._state.own_plan import OwnPlan
from freeze_optax._state.rates_state import RatesState
from freeze_optax._state.shared_buffers import collect_ties
from freeze_optax._tree.batch_axis import UNDER_VMAP, extra_axis
from freeze_optax._tree.holes import HOLE, is_hole
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.lookahead import param_copies
from freeze_optax._tree.messages import few_clauses, path_differences
from freeze_optax._tree.node_types import nodes_of_type
from freeze_optax._tree.variables import without_boxes_of_holes

COUNTER = -1
"""The owner of an array that starts again with a leaf, such as a step count beside moments."""

CLOCK = -2
"""The owner of an array that runs on, such as the step count of a schedule."""

ABSENT = -3
"""The owner of a hole for a node of the params that the transformation leaves out as a whole."""

_FACTORS, _NORMS, _STATE = map(jax.tree_util.GetAttrKey, ("factors", "norms", "state"))

Keys = tuple[Any, ...]
Place = tuple[Keys, int]
"""The keys of a node of a state that is like the params, and the index of a leaf."""


class Layout:
    """Lists the places in the state of a transformation, and the owner of each.

    The layout is read from the state that `init` makes for params that are all holes. A hole in
    that state is a place for the statistics of one leaf, whatever the place holds for real params.
    A node with a direct child that has the structure of the params starts again with a leaf. So
    the arrays directly in that node are counters, and each cohort of leaves has its own copy of
    them. Any other array is a clock and runs on: the count of a schedule, an injected learning
    rate, the key of a noise.

    Args:
      init: Makes the state for params with holes.
      skeleton: The params, with a hole for each leaf.

    Raises:
      ValueError: If `init` fails on the skeleton, naming the transformation that fails.

    Attributes:
      paths: The key path of each place in the state.
      owners: For each place, the index of the leaf whose statistics it holds, or `COUNTER`,
        `CLOCK` or `ABSENT`.
      counters: The indices of the places that hold counters, in order.
      prefixes: For each place, the keys of the node like the params that the place is in; `()`
        for a place outside of such nodes.
      ties: The groups of all `tie`s in the transformation.
      factors: The prefixes of the trees of factors (`freeze_optax.rates`).
      scalars: The prefixes of the trees with a few numbers for each leaf: of factors, and of norms
        (`freeze_optax.measured`). They are for all of a leaf, so each part of it gets the same.
    """

    def __init__(self, init: Callable[[Any], Any], skeleton: Any):
        try:
            # A new function each time: a trace that jax has cached would report no ties.
            with collect_ties() as self.ties:
                made = jax.eval_shape(lambda: init(skeleton))
        except Exception as error:
            raise ValueError(
                f"the state of {_failing_transformation(error)} can't be edited, nor follow "
                "phases: its init fails on params that are all holes (optax.MaskedNode), with "
                f"{type(error).__name__}: {error}"
            ) from error
        self._has_own_plan = bool(nodes_of_type(OwnPlan, made))
        # The place of a leaf in a box is the box, so the state of unboxed params has it too. `init`
        # itself gets the boxes, because a label tree in it may have them.
        template = Leaves(without_boxes_of_holes(made))
        self._treedef, self._template = template.treedef, template.values
        self.paths = template.paths
        params = _keys(without_boxes_of_holes(param_copies(skeleton)[0]))
        keys = _keys(template.tree)
        nodes = list(_nodes_of_scalars(made))
        self.factors = frozenset(keys for keys, node in nodes if isinstance(node, RatesState))
        self.scalars = frozenset(keys for keys, _ in nodes)
        # A node of norms has no counters: the state beside the norms is another's.
        self.owners = _owners(keys, template.values, params, self.scalars)
        # Norms of groups, whose labels are not known for holes alone.
        self._any_shape = {
            i
            for i, (place, x) in enumerate(zip(keys, template.values, strict=True))
            if place in self.scalars and not is_hole(x)
        }
        self.prefixes = [
            place[: len(place) - len(params[owner])] if owner >= 0 else ()
            for place, owner in zip(keys, self.owners, strict=True)
        ]
        self.counters = tuple(i for i, owner in enumerate(self.owners) if owner == COUNTER)

    def places(self, inner_state: Any) -> list[Any]:
        """Returns what each place of a state holds: an array, a hole, or a node for one leaf.

        Args:
          inner_state: A state of the transformation.

        Raises:
          ValueError: If the state has another structure, as one with a plan of its own in it has
            where that plan differs; or an array in it mixes several leaves, naming its path.
        """
        try:
            values = self._treedef.flatten_up_to(inner_state)
        except (ValueError, TypeError):
            if self._has_own_plan:
                raise ValueError(
                    "the inner state has a FreezeState of its own, so what is frozen can't change "
                    "here; say all that is frozen in the outer transformation, and give that the "
                    "optimizer without fo.freezable"
                ) from None
            paths = Leaves(inner_state).paths
            hint = "; if `update` is what makes them, let `init` make them too"
            raise ValueError(
                f"the inner state, a {type(inner_state).__name__}, does not have the structure "
                "that its transformation gives: "
                + path_differences(paths, self.paths, "in the inner state", "in that structure")
                + (hint if set(self.paths) < set(paths) else "")
            ) from None
        length = self._extra_axis(values)
        if length is not None:
            raise ValueError(
                f"the state has one more axis, of length {length}, than that of one model, "
                f"{UNDER_VMAP}"
            )
        places = zip(self.paths, self.owners, self._template, values, strict=True)
        mixing_leaves = [
            f"{path!r} has {array_shapes(value)}, but with all leaves frozen it has "
            f"{array_shapes(expected)}"
            for i, (path, owner, expected, value) in enumerate(places)
            if owner < 0
            and array_shapes(value) != array_shapes(expected)
            and i not in self._any_shape
        ]
        if mixing_leaves:
            raise ValueError(
                "the state of this inner transformation can't be edited, as a part of it mixes "
                f"the leaves (a flattened vector, say): {few_clauses(mixing_leaves)}"
            )
        return values

    def extra_axis(self, inner_state: Any) -> int | None:
        """Returns the length of the axis by which all counters and clocks of a state are larger.

        Args:
          inner_state: A state. Another structure than that of the transformation gives None.
        """
        try:
            return self._extra_axis(self._treedef.flatten_up_to(inner_state))
        except (ValueError, TypeError):
            return None

    def _extra_axis(self, values: list[Any]) -> int | None:
        triples = zip(self.owners, values, self._template, strict=True)
        shapes = [
            pair
            for owner, value, expected in triples
            if owner < 0
            for pair in zip(array_shapes(value), array_shapes(expected), strict=False)
        ]
        return extra_axis(shapes)

    def rebuild(self, values: list[Any]) -> Any:
        """Returns the state with other values, one for each place."""
        return jax.tree.unflatten(self._treedef, values)

    def split(self, inner_state: Any) -> tuple[dict[Place, Any], list[Any]]:
        """Returns the statistics in a state by their place, and a list of counters and clocks.

        Args:
          inner_state: As for `places`.

        Returns:
          A dict from place to statistics, and the counters and clocks in the order of the places.

        Raises:
          ValueError: As for `places`.
        """
        values = self.places(inner_state)
        triples = list(zip(self.prefixes, self.owners, values, strict=True))
        statistics = {(prefix, owner): x for prefix, owner, x in triples if owner >= 0}
        return statistics, [x for _, owner, x in triples if ABSENT < owner < 0]

    def join(self, statistic: Callable[[Place, str], Any], shared: list[Any]) -> Any:
        """Returns a state made of statistics, counters and clocks; the inverse of `split`.

        Args:
          statistic: Gives the statistics of a place, from the place and its key path.
          shared: The counters and clocks, in the order of the places.
        """
        remaining = iter(shared)

        def value(prefix: Keys, owner: int, path: str) -> Any:
            if owner == ABSENT:
                return HOLE
            return next(remaining) if owner < 0 else statistic((prefix, owner), path)

        return self.rebuild(list(map(value, self.prefixes, self.owners, self.paths)))


def _nodes_of_scalars(tree: Any, keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Yields the states that hold a few numbers for each leaf, with the keys of these numbers."""
    is_node = lambda x: isinstance(x, RatesState | MeasuredState)  # noqa: E731
    for below, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_node)[0]:
        if isinstance(node, RatesState):
            yield (*keys, *below, _FACTORS), node
        elif isinstance(node, MeasuredState):
            yield (*keys, *below, _NORMS), node
            yield from _nodes_of_scalars(node.state, (*keys, *below, _STATE))


def _failing_transformation(error: BaseException) -> str:
    """Returns the name of the innermost transformation whose `init` is in the error's traceback."""
    name, traceback = "this inner transformation", error.__traceback__
    while traceback is not None:
        factory, _, function = traceback.tb_frame.f_code.co_qualname.rpartition(".<locals>.")
        if factory and function.startswith("init"):
            name = factory
        traceback = traceback.tb_next
    return name


def array_shapes(x: Any) -> list[tuple[int, ...]]:
    """Returns the shapes of the arrays in a tree; a hole has no arrays."""
    return [np.shape(leaf) for leaf in jax.tree.leaves(x)]


def _keys(tree: Any) -> list[Keys]:
    # Keys, not the text of paths: a key may be empty or contain slashes.
    return [keys for keys, _ in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_hole)[0]]


def _owners(
    places: list[Keys], values: list[Any], params: list[Keys], scalars: Collection[Keys]
) -> tuple[int, ...]:
    """Returns the owner of each place of a state.

    Args:
      places: The keys of each place.
      values: What each place holds for params that are all holes.
      params: The keys of each leaf of the params.
      scalars: The keys of nodes like the params that have no counters beside them.
    """
    owners = [CLOCK] * len(places)
    restarting, place = set[Keys](), 0
    while place < len(places):
        prefix, block = _params_at(place, places, values, params)
        owners[place : place + len(block)] = block
        place += len(block) or 1
        # With no prefix the whole state is like the params, and holds nothing else.
        if prefix and prefix not in scalars:
            restarting.add(prefix[:-1])
    for i, (keys, value) in enumerate(zip(places, values, strict=True)):
        if not is_hole(value) and keys[:-1] in restarting:
            owners[i] = COUNTER
    return tuple(owners)


def _params_at(
    place: int, places: list[Keys], values: list[Any], params: list[Keys]
) -> tuple[Keys, list[int]]:
    """Returns the prefix and owners of the tree like the params that begins at a place, if any."""
    if params and is_hole(values[place]):
        first = params[0]
        # Where a label tree is a prefix of the params, a node that it excludes has one hole in all.
        for length in range(len(first), min(len(first), 1) - 1, -1):
            prefix = places[place][: len(places[place]) - length]
            if (*prefix, *first[:length]) == places[place]:
                block = _block(place, prefix, places, values, params)
                if block:
                    return prefix, block
    return (), []


def _block(
    place: int, prefix: Keys, places: list[Keys], values: list[Any], params: list[Keys]
) -> list[int]:
    """Returns the owners of the places below `prefix`, or none if they are not like the params."""
    block, owner = list[int](), 0
    while owner < len(params):
        i = place + len(block)
        if i == len(places) or not is_hole(values[i]) or places[i][: len(prefix)] != prefix:
            return []
        node = places[i][len(prefix) :]
        if params[owner][: len(node)] != node:
            return []
        if node == params[owner]:
            block.append(owner)
            owner += 1
        else:
            block.append(ABSENT)
            while owner < len(params) and params[owner][: len(node)] == node:
                owner += 1
    return block
