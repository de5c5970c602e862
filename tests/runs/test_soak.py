"""Two thousand edits and steps: nothing grows, nothing costs more, and each number stays right."""

import collections
import dataclasses
import functools
import gc
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freeze_optax as fo
from tests.edit.test_model import CASES, Reference, check_state, draw_grads, flat, nested, spoil

pytestmark = [
    pytest.mark.slow,
    pytest.mark.exhaustive,
    pytest.mark.usefixtures("standard_promotion"),
]

# Looked at when each plan has been there, and at the end; measured just before and just after.
WARM, EDITS, MEASURED = 500, 2000, 200
CASE = CASES["clip and adamw"]
NEW_ROWS = fo.rows("table", slice(0, 2))
# The rows of the table that are frozen and thawed are a leaf of their own to the reference.
SHAPES = {
    "encoder/a": (2, 2),
    "encoder/b": (3,),
    "head/b": (),
    "head/c": (1, 3),
    "head/w": (2,),
    "table/new": (2, 2),
    "table/old": (3, 2),
}
GROUPS = {
    "encoder": ("encoder", {"encoder/a", "encoder/b"}),
    "rows": (NEW_ROWS, {"table/new"}),
    "both": (("encoder", NEW_ROWS), {"encoder/a", "encoder/b", "table/new"}),
    "none": (fo.nothing, set()),
}
MANY = {"freeze": 8, "thaw": 8, "set_frozen": 4, "release": 1, "export": 1}


def joined(values: dict[str, np.ndarray]) -> Any:
    """The params, or a tree like them, of values for the reference."""
    table = np.concatenate([values["table/new"], values["table/old"]])
    others = {path: x for path, x in values.items() if not path.startswith("table")}
    return jax.tree.map(jnp.asarray, nested({**others, "table": table}))


def draw_edit(numbers: random.Random) -> tuple[str, str, bool]:
    verb = numbers.choices(list(MANY), list(MANY.values()))[0]
    group = numbers.choice(list(GROUPS) if verb == "set_frozen" else ["encoder", "rows"])
    return verb, group, numbers.random() < 0.5


def edited(tx: Any, state: Any, params: Any, edit: tuple[str, str, bool]) -> Any:
    verb, group, keep_state = edit
    if verb == "release":
        return fo.adopt(tx, fo.release(state, params), params)
    if verb == "export":
        return fo.import_state(tx, params, fo.export_state(state))
    options = {} if verb == "thaw" else {"keep_state": keep_state}
    return getattr(fo, verb)(state, params, GROUPS[group][0], **options)


def edit_reference(reference: Reference, edit: tuple[str, str, bool]) -> None:
    verb, group, keep_state = edit
    paths = GROUPS[group][1]
    if verb == "set_frozen":
        reference.set_frozen(paths, keep_state)
    elif verb == "release":
        # The plain optimizer has one count, that of the leaves which were never frozen.
        for path, leaf in reference.leaves.items():
            reference.thaw(path)
            leaf.count = reference.leaves["head/w"].count
    elif verb != "export":
        for path in paths:
            reference.thaw(path) if verb == "thaw" else reference.freeze(path, keep_state)


PACKAGE = str(Path(fo.__file__).parent)


