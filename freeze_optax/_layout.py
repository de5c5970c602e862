"""Where in an optimizer's state the statistics of each leaf, their counters and the clocks are."""

from collections.abc import Callable
from typing import Any

import jax

from freeze_optax._leaves import Leaves, is_hole
from freeze_optax._patterns import listed

COUNTER = -1
CLOCK = -2


class Layout:
    """The places in the state of a transformation, and what each belongs to.

    All is told by the state of params that are nothing but holes: a hole in it is a place for the
    statistics of one leaf, whatever stands there otherwise. A node with a direct child of the
    structure of the params starts afresh with a leaf, so the arrays directly in it are counters,
    of which each cohort of leaves has its own. Any other array is a clock and runs on: a
    schedule's count, an injected learning rate, the key of a noise.

    Attributes:
      paths: The key path of each place in the state.
      owners: For each place the index of the leaf whose statistics it holds, or `COUNTER` or
        `CLOCK`.
      counters: The places of the counters, in order.
    """

    def __init__(
        self,
        init: Callable[[Any], Any],
        skeleton: Any,
        param_paths: tuple[str, ...],
    ):
        try:
            template = Leaves(jax.eval_shape(init, skeleton))
        except Exception as error:
            raise ValueError(
                "the state of this inner transformation can't be edited, nor follow phases: its "
                "init fails on params that are all holes (optax.MaskedNode), with "
                f"{type(error).__name__}: {error}"
            ) from error
        self._treedef, self._template = template.treedef, template.values
        self.paths = template.paths
        self.owners = _owners(template, param_paths)
        self.counters = tuple(i for i, owner in enumerate(self.owners) if owner == COUNTER)

    def places(self, inner_state: Any) -> list[Any]:
        """What stands at each place of a state: an array, a hole, or a node per leaf.

        Raises:
          ValueError: If the state has another structure, or something in it depends on the
            params in a way that no leaf can be told apart, naming it.
        """
        try:
            values = self._treedef.flatten_up_to(inner_state)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"the inner state has not the structure that its transformation gives it: {error}"
            ) from error
        carried = zip(self.paths, self.owners, self._template, values, strict=True)
        odd = [
            f"{path!r} has {shapes(value)}, where all leaves frozen give {shapes(expected)}"
            for path, owner, expected, value in carried
            if owner < 0 and shapes(value) != shapes(expected)
        ]
        if odd:
            raise ValueError(
                "the state of this inner transformation can't be edited, as a part of it mixes "
                f"the leaves (a flattened vector, say): {listed(odd)}"
            )
        return values

    def rebuild(self, values: list[Any]) -> Any:
        """The state with other things at its places."""
        return jax.tree.unflatten(self._treedef, values)


def shapes(x: Any) -> list[tuple[int, ...]]:
    """The shapes of the arrays at a place: none at a hole."""
    return [leaf.shape for leaf in jax.tree.leaves(x)]


def _owners(template: Leaves, param_paths: tuple[str, ...]) -> tuple[int, ...]:
    owners = [CLOCK] * len(template.paths)
    count, restarting, place = len(param_paths), set[str](), 0
    while place < len(owners):
        block = template.paths[place : place + count]
        prefix = _prefix(block, param_paths) if is_hole(template.values[place]) else None
        if prefix is None:
            place += 1
            continue
        owners[place : place + count] = range(count)
        if prefix:  # else the whole state is shaped like the params, with nothing beside it
            restarting.add(prefix.rpartition("/")[0])
        place += count
    for i, (path, value) in enumerate(zip(template.paths, template.values, strict=True)):
        if not is_hole(value) and path.rpartition("/")[0] in restarting:
            owners[i] = COUNTER
    return tuple(owners)


def _prefix(block: tuple[str, ...], param_paths: tuple[str, ...]) -> str | None:
    """Where the tree of these paths hangs, if it is one of the params."""
    first = param_paths[0]
    prefix = block[0].removesuffix(first).removesuffix("/") if first else block[0]
    start = f"{prefix}/" if prefix else ""
    expected = tuple(start + path if path else prefix for path in param_paths)
    return prefix if block == expected else None
