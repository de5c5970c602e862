"""The names under which pickles of version 0.1.0 look for their classes.

That version kept each file at the top of the package. A pickle names a class by its module, so the
former modules stay importable: the classes that states, selectors and summaries are made of, and
nothing else. `tests/state/test_pickle.py` loads a pickle of that version.
"""

import sys
import types
from collections.abc import Mapping
from typing import Any

_FORMER = {
    "_cut": {"Cut": "_rows.parts.PartTable", "Parts": "_rows.parts.Parts"},
    "_modules": {"Modules": "_tree.modules.Modules"},
    "_outline": {"Line": "_report.outline.Line", "Node": "_report.outline.Node"},
    "_phases": {"Phases": "_edit.phases.Phases"},
    "_plan": {"Origin": "_state.context.PlanContext", "Plan": "_state.plan.Plan"},
    "_rows": {
        "Rows": "_rows.rows.Rows",
        "both": "_rows.flags.flag_and",
        "either": "_rows.flags.flag_or",
        "minus": "_rows.flags.flag_minus",
    },
    # Where rows were the only parts of leaves.
    "_rows.rows": {
        "flag_and": "_rows.flags.flag_and",
        "flag_minus": "_rows.flags.flag_minus",
        "flag_or": "_rows.flags.flag_or",
    },
    "_select": {
        "Layers": "_select.by_path.Layers",
        "_Labelled": "_select.by_leaf._Labelled",
        "_Regex": "_select.by_path._Regex",
        "_Where": "_select.by_leaf._Where",
    },
    "_select_modules": {
        "_ByModule": "_select.by_module._ByModule",
        "_Declared": "_select.by_module._Declared",
        "_OfType": "_select.by_module._OfType",
    },
    "_select_rows": {"_Rows": "_select.by_rows._Rows"},
    "_selectors": {
        "Path": "_select.selector.Path",
        "_All": "_select.selector._All",
        "_Combined": "_select.selector._Combined",
        "_Not": "_select.selector._Not",
    },
    "_specs": {
        "_Function": "_select.specs._Function",
        "_Mask": "_select.specs._Mask",
        "_Planned": "_select.specs._Planned",
        "_Union": "_select.specs._Union",
    },
    "_state": {
        "FreezeState": "_state.freeze_state.FreezeState",
        "ScheduledState": "_state.freeze_state.ScheduledState",
    },
    "_summary": {"Row": "_report.summary.Row", "Summary": "_report.summary.Summary"},
    "_tally": {"Tally": "_report.counts.LeafCounts"},
}


def keep_former_names(package: str) -> None:
    """Makes each former module importable, with the classes that pickles ask it for.

    Three rooms and a file have the name of a former module; to these the names are added.

    Args:
      package: The name of the package, all of whose rooms are imported.
    """
    for former, names in _FORMER.items():
        path = f"{package}.{former}"
        module = sys.modules.setdefault(path, types.ModuleType(path))
        for name, place in names.items():
            now, _, attribute = place.rpartition(".")
            setattr(module, name, getattr(sys.modules[f"{package}.{now}"], attribute))


def with_present_names(state: Mapping[str, Any], former: Mapping[str, str]) -> dict[str, Any]:
    """Returns the attributes in a pickle under the names that they have now.

    Args:
      state: The attributes, as pickle stored them.
      former: For each attribute that was renamed, the former name and the present one.
    """
    return {former.get(name, name): value for name, value in state.items()}
