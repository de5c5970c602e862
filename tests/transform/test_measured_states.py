"""Norms through edits, parts of leaves and wrappers: each leaf has its own steps."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec

import freeze_optax as fo
from freeze_optax import nnx as fnnx
from tests.support import measuring
from tests.support.measuring import (
    ADAM,
    NAMES,
    PARAMS,
    TX,
    Run,
    assert_close,
    by_hand,
    gradient,
)
from tests.support.memories import assert_same_bits

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_a_leaf_is_measured_from_its_own_first_step():
    run = Run(fo.freezable(fo.measured(ADAM), "a")).train(2)
    run.check("b/c", "d/kernel")
    run.state = fo.thaw(run.state, PARAMS, "a")
    assert fo.scores(run.state)["a"].steps == 0
    run.train(2).check(*NAMES, a=2)
    before = fo.scores(run.state)
    run.state = fo.freeze(run.state, PARAMS, "b/c", keep_state=True)
    run.train(2)
    assert "b/c" not in fo.scores(run.state)
    run.state = fo.set_frozen(run.state, PARAMS, "d")
    # What was parked goes on where it stopped, what was dropped begins anew.
    assert fo.scores(run.state)["b/c"] == before["b/c"]
    run.state = fo.set_frozen(run.state, PARAMS, fo.nothing)
    assert fo.scores(run.state)["d/kernel"].steps == 0
    run.history = [x for i, x in enumerate(run.history) if i not in (4, 5)]
    expected = by_hand(run.history)
    assert_close({"b/c": fo.scores(run.state)["b/c"]}, {"b/c": expected["b/c"]._replace(steps=4)})
    assert fo.scores(run.state)["a"].steps == 4


def test_norms_make_no_cohort_of_an_optimizer_without_counters():
    tx = fo.freezable(fo.measured(optax.sgd(0.1, momentum=0.9)), "a")
    run = Run(tx).train(2)
    run.state = fo.thaw(run.state, PARAMS, "a")
    assert run.state.ages == ()
    run.train(1).check(*NAMES, a=2)


def test_adopt_and_release_keep_the_norms():
    bare = fo.measured(ADAM)
    run = Run(bare, {k: x for k, x in PARAMS.items() if k != "d"}).train(2)
    run.check("a", "b/c")
    adopted = fo.adopt(TX, run.state, run.params)
    assert_close(fo.scores(adopted), fo.scores(run.state))
    frozen = fo.freeze(adopted, run.params, "a", keep_state=True)
    released = fo.release(frozen, run.params)
    assert_same_bits(released, run.state)
    frozen = fo.freeze(adopted, run.params, "a")
    assert {k: x.steps for k, x in fo.scores(fo.release(frozen, run.params)).items()} == {
        "a": 0,
        "b/c": 2,
    }


# Parts of a leaf.


@pytest.mark.parametrize(
    ("first", "rest"),
    [
        pytest.param(np.array([[1], [1], [0], [0]]), "rows", id="rows"),
        pytest.param(np.arange(8).reshape(4, 2) % 3 == 0, "elements", id="elements"),
    ],
)
def test_each_part_of_a_leaf_has_a_vector_and_the_leaf_the_norm_of_all(first, rest):
    live = np.broadcast_to(first, (4, 2)).astype(bool)
    if rest == "rows":
        frozen, half = fo.rows("a", [2, 3]), fo.rows("a", [0])
    else:
        frozen, half = ~fo.elements("a", live) & "a", fo.elements("a", live & (np.arange(2) == 0))
    run = Run(fo.freezable(fo.measured(ADAM), frozen)).train(2)
    norms = [measuring.norm(g["a"][live]) for g, _ in run.history]
    moves = [measuring.norm(u["a"][live]) for _, u in run.history]
    assert_close({"a": fo.scores(run.state)["a"]}, {"a": measuring.score(norms, moves)})
    # A new part begins anew, and the other one goes on.
    run.state = fo.thaw(run.state, PARAMS, "a")
    run.train(1)
    parts = jax.tree.leaves(optax.tree_utils.tree_get(run.state, "norms")["a"])
    assert sorted(float(x[0]) for x in parts) == [1.0, 3.0]
    grads = run.history[2][0]["a"]
    old = measuring.average([*norms, measuring.norm(grads[live])], 0.9)
    expected = np.hypot(old, measuring.norm(grads[~live]))
    found = fo.scores(run.state)["a"]
    np.testing.assert_allclose(found.gradient, expected, rtol=1e-6)
    assert found.steps == 3
    # A part that is split: both get a copy, and no buffer is in the state twice.
    state = fo.freeze(run.state, PARAMS, half, keep_state=True)
    parts = jax.tree.leaves(optax.tree_utils.tree_get(state, "norms")["a"])
    assert sorted(float(x[0]) for x in parts) == [1.0, 3.0, 3.0]
    assert len({x.unsafe_buffer_pointer() for x in parts}) == 3
    np.testing.assert_allclose(fo.scores(state)["a"].gradient, expected, rtol=1e-6)


# Inside of others, and around them.


def test_around_a_freezable_what_is_frozen_has_no_score():
    run = Run(fo.measured(fo.freezable(ADAM, "a"))).train(2)
    run.check("b/c", "d/kernel")
    run.state = fo.thaw(run.state, PARAMS, "a")
    run.train(1)
    # Around it, it sees what every gradient and update was: here of a leaf that stood still.
    run.history = [
        (g, {**u, "a": u["a"] if i == 2 else 0 * u["a"]}) for i, (g, u) in enumerate(run.history)
    ]
    run.check(*NAMES)
    # In the style of partition a frozen leaf has no gradient: then nothing of it is measured.
    shown = fo.partition(PARAMS, "a")[0]
    tx = fo.measured(fo.freezable(ADAM, "a"))
    state = tx.init(PARAMS)
    _, state = tx.update(shown, state, PARAMS)
    assert float(state.norms["a"][0]) == 0


def test_several_of_them_measure_before_and_after():
    inner = optax.chain(fo.measured(optax.clip(0.5)), fo.measured(optax.sgd(0.1)), optax.scale(2.0))
    run = Run(fo.freezable(inner, "a")).train(2)
    with pytest.raises(ValueError, match=r"with 2 states of fo\.measured, so which is meant"):
        fo.scores(run.state)
    clipped, stepped = run.state.inner[:2]
    first, second = fo.scores(clipped), fo.scores(stepped)
    assert_close(
        {
            k: x._replace(update=x.gradient, update_change=x.gradient_change)
            for k, x in second.items()
        },
        {
            k: x._replace(gradient=x.update, gradient_change=x.update_change)
            for k, x in first.items()
        },
    )
    nested = fo.freezable(fo.measured(fo.measured(ADAM)), "a")
    state = fo.thaw(Run(nested).train(1).state, PARAMS, "a")
    assert fo.scores(state.inner.state)["a"].steps == 0
    with pytest.raises(ValueError, match="with 2 states"):
        fo.scores(state)


WRAPPERS: dict[str, Any] = {
    "masked": lambda tx: optax.masked(tx, lambda tree: jax.tree.map(lambda _: True, tree)),
    "partition": lambda tx: optax.partition({"x": tx}, fo.groups({True: "x"})),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(
        lambda r: optax.chain(tx, optax.scale(r))
    )(r=1.0),
    "tie": lambda tx: fo.tie(tx, ("b/c", "e")),
    "rates": lambda tx: optax.chain(tx, fo.rates({"a": 1.0})),
    "since_thaw": lambda tx: optax.chain(fo.since_thaw(lambda n: 1.0), tx),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_inside_of_other_transformations_it_measures_the_same(name):
    params = {**PARAMS, "e": PARAMS["b/c"]} if name == "tie" else PARAMS
    run = Run(fo.freezable(WRAPPERS[name](fo.measured(ADAM)), "a"), params).train(1)
    run.state = fo.thaw(run.state, params, "a")
    run.train(1)
    found, expected = fo.scores(run.state), by_hand(run.history, since={"a": 1})
    if name == "tie":
        # One update for both, of the sum of their gradients.
        assert "e" not in found
        twice = [measuring.norm(g["b/c"] + g["e"]) for g, _ in run.history]
        np.testing.assert_allclose(found["b/c"].gradient, measuring.average(twice, 0.9), rtol=1e-6)
        found, expected = ({k: x[k] for k in ("a", "d/kernel")} for x in (found, expected))
    assert_close(found, {k: x for k, x in expected.items() if k != "d/steps"})


def test_around_a_tie_each_alias_has_its_gradient_and_the_one_update():
    params = {**PARAMS, "e": PARAMS["b/c"]}
    run = Run(fo.freezable(fo.measured(fo.tie(ADAM, ("b/c", "e")))), params).train(2)
    run.check(*NAMES, "e")


def test_steps_that_are_accumulated_are_one_step():
    tx = fo.freezable(optax.MultiSteps(fo.measured(ADAM), 2).gradient_transformation(), "a")
    state, means = tx.init(PARAMS), []
    update = jax.jit(tx.update)
    for i in range(4):
        _, state = update(gradient(i), state, PARAMS)
        means.append(gradient(i)["b/c"])
    norms = [measuring.norm((means[i] + means[i + 1]) / 2) for i in (0, 2)]
    found = fo.scores(state)["b/c"]
    assert found.steps == 2
    np.testing.assert_allclose(found.gradient, measuring.average(norms, 0.9), rtol=1e-6)


def test_of_a_lookahead_the_fast_params_are_measured():
    params = optax.LookaheadParams.init_synced({"w": jnp.full(4, 2.0)})
    tx = fo.freezable(fo.measured(optax.lookahead(optax.sgd(0.5), 2, 0.5)))
    _, state = tx.update({"w": jnp.full(4, 3.0)}, tx.init(params), params)
    expected = fo.Score(6.0, 3.0, np.nan, np.nan, 1)
    assert_close(fo.scores(state), {"w": expected})


def test_phases_in_one_program_measure_as_a_loop_on_the_host():
    phases = fo.Phases({0: "a", 2: "b/c", 4: ["a", "b/c"]})
    tx = fo.scheduled(fo.measured(ADAM), phases)
    state, host = tx.init(PARAMS), Run()
    update = jax.jit(tx.update)
    for step in range(6):
        host.state = fo.set_frozen(host.state, PARAMS, phases.at(step), keep_state=True)
        host.train(1)
        _, state = update(gradient(step), state, PARAMS)
        if step in (3, 5):
            found, expected = fo.scores(state), dict(fo.scores(host.state))
            if step == 3:  # before the switch; the step of the state is that of the next phase
                expected = {"d/kernel": expected["d/kernel"]}
            assert_close(found, expected)


def test_layers_in_turns_are_measured_anew_in_each_turn():
    params = {"layers": jnp.arange(1.0, 9.0).reshape(4, 2), "head": jnp.ones(2)}
    tx = fo.rotating(fo.measured(ADAM), "layers", 1, 3, order="ascending")
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(5):
        _, state = update(gradient(step, params), state, params)
        layer = step // 3
        norms = [measuring.norm(gradient(i, params)["layers"][layer]) for i in (3, 4)]
        found = fo.scores(state)
        assert found["head"].steps == step + 1
        # The last step of a turn ends it: the next layers begin.
        assert found["layers"].steps == (step + 1) % 3
    np.testing.assert_allclose(found["layers"].gradient, measuring.average(norms, 0.9), rtol=1e-6)


def test_of_many_models_each_has_its_own_norms():
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), PARAMS)
    tx = fo.freezable(fo.measured(ADAM), "a")
    states = jax.vmap(tx.init)(stacked)
    _, states = jax.vmap(tx.update)(stacked, states, stacked)
    states = jax.vmap(lambda s, p: fo.thaw(s, p, "a"))(states, stacked)
    _, states = jax.vmap(tx.update)(stacked, states, stacked)
    with pytest.raises(ValueError, match=r"one more axis, of length 2, .*read one at a time"):
        fo.scores(states)
    for i in range(2):
        one = jax.tree.map(lambda x, i=i: x[i], (stacked, states))
        params, state = one
        alone = tx.init(params)
        _, alone = tx.update(params, alone, params)
        alone = fo.thaw(alone, params, "a")
        _, alone = tx.update(params, alone, params)
        assert_close(fo.scores(state), fo.scores(alone))
    with pytest.raises((ValueError, TypeError)):
        tx.update(stacked, states, stacked)


def test_norms_are_no_params_to_optax():
    for by in (None, lambda tree: jax.tree.map(lambda _: "x", tree)):
        tx = fo.freezable(fo.measured(ADAM, by=by), fo.rows("a", [0]))
        state = fo.thaw(tx.init(PARAMS), PARAMS, fo.rows("a", [0]))
        kinds = optax.tree_map_params(tx, lambda _: "P", state, transform_non_params=lambda _: "N")
        assert jax.tree.structure(kinds) == jax.tree.structure(state)
        assert set(jax.tree.leaves(optax.tree_utils.tree_get(kinds, "norms"))) == {"N"}
        assert set(jax.tree.leaves(optax.tree_utils.tree_get(kinds, "mu"))) == {"P"}
        bare = fo.measured(ADAM, by=by)
        mapped = optax.tree_map_params(bare, lambda x: x, bare.init(PARAMS))
        assert_same_bits(mapped, bare.init(PARAMS))


def test_boxes_of_linen_have_plain_norms_without_axes():
    kernel = nn.LogicallyPartitioned(PARAMS["a"], names=("embed", "mlp"))
    boxed = {**PARAMS, "a": kernel}
    run = Run(TX, boxed).train(2)
    plain = Run(TX).train(2)
    assert_close(fo.scores(run.state), fo.scores(plain.state))
    specs = optax.tree_utils.tree_get(nn.get_partition_spec(run.state), "norms")
    is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    assert jax.tree.leaves(specs, is_leaf=is_spec) == [PartitionSpec()] * 3
    assert_same_bits(nn.meta.unbox(run.state), plain.state)


def test_an_nnx_optimizer_measures_its_params_and_edits_keep_the_norms():
    class Net(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.body, self.head = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

    model = Net()
    optimizer = nnx.Optimizer(model, fo.freezable(fo.measured(ADAM), "body"), wrt=nnx.Param)
    loss = lambda m: (m.head(m.body(jnp.ones((2, 3)))) ** 2).mean()  # noqa: E731
    grads = fnnx.grad(loss, optimizer)(model)
    optimizer.update(model, grads)
    found = fo.scores(optimizer.opt_state)
    assert list(found) == ["head/bias", "head/kernel"]
    kernel = np.asarray(nnx.to_pure_dict(grads)["head"]["kernel"])
    np.testing.assert_allclose(found["head/kernel"].gradient, measuring.norm(kernel), rtol=1e-6)
    assert_close(fo.scores(optimizer), found)
    fnnx.thaw(optimizer, model, "body/kernel")
    optimizer.update(model, fnnx.grad(loss, optimizer)(model))
    assert {k: x.steps for k, x in fo.scores(optimizer.opt_state).items()} == {
        "body/kernel": 1,
        "head/bias": 2,
        "head/kernel": 2,
    }


def test_parked_norms_stay_on_the_device_when_moments_go_to_the_host():
    state = fo.freeze(Run().train(2).state, PARAMS, "a", keep_state=True)
    placed = fo.place_state(state)
    norms, mu = (optax.tree_utils.tree_get(placed, name) for name in ("norms", "mu"))
    kinds = [x["a"].sharding.memory_kind for x in (norms, mu)]
    assert kinds == ["device", "pinned_host"]
    back = fo.thaw(placed, PARAMS, "a")
    assert_same_bits(back, fo.thaw(state, PARAMS, "a"))
