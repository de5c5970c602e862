"""Edits of states in host memory: new moments go where their neighbours are, survivors stay."""

from typing import Any

import jax
import optax
import pytest

import freeze_optax as fo
from tests.support.memories import (
    DEVICE,
    HOST,
    JITS,
    PLACES,
    assert_same_bits,
    jit_keeps_memory,
    kinds,
    make_params,
    on_device,
    on_host,
)

pytestmark = pytest.mark.usefixtures("standard_promotion")

ADAM = optax.adam(0.1)


def moments(state: Any) -> Any:
    return optax.tree_utils.tree_get(state, "mu")


def memories(state: Any) -> set[str]:
    return set(jax.tree.leaves(kinds(state)))


def parked_on_host(state: Any, *names: str) -> Any:
    """The state with the moments of these leaves in host memory."""

    def moved(path: Any, x: Any) -> Any:
        return on_host(x) if any(getattr(key, "key", None) in names for key in path) else x

    return jax.tree_util.tree_map_with_path(moved, state)


def edit(jit: Any, verb: Any, *args: Any) -> Any:
    return jit(lambda state, params: verb(state, params, *args))


@pytest.mark.parametrize("jit", JITS)
@pytest.mark.parametrize("place", PLACES)
def test_a_host_leaf_is_thawed_with_moments_beside_those_that_train(place, jit):
    params = make_params(place)
    hosted = {**params, "a": on_host(params["a"])}
    tx = fo.freezable(ADAM, "a")
    state = tx.init(hosted)
    thawed = edit(jit, fo.thaw, "a")(state, hosted)
    assert_same_bits(thawed, edit(jit, fo.thaw, "a")(tx.init(params), params))
    assert memories(thawed) == {DEVICE}
    if jit is not jax.jit:
        assert moments(thawed)["b"] is moments(state)["b"], "a survivor is not copied"
        assert moments(thawed)["a"].sharding == params["a"].sharding
    released = edit(jit, fo.release)(state, hosted)
    assert_same_bits(released, edit(jit, fo.release)(tx.init(params), params))
    assert memories(released) == {DEVICE}


