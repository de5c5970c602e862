"""Params in host memory: gradients, updates and rows stay there, with the bits of device memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from freeze_optax.testing import assert_frozen
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

A_ON_HOST = {"a": HOST, "b": DEVICE, "c": DEVICE}


def with_a_on_host(params: Any) -> Any:
    return {**params, "a": on_host(params["a"])}


def loss(params: Any) -> Any:
    a = jax.device_put(params["a"], jax.memory.Space.Device)
    return (a * params["b"] * params["c"]).sum()


def assert_kinds(tree: Any, expected: Any) -> None:
    # What JAX 0.7.1 computes is in device memory, whatever it computes it from.
    if jit_keeps_memory():
        assert kinds(tree) == expected


@pytest.mark.parametrize("jit", JITS)
@pytest.mark.parametrize("place", PLACES)
def test_zeros_of_a_frozen_host_leaf_are_in_host_memory_and_add_to_it(place, jit):
    on_devices = make_params(place)
    params = with_a_on_host({**on_devices, "a": -0.0 * on_devices["a"]})
    tx = fo.freezable(optax.adam(0.1), "a")
    state = tx.init(params)

    def step(params: Any, state: Any) -> Any:
        grads = fo.grad(loss, state)(params)
        updates, state = tx.update(grads, state, params)
        ours = fo.apply_updates(params, updates, frozen=state)
        return grads, updates, ours, optax.apply_updates(params, updates), state

    if jit is jax.jit and place == "mesh" and not jit_keeps_memory():
        pytest.skip("JAX 0.7.1 mixes its own memories here")
    *trees, state = jit(step)(params, state)
    *expected, expected_state = jit(step)(on_device(params), tx.init(on_device(params)))
    for tree, other in zip(trees, expected, strict=True):
        assert_same_bits(tree, other)
        assert_kinds(tree, A_ON_HOST)
    assert_same_bits(state, expected_state)
    assert np.all(np.signbit(np.asarray(trees[1]["a"]))), "-0.0"
    assert_frozen(params, trees[2], "a")


@pytest.mark.parametrize("place", PLACES)
def test_zeros_of_the_eager_path_have_the_sharding_of_their_host_leaves(place):
    params = on_host(make_params(place))
    params["a"] = on_host(make_params(place)["a"].astype(jnp.bfloat16))
    params["c"] = on_host(make_params(place)["c"].astype(jnp.complex64))
    with pytest.warns(UserWarning, match="nothing is left to train"):
        tx = fo.freezable(optax.sgd(0.1), fo.everything).init(params)
    updates, _ = fo.freezable(optax.sgd(0.1)).update(params, tx, params)
    for name, update in updates.items():
        assert update.sharding == params[name].sharding
        assert update.dtype == params[name].dtype
        assert jax.typeof(update) == jax.typeof(params[name])
        assert np.array_equal(np.asarray(update), np.zeros((8, 2), update.dtype))


def test_the_zeros_of_a_closed_over_host_leaf_are_no_constant_of_the_program():
    params = with_a_on_host(make_params("one device"))
    jaxpr = jax.make_jaxpr(lambda b: fo.grad(loss, "a")({**params, "b": b}))(params["b"])
    shapes = [np.shape(constant) for constant in jaxpr.consts]
    # The leaves themselves: `a` and `c`.
    assert shapes == [(8, 2)] * 2


@pytest.mark.parametrize("jit", JITS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "rows", [slice(0, 2), pytest.param([0, 2, 3, 7], marks=pytest.mark.exhaustive)]
)
def test_rows_of_a_host_leaf_are_taken_and_put_as_in_device_memory(place, jit, rows, monkeypatch):
    if not isinstance(rows, slice):  # gathered and scattered
        monkeypatch.setattr("freeze_optax._rows.rows._MOST_RUNS", 1)
    frozen = fo.rows("a", rows)
    on_devices = make_params(place)

    def run(params: Any) -> Any:
        grads = fo.grad(loss, frozen)(params)
        # Whatever is in host memory, the updates may be in device memory.
        updates = jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), grads)
        new = fo.apply_updates(params, updates, frozen)
        trainable, rest = fo.partition(params, frozen)
        held = fo.hold(new, on_devices, frozen)
        return grads, new, held, fo.merge(trainable, rest)

    results = jit(run)(with_a_on_host(on_devices))
    for tree, expected in zip(results, jit(run)(on_devices), strict=True):
        assert_same_bits(tree, expected)
        assert_kinds(tree, A_ON_HOST)
    assert_frozen(on_devices, results[1], frozen)


@pytest.mark.parametrize("jit", JITS)
@pytest.mark.parametrize("place", PLACES)
def test_a_host_leaf_that_trains_is_updated_in_host_memory(place, jit):
    params = make_params(place)
    apply = jit(fo.apply_updates)
    new = apply(with_a_on_host(params), params)
    assert_same_bits(new, apply(params, params))
    assert_kinds(new, A_ON_HOST)


@pytest.mark.parametrize("jit", JITS)
@pytest.mark.parametrize("place", PLACES)
def test_assign_keeps_the_memory_of_the_leaf(place, jit):
    params = make_params(place)
    assign = jit(lambda params: fo.assign(params, {"a": params["b"], "b": 0.5}))
    new = assign(with_a_on_host(params))
    assert_same_bits(new, assign(params))
    assert_kinds(new, A_ON_HOST)


@pytest.mark.parametrize("jit", JITS)
@pytest.mark.parametrize("place", PLACES)
def test_scan_hands_the_layers_of_a_host_stack_on_as_jax_does(place, jit):
    frozen = np.arange(8) < 3

    def layer(x: Any, w: Any) -> Any:
        return jnp.tanh(x * jax.device_put(w, jax.memory.Space.Device)), None

    def of_stack(params: Any, scan: Any) -> Any:
        return scan(layer, jnp.ones(2), params["a"])[0].sum()

    def ours(f: Any, x: Any, stack: Any) -> Any:
        return fo.scan(f, x, stack, frozen=frozen)

    def run(params: Any) -> Any:
        return fo.value_and_grad(lambda p: of_stack(p, ours), fo.rows("a", frozen))(params)

    params = make_params(place)
    value, grads = jit(run)(with_a_on_host(params))
    assert_same_bits((value, grads), jit(run)(params))
    assert_kinds(grads, A_ON_HOST)
    reference = jax.grad(lambda p: of_stack(p, jax.lax.scan))(params)
    actual, expected = np.asarray(grads["a"]), np.asarray(reference["a"])
    np.testing.assert_allclose(actual[3:], expected[3:], rtol=1e-6)


def test_tied_leaves_may_be_in_different_memories():
    params = make_params("one device")
    tx = fo.freezable(fo.tie(optax.sgd(0.5), ("a", "b")), "c")
    grads = with_a_on_host(params)
    updates, _ = tx.update(grads, tx.init(params), params)
    expected, _ = tx.update(params, tx.init(params), params)
    assert_same_bits(updates, expected)
    new = fo.apply_updates(grads, updates)
    assert_same_bits(new, fo.apply_updates(params, expected))
    assert kinds(new) == A_ON_HOST


@pytest.mark.skipif(not jit_keeps_memory(), reason="JAX 0.7.1 computes from both memories")
@pytest.mark.parametrize("jit", JITS)
def test_an_update_that_mixes_memories_names_what_is_on_the_host(jit):
    params = make_params("one device")
    tx = fo.freezable(optax.adam(0.1), ["b", "c"])
    state = jax.tree.map(lambda x: on_host(x) if x.ndim else x, tx.init(params))
    names = r"in host memory are 'state: 0/mu/a', 'state: 0/nu/a', in device memory 'gradient: a'"
    with pytest.raises(ValueError, match=names):
        jit(tx.update)(params, state, params)


@pytest.mark.skipif(not jit_keeps_memory(), reason="JAX 0.7.1 computes from both memories")
def test_place_mends_an_update_of_a_leaf_that_was_thawed_on_the_host():
    params = with_a_on_host(make_params("one device"))
    tx = fo.freezable(optax.adamw(0.1), "a")
    state = fo.thaw(tx.init(params), params, "a")
    grads = on_device(params)
    with pytest.raises(ValueError, match=r"host memory are 'params: a'.* = fo\.place\(params, st"):
        tx.update(grads, state, params)
    updates, _ = tx.update(grads, state, fo.place(params, state))
    assert kinds(updates) == dict.fromkeys("abc", DEVICE)


RAW_LOSSES = {
    "operation": lambda p: (p["a"] * p["b"]).sum(),
    "value on the host": lambda p: (p["a"] * p["a"]).sum(),
    "carry": lambda p: jax.lax.fori_loop(0, 2, lambda i, x: p["a"], p["b"]).sum(),
    "branches": lambda p: jax.lax.cond(p["b"].sum() > 0, lambda: p["b"], lambda: p["a"]).sum(),
}


@pytest.mark.skipif(not jit_keeps_memory(), reason="JAX 0.7.1 computes from both memories")
@pytest.mark.parametrize("raw_loss", RAW_LOSSES.values(), ids=RAW_LOSSES)
@pytest.mark.parametrize("jit", JITS)
def test_a_loss_that_mixes_memories_names_the_leaves_and_says_place(jit, raw_loss):
    params = with_a_on_host(make_params("one device"))
    phases = fo.scheduled(optax.sgd(0.1), fo.Phases({0: "a", 1: ["a", "c"]}))
    message = (
        r"the loss computes with leaves in another memory.*in host memory are 'a', in device memory"
        r" 'b', 'c'\. Move all .* fo\.place\(params, frozen, 'device'\), .* fo\.streamed\(f\)"
    )
    for frozen in ("a", fo.rows("b", slice(0, 2)), phases.init(params)):
        for differentiate in (fo.grad, fo.value_and_grad):
            with pytest.raises(ValueError, match=message) as caught:
                jit(differentiate(raw_loss, frozen))(params)
            assert isinstance(caught.value.__cause__, ValueError | TypeError)
    grads = jit(fo.grad(raw_loss, "a"))(fo.place(params, "a", "device"))
    assert_same_bits(grads, jit(fo.grad(raw_loss, "a"))(make_params("one device")))


@pytest.mark.parametrize("error", [ValueError("bad memory"), TypeError("float32[2]"), KeyError(1)])
def test_an_error_of_the_loss_itself_is_not_changed(error):
    def failing(params: Any) -> Any:
        raise error

    params = with_a_on_host(make_params("one device"))
    with pytest.raises(type(error)) as caught:
        fo.grad(failing, "a")(params)
    assert caught.value is error


@pytest.mark.skipif(not jit_keeps_memory(), reason="JAX 0.7.1 computes from both memories")
def test_an_error_of_jax_about_other_arrays_on_the_host_is_not_changed():
    params, host = make_params("one device"), on_host(jnp.ones((8, 2)))
    with pytest.raises(ValueError, match=r"^memory_space of all inputs"):
        fo.grad(lambda params: (params["a"] * host).sum(), "a")(params)


@pytest.mark.parametrize("jit", JITS)
@pytest.mark.parametrize("place", PLACES)
def test_two_trees_in_different_memories_are_joined_as_if_they_were_in_one(place, jit):
    params = make_params(place)
    hosted = with_a_on_host(params)

    def run(one: Any, other: Any) -> Any:
        results = []
        for frozen in (fo.rows("a", slice(0, 3)), fo.elements("a", MASK), "a"):
            results += [fo.apply_updates(one, other, frozen), fo.hold(one, other, frozen)]
            results += [fo.merge(fo.partition(one, frozen)[0], fo.partition(other, frozen)[1])]
        return [*results, fo.assign(one, {"a": other["a"]})]

    expected = jit(run)(params, params)
    assert_same_bits(jit(run)(hosted, params), expected)
    assert_same_bits(jit(run)(params, hosted), expected)


MASK = np.arange(16).reshape(8, 2) % 3 == 0


def test_what_only_reads_params_takes_them_from_host_memory():
    params = make_params("one device")
    hosted = with_a_on_host(params)
    assert fo.tied_paths({**hosted, "z": hosted["a"]}) == [("a", "z")]
    tx = fo.freezable(optax.adam(0.1), "a")
    summaries = fo.summary(hosted, tx.init(hosted)), fo.summary(params, tx.init(params))
    assert [x.headline for x in summaries] == ["trainable: 32 of 48 parameters (66.67%)"] * 2
    one, other = ({**x.to_dict(), "rows": len(x.rows)} for x in summaries)
    assert one == other
    assert [x.host_bytes for x in summaries] == [hosted["a"].nbytes, 0]
    assert_frozen(hosted, params, "a")
    with pytest.raises(AssertionError, match="a: 16 of 16 elements differ"):
        assert_frozen(hosted, {**params, "a": 1 + params["a"]}, fo.rows("a", slice(0, 8)))
