"""Weights in host memory that one call brings to the device: the bits, and what is kept of them."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freeze_optax as fo
from tests.support.jaxprs import copied, jaxprs_in
from tests.support.memories import JITS, assert_same_bits, jit_keeps_memory, kinds, on_host

WIDTH, NAMES = 4, ("layer_0", "layer_1", "layer_2")
BASE = fo.path("layer_*/base")
X = jnp.linspace(-1.0, 1.0, 3 * WIDTH).reshape(3, WIDTH)


def make_params() -> Any:
    draw = np.random.default_rng(0).normal

    def layer() -> Any:
        return {
            "base": {
                "qvalue": jnp.asarray(draw(size=(WIDTH, WIDTH)) * 40, jnp.int8),
                "scale": jnp.asarray(draw(size=(WIDTH,)) / 40, jnp.float32),
            },
            "lora": jnp.asarray(draw(size=(WIDTH, WIDTH)) / 2, jnp.float32),
        }

    return {name: layer() for name in NAMES} | {"head": jnp.ones(WIDTH)}


def with_base_on_host(params: Any) -> Any:
    layers = {name: {**params[name], "base": on_host(params[name]["base"])} for name in NAMES}
    return {**params, **layers}


def layer(p: Any, x: Any) -> Any:
    w = p["base"]["qvalue"].astype(jnp.float32) * p["base"]["scale"]
    return jnp.tanh(x @ w + x @ p["lora"])


def loss_of(call: Any) -> Any:
    def loss(params: Any) -> Any:
        x = X
        for name in NAMES:
            x = call(params[name], x)
        return (x @ params["head"]).sum()

    return loss


@pytest.mark.parametrize("jit", JITS)
@pytest.mark.parametrize("f", [layer, jax.checkpoint(layer), jax.jit(layer)])
def test_value_and_gradients_have_the_bits_of_calls_on_the_device(f, jit):
    params = make_params()

    def run(call: Any) -> Any:
        return jit(fo.value_and_grad(loss_of(call), BASE, holes=True))

    actual = run(fo.streamed(f))(with_base_on_host(params))
    assert_same_bits(actual, run(f)(params))


def test_each_pass_copies_each_weight_once_and_the_floats_of_them_are_not_kept():
    hosted = with_base_on_host(make_params())
    step = fo.grad(loss_of(fo.streamed(layer)), BASE, holes=True)
    weights = [x for x in copied(step, hosted) if x.dtype == jnp.int8]
    assert len(weights) == 3 * len(NAMES), "to trace a layer, in the forward and the backward pass"
    program = jax.make_jaxpr(step)(hosted).jaxpr
    barriers = [
        eqn
        for _, jaxpr in jaxprs_in(program)
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "optimization_barrier"
    ]
    # The types of JAX 0.7.1 do not tell that `lora` is on the device.
    streamed = 2 if jit_keeps_memory() else 3
    assert len(barriers) == streamed * len(NAMES), (
        "or XLA would keep the first copy for the second pass"
    )


def test_a_weight_that_trains_in_host_memory_has_its_gradient_there():
    params = make_params()
    hosted = {
        **params,
        "layer_1": {**params["layer_1"], "lora": on_host(params["layer_1"]["lora"])},
    }
    reference = jax.jit(fo.grad(loss_of(layer), BASE, holes=True))(params)
    actual = jax.jit(fo.grad(loss_of(fo.streamed(layer)), BASE, holes=True))(hosted)
    assert_same_bits(actual, reference)
    if jit_keeps_memory():
        assert kinds(actual["layer_1"]["lora"]) == "pinned_host"
        assert kinds(actual["layer_0"]["lora"]) == "device"


def test_other_arguments_any_outputs_and_modules_pass():
    linear = eqx.nn.Linear(WIDTH, WIDTH, key=jax.random.key(0))
    hosted = eqx.combine(on_host(eqx.filter(linear, eqx.is_array)), linear)

    def f(module: Any, x: Any, power: int, *, shift: Any) -> Any:
        return {"y": module(x) ** power + shift, "n": jnp.int32(power)}

    actual = fo.streamed(f)(hosted, X[0], 2, shift=X[1])
    assert_same_bits(actual, f(linear, X[0], 2, shift=X[1]))
    assert kinds(actual) == {"n": "device", "y": "device"}
    assert fo.streamed(f).__name__ == "f"
    assert fo.streamed(lambda w, x: w + x)(2.0, 3.0) == 5.0


def test_second_derivatives_and_vmap_work_and_forward_mode_is_an_error():
    params = make_params()
    hosted = with_base_on_host(params)

    def of_lora(params: Any, call: Any) -> Any:
        def loss(lora: Any) -> Any:
            return loss_of(call)({**params, "layer_0": {**params["layer_0"], "lora": lora}})

        return loss

    lora = params["layer_0"]["lora"]
    ours, plain = of_lora(hosted, fo.streamed(layer)), of_lora(params, layer)
    actual = jax.jit(jax.jacfwd(jax.grad(ours)))(lora)
    np.testing.assert_allclose(actual, jax.jacfwd(jax.grad(plain))(lora), atol=1e-6)
    many = jnp.stack([lora, 2 * lora])
    batched = jax.jit(jax.vmap(jax.grad(ours)))(many)
    np.testing.assert_allclose(batched, jax.vmap(jax.grad(plain))(many), atol=1e-6)
    with pytest.raises(TypeError, match=r"forward-mode|jvp"):
        jax.jvp(ours, (lora,), (lora,))


def test_what_is_computed_of_weights_in_both_memories_is_not_kept_either():
    params = make_params()["layer_0"]
    base = {**params["base"], "qvalue": on_host(params["base"]["qvalue"])}
    whole = params["base"]["qvalue"].astype(jnp.float32) * params["base"]["scale"]

    def merged(p: Any, x: Any) -> Any:
        w = p["base"]["qvalue"].astype(jnp.float32) * p["base"]["scale"]
        return jnp.tanh(x @ w) @ (w + p["lora"])

    def run(call: Any, base: Any) -> Any:
        def loss(lora: Any, x: Any) -> Any:
            return call({"base": base, "lora": lora}, x)

        outputs, pull = jax.vjp(loss, params["lora"], X)
        return pull, pull(outputs)

    pull, actual = run(fo.streamed(merged), base)
    for x, y in zip(actual, run(merged, params["base"])[1], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)
    kept = [np.asarray(x) for x in jax.tree.leaves(pull) if x.shape == whole.shape]
    assert kept, "of the weights, those of the call itself are kept"
    for floats in (whole, whole + params["lora"]):
        assert not any(np.array_equal(x, floats) for x in kept)
