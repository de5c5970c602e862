"""What functions and stacks a streamed scan takes, against `jax.lax.scan` on the device."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import io_callback

import freeze_optax as fo
from tests.support.jaxprs import shapes_made_by_loops
from tests.support.memories import JITS, assert_same_bits, jit_keeps_memory, kinds, on_host

pytestmark = pytest.mark.usefixtures("standard_promotion")

DEPTH, WIDTH, HIDDEN = 3, 2, 4
draw = np.random.default_rng(0).normal
BASE = {
    "up": jnp.asarray(draw(size=(DEPTH, WIDTH, HIDDEN)), jnp.float32),
    "down": jnp.asarray(draw(size=(DEPTH, HIDDEN, WIDTH)), jnp.float32),
}
LORA = jnp.asarray(draw(size=(DEPTH, WIDTH, WIDTH)), jnp.float32)
X = jnp.linspace(-1.0, 1.0, 5 * WIDTH).reshape(5, WIDTH)
FROZEN = {"base": True, "lora": False}


def layer(x: Any, p: Any) -> Any:
    return jnp.tanh(x @ p["base"]["up"]) @ p["base"]["down"] + x @ p["lora"]


def gradient(scan: Any, f: Any) -> Any:
    def loss(lora: Any, base: Any) -> Any:
        carry, outputs = scan(f, X, {"base": base, "lora": lora})
        return jnp.sum(carry**2) + sum(jnp.sum(y) for y in jax.tree.leaves(outputs))

    return jax.value_and_grad(loss)


def streamed_scan(f: Any, init: Any, xs: Any) -> Any:
    return fo.scan(f, init, xs, FROZEN, stream=True)


def assert_as_on_the_device(f: Any) -> None:
    expected = jax.jit(gradient(jax.lax.scan, f))(LORA, BASE)
    actual = jax.jit(gradient(streamed_scan, f))(LORA, on_host(BASE))
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["bare", "jit"])
def test_callbacks_run_once_a_layer_in_the_forward_pass_and_keep_no_weights(wrap):
    seen, counted = list[float](), list[float]()

    def count(x: Any) -> Any:
        counted.append(float(x))
        return np.float32(len(counted))

    def of_layer(x: Any, p: Any) -> Any:
        jax.debug.callback(lambda x: seen.append(float(x)), x.sum())
        w = jax.lax.stop_gradient(p["base"]["up"].sum())
        n = io_callback(count, jax.ShapeDtypeStruct((), jnp.float32), w)
        return layer(x, p) * n

    def f(x: Any, p: Any) -> Any:
        return wrap(of_layer)(x, p), None

    def run(scan: Any, base: Any) -> Any:
        seen.clear(), counted.clear()
        result = jax.jit(gradient(scan, f))(LORA, base)
        jax.effects_barrier()
        return result, sorted(seen), sorted(counted)

    actual, expected = run(streamed_scan, on_host(BASE)), run(jax.lax.scan, BASE)
    assert actual[1:] == expected[1:]
    assert len(actual[1]) == len(actual[2]) == DEPTH
    assert_same_bits(actual[0], expected[0])
    kept = shapes_made_by_loops(gradient(streamed_scan, f), LORA, on_host(BASE))
    assert not kept & {x.shape for x in BASE.values()}


def test_a_function_may_return_a_list_and_what_is_no_pair_is_an_error():
    assert_as_on_the_device(lambda x, p: [layer(x, p), x])
    for result in (X, None, (X, X, X)):
        with pytest.raises(
            TypeError, match=r"fo.scan needs a function that returns a pair, .* not"
        ):
            fo.scan(lambda x, p: result, X, BASE, True, stream=True)  # noqa: B023


def test_holes_in_the_stack_are_holes_of_the_layer():
    def f(x: Any, p: Any) -> Any:
        assert p["other"] == optax.MaskedNode()
        return layer(x, p), None

    def run(stream: bool, base: Any) -> Any:
        def scan(f: Any, init: Any, xs: Any) -> Any:
            xs = {**xs, "other": optax.MaskedNode()}
            mask = {**FROZEN, "other": optax.MaskedNode()}
            outputs = fo.scan(f, init, xs, mask, stream=stream)
            trained = fo.scan(f, init, xs, ["base", fo.rows("lora", [0])], stream=stream)
            return outputs[0] + trained[0], None

        return jax.jit(gradient(scan, f))(LORA, base)

    def reference(f: Any, init: Any, xs: Any) -> Any:
        xs = {**xs, "other": optax.MaskedNode()}
        first = xs["lora"].at[0].set(jax.lax.stop_gradient(xs["lora"][0]))
        one, _ = jax.lax.scan(f, init, xs)
        return one + jax.lax.scan(f, init, {**xs, "lora": first})[0], None

    expected = jax.jit(gradient(reference, f))(LORA, BASE)
    for actual in (run(True, on_host(BASE)), run(False, BASE)):
        for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5)


def test_leaves_without_the_axis_are_named():
    xs = {"base": BASE, "name": "block", "scale": 2.0}
    for stream in (False, True):
        message = r"same leading axis, but .* \(3, 4, 2\) of 'base/down', \(\) of 'name'$"
        with pytest.raises(ValueError, match=message):
            fo.scan(lambda x, _: (x, None), X, xs, True, stream=stream)
        with pytest.raises(ValueError, match="same leading axis, but was given no array"):
            fo.scan(lambda x, _: (x, None), X, {"none": None}, True, stream=stream)


@pytest.mark.parametrize("jit", JITS)
def test_a_stack_of_no_layers_returns_the_first_carry(jit):
    none = jax.tree.map(lambda x: x[:0], {"base": BASE, "lora": LORA})
    hosted = {**none, "base": on_host(none["base"])}

    def f(x: Any, p: Any) -> Any:
        return layer(x, p), x

    actual = jit(lambda xs: fo.scan(f, X, xs, True, stream=True))(hosted)
    assert_same_bits(actual, (X, jnp.zeros((0, *X.shape))))


@pytest.mark.parametrize("jit", JITS)
def test_a_weight_on_the_host_that_the_function_closes_over_has_its_gradient_there(jit):
    if not jit_keeps_memory():
        pytest.skip("the types of JAX 0.7.1 do not name the memory")
    shared = jnp.asarray(draw(size=(WIDTH, WIDTH)), jnp.float32)

    def grads(scan: Any, call: Any, shared: Any, base: Any) -> Any:
        def loss(shared: Any) -> Any:
            def f(x: Any, p: Any) -> Any:
                return call(shared, layer(x, p)), None

            return scan(f, X, {"base": base, "lora": LORA})[0].sum()

        return jit(jax.grad(loss))(shared)

    def call(w: Any, x: Any) -> Any:
        return x @ w

    expected = grads(jax.lax.scan, call, shared, BASE)
    actual = grads(streamed_scan, fo.streamed(call), on_host(shared), on_host(BASE))
    assert kinds(actual) == "pinned_host"
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_an_ensemble_in_host_memory_streams_under_vmap(axis):
    ensemble = jax.tree.map(lambda x: jnp.stack([x, -x, 2 * x], axis), (LORA, BASE))
    hosted = (ensemble[0], on_host(ensemble[1]))

    def f(x: Any, p: Any) -> Any:
        return layer(x, p), None

    actual = jax.jit(jax.vmap(gradient(streamed_scan, f), axis))(*hosted)
    expected = jax.jit(jax.vmap(gradient(jax.lax.scan, f), axis))(*ensemble)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4)
