"""The params of a summary, with what is frozen of each leaf and the bytes of its state."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from freeze_optax._report.counts import LeafCounts
from freeze_optax._report.factors import Factors, factors_by_path
from freeze_optax._report.memory import is_on_host
from freeze_optax._report.outline import Entry
from freeze_optax._report.state_bytes import StateBytes, state_bytes
from freeze_optax._rows.flags import Flag
from freeze_optax._select.specs import Spec, resolve, state_in_spec
from freeze_optax._state.shared_buffers import first_of_buffer
from freeze_optax._transform.rates import collect_factors
from freeze_optax._tree.kinds import is_array
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.lookahead import param_leaves
from freeze_optax._tree.variables import tree_has_variables


class ResolvedParams(NamedTuple):
    """The leaves of the params, and what a spec and an optimizer are to them.

    Attributes:
      leaves: The leaves.
      flags: What is frozen of each.
      present: The bytes of the optimizer state, or None if not known.
      unfrozen: The bytes that it would have with nothing frozen, or None if not known.
      factors: The factors of the leaves that have some, by path.
    """

    leaves: Leaves
    flags: Sequence[Flag]
    present: StateBytes | None
    unfrozen: StateBytes | None
    factors: Mapping[str, Factors]

    def entries(self, shown: Leaves) -> Iterator[Entry]:
        """Yields the leaves for the outline, with their counts and the bytes of their state.

        Args:
          shown: The leaves, with the paths to show.
        """
        same = first_of_buffer(shown)
        unknown: list[int | None] = [None] * len(shown.values)
        present = self.present.by_leaf if self.present else unknown
        on_host = self.present.host_by_leaf if self.present else [0] * len(shown.values)
        unfrozen = self.unfrozen.by_leaf if self.unfrozen else unknown
        for i, (path, leaf) in enumerate(zip(shown.paths, shown.values, strict=True)):
            size, full_size = present[i], unfrozen[i]
            saved = None if size is None or full_size is None else full_size - size
            factors = self.factors.get(self.leaves.paths[i], ())
            counts = LeafCounts.of_leaf(leaf, self.flags[i], i in same)
            counts = counts.with_state(size, saved, factors)
            counts = counts.with_memory(is_on_host(leaf), on_host[i])
            kind = (leaf.shape, leaf.dtype) if is_array(leaf) else type(leaf)
            same_as = shown.paths[same[i]] if i in same else ""
            yield Entry(path, counts, (counts, kind, same_as), same_as)


def resolve_params(params: Any, frozen: Spec, optimizer: Any) -> ResolvedParams:
    """Resolves a spec on params, and counts the bytes of the state.

    An NNX model holds more than the variables of its optimizer: BatchNorm statistics, RNG state,
    the base of a LoRA. If the spec is the state of some of its variables, the others count as
    frozen, as nothing trains them.

    Args:
      params: The params, abstract or not; or an NNX model.
      frozen: Any spec.
      optimizer: A transformation or None, as for `state_bytes`.
    """
    leaves = param_leaves(params)
    own = _own_leaves(leaves, frozen)
    if own is None:
        flags = resolve(frozen, leaves)
        with collect_factors() as reported:
            sizes = state_bytes(params, frozen, flags, optimizer)
        return ResolvedParams(leaves, flags, *sizes, factors_by_path(frozen, reported))
    part = {leaves.paths[i]: leaves.values[i] for i in own}
    part_leaves = Leaves(part)
    part_flags = resolve(frozen, part_leaves)
    with collect_factors() as reported:
        sizes = state_bytes(part, frozen, part_flags, optimizer)
    places = {path: place for place, path in enumerate(part_leaves.paths)}
    # A shared Variable has one path in the state. Its other paths are frozen or not as that one is.
    same = first_of_buffer(leaves)
    group_places = {same.get(i, i): places[leaves.paths[i]] for i in own}
    flags = [
        part_flags[group_places[first]] if (first := same.get(i, i)) in group_places else True
        for i in range(len(leaves.values))
    ]
    first_places = [None if i in same else group_places.get(i) for i in range(len(leaves.values))]
    present, unfrozen = (size and size.spread(first_places) for size in sizes)
    factors = factors_by_path(frozen, reported)
    return ResolvedParams(leaves, flags, present, unfrozen, factors)


def _own_leaves(leaves: Leaves, frozen: Spec) -> list[int] | None:
    """Returns the indices of the leaves that a state has; None if it has all, or others too."""
    state = state_in_spec(frozen)
    if state is None or not tree_has_variables(leaves.tree):
        return None
    state_paths = set(state.plan.paths)
    own = [i for i, path in enumerate(leaves.paths) if path in state_paths]
    is_part = len(own) == len(state.plan.paths) < len(leaves.paths)
    return own if is_part else None
