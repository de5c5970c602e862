"""What cohorts cost: XLA removes all that the run for one cohort makes for the others."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from freeze_optax._transform import cohorts as cohorts_file
from tests.support import optimizers
from tests.support.optimizers import build, every, extras

pytestmark = pytest.mark.usefixtures("standard_promotion")

# So wide that a counter and its two powers for each cohort weigh nothing.
WIDTH, LAYERS = 128, 9
INNERS = {
    "clip and adamw": optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.1)
    ),
    "adamw with a schedule": optax.adamw(optax.cosine_decay_schedule(1e-3, 100)),
}


@functools.cache
def params() -> dict[str, Any]:
    return {
        f"layer_{i}": {"kernel": jnp.full((WIDTH, WIDTH), 0.01), "bias": jnp.zeros(WIDTH)}
        for i in range(LAYERS)
    }


def loss(tree: Any, batch: jax.Array) -> jax.Array:
    x = batch
    for layer in tree.values():
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return (x**2).mean()


def in_cohorts(tx: optax.GradientTransformation) -> Any:
    """A state with a cohort for each layer: all but one frozen, then thawed one by one."""
    state = fo.set_frozen(tx.init(params()), params(), "layer_{1..8}")
    for i in range(1, LAYERS):
        state = fo.thaw(state, params(), f"layer_{i}")
    assert [age.shape[0] for age in state.ages] == [LAYERS - 1]
    return state


def update_alone(tx: Any) -> Any:
    return lambda grads, state, tree, batch: tx.update(grads, state, tree)


def full_step(tx: Any) -> Any:
    def step(tree, state, again, batch):
        value, grads = fo.value_and_grad(loss, frozen=state)(tree, batch)
        updates, state = tx.update(grads, state, tree)
        return fo.apply_updates(tree, updates, frozen=state), state, value

    return step


def costs(step: Any, state: Any) -> dict[str, float]:
    batch = jnp.ones((16, WIDTH))
    jitted = jax.jit(step, donate_argnums=(0, 1))
    analysis = jitted.lower(params(), state, params(), batch).compile().cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    return {name: analysis[name] for name in ("flops", "bytes accessed")}


@pytest.mark.parametrize("make", [update_alone, full_step], ids=["update", "step"])
@pytest.mark.parametrize("name", INNERS)
def test_nine_cohorts_cost_what_one_costs(name, make):
    tx = fo.freezable(INNERS[name])
    one = costs(make(tx), tx.init(params()))
    nine = costs(make(tx), in_cohorts(tx))
    assert one["flops"] > 0
    over = {key: (nine[key], one[key]) for key in one if nine[key] > 1.01 * one[key]}
    assert not over


@pytest.mark.parametrize("make", [update_alone, full_step], ids=["update", "step"])
@pytest.mark.parametrize("name", INNERS)
def test_cohorts_do_not_cost_the_frozen_leaves_beside_them(name, make):
    tx = fo.freezable(INNERS[name])
    whole, part = in_cohorts(tx), fo.freeze(in_cohorts(tx), params(), "layer_{0..7}")
    # One of nine layers is left: so the gate above would see a cohort that is run in full.
    assert costs(make(tx), part)["flops"] < 0.5 * costs(make(tx), whole)["flops"]


@pytest.mark.parametrize("make", [update_alone, full_step], ids=["update", "step"])
@pytest.mark.parametrize("name", INNERS)
def test_a_parked_leaf_costs_the_flops_of_a_dropped_one(name, make):
    tx = fo.freezable(INNERS[name])
    dropped, parked = (
        costs(make(tx), fo.freeze(tx.init(params()), params(), "layer_{0..5}", keep_state=keep))
        for keep in (False, True)
    )
    assert dropped["flops"] == parked["flops"]


def unshared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cohorts_file, "_trace_once", lambda run, _: run)


@pytest.mark.parametrize("is_traced", [False, True], ids=["eager", "traced"])
def test_all_cohorts_share_one_trace_of_the_inner_update(is_traced):
    calls: list[bool] = []

    def update(grads, state, params=None):
        calls.append(isinstance(state.count, jax.core.Tracer))
        return adam.update(grads, state, params)

    adam = optax.scale_by_adam()
    tx = fo.freezable(optax.GradientTransformation(adam.init, update))
    args = params(), in_cohorts(tx), params()
    jax.make_jaxpr(tx.update)(*args) if is_traced else tx.update(*args)
    assert calls == ([True] if is_traced else [False] * LAYERS)


@pytest.mark.parametrize("is_traced", [False, True], ids=["eager", "traced"])
def test_a_counter_may_be_an_array(is_traced):
    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return {"count": jnp.zeros((3, 4), jnp.int32), "sum": zeros}

    def update(grads, state, params=None):
        total = jax.tree.map(jnp.add, state["sum"], grads)
        count = state["count"] + jnp.arange(1, 4)[:, None]
        updates = jax.tree.map(lambda x: x / count[2, 1].astype(x.dtype), total)
        return updates, {"count": count, "sum": total}

    tree = {name: jnp.ones(2) for name in "abc"}
    tx = fo.freezable(optax.GradientTransformation(init, update), ("a", "b"))
    step = jax.jit(tx.update) if is_traced else tx.update
    state = tx.init(tree)
    for name in "ab":
        _, state = step(tree, state, tree)
        state = fo.thaw(state, tree, name)
    updates, state = step(tree, state, tree)
    # The sum of all gradients by three times the steps, and each leaf has its own.
    assert {name: x.tolist() for name, x in updates.items()} == dict.fromkeys(
        "abc", [np.float32(1 / 3)] * 2
    )
    assert state.inner["count"].tolist() == [[3] * 4, [6] * 4, [9] * 4]
    (ages,) = state.ages
    assert ages[:, :, 0].tolist() == [[2, 4, 6], [1, 2, 3]]


UNEDITABLE = {
    "flatten",
    "lbfgs",
    "scale_by_backtracking_linesearch",
    "scale_by_zoom_linesearch",
}
EDITABLE = [pair for pair in every() if pair[1] not in UNEDITABLE]


@pytest.mark.parametrize(
    ("module", "name"), optimizers.cases(EDITABLE, {"adafactor", "chain", "noisy_sgd", "partition"})
)
def test_a_shared_trace_has_the_equations_of_a_trace_for_each_cohort(module, name, monkeypatch):
    tree = optimizers.params()
    tx = fo.freezable(build(module, name), "bottom")
    state = fo.thaw(tx.init(tree), tree, "bottom")

    def value(tree):
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(tree))

    grads = jax.grad(value)(tree)

    def update(grads, state, tree):
        return tx.update(grads, state, tree, **extras(name, value, value(tree), grads))

    shared = jax.make_jaxpr(update)(grads, state, tree)
    unshared(monkeypatch)
    assert str(shared) == str(jax.make_jaxpr(update)(grads, state, tree))
