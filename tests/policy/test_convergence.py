"""`Convergence`: what it decides, against the same rule in NumPy on the recorded norms."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

import freeze_optax as fo

pytestmark = pytest.mark.usefixtures("standard_promotion")

NAMES = ("embed", "layer_0", "layer_1", "layer_2", "head")
ORDER = list(NAMES[:-1])
SIZES = {name: 2.0**i for i, name in enumerate(NAMES)}
"""The norm of each leaf below a name."""
PARAMS = {
    name: {"kernel": jnp.full((2, 2), size / 2), "bias": jnp.full(4, size / 2)}
    for name, size in SIZES.items()
} | {"head": jnp.full(4, SIZES["head"] / 2)}
SGD = optax.sgd(0.01)


def grads_of_norms(norms: dict[str, Sequence[float]]) -> Any:
    """Gradients like `PARAMS`, whose leaves have these norms: the kernel and the bias."""

    def leaf(x: jax.Array, norm: float) -> jax.Array:
        return jnp.full_like(x, norm / x.size**0.5)

    def of(name: str) -> Any:
        if name == "head":
            return leaf(PARAMS[name], norms[name][0])
        pairs = zip(("kernel", "bias"), norms[name], strict=True)
        return {key: leaf(PARAMS[name][key], norm) for key, norm in pairs}

    return {name: of(name) for name in NAMES}


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


def frozen_names(state: Any) -> set[str]:
    mask = fo.mask(state, PARAMS)
    found = {name for name in NAMES if all(jax.tree.leaves(mask[name]))}
    assert found == {name for name in NAMES if any(jax.tree.leaves(mask[name]))}
    return found


LIMITS = [{"threshold": 0.4}, {"threshold": 1.0}, {"quantile": 0.5}, {"quantile": 0.8}]


@pytest.mark.parametrize("probe", [None, 12])
@pytest.mark.parametrize("limit", LIMITS, ids=str)
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


def steps_of(policy: fo.Convergence, tx: Any, count: int, norms: Any, **options: Any) -> Any:
    """Runs `count` steps with gradients of the norms of each step; returns states and decisions."""
    state, update, decisions = tx.init(PARAMS), jax.jit(tx.update), []
    for step in range(count):
        decisions.append(policy.at(step, state, PARAMS))
        state = fo.set_frozen(state, PARAMS, decisions[-1], **options)
        _, state = update(grads_of_norms(norms(step)), state, PARAMS)
    return state, decisions


def steady(moving: Sequence[str] = ("head",)) -> dict[str, list[float]]:
    """Norms that are twice the size for these names, and a fifth of it for the others."""
    return {name: 2 * [size * (2.0 if name in moving else 0.2)] for name, size in SIZES.items()}


MEASURED = fo.freezable(fo.measured(SGD))


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


EQUAL = {"quantile": 1.0}, {"quantile": 0.0}, {"threshold": 0.0}


@pytest.mark.parametrize("limit", EQUAL, ids=str)
@pytest.mark.parametrize("order", [ORDER, None, ["embed"]])
def test_equal_scores_freeze_nothing_by_quantile_and_none_is_below_zero(limit, order):
    policy = fo.Convergence(order, **limit, patience=2, every=5)
    _, decisions = steps_of(policy, MEASURED, 11, lambda _: steady(NAMES))
    assert not any(x.changed for x in decisions)


def test_nothing_converges_before_it_was_measured_long_enough_or_without_finite_norms():
    policy = fo.Convergence(ORDER, threshold=0.5, patience=10, every=5)
    _, decisions = steps_of(policy, MEASURED, 11, lambda _: steady())
    assert [x.step for x in decisions if x.changed] == [10]
    for bad in (math.nan, math.inf):
        norms = {**steady(), "embed": [bad, 1.0]}
        _, decisions = steps_of(policy, MEASURED, 16, lambda _, norms=norms: norms)
        assert not any(x.changed for x in decisions)


def test_a_gradient_of_zeros_has_converged():
    policy = fo.Convergence(["embed"], threshold=0.5, patience=2, every=5)
    norms = {**steady(), "embed": [0.0, 0.0]}
    state, _ = steps_of(policy, MEASURED, 6, lambda _: norms)
    assert frozen_names(state) == {"embed"}


def test_a_score_of_ones_own_is_compared_instead():
    seen = {}

    def update(score: fo.Score, norm: float) -> float:
        seen[norm] = score
        return score.update

    policy = fo.Convergence(ORDER, threshold=0.04, patience=2, every=5, score=update)
    norms = {name: [3.0 * i, 4.0 * i] for i, name in enumerate(NAMES)}
    state, _ = steps_of(policy, MEASURED, 6, lambda _: norms)
    assert frozen_names(state) == {"embed"}  # 0, and the next one is 0.05
    assert list(seen) == pytest.approx([SIZES[name] * 2**0.5 for name in ORDER])
    assert [x.gradient for x in seen.values()] == pytest.approx([0, 5, 10, 15])
    assert [x.steps for x in seen.values()] == [5, 5, 5, 5]


def test_where_no_decision_is_due_nothing_is_read():
    policy = fo.Convergence(ORDER, threshold=0.5, patience=2, every=5)
    abstract = jax.eval_shape(MEASURED.init, PARAMS)
    shapes = jax.eval_shape(lambda: PARAMS)
    assert not policy.at(3, abstract, shapes).changed
    with pytest.raises(TypeError, match=r"the state is traced, or of shapes alone"):
        policy.at(5, abstract, PARAMS)
    state, _ = steps_of(policy, MEASURED, 5, lambda _: steady())
    with pytest.raises(TypeError, match=r"the params are traced, or shapes alone"):
        policy.at(20, state, shapes)


@pytest.mark.parametrize("wrap", ["chain", "MultiSteps", "around"])
def test_the_state_may_be_anywhere_in_that_of_a_chain(wrap):
    inner = fo.measured(SGD)
    tx: Any = {
        "chain": optax.chain(optax.clip_by_global_norm(100.0), fo.freezable(inner)),
        "MultiSteps": optax.MultiSteps(fo.freezable(inner), 1),
        "around": fo.measured(fo.freezable(SGD)),
    }[wrap]
    policy = fo.Convergence(ORDER, threshold=0.5, patience=2, every=5)
    state, _ = steps_of(policy, tx, 6, lambda _: steady(["layer_1"]))
    assert frozen_names(state) == {"embed", "layer_0"}


def test_what_someone_else_froze_stays_so_and_its_group_counts_as_frozen():
    policy = fo.Convergence(ORDER, threshold=0.5, patience=2, every=5)
    tx = fo.freezable(fo.measured(SGD), ["layer_0", "head"])
    state, _ = steps_of(policy, tx, 6, lambda _: steady(["layer_0", "layer_2"]))
    assert frozen_names(state) == {"embed", "layer_0", "layer_1", "head"}


def test_a_decision_is_a_spec():
    policy = fo.Convergence(ORDER, threshold=0.5, patience=2, every=5)
    state, decisions = steps_of(policy, MEASURED, 6, lambda _: steady(["layer_1"]))
    decision = decisions[-1]
    assert decision(PARAMS) == fo.mask(state, PARAMS) == fo.mask(decision, PARAMS)
    assert (decision | "head")(PARAMS)["head"] is True
    trainable, _ = fo.partition(PARAMS, decision)
    assert jax.tree.leaves(trainable) == jax.tree.leaves(fo.partition(PARAMS, state)[0])
    with pytest.raises(ValueError, match=r"is of other params: only in the decision: 'embed/bias'"):
        decision({"head": 1.0})


def test_rows_that_it_freezes_are_not_called_thawed():
    policy = fo.Convergence(["embed"], threshold=0.5, frozen=fo.rows("embed/kernel", [0]))
    decision = policy.at(0, MEASURED.init(PARAMS), PARAMS)
    assert (decision.froze, decision.thawed) == (("embed/kernel",), ())


def test_of_a_leaf_that_trains_in_part_both_norms_are_of_that_part():
    seen = []
    policy = fo.Convergence(
        ["embed/kernel"],
        threshold=0.5,
        patience=2,
        every=5,
        frozen=fo.rows("embed/kernel", [0]),
        score=lambda score, norm: seen.append((score.gradient, norm)) or 1.0,
    )
    steps_of(policy, MEASURED, 6, lambda _: steady(["embed"]))
    # One of two rows, of a leaf whose norm is 1, and that of its gradient 2.
    assert seen == [(pytest.approx(2 * 0.5**0.5), pytest.approx(0.5**0.5))]


def test_a_group_waits_for_a_leaf_that_is_not_measured_and_for_finite_params():
    labels = {name: "a" if name == "embed" else "b" for name in NAMES}
    inner = optax.partition({"a": fo.measured(SGD), "b": SGD}, labels)
    policy = fo.Convergence(["{embed,layer_0}"], threshold=1e9, patience=2, every=5)
    _, decisions = steps_of(policy, fo.freezable(inner), 6, lambda _: steady())
    assert not any(x.changed for x in decisions)
    state, _ = steps_of(policy, MEASURED, 5, lambda _: steady())
    assert policy.at(5, state, PARAMS).froze
    for bad in (math.inf, math.nan, 1e30):
        params = {**PARAMS, "embed": jax.tree.map(lambda x, y=bad: x * y, PARAMS["embed"])}
        assert not policy.at(5, state, params).changed


@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.5, 0.75, 0.9, 1.0])
def test_a_quantile_is_that_of_numpy_and_infinite_scores_stay_above_it(quantile):
    values: list[float] = []

    def score(score: fo.Score, norm: float) -> float:
        return values[int(np.log2(norm / 2**0.5) + 0.5)]

    policy = fo.Convergence(ORDER, quantile=quantile, patience=2, every=5, score=score)
    state, _ = steps_of(policy, MEASURED, 5, lambda _: steady())
    for numbers in ([1.0, 2.0, 4.0, 8.0], [1.0, 1.0, 2.0, 3.0], [1.0, 2.0, math.inf, math.inf]):
        values[:] = numbers
        finite = [min(x, 1e30) for x in numbers]
        limit = np.quantile(finite, quantile)
        below = [x < limit for x in finite]
        count = below.index(False) if False in below else len(below)
        expected = {path for name in ORDER[:count] for path in (f"{name}/bias", f"{name}/kernel")}
        assert set(policy.at(5, state, PARAMS).froze) == expected, (numbers, quantile)


def test_the_leaves_of_a_group_may_be_on_different_devices():
    devices = jax.devices()[:2]
    params = {"a": {"x": jax.device_put(jnp.ones(4), devices[0])}}
    params["a"]["y"] = jax.device_put(jnp.ones(4), devices[1])
    grads = jax.tree.map(lambda x: 1e-3 * x, params)
    state = MEASURED.init(params)
    policy = fo.Convergence(["a"], threshold=0.5, patience=1, every=2)
    for _ in range(2):
        _, state = MEASURED.update(grads, state, params)
    assert policy.at(2, state, params).froze == ("a/x", "a/y")


def test_a_state_that_is_not_measured_raises_at_the_first_step():
    with pytest.raises(TypeError, match=r"no state of fo\.measured is"):
        fo.Convergence(ORDER, threshold=0.5).at(0, fo.freezable(SGD).init(PARAMS), PARAMS)
