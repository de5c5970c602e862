"""`Convergence`: what it decides, against the same rule in NumPy on the recorded norms."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import serialization

import freeze_optax as fo
from tests.support.policy_runs import (
    MEASURED,
    NAMES,
    ORDER,
    PARAMS,
    SGD,
    SIZES,
    frozen_names,
    grads_of_norms,
    steady,
    steps_of,
)
from tests.support.sampling import cases

pytestmark = pytest.mark.usefixtures("standard_promotion")


class Averages:
    """The debiased average of the norms since the last thaw."""

    def __init__(self, decay: float):
        self.decay, self.norms = decay, []

    def mean(self) -> float:
        weights = self.decay ** np.arange(len(self.norms))[::-1]
        return float(np.average(self.norms, weights=weights))


class Oracle:
    """The rule, for the groups of `ORDER`, written on its own."""

    def __init__(self, limit: dict[str, float], patience: int, every: int, probe: int | None):
        self.limit, self.patience, self.every, self.probe = limit, patience, every, probe
        self.frozen: set[str] = set()
        self.leaves = {name: [Averages(0.9), Averages(0.9)] for name in NAMES}

    def decide(self, step: int) -> set[str]:
        if step == 0 or step % self.every:
            return self.frozen
        if self.probe and step % self.probe == 0 and self.frozen:
            for name in self.frozen:
                self.leaves[name] = [Averages(0.9), Averages(0.9)]
            self.frozen = set()
            return self.frozen
        ratios = {}
        for name in ORDER:
            if name not in self.frozen:
                kernel, bias = self.leaves[name]
                if len(kernel.norms) >= self.patience:
                    gradient = math.hypot(kernel.mean(), bias.mean())
                    ratios[name] = gradient / (SIZES[name] * 2**0.5)  # both leaves have a size
        limit = self.limit.get("threshold")
        if limit is None:
            limit = np.quantile(list(ratios.values()), self.limit["quantile"]) if ratios else 0.0
        for name in ORDER:
            if name in self.frozen:
                continue
            if name not in ratios or ratios[name] >= limit:
                break
            self.frozen = self.frozen | {name}
        return self.frozen

    def record(self, norms: dict[str, Sequence[float]]) -> None:
        for name in NAMES:
            if name not in self.frozen:
                for average, norm in zip(self.leaves[name], norms[name], strict=False):
                    average.norms.append(norm)


LIMITS = [{"threshold": 0.4}, {"threshold": 1.0}, {"quantile": 0.5}, {"quantile": 0.8}]


RULES = {f"{limit}-{probe}": (limit, probe) for limit in LIMITS for probe in (None, 12)}
# Each limit once, and each kind of limit with a probe and without one.
ALWAYS = [f"{limit}-{probe}" for limit, probe in zip(LIMITS, (None, 12, None, 12), strict=True)]


@pytest.mark.parametrize(("limit", "probe"), cases(RULES, ALWAYS))
def test_it_decides_as_the_rule_in_numpy_on_the_recorded_norms(limit, probe):
    patience, every = 3, 4
    tx = fo.freezable(fo.measured(SGD))
    policy = fo.Convergence(ORDER, **limit, patience=patience, every=every, probe=probe)
    update = jax.jit(tx.update)
    seen = set()
    for seed in range(3):
        rng, state = np.random.default_rng(seed), tx.init(PARAMS)
        oracle = Oracle(limit, patience, every, probe)
        # Some groups have larger gradients than others, and all of them get smaller ones.
        amounts = np.array([0.5, 0.7, 1.0, 2.0, 3.0])
        moves = dict(zip(NAMES, rng.permutation(amounts) if seed else amounts, strict=True))
        for step in range(30):
            state = fo.set_frozen(state, PARAMS, policy.at(step, state, PARAMS))
            assert frozen_names(state) == oracle.decide(step), step
            seen.add(frozenset(oracle.frozen))
            norms = {
                name: SIZES[name] * moves[name] * rng.uniform(0.5, 1, size=2) / (1 + step / 9)
                for name in NAMES
            }
            oracle.record(norms)
            _, state = update(grads_of_norms(norms), state, PARAMS)
    assert len(seen) > 1


def test_a_prefix_ends_before_the_first_group_that_moves():
    policy = fo.Convergence(ORDER, threshold=0.5, patience=2, every=5)
    state, decisions = steps_of(policy, MEASURED, 6, lambda _: steady(["layer_1"]))
    assert frozen_names(state) == {"embed", "layer_0"}
    assert [x.changed for x in decisions] == 5 * [False] + [True]
    assert decisions[5].froze == ("embed/bias", "embed/kernel", "layer_0/bias", "layer_0/kernel")
    assert decisions[5].thawed == ()
    assert repr(decisions[5]) == (
        "Decision(step 5: freezes 'embed/bias', 'embed/kernel', 'layer_0/bias' and 1 more)"
    )
    assert repr(decisions[4]) == "Decision(step 4: no change)"


def test_leaf_by_leaf_any_leaf_is_frozen_that_has_converged():
    policy = fo.Convergence(threshold=0.5, patience=2, every=5, floor="layer_0/bias")
    state, _ = steps_of(policy, MEASURED, 6, lambda _: steady(["layer_1"]))
    expected = fo.path("*") - "layer_1" - "layer_0/bias"
    assert fo.mask(state, PARAMS) == expected(PARAMS)


def test_what_is_always_frozen_is_so_from_the_first_step_and_the_floor_never():
    policy = fo.Convergence(
        ORDER, threshold=0.5, patience=2, every=5, frozen="layer_2/kernel", floor="**/bias"
    )
    state, decisions = steps_of(policy, MEASURED, 1, lambda _: steady())
    assert decisions[0].froze == ("layer_2/kernel",)
    state, _ = steps_of(policy, MEASURED, 6, lambda _: steady())
    assert fo.mask(state, PARAMS) == (fo.path("*") - "**/bias" - "head")(PARAMS)


def test_a_probe_thaws_what_it_froze_and_a_group_that_moves_goes_on_training():
    policy = fo.Convergence(ORDER, threshold=0.5, patience=2, every=5, probe=15, frozen="embed")

    def norms(step: int) -> Any:
        return steady(["layer_0"] if step > 10 else [])

    for keep_state in (False, True):
        state, decisions = steps_of(policy, MEASURED, 21, norms, keep_state=keep_state)
        changed = {x.step: (x.froze, x.thawed) for x in decisions if x.changed}
        layers = fo.path("layer_*")(PARAMS)
        of_layers = [
            f"{name}/{key}" for name in ORDER for key in ("bias", "kernel") if layers[name]["bias"]
        ]
        assert changed == {
            0: (("embed/bias", "embed/kernel"), ()),
            5: (tuple(of_layers), ()),
            15: ((), tuple(of_layers)),
        }
        assert frozen_names(state) == {"embed"}
    # If nothing moves, all is frozen again at the next decision.
    state, _ = steps_of(policy, MEASURED, 21, lambda _: steady([]))
    assert frozen_names(state) == set(ORDER)


def test_only_a_decision_that_changes_something_compiles_the_step_anew():
    policy = fo.Convergence(ORDER, threshold=1, patience=4, every=4)
    traces = []

    @jax.jit
    def update(grads: Any, state: Any) -> Any:
        traces.append(state.plan)
        return MEASURED.update(grads, state, PARAMS)[1]

    state, changes = MEASURED.init(PARAMS), 0
    rng = np.random.default_rng(0)
    for step in range(40):
        decision = policy.at(step, state, PARAMS)
        changes += decision.changed
        state = fo.set_frozen(state, PARAMS, decision)
        norms = {
            name: SIZES[name] * (1 + i) * rng.uniform(0.9, 1, size=2) / (1 + step / 8)
            for i, name in enumerate(NAMES)
        }
        state = update(grads_of_norms(norms), state)
    assert 1 < changes <= policy.most_changes(40) == 4
    assert len(traces) == 1 + changes


def test_the_most_changes_are_the_decisions_or_the_groups():
    policy = functools.partial(fo.Convergence, ORDER, threshold=0.5, every=10)
    assert [policy().most_changes(n) for n in (0, 1, 10, 11, 20, 21, 100)] == [0, 0, 0, 1, 1, 2, 4]
    assert policy(probe=20).most_changes(100) == 9
    assert fo.Convergence(threshold=0.5, every=10).most_changes(100) == 9


def test_a_run_that_was_stopped_and_resumed_decides_the_same():
    tx = fo.freezable(fo.measured(optax.sgd(1e-2, momentum=0.9)))
    policy = fo.Convergence(ORDER, quantile=0.7, patience=3, every=4, probe=16)
    rng = np.random.default_rng(1)
    norms = [{name: SIZES[name] * rng.uniform(1, 3, size=2) for name in NAMES} for _ in range(30)]

    def run(steps: range, state: Any, params: Any) -> tuple[Any, Any, list[Any]]:
        decisions = []
        for step in steps:
            decision = policy.at(step, state, params)
            decisions.append((decision.froze, decision.thawed))
            state = fo.set_frozen(state, params, decision, keep_state=True)
            updates, state = tx.update(grads_of_norms(norms[step]), state, params)
            params = fo.apply_updates(params, updates, frozen=state)
        return state, params, decisions

    state, params, whole = run(range(30), tx.init(PARAMS), PARAMS)
    assert sum(a != ((), ()) for a in whole) >= 3
    for stop in (3, 4, 5, 16, 17):
        before, half, first = run(range(stop), tx.init(PARAMS), PARAMS)
        data = serialization.msgpack_serialize(jax.device_get(fo.export_state(before)))
        resumed = fo.import_state(tx, half, serialization.msgpack_restore(data))
        after, ended, second = run(range(stop, 30), resumed, half)
        assert first + second == whole
        jax.tree.map(np.testing.assert_array_equal, (ended, after.inner), (params, state.inner))


def test_rows_that_are_always_frozen_come_back_at_a_probe():
    rows = fo.rows("embed/kernel", [0])
    policy = fo.Convergence(["embed"], threshold=0.5, patience=2, every=5, probe=10, frozen=rows)
    state, decisions = steps_of(policy, MEASURED, 1, lambda _: steady())
    assert fo.mask(state, PARAMS)["embed"]["kernel"].tolist() == [True, False]
    assert decisions[0].changed
    state, _ = steps_of(policy, MEASURED, 6, lambda _: steady())
    assert fo.mask(state, PARAMS)["embed"] == {"kernel": True, "bias": True}
    state, decisions = steps_of(policy, MEASURED, 11, lambda _: steady())
    assert fo.mask(state, PARAMS)["embed"]["kernel"].tolist() == [True, False]
    assert decisions[10].thawed == ("embed/bias", "embed/kernel")
