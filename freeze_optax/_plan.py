"""What was resolved against the params, and the optimizer state that carries it."""

import dataclasses
from typing import Any

import jax
import optax

from freeze_optax._leaves import Leaves, is_hole
from freeze_optax._patterns import listed

FROZEN = -1
"""The cohort of a leaf that keeps no optimizer state."""


def odd_paths(
    ours: tuple[str, ...], theirs: tuple[str, ...], our_name: str, their_name: str
) -> str:
    """A clause for an error: the paths that only one of two trees has."""
    mine, others = set(ours), set(theirs)
    left = [path for path in ours if path not in others]
    right = [path for path in theirs if path not in mine]
    parts = [f"only {our_name}: {listed(left)}"] if left else []
    parts += [f"only {their_name}: {listed(right)}"] if right else []
    return "; ".join(parts) or "the same paths, in other containers or another order"


class Plan:
    """Which leaves are frozen, settled once at `init` or by an edit, then static.

    It is part of the state's tree structure, so `jax.jit` retraces exactly when it changes:
    plans are equal when their paths, frozen flags and cohorts are.

    Attributes:
      paths: The key path of each leaf of the params.
      frozen: For each leaf, whether it is frozen.
      cohorts: For each leaf, the index of the cohort whose counters it uses, or `FROZEN`.
      inner: The wrapped transformation, for edits, which are given nothing but the state.
        Not compared: under `optax.inject_hyperparams` each trace makes another one, and that
        one holds tracers, so `update` passes on the plan that `init` made.
    """

    __slots__ = (
        "__weakref__",
        "_hash",
        "_treedefs",
        "cohorts",
        "frozen",
        "inner",
        "is_unknown",
        "paths",
    )

    paths: tuple[str, ...]
    frozen: tuple[bool, ...]
    cohorts: tuple[int, ...]
    inner: optax.GradientTransformationExtraArgs | None

    def __init__(
        self,
        leaves: Leaves,
        frozen: tuple[bool, ...],
        cohorts: tuple[int, ...],
        inner: optax.GradientTransformationExtraArgs,
    ):
        self.paths, self.frozen, self.cohorts, self.inner = leaves.paths, frozen, cohorts, inner
        self._treedefs: list[Any] = [leaves.treedef]
        self._hash: int | None = None
        self.is_unknown = False

    @classmethod
    def unknown(cls) -> "Plan":
        """A plan that becomes the first other one it is compared with.

        `optax.tree_map_params` builds its result with the tree structure of `init`'s answer to
        a placeholder, which says nothing of the params. Comparing the two structures is the
        only moment at which that answer meets the real plan, so it takes it over there.
        """
        plan = cls.__new__(cls)
        plan.paths = plan.frozen = plan.cohorts = ()
        plan.inner = None
        plan._treedefs = []
        plan._hash = None
        plan.is_unknown = True
        return plan

    def _become(self, other: "Plan") -> None:
        self.paths, self.frozen, self.cohorts = other.paths, other.frozen, other.cohorts
        self.inner, self._treedefs, self._hash = other.inner, other._treedefs, other._hash
        self.is_unknown = other.is_unknown

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Plan):
            return NotImplemented
        if self.is_unknown or other.is_unknown:
            unknown, known = (self, other) if self.is_unknown else (other, self)
            unknown._become(known)
            return True
        return (
            hash(self) == hash(other)
            and self.frozen == other.frozen
            and self.cohorts == other.cohorts
            and self.paths == other.paths
        )

    def __hash__(self) -> int:
        if self.is_unknown:
            return 0
        # Kept: jit hashes the structure of its arguments at every call.
        if self._hash is None:
            self._hash = hash((self.paths, self.frozen, self.cohorts))
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        # The transformation is made of closures, which pickle refuses.
        return {"paths": self.paths, "frozen": self.frozen, "cohorts": self.cohorts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.paths, self.frozen, self.cohorts = state["paths"], state["frozen"], state["cohorts"]
        self.inner, self._treedefs, self._hash = None, [], None
        self.is_unknown = False

    def __repr__(self) -> str:
        count = sum(self.frozen)
        return f"Plan({count} of {len(self.frozen)} leaves frozen)"

    def flags(self, leaves: Leaves, role: str) -> tuple[bool, ...]:
        """What is frozen, in the order of `leaves`, which must be of the same params.

        Args:
          leaves: The leaves of params, gradients, or another tree like them.
          role: What to call the tree in an error.

        Returns:
          One bool for each leaf.

        Raises:
          ValueError: If the paths differ, naming those that do.
        """
        if self.knows(leaves):
            return self.frozen
        if isinstance(leaves.tree, optax.LookaheadParams):
            copies = [self.flags(Leaves(copy), role) for copy in leaves.tree]
            return (*copies[0], *copies[1])
        if leaves.paths != self.paths:
            if sorted(leaves.paths) == sorted(self.paths):
                by_path = dict(zip(self.paths, self.frozen, strict=True))
                return tuple(by_path[path] for path in leaves.paths)
            raise ValueError(
                f"the {role} and the optimizer state are of different params: "
                + odd_paths(leaves.paths, self.paths, f"in the {role}", "in the state")
            )
        # Another container for the same paths (a FrozenDict, an nnx.State of plain arrays):
        # remembered, so that a training loop compares texts once.
        self._treedefs.append(leaves.treedef)
        return self.frozen

    def knows(self, leaves: Leaves) -> bool:
        """Whether a tree has a structure that is known to be that of the params."""
        return leaves.treedef in self._treedefs

    def fit(self, tree: Any, role: str) -> Leaves:
        """The leaves of `tree` in the plan's order, `None` where a leaf is left out.

        Args:
          tree: Gradients, params, or another tree like them; a leaf may be a hole or None.
          role: What to call the tree in an error.

        Returns:
          As many leaves as the plan has.

        Raises:
          ValueError: If the tree is of other params, naming the odd paths.
        """
        leaves = Leaves(tree)
        if self.knows(leaves):
            return leaves
        with_none = self._fit_none(tree)
        if with_none is not None:
            return with_none
        if self.flags(leaves, role) is not self.frozen:
            raise ValueError(
                f"the {role} has the leaves of the optimizer state in another order: {role} has "
                f"{listed(leaves.paths)}, the state {listed(self.paths)}"
            )
        return leaves

    def _fit_none(self, tree: Any) -> Leaves | None:
        # jax takes None for a node without leaves, so a gradient with None at a leaf has
        # another structure; one of the known structures tells where the leaves are.
        for treedef in self._treedefs:
            try:
                values = treedef.flatten_up_to(tree)
            except (ValueError, TypeError, AttributeError):
                continue
            if all(x is None or is_hole(x) or jax.tree_util.all_leaves([x]) for x in values):
                leaves = Leaves(tree)
                leaves.values, leaves.treedef = values, treedef
                return leaves
        return None


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, repr=False)
class FreezeState:
    """State of `freezable`: the inner state, and as static metadata what is frozen.

    Attributes:
      inner: The state of the inner transformation for the params with holes
        (`optax.MaskedNode`) at every leaf that keeps no state.
      ages: For each cohort of leaves after the first, its own copy of the counters that belong
        to per-leaf statistics; empty while there is one cohort.
      plan: What is frozen. Static: part of the tree structure, no leaf.
    """

    inner: optax.OptState
    ages: Any = ()
    plan: Plan = dataclasses.field(default_factory=Plan.unknown)

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], Plan]:
        key = jax.tree_util.GetAttrKey
        return ((key("inner"), self.inner), (key("ages"), self.ages)), self.plan

    def tree_flatten(self) -> tuple[tuple[Any, Any], Plan]:
        return (self.inner, self.ages), self.plan

    @classmethod
    def tree_unflatten(cls, plan: Plan, children: tuple[Any, Any]) -> "FreezeState":
        return cls(*children, plan=plan)

    def known_plan(self) -> Plan:
        """The plan, which only a state that `init` did not make lacks."""
        if self.plan.is_unknown:
            raise ValueError(
                "this FreezeState has no plan; states are made by freezable(...).init(params)"
            )
        return self.plan

    def __repr__(self) -> str:
        plan = self.plan
        frozen = [
            path for path, is_frozen in zip(plan.paths, plan.frozen, strict=True) if is_frozen
        ]
        return (
            f"FreezeState(frozen={len(frozen)} of {len(plan.paths)} leaves"
            + (f" [{listed(frozen, 3)}]" if frozen else "")
            + f", inner={self.inner!r}, ages={self.ages!r})"
        )


def states_in(tree: Any) -> list[FreezeState]:
    """All the `FreezeState`s that a tree holds."""
    found = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, FreezeState))
    return [x for x in found if isinstance(x, FreezeState)]
