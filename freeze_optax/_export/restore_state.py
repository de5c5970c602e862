"""`restore_state`: an export put into a state that has its plan already."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from freeze_optax._export.encoded_subset import decoded_subset, described_subset, shape_in
from freeze_optax._export.encoding import unpack_text
from freeze_optax._export.import_state import decoded_leaves
from freeze_optax._rows.elements import Elements
from freeze_optax._rows.parts import Part
from freeze_optax._rows.subset import Subset
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
    table = list(plan.part_table.parts if plan.part_table else _whole_leaves(len(paths)))
    parts = about["parts"] or _whole_leaves(len(paths))
    in_saved = _fates(len(paths), _decoded(parts, table, paths), about["frozen"], about["cohorts"])
    in_target = _fates(len(paths), table, plan.frozen, plan.cohorts)
    differing = [
        f"{path!r} {_described(old)} in the saved state, and {_other(old, new)} in the target"
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


def _whole_leaves(count: int) -> list[Part]:
    return [(leaf, None) for leaf in range(count)]


def _decoded(parts: Sequence[Any], table: Sequence[Part], paths: Sequence[str]) -> list[Part]:
    """Returns the parts in a file, of the leaves that the parts of a table are of.

    Raises:
      ValueError: If they are damaged, or elements are of a leaf of another shape.
    """
    shapes = {leaf: one.shape for leaf, one in table if isinstance(one, Elements)}
    decoded: list[Part] = []
    for leaf, encoded in parts:
        if not 0 <= leaf < len(paths):
            raise ValueError(f"the export is damaged: it has a part of leaf {leaf}")
        shape = shape_in(encoded)
        if shape is not None and shape != shapes.get(leaf):
            of_target = f"of the shape {shapes[leaf]}" if leaf in shapes else "none"
            raise ValueError(
                f"the saved state has another plan: {paths[leaf]!r} has elements of the shape "
                f"{shape} in the saved state, and {of_target} in the target; {_REMEDY}"
            )
        try:
            decoded.append((leaf, decoded_subset(encoded)))
        except ValueError as error:
            raise ValueError(f"the export is damaged: {error}") from error
    return decoded


Fate: TypeAlias = tuple[str, Subset | None, int]
"""What becomes of a part, which part it is, and its cohort."""


def _fates(
    count: int, parts: Sequence[Part], frozen: Sequence[bool], cohorts: Sequence[int]
) -> list[list[Fate]]:
    """Returns for each leaf what becomes of each of its parts."""
    of_leaf: list[list[Fate]] = [[] for _ in range(count)]
    for (leaf, subset), is_frozen, cohort in zip(parts, frozen, cohorts, strict=True):
        fate = "is frozen" if cohort == DROPPED else "is parked" if is_frozen else "trains"
        of_leaf[leaf].append((fate, subset, cohort))
    return of_leaf


def _described(fates: list[Fate]) -> str:
    """Describes for one leaf what trains of it, and in which cohort."""
    return " and ".join(
        fate + described_subset(subset) + ("" if cohort == DROPPED else f" in cohort {cohort}")
        for fate, subset, cohort in fates
    )


def _other(old: list[Fate], new: list[Fate]) -> str:
    """Describes a fate that differs from another one, maybe beyond what the text shows."""
    return _described(new) if _described(new) != _described(old) else "in others"
