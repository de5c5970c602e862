"""`restore_state`: an export put into a state that has its plan already."""

from collections.abc import Mapping, Sequence
from typing import Any

from freeze_optax._export.encoded_subset import described_subset, encoded_subset
from freeze_optax._export.encoding import unpack_text
from freeze_optax._export.import_state import decoded_leaves
from freeze_optax._state.freeze_state import FreezeState
from freeze_optax._state.plan import DROPPED, Plan
from freeze_optax._tree.holes import is_hole
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.messages import few_clauses, path_differences, quoted_list

_REMEDY = (
    "read the file without a target (flax.serialization.msgpack_restore(data)), and give the dict "
    "at the place of this state to fo.import_state(freezable, params, saved), which takes the plan "
    "from it; its argument `frozen` then changes what is frozen"
)


def restore_state(target: FreezeState, saved: Any) -> FreezeState:
    """Returns the state that was exported as `saved`, in the containers of `target`.

    Flax restores a tree in this way: onto another one, of which it takes the structure alone.

    Args:
      target: A state with the plan of the exported one. Its arrays may be abstract.
      saved: What `export_state` gave for the state.

    Raises:
      ValueError: If `saved` is no export or is damaged, or its plan or its arrays are others than
        those of `target`. The error names what differs.
    """
    if not isinstance(saved, Mapping) or "about" not in saved:
        has = quoted_list(saved) if isinstance(saved, Mapping) else f"a {type(saved).__name__}"
        raise ValueError(
            f"what was saved is no state of fo.freezable: it has {has}, not 'about' and 'leaves'; "
            "restore the state of a plain optimizer onto one of that, and turn it into a "
            "FreezeState with fo.adopt(freezable, state, params)"
        )
    about = unpack_text(saved)
    _check_plan(about, target.plan)
    leaves = Leaves(target)
    restored = iter(decoded_leaves(about["leaves"], saved.get("leaves"), leaves))
    return leaves.rebuild(x if is_hole(x) else next(restored) for x in leaves.values)


def _check_plan(about: dict[str, Any], plan: Plan) -> None:
    """Raises ValueError if the plan of an export is another one."""
    paths = tuple(about["paths"])
    if paths != plan.paths:
        raise ValueError(
            "the saved state is of other params: "
            + path_differences(paths, plan.paths, "in the saved state", "in the target")
        )
    schedule = tuple((start, tuple(flags)) for start, flags in about["schedule"])
    if schedule != plan.schedule:
        raise ValueError(
            f"the saved state follows {_phases(schedule)}, the target {_phases(plan.schedule)}; "
            "make the target with the transformation of the saved state"
        )
    table = plan.part_table.parts if plan.part_table else enumerate([None] * len(paths))
    parts = about["parts"] or [[leaf, None] for leaf in range(len(paths))]
    in_saved = _fates(len(paths), parts, about["frozen"], about["cohorts"])
    encoded = [[leaf, encoded_subset(subset)] for leaf, subset in table]
    in_target = _fates(len(paths), encoded, plan.frozen, plan.cohorts)
    differing = [
        f"{path!r} {old} in the saved state, and {new} in the target"
        for path, old, new in zip(paths, in_saved, in_target, strict=True)
        if old != new
    ]
    if differing:
        raise ValueError(
            f"the saved state has another plan: {few_clauses(differing)}. Give the target the same "
            f"plan with fo.set_frozen, fo.freeze and fo.thaw; or {_REMEDY}"
        )


def _phases(schedule: Sequence[tuple[int, Any]]) -> str:
    return f"phases from steps {[start for start, _ in schedule]}" if schedule else "no phases"


def _fates(
    count: int, parts: Sequence[Any], frozen: Sequence[bool], cohorts: Sequence[int]
) -> list[str]:
    """Describes for each leaf what trains of it, and in which cohort."""
    of_leaf: list[list[str]] = [[] for _ in range(count)]
    for (leaf, subset), is_frozen, cohort in zip(parts, frozen, cohorts, strict=True):
        fate = "is frozen" if cohort == DROPPED else "is parked" if is_frozen else "trains"
        counters = "" if cohort == DROPPED else f" in cohort {cohort}"
        of_leaf[leaf].append(fate + described_subset(subset) + counters)
    return [" and ".join(fates) for fates in of_leaf]
