"""`Convergence` in special cases: degenerate scores, states anywhere, parts, several devices."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from tests.support.policy_runs import (
    MEASURED,
    NAMES,
    ORDER,
    PARAMS,
    SGD,
    SIZES,
    frozen_names,
    steady,
    steps_of,
)

pytestmark = pytest.mark.usefixtures("standard_promotion")

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


def test_a_probe_thaws_nothing_where_all_that_is_frozen_always_is():
    policy = fo.Convergence(ORDER, threshold=0.5, patience=2, every=5, frozen="embed", probe=5)
    state, _ = steps_of(policy, MEASURED, 6, lambda _: steady(["layer_1"]))
    assert frozen_names(state) == {"embed", "layer_0"}


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