@pytest.mark.parametrize("jit", JITS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("inner", [ADAM, optax.contrib.schedule_free_adamw(0.1)], ids=["adam", "z"])
def test_moments_go_with_the_parameter_where_none_train(inner, place, jit):
    params = make_params(place)
    hosted = {**params, "a": on_host(params["a"])}
    state = jit(fo.freezable(inner).init)(hosted)
    assert_same_bits(state, jit(fo.freezable(inner).init)(params))
    with pytest.warns(UserWarning, match="nothing is left to train"):
        empty = fo.freezable(inner, fo.everything).init(hosted)
    thawed = edit(jit, fo.thaw, "a")(empty, hosted)
    if jit is not jax.jit or jit_keeps_memory():
        expected = {"a": HOST, "b": DEVICE, "c": DEVICE}
        nu = optax.tree_utils.tree_get(state, "nu")
        assert kinds(nu) == expected
        assert kinds(optax.tree_utils.tree_get(thawed, "nu"))["a"] == HOST
        scalars = [x for x in jax.tree.leaves((state, thawed)) if not x.ndim]
        assert memories(scalars) == {DEVICE}


@pytest.mark.parametrize("jit", JITS)
@pytest.mark.parametrize("place", PLACES)
def test_a_state_on_the_host_stays_there_as_a_whole_through_every_edit(place, jit):
    params = make_params(place)
    tx = fo.freezable(ADAM, ["b", "c"])
    start = tx.init(params)
    edits = [
        edit(jit, fo.thaw, "b"),  # a second cohort
        edit(jit, fo.freeze, "a", True),
        edit(jit, fo.set_frozen, fo.rows("b", slice(0, 2))),
        edit(jit, fo.thaw, ["a", "b"]),
        edit(jit, fo.release),
    ]
    state, expected = on_host(start), start
    for one in edits:
        state, expected = one(state, params), one(expected, params)
        assert_same_bits(state, expected)
        if jit is not jax.jit or jit_keeps_memory():
            assert memories(state) == {HOST}


@pytest.mark.parametrize("jit", JITS)
@pytest.mark.parametrize("place", PLACES)
def test_parked_moments_stay_on_the_host_and_come_back_where_the_others_train(place, jit):
    params = make_params(place)
    tx = fo.freezable(ADAM)
    state = fo.freeze(tx.init(params), params, "a", keep_state=True)
    offloaded = parked_on_host(state, "a")
    step = jit(lambda state, params: tx.update(params, state, params)[1])
    stepped, expected = step(offloaded, params), step(state, params)
    assert_same_bits(stepped, expected)
    if jit is not jax.jit:
        assert moments(stepped)["a"] is moments(offloaded)["a"]
    if jit_keeps_memory():
        assert kinds(moments(stepped)) == {"a": HOST, "b": DEVICE, "c": DEVICE}
    for back in (edit(jit, fo.thaw, "a"), edit(jit, fo.release)):
        assert_same_bits(back(stepped, params), back(expected, params))
        assert memories(back(stepped, params)) == {DEVICE}
    frozen = edit(jit, fo.freeze, "b", True)(stepped, params)
    assert_same_bits(frozen, edit(jit, fo.freeze, "b", True)(expected, params))
    if jit_keeps_memory():
        assert kinds(moments(frozen)) == {"a": HOST, "b": HOST, "c": DEVICE}


@pytest.mark.parametrize("jit", JITS)
@pytest.mark.parametrize("place", PLACES)
def test_a_leaf_with_rows_in_both_memories_is_released_and_thawed(place, jit):
    params = make_params(place)
    state = fo.freeze(fo.freezable(ADAM).init(params), params, fo.rows("a", [0, 5]), True)
    parked = on_host(jax.tree.leaves(moments(state)["a"])[1])
    both = jax.tree.map(lambda x: parked if x.shape == parked.shape else x, state)
    assert memories(both) == {HOST, DEVICE}
    for back in (edit(jit, fo.thaw, "a"), edit(jit, fo.release)):
        whole = back(both, params)
        assert_same_bits(whole, back(state, params))
        assert memories(whole) == {DEVICE}


@pytest.mark.skipif(not jit_keeps_memory(), reason="JAX 0.7.1 loses it in the backward pass")
@pytest.mark.parametrize("jit", JITS)
@pytest.mark.parametrize("place", PLACES)
def test_scheduled_takes_a_host_leaf_through_phases_that_freeze_and_train_it(place, jit):
    params = make_params(place)
    hosted = {**params, "a": on_host(params["a"])}
    tx = fo.scheduled(optax.sgd(0.1, momentum=0.9), fo.Phases({0: "a", 1: fo.nothing}))

    def loss(params: Any) -> Any:
        a = jax.device_put(params["a"], jax.memory.Space.Device)
        return (a * params["b"] * params["c"]).sum()

    @jit
    def step(params: Any, state: Any) -> Any:
        grads = jax.device_put(fo.grad(loss, state)(params), jax.memory.Space.Device)
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    def run(params: Any) -> Any:
        state = on_device(tx.init(params))
        for _ in range(3):
            params, state = step(params, state)
        return params, state

    result = run(hosted)
    assert_same_bits(result, run(params))
    assert kinds(result[0]) == {"a": HOST, "b": DEVICE, "c": DEVICE}


@pytest.mark.parametrize("jit", JITS)
def test_statistics_of_another_shape_are_on_the_host_on_all_devices_of_the_mesh(jit):
    # Adafactor keeps arrays of length 1 for a leaf that it does not factor. They are committed to
    # no device, but JAX commits what is in host memory.
    params = make_params("mesh")
    hosted, tx = on_host(params), fo.freezable(optax.adafactor(0.1))
    state, expected = tx.init(hosted), tx.init(params)
    edits = [edit(jit, verb, "a", *args) for verb, *args in [(fo.freeze,), (fo.thaw,)]]
    edits += [edit(jit, fo.freeze, "b", True), edit(jit, fo.thaw, "b"), edit(jit, fo.release)]
    for one in edits:
        state, expected = one(state, hosted), one(expected, params)
        assert_same_bits(state, expected)
        hosted_arrays = [x for x in jax.tree.leaves(state) if x.sharding.memory_kind == HOST]
        assert {len(x.devices()) for x in hosted_arrays} <= {8}
        if jit_keeps_memory():
            assert {(1,), (8, 2)} <= {x.shape for x in hosted_arrays}
