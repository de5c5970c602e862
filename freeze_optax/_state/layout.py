"""Where in an optimizer's state the statistics of each leaf, their counters and the clocks are."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from freeze_optax._state.shared_buffers import collect_ties
from freeze_optax._tree.holes import HOLE, is_hole
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.lookahead import param_copies
from freeze_optax._tree.messages import few_clauses, path_differences

COUNTER = -1
CLOCK = -2
ABSENT = -3
"""A node of the params that the transformation leaves out, with all leaves below it."""

Keys = tuple[Any, ...]
Place = tuple[Keys, int]
"""The keys of a node like the params in a state, and the index of a leaf."""


class Layout:
    """The places in the state of a transformation, and what each belongs to.

    All is told by the state of params that are nothing but holes: a hole in it is a place for the
    statistics of one leaf, whatever stands there otherwise. A node with a direct child of the
    structure of the params starts afresh with a leaf, so the arrays directly in it are counters,
    of which each cohort of leaves has its own. Any other array is a clock and runs on: a
    schedule's count, an injected learning rate, the key of a noise.

    Attributes:
      paths: The key path of each place in the state.
      owners: For each place the index of the leaf whose statistics it holds, or `COUNTER`,
        `CLOCK` or `ABSENT`.
      counters: The places of the counters, in order.
      prefixes: For each place, the keys of the node like the params that it is in.
      ties: The groups of each `tie` in the transformation.
    """

    def __init__(
        self,
        init: Callable[[Any], Any],
        skeleton: Any,
    ):
        try:
            # By a function of its own: a trace that jax has cached would note no ties.
            with collect_ties() as self.ties:
                template = Leaves(jax.eval_shape(lambda: init(skeleton)))
        except Exception as error:
            raise ValueError(
                f"the state of {_raiser(error)} can't be edited, nor follow phases: its init fails "
                "on params that are all holes (optax.MaskedNode), with "
                f"{type(error).__name__}: {error}"
            ) from error
        self._treedef, self._template = template.treedef, template.values
        self.paths = template.paths
        keys, params = _keys(template.tree), _keys(param_copies(skeleton)[0])
        self.owners = _owners(keys, template.values, params)
        self.prefixes = [
            place[: len(place) - len(params[owner])] if owner >= 0 else ()
            for place, owner in zip(keys, self.owners, strict=True)
        ]
        self.counters = tuple(i for i, owner in enumerate(self.owners) if owner == COUNTER)

    def places(self, inner_state: Any) -> list[Any]:
        """What stands at each place of a state: an array, a hole, or a node per leaf.

        Raises:
          ValueError: If the state has another structure, or something in it depends on the
            params in a way that no leaf can be told apart, naming it.
        """
        try:
            values = self._treedef.flatten_up_to(inner_state)
        except (ValueError, TypeError):
            odd = path_differences(Leaves(inner_state).paths, self.paths, "in it", "in that")
            raise ValueError(
                f"the inner state, a {type(inner_state).__name__}, has not the structure that its "
                f"transformation gives: {odd}"
            ) from None
        carried = zip(self.paths, self.owners, self._template, values, strict=True)
        odd = [
            f"{path!r} has {array_shapes(value)}, where all leaves frozen give "
            f"{array_shapes(expected)}"
            for path, owner, expected, value in carried
            if owner < 0 and array_shapes(value) != array_shapes(expected)
        ]
        if odd:
            raise ValueError(
                "the state of this inner transformation can't be edited, as a part of it mixes "
                f"the leaves (a flattened vector, say): {few_clauses(odd)}"
            )
        return values

    def rebuild(self, values: list[Any]) -> Any:
        """The state with other things at its places."""
        return jax.tree.unflatten(self._treedef, values)

    def split(self, inner_state: Any) -> tuple[dict[Place, Any], list[Any]]:
        """The statistics in a state, each by its place, and in order the counters and clocks."""
        values = self.places(inner_state)
        triples = list(zip(self.prefixes, self.owners, values, strict=True))
        statistics = {(prefix, owner): x for prefix, owner, x in triples if owner >= 0}
        return statistics, [x for _, owner, x in triples if ABSENT < owner < 0]

    def join(self, statistic: Callable[[Place, str], Any], shared: list[Any]) -> Any:
        """A state with these counters and clocks, and statistics as told of place and path."""
        rest = iter(shared)

        def value(prefix: Keys, owner: int, path: str) -> Any:
            if owner == ABSENT:
                return HOLE
            return next(rest) if owner < 0 else statistic((prefix, owner), path)

        return self.rebuild(list(map(value, self.prefixes, self.owners, self.paths)))


def _raiser(error: BaseException) -> str:
    """What the error comes from: the innermost transformation of optax's making, by its name."""
    name, traceback = "this inner transformation", error.__traceback__
    while traceback is not None:
        factory, _, function = traceback.tb_frame.f_code.co_qualname.rpartition(".<locals>.")
        if factory and function.startswith("init"):
            name = factory
        traceback = traceback.tb_next
    return name


def array_shapes(x: Any) -> list[tuple[int, ...]]:
    """The shapes of the arrays at a place: none at a hole."""
    return [np.shape(leaf) for leaf in jax.tree.leaves(x)]


def _keys(tree: Any) -> list[Keys]:
    # Not the text of paths: a key may be empty or have slashes.
    return [keys for keys, _ in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_hole)[0]]


def _owners(places: list[Keys], values: list[Any], params: list[Keys]) -> tuple[int, ...]:
    owners = [CLOCK] * len(places)
    restarting, place = set[Keys](), 0
    while place < len(places):
        prefix, block = _params_at(place, places, values, params)
        owners[place : place + len(block)] = block
        place += len(block) or 1
        if prefix:  # else the whole state is shaped like the params, with nothing beside it
            restarting.add(prefix[:-1])
    for i, (keys, value) in enumerate(zip(places, values, strict=True)):
        if not is_hole(value) and keys[:-1] in restarting:
            owners[i] = COUNTER
    return tuple(owners)


def _params_at(
    place: int, places: list[Keys], values: list[Any], params: list[Keys]
) -> tuple[Keys, list[int]]:
    """The prefix and owners of the tree like the params that begins at a place, if one does."""
    if params and is_hole(values[place]):
        first = params[0]
        # A label tree that is a prefix of the params puts one hole for all of a node it excludes.
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
