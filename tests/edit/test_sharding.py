"""Thawing sharded params: new moments lie where their parameter lies, and the step goes on."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import freeze_optax as fo
from tests.support import by_hand

pytestmark = pytest.mark.usefixtures("standard_promotion")

SHAPES = {
    "embed": (8, 8),
    "encoder": {"a": (8, 16), "b": (16, 8)},
    "head": {"w": (8, 4), "b": (4,)},
}
SPLIT = {
    # Along one axis, the other, both, and not at all.
    "data": [("data",), (None, "data"), ("data", None), (), ("data", None)],
    "data and model": [(None, "model"), ("data", "model"), ("model", "data"), (), ("data",)],
}
MOMENTS = {"adam": ("mu", "nu"), "clip and adamw": ("mu", "nu"), "momentum": ("trace",)}
STEPS = 6


@functools.cache
def mesh(layout: str) -> Mesh:
    # Auto axes in any version of jax: make_mesh has changed its default.
    devices = np.array(jax.devices())
    if layout == "data":
        return Mesh(devices, ("data",))
    return Mesh(devices.reshape(4, 2), ("data", "model"))


def make_params() -> Any:
    random = np.random.default_rng(0)
    draw = lambda shape: jnp.asarray(random.normal(size=shape) / 3, jnp.float32)  # noqa: E731
    return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def shardings(layout: str) -> Any:
    order = by_hand.paths(make_params())
    assert order == ["embed", "encoder/a", "encoder/b", "head/b", "head/w"]
    specs = [NamedSharding(mesh(layout), PartitionSpec(*axes)) for axes in SPLIT[layout]]
    return jax.tree.unflatten(jax.tree.structure(make_params()), specs)


def sharded(layout: str) -> Any:
    return jax.tree.map(jax.device_put, make_params(), shardings(layout))


def batch(step: int) -> Any:
    return np.random.default_rng(step).normal(size=(16, 8)).astype(np.float32)


def loss(params: Any, x: Any) -> Any:
    x = jnp.tanh(jnp.tanh(x @ params["embed"]) @ params["encoder"]["a"])
    x = jnp.tanh(x @ params["encoder"]["b"])
    return ((x @ params["head"]["w"] + params["head"]["b"]) ** 2).mean()


def make_step(tx: Any) -> Any:
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, x):
        grads = fo.grad(loss, frozen=state)(params, x)
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    return step


def place(tree: Any) -> Any:
    """Where each leaf lies, as a tree of shards that compares whole."""
    return jax.tree.map(lambda x: x.sharding.devices_indices_map(x.shape), tree)


def without(tree: Any, *frozen: str) -> Any:
    """The tree with holes in the subtrees of these paths."""
    names, leaves = by_hand.paths(tree), jax.tree.leaves(tree)
    hole = lambda path: any(f"{path}/".startswith(f"{name}/") for name in frozen)  # noqa: E731
    pairs = zip(names, leaves, strict=True)
    values = [optax.MaskedNode() if hole(path) else leaf for path, leaf in pairs]
    return jax.tree.unflatten(jax.tree.structure(tree), values)


@pytest.mark.parametrize("layout", SPLIT)
@pytest.mark.parametrize("name", MOMENTS)
def test_new_moments_lie_where_their_parameter_lies_and_survivors_are_not_moved(name, layout):
    assert jax.device_count() == 8
    tx, params = fo.freezable(by_hand.CASES[name].inner, ("embed", "encoder")), sharded(layout)
    expected = place(params)
    params, state = make_step(tx)(params, tx.init(params), batch(0))
    thawed = fo.thaw(state, params, "encoder")
    for moment in MOMENTS[name]:
        before = optax.tree_utils.tree_get(state, moment)
        after = optax.tree_utils.tree_get(thawed, moment)
        assert place(after) == place(without(params, "embed")) == without_maps(expected, "embed")
        for leaf, old in zip(after["head"].values(), before["head"].values(), strict=True):
            assert leaf is old
    # The counters of the new cohort too: Orbax stores none of one process among several.
    for leaf in jax.tree.leaves((thawed.ages, optax.tree_utils.tree_get(thawed, "count", ()))):
        assert leaf.sharding.device_set == set(jax.devices())


def without_maps(places: Any, *frozen: str) -> Any:
    return {key: optax.MaskedNode() if key in frozen else value for key, value in places.items()}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param("clip and adamw", "data", marks=pytest.mark.exhaustive),
        ("clip and adamw", "data and model"),
        pytest.param("momentum", "data", marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize("keep_state", [False, True], ids=["dropped", "parked"])
def test_a_sharded_run_through_thaws_and_freezes_equals_one_on_one_device_by_hand(
    name, layout, keep_state
):
    case = by_hand.CASES[name]
    phases = fo.Phases({0: ("embed", "encoder"), 2: ("embed", "encoder/a"), 4: "head", 5: "embed"})
    frozen = [
        *[{"embed", "encoder/a", "encoder/b"}] * 2,
        *[{"embed", "encoder/a"}] * 2,
        {"head/w", "head/b"},
        {"embed"},
    ]
    tx, params = fo.freezable(case.inner, phases.at(0)), sharded(layout)
    state, step, expected_places = tx.init(params), make_step(tx), place(params)
    for i in range(STEPS):
        state = fo.set_frozen(state, params, phases.at(i), keep_state=keep_state)
        params, state = step(params, state, batch(i))
    batches = [batch(i) for i in range(STEPS)]
    expected = by_hand.train(case, loss, make_params(), batches, frozen, keep_state)[-1]
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), params, expected
    )
    assert place(params) == expected_places


def test_a_step_with_stated_shardings_takes_a_thawed_state():
    tx, params = fo.freezable(optax.adam(0.1), "encoder"), sharded("data")
    state = fo.thaw(tx.init(params), params, "encoder")
    replicated = NamedSharding(mesh("data"), PartitionSpec())
    of_state = optax.tree_map_params(
        tx,
        lambda _, sharding: sharding,
        state,
        shardings("data"),
        transform_non_params=lambda x: jax.tree.map(lambda _: replicated, x),
    )
    update = jax.jit(
        tx.update,
        in_shardings=(shardings("data"), of_state, shardings("data")),
        out_shardings=(shardings("data"), of_state),
    )
    updates, state = update(params, state, params)
    assert place(updates) == place(params) == place(optax.tree_utils.tree_get(state, "mu"))
    # A fresh Adam's first update is the learning rate, against the sign of the gradient.
    jax.tree.map(
        lambda u, g: np.testing.assert_allclose(u, -0.1 * np.sign(g), rtol=1e-4), updates, params
    )


def test_params_that_lie_on_another_device_than_the_first_are_thawed_there():
    elsewhere = SingleDeviceSharding(jax.devices()[3])
    params = jax.device_put(make_params(), elsewhere)
    tx = fo.freezable(optax.adam(0.1), ("embed", "encoder"))
    state, step = tx.init(params), make_step(tx)
    for i, where in enumerate(("embed", "encoder/a", "encoder/b")):
        params, state = step(params, state, batch(i))
        state = fo.thaw(state, params, where)
        moments = jax.tree.leaves([optax.tree_utils.tree_get(state, m) for m in ("mu", "nu")])
        assert {x.sharding for x in moments} == {elsewhere}
    params, state = step(params, state, batch(3))
    assert {x.sharding for x in jax.tree.leaves((params, state))} == {elsewhere}


def test_thawing_in_a_jitted_function_keeps_survivors_where_they_lie():
    tx, params = fo.freezable(optax.adam(0.1), "encoder"), sharded("data")
    params, state = make_step(tx)(params, tx.init(params), batch(0))
    thawed = jax.jit(fo.thaw, static_argnums=2)(state, params, "encoder")
    assert jax.tree.structure(thawed) == jax.tree.structure(fo.thaw(state, params, "encoder"))
    for moment in ("mu", "nu"):
        after, before = (optax.tree_utils.tree_get(x, moment) for x in (thawed, state))
        assert place(without(after, "encoder")) == place(before)
        assert not np.any(jax.tree.leaves(after["encoder"])[0])
