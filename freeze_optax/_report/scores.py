"""`scores`: the norms that `measured` keeps, by path, as numbers and as a table."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from freeze_optax._report.console import console_text, new_table
from freeze_optax._report.html import TableRow, table_as_html
from freeze_optax._report.row_names import ROOT
from freeze_optax._rows.parts import Parts, is_hole_or_parts
from freeze_optax._state.freeze_state import schedules_in, states_in
from freeze_optax._state.measured_state import MEASURES, MeasuredState, measured_in
from freeze_optax._state.plan import Plan
from freeze_optax._tree.holes import is_hole
from freeze_optax._tree.key_paths import natural_order
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.messages import printable
from freeze_optax._tree.variables import unwrap_variable


class Score(NamedTuple):
    """What was measured of a leaf, or of a group of leaves; NaN is not known yet.

    Attributes:
      gradient: The average of the norm of the gradient.
      update: The average of the norm of the update.
      gradient_change: The average of the absolute change of the norm of the gradient, from one step
        to the next.
      update_change: The same of the update.
      steps: How many steps were measured.
    """

    gradient: float
    update: float
    gradient_change: float
    update_change: float
    steps: int


class Scores(Mapping[str, Score]):
    """What was measured, a `Score` for each path in natural order; it is shown as a table.

    `freeze_optax.scores` makes it.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import freeze_optax as fo
      >>> params = {"body": jnp.ones(4), "head": jnp.ones(9)}
      >>> tx = fo.freezable(fo.measured(optax.sgd(0.5)))
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> fo.scores(state)
             gradient   update   gradient change   update change   steps
      ──────────────────────────────────────────────────────────────────
      body          2        1                 -               -       1
      head          3      1.5                 -               -       1
      <BLANKLINE>
      measured: 2

    Args:
      scores: The scores by path.
    """

    def __init__(self, scores: Mapping[str, Score]):
        self._scores = {path: scores[path] for path in sorted(scores, key=natural_order)}

    def __getitem__(self, path: str) -> Score:
        return self._scores[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._scores)

    def __len__(self) -> int:
        return len(self._scores)

    @property
    def _headline(self) -> str:
        return f"measured: {len(self):,}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = new_table(_COLUMNS)
        for path, score in self.items():
            table.add_row(Text(printable(path) or ROOT), *_cells(score))
        yield table
        yield Text()
        yield Text(self._headline, "bold")

    def __repr__(self) -> str:
        rows = [_COLUMNS, *map(_cells, self.values())]
        console = Console(color_system=None, force_jupyter=False)
        longest = max((len(printable(path) or ROOT) for path in self), default=0)
        return console_text(self, console, rows, len(self._headline), min(longest, _LONGEST))

    def _repr_html_(self) -> str:
        rows = [
            TableRow(0, printable(path) or ROOT, printable(path) or ROOT, "", None, _cells(score))
            for path, score in self.items()
        ]
        return table_as_html(_COLUMNS, rows, [], self._headline, has_status=False)


_LONGEST = 80
"""The longest path that is not folded. Paths are whole, as code gives them to other functions."""

_COLUMNS = [*(name.replace("_", " ") for name in MEASURES), "steps"]


def _cells(score: Score) -> list[str]:
    *norms, steps = score
    return [*("-" if math.isnan(x) else f"{x:.3g}" for x in norms), f"{steps:,}"]


def scores(state: Any) -> Scores:
    """Returns what `freeze_optax.measured` has measured, of each leaf that trains now.

    It reads numbers from the device, so call it every few steps, and not in a jitted function.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import freeze_optax as fo
      >>> params = {"body": jnp.ones(4), "head": jnp.ones(4)}
      >>> tx = fo.freezable(fo.measured(optax.sgd(0.5)), frozen="body")
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> scores = fo.scores(state)
      >>> list(scores), scores["head"].gradient, scores["head"].steps
      (['head'], 2.0, 1)

    Args:
      state: An optimizer state, or any tree, with one state of `measured` in it.

    Returns:
      A mapping from path, or from label where `measured` has groups, to `Score`, in natural order.
      Before the first step of a leaf its averages are NaN, and before the second one those of the
      changes. A leaf that trains in several parts has one score: the root of the sum of the squares
      of theirs, and the steps of the part that has trained longest. A group of which all is frozen
      keeps the last one.

    Raises:
      TypeError: If `state` holds no state of `measured`, or is traced.
      ValueError: If `state` holds several, or is that of several models (`jax.vmap(tx.init)`).
    """
    measured = _only_measured(state)
    slots = Leaves(measured.norms, stop=is_hole_or_parts)
    vectors = [
        [unwrap_variable(x) for x in (slot.values if isinstance(slot, Parts) else [slot])]
        for slot in slots.values
    ]
    trains = _training_parts(state, measured, slots.paths, list(map(len, vectors)))
    live = {
        path: [x for x, flag in zip(parts, flags, strict=True) if flag and not is_hole(x)]
        for path, parts, flags in zip(slots.paths, vectors, trains, strict=True)
    }
    live = {path: parts for path, parts in live.items() if parts}
    _check_readable(x for parts in live.values() for x in parts)
    return Scores({path: _score(parts) for path, parts in jax.device_get(live).items()})


def _only_measured(state: Any) -> MeasuredState:
    """Returns the one state of `measured` in a tree; raises if there is none, or several."""
    found = measured_in(state)
    if not found:
        raise TypeError(
            f"fo.scores was given a {type(state).__name__} for its state, in which no state of "
            "fo.measured is; measure the optimizer: fo.freezable(fo.measured(optimizer), frozen)"
        )
    if len(found) > 1:
        raise ValueError(
            f"fo.scores was given a {type(state).__name__} with {len(found)} states of "
            "fo.measured, so which is meant is not known; pass one of their states alone, or "
            "measure once, around all of the optimizer"
        )
    return found[0]


def _training_parts(
    state: Any, measured: MeasuredState, paths: Sequence[str], counts: list[int]
) -> list[list[bool]]:
    """Returns for each part of each leaf of the norms whether it trains now.

    Args:
      state: The tree with the state of `measured`.
      measured: That state.
      paths: The path of each leaf of the norms, or the label of each group.
      counts: The number of its parts.
    """
    # Inside of a `freezable`, or around one.
    plans = [one.plan for one in states_in(state) if measured_in(one)]
    plans = plans or [one.plan for one in states_in(measured.state)]
    plan = plans[0] if len(plans) == 1 else None
    everything = [[True] * count for count in counts]
    if plan is None or set(paths) != set(plan.paths):
        return everything
    frozen = _frozen_now(state, plan)
    by_leaf = plan.part_table.by_leaf if plan.part_table else [[i] for i in range(len(plan.paths))]
    parts = dict(zip(plan.paths, by_leaf, strict=True))
    mask = dict(zip(plan.paths, plan.mask_of(frozen), strict=True))
    return [
        [not frozen[part] for part in parts[path]]
        if len(parts[path]) == count
        else [mask[path] is not True] * count
        for path, count in zip(paths, counts, strict=True)
    ]


def _frozen_now(state: Any, plan: Plan) -> tuple[bool, ...]:
    """Returns for each part whether it is frozen; under `scheduled`, in the phase of this step."""
    phases = [one for one in schedules_in(state) if one.state.plan is plan]
    if not phases or isinstance(phases[0].step, Tracer):
        return plan.frozen
    return plan.schedule[int(phases[0].switch_index())][1]


def _check_readable(vectors: Iterable[Any]) -> None:
    for x in vectors:
        if isinstance(x, Tracer | jax.ShapeDtypeStruct):
            raise TypeError(
                "fo.scores reads numbers, but the state is traced, or of shapes alone; call it "
                "outside of jax.jit, on the state that the step returns"
            )
        if np.ndim(x) != 1:
            raise ValueError(
                f"the state has one more axis, of length {np.shape(x)[0]}, than that of one model, "
                "as jax.vmap(tx.init) gives for stacked params; read one at a time: "
                "fo.scores(jax.tree.map(lambda x: x[0], state))"
            )


def _score(parts: Sequence[Any]) -> Score:
    """Returns the score of a leaf from the vectors of its parts."""
    vectors = np.asarray(parts, np.float64)
    steps, norms = vectors[:, 0], vectors[:, 1 : 1 + len(MEASURES)]
    known = np.stack([steps > 0, steps > 0, steps > 1, steps > 1], axis=1)
    joined = np.sqrt(np.sum(np.where(known, norms, 0) ** 2, axis=0))
    values = np.where(known.any(axis=0), joined, np.nan).tolist()
    return Score(*values, steps=int(steps.max()))
