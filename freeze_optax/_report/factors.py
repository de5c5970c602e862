"""The factors of `rates` that a summary shows."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from freeze_optax._rows.parts import Parts, is_hole_or_parts
from freeze_optax._select.selector import Selector
from freeze_optax._select.specs import Spec
from freeze_optax._state.freeze_state import states_in
from freeze_optax._state.plan import Plan
from freeze_optax._state.rates_state import rates_in
from freeze_optax._transform.rates import Reported
from freeze_optax._tree.leaves import Leaves

Factors = tuple[float, ...]
"""The different factors of some leaves, in order. A leaf in parts may have several."""


def factors_by_path(frozen: Spec, reported: Reported) -> dict[str, Factors]:
    """Returns the factors of each leaf that has some, by its path.

    Args:
      frozen: Any spec. If it is a state with factors, these count.
      reported: What the `rates` of the optimizer would give at `init`.
    """
    tables = [] if isinstance(frozen, Selector | str) else _tables_of_state(frozen)
    if not any(tables):
        tables = [{path: [x] for path, x in table.items()} for table in reported.values()]
    found: dict[str, list[float]] = {}
    for path, values in (item for table in tables for item in table.items()):
        factors = sorted({round(float(x), 7) for x in values if _is_known(x)})
        if factors:
            # Two of them in one chain multiply; those of two groups have different leaves.
            found[path] = [a * b for a in found.get(path, [1.0]) for b in factors]
    return {path: tuple(sorted(set(values))) for path, values in found.items()}


def factor_text(factors: Factors) -> str:
    """Returns factors as the table shows them: the lowest and the highest."""
    ends = dict.fromkeys((factors[0], factors[-1])) if factors else ()
    return " to ".join(f"{x:.3g}" for x in ends)


def shows_factors(rows: Iterable[Factors]) -> bool:
    """Returns whether a factor is not 1, so that the table has a column of them."""
    return any(factors not in ((), (1.0,)) for factors in rows)


def _tables_of_state(state: Any) -> list[Mapping[str, list[Any]]]:
    """Returns the factors of each `rates` in a state, by path; those that are parked left out."""
    plans = [one.plan for one in states_in(state) if rates_in(one)]
    return [_by_path(one.factors, plans[0] if plans else None) for one in rates_in(state)]


def _by_path(factors: Any, plan: Plan | None) -> Mapping[str, list[Any]]:
    leaves = Leaves(factors, stop=is_hole_or_parts)
    found: dict[str, list[Any]] = {}
    for path, value in zip(leaves.paths, leaves.values, strict=True):
        parts = list(value.values) if isinstance(value, Parts) else [value]
        if plan and plan.part_table and path in plan.paths:
            of_leaf = plan.part_table.by_leaf[plan.paths.index(path)]
            pairs = zip(of_leaf, parts, strict=True)
            parts = [x for part, x in pairs if part not in plan.parked]
        if arrays := jax.tree.leaves(parts):
            found[path] = arrays
    return found


def _is_known(x: Any) -> bool:
    if isinstance(x, Tracer | jax.ShapeDtypeStruct):
        return False
    return not np.ndim(x)