def calls(function: Callable[[], Any]) -> int:
    """How often functions of the package are called."""
    count = 0

    def notice(frame: Any, event: str, _: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    sys.setprofile(notice)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def kinds(tree: Any) -> Any:
    """All that jit looks at."""
    leaves = jax.tree.leaves(tree)
    return jax.tree.structure(tree), tuple((x.shape, x.dtype, x.weak_type) for x in leaves)


def objects() -> collections.Counter[str]:
    """What a collection leaves: the objects of the package by type, and how many there are."""
    gc.unfreeze()  # what tests/conftest.py froze is not listed
    gc.collect()
    names = [f"{type(x).__module__}.{type(x).__name__}" for x in gc.get_objects()]
    own = collections.Counter(name for name in names if name.startswith("freeze_optax"))
    return own + collections.Counter({"all": len(names)})


def cached() -> dict[str, int]:
    """The entries of each cache of the package."""
    gc.unfreeze()
    caches = [x for x in gc.get_objects() if isinstance(x, functools._lru_cache_wrapper)]
    own = [x for x in caches if str(x.__module__).startswith("freeze_optax")]
    return {f"{x.__module__}.{x.__qualname__}": x.cache_info().currsize for x in own}


@dataclasses.dataclass
class Soak:
    """What was seen during the edits.

    Attributes:
      tx: The transformation.
      paths: For each plan the edits that first led to it.
      seen: For each plan all that its states ever were to jit.
      traces: The plan of each trace of the step.
      held: After so many edits, what was alive.
      odd: Where the reference had another state or other values.
      costs: The calls that one edit and one update make, early and late, of one plan.
      programs: The step as compiled for that plan, early and late.
    """

    tx: Any
    paths: dict[Any, list[Any]]
    seen: dict[Any, set[Any]] = dataclasses.field(default_factory=dict)
    traces: list[Any] = dataclasses.field(default_factory=list)
    held: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    odd: list[str] = dataclasses.field(default_factory=list)
    costs: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    programs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def step(self, params: Any, state: Any, grads: Any) -> Any:
        self.traces.append(state.plan)

        def loss(params: Any) -> Any:
            pairs = zip(jax.tree.leaves(params), jax.tree.leaves(grads), strict=True)
            return sum((x * g).sum() for x, g in pairs)

        updates, state = self.tx.update(fo.grad(loss, frozen=state)(params), state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    def measure(self, when: str, params: Any, state: Any, grads: Any) -> None:
        functions = [
            lambda: fo.freeze(state, params, "encoder"),
            lambda: self.tx.update(grads, state, params),
        ]
        for function in functions:  # dtypes are looked up once
            function()
        self.costs.setdefault(when, []).append(tuple(map(calls, functions)))
        if when not in self.programs:
            # By a function of its own: jit keeps what it traced of the other.
            def anew(*args: Any) -> Any:
                return self.step(*args)

            self.programs[when] = jax.jit(anew).lower(params, state, grads).compile()
            assert self.traces.pop() == state.plan


def check_values(params: Any, reference: Reference) -> None:
    expected = flat(joined({path: leaf.value for path, leaf in reference.leaves.items()}))
    for path, value in flat(params).items():
        np.testing.assert_allclose(value, expected[path], rtol=2e-5, atol=2e-5, err_msg=path)


@pytest.fixture(scope="module")
def soak() -> Soak:
    with jax.numpy_dtype_promotion("standard"):
        return soaked()


def soaked() -> Soak:
    numbers = random.Random(0)
    ordered = enumerate(SHAPES.items())
    values = {path: np.full(shape, 0.5 + i, np.float32) for i, (path, shape) in ordered}
    reference = Reference(CASE, values, set())
    tx, params = fo.freezable(CASE.inner), joined(values)
    state = tx.init(params)
    record = Soak(tx, {state.plan: []})
    step = jax.jit(record.step, donate_argnums=(0, 1))
    target = None
    for i in range(1, EDITS + MEASURED + 1):
        edit, before = draw_edit(numbers), state.plan
        state = edited(tx, state, params, edit)
        edit_reference(reference, edit)
        record.paths.setdefault(state.plan, [*record.paths[before], edit])
        seen = record.seen.setdefault(state.plan, set())
        seen.add(kinds(state))
        grads = draw_grads(values, i)
        reference.step(grads)
        grads = joined(spoil(grads, reference.frozen))
        params, state = step(params, state, grads)
        seen.add(kinds(state))
        try:
            check_state(state, reference)
            check_values(params, reference)
        except AssertionError as error:
            record.odd.append(f"after edit {i}, {edit}: {error}")
        if state.plan.parked and len(state.plan.live) == 2:
            target = target or state.plan
        if state.plan == target and (WARM - MEASURED < i < WARM or i > EDITS):
            record.measure("early" if i < WARM else "late", params, state, grads)
        del grads
        if i in (WARM, EDITS):
            record.held[i] = {
                "plans": len(record.seen),
                "traces of jit": step._cache_size(),
                "objects": objects(),
                "arrays": len(jax.live_arrays()) - len(jax.tree.leaves((params, state))),
                "caches": cached(),
            }
    return record


def test_values_and_state_agree_all_along_with_a_reference_for_each_leaf(soak):
    assert not soak.odd, soak.odd[0]


def test_equal_plans_share_one_trace_whatever_led_to_them(soak):
    plans = set(soak.seen)
    assert 20 <= len(plans) <= 30
    assert collections.Counter(soak.traces) == collections.Counter(plans)
    for held in soak.held.values():
        assert held["plans"] == held["traces of jit"] == len(plans)


def test_no_more_cohorts_than_parts_that_keep_state(soak):
    for plan in soak.seen:
        kept = [cohort for cohort in plan.cohorts if cohort >= 0]
        assert sorted(set(kept)) == list(range(len(set(kept))))
        # Leaves that were never frozen are one, the encoder one, and the rows.
        assert len(set(kept)) <= 3


def test_nothing_that_is_not_needed_stays_alive(soak):
    early, late = soak.held[WARM], soak.held[EDITS]
    assert late["arrays"] == early["arrays"]
    assert late["caches"] == early["caches"]
    assert any(early["caches"].values())
    assert late["objects"] - early["objects"] - collections.Counter({"all": 200}) == {}
    # As jit holds the plan of each trace, so these are seen at all.
    assert early["objects"].total() - early["objects"]["all"] >= len(soak.seen)


def test_all_states_of_a_plan_are_alike_and_like_one_that_was_edited_a_few_times(soak):
    ordered = enumerate(SHAPES.items())
    params = joined({path: np.full(shape, i, np.float32) for i, (path, shape) in ordered})
    for plan, seen in soak.seen.items():
        state = soak.tx.init(params)
        for edit in soak.paths[plan]:
            state = edited(soak.tx, state, params, edit)
        assert seen == {kinds(state)}
    fresh = [fo.freezable(CASE.inner, where).init(params) for where, _ in GROUPS.values()]
    assert [soak.seen[state.plan] for state in fresh] == [{kinds(state)} for state in fresh]


def test_edits_and_updates_cost_at_last_what_they_cost_at_first(soak):
    assert len(soak.costs["early"]) >= 3
    assert len(soak.costs["late"]) >= 3
    assert len({*soak.costs["early"], *soak.costs["late"]}) == 1
    early, late = soak.programs["early"], soak.programs["late"]
    assert late.cost_analysis() == early.cost_analysis()
    assert late.cost_analysis()["flops"] > 0
    count = [program.as_text().count(" = ") for program in (early, late)]
    assert count[0] == count[1] > 20
