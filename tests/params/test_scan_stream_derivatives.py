"""Streamed loops are differentiated where JAX differentiates a `lax.scan`, and no further."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import io_callback
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import freeze_optax as fo
from tests.support.memories import jit_keeps_memory, on_host

pytestmark = pytest.mark.usefixtures("standard_promotion")

WEIGHTS = jnp.linspace(0.5, 1.5, 12).reshape(3, 4)
X = jnp.linspace(-1.0, 1.0, 32).reshape(8, 4)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=1e-6)


# A loss that uses one of the outputs alone: JAX has no cotangent for the other.


def looped(scale, weights, x, use, stream):
    def layer(x, w):
        return x * w * scale, x.sum(-1)

    carry, outputs = fo.scan(layer, x, weights, frozen=True, stream=stream)
    return (carry if use == "carry" else outputs).sum()


def called(scale, weights, x, use, stream):
    def f(weights, x):
        return x * weights[0] * scale, x.sum(-1) * scale

    carry, output = (fo.streamed(f) if stream else f)(weights, x)
    return (carry if use == "carry" else output).sum()


@pytest.mark.skipif(not jit_keeps_memory(), reason="XLA of JAX 0.7.1 lacks shardings of transfers")
@pytest.mark.parametrize("use", ["carry", "outputs"])
@pytest.mark.parametrize("loss", [looped, called], ids=["scan", "streamed"])
@pytest.mark.parametrize("way", ["explicit", "shard_map"])
def test_on_a_mesh_a_loss_may_use_one_of_the_outputs_alone(way, loss, use):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    by_rows = PartitionSpec("d", None)
    weights = jax.device_put(WEIGHTS, NamedSharding(mesh, PartitionSpec()))
    x = jax.device_put(X, NamedSharding(mesh, by_rows))

    def gradient(weights, x, stream):
        return jax.grad(loss)(2.0, weights, x, use, stream)

    def summed(weights, x):
        return jax.lax.psum(gradient_of_shard(weights, x), "d")

    def gradient_of_shard(weights, x):
        scale = jax.lax.pcast(2.0, ("d",), to="varying")
        return jax.grad(loss)(scale, weights, x, use, True)

    expected = gradient(WEIGHTS, X, False)
    if way == "explicit":
        with jax.set_mesh(mesh):
            actual = jax.jit(gradient, static_argnums=2)(on_host(weights), x, True)
    else:
        specs = {"in_specs": (PartitionSpec(), by_rows), "out_specs": PartitionSpec()}
        actual = jax.jit(jax.shard_map(summed, mesh=mesh, **specs))(on_host(weights), x)
    assert_close(actual, expected)


def test_layers_in_turns_on_explicit_axes_may_be_used_by_their_outputs_alone():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    tx = fo.rotating(optax.sgd(0.1), "layers", 1, 1, order="ascending")
    params = {"layers": WEIGHTS}

    def loss(params, x):
        _, outputs = fo.scan(lambda x, w: (x * w, x.sum(-1)), x, params["layers"])
        return outputs.sum()

    expected = jax.grad(loss)(params, X)["layers"][0]
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("d", None)))
        state = tx.init(placed)
        actual = jax.jit(fo.grad(loss, frozen=state))(placed, x)
    assert_close(actual["layers"][0], expected)
    assert not np.asarray(actual["layers"][1:]).any()


# A carry that starts as a number of Python.


def by_dtype(carry, w):
    is_integer = jnp.issubdtype(carry.dtype, jnp.integer)
    return (carry if is_integer else 2 * carry) + w.sum(), None


CARRIES = {
    "an integer that becomes a float": (by_dtype, 1, WEIGHTS),
    "halved": (lambda c, w: (c // 2 + w.sum(), None), 7, WEIGHTS),
    "a float that becomes narrow": (
        lambda c, w: (c * 2.0 * w.sum(), None),
        1.0,
        WEIGHTS.astype(jnp.bfloat16),
    ),
    "beside an array": (lambda c, w: ((c[0] * w, c[1] + c[0].sum()), None), (X, 0), WEIGHTS),
    "that stays weak": (lambda c, w: (c * w[0], None), 1.0, WEIGHTS),
}


@pytest.mark.parametrize("name", CARRIES)
def test_a_number_as_the_first_carry_gets_the_dtype_that_lax_scan_gives_it(name):
    f, init, weights = CARRIES[name]
    expected, _ = jax.jit(lambda weights: jax.lax.scan(f, init, weights))(weights)
    stream = {"frozen": True, "stream": True}
    actual, _ = jax.jit(lambda weights: fo.scan(f, init, weights, **stream))(on_host(weights))
    for x, y in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert (x.dtype, x.aval.weak_type) == (y.dtype, y.aval.weak_type)
        assert_close(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.parametrize("way", ["streamed", "in turns"])
def test_a_sum_beside_the_carry_may_start_at_zero(way):
    def loss(params, scan):
        def layer(carry, w):
            x, total = carry
            return (x * w * params["scale"], total + (x**2).sum()), None

        return scan(layer, (X, 0), params["layers"])[0][1]

    params = {"layers": WEIGHTS, "scale": jnp.float32(1.5)}
    expected = jax.grad(loss)(params, jax.lax.scan)
    if way == "streamed":
        placed = {**params, "layers": on_host(WEIGHTS)}

        def scan(f, init, xs):
            return fo.scan(f, init, xs, frozen=True, stream=True)

        actual = jax.jit(fo.grad(lambda params: loss(params, scan), "layers"))(placed)
    else:
        state = fo.rotating(optax.sgd(0.1), "layers", 1, 1, order="descending").init(params)
        actual = fo.grad(lambda params: loss(params, fo.scan), frozen=state)(params)
        assert_close(actual["layers"][2], expected["layers"][2])
    assert_close(actual["scale"], expected["scale"])


def test_a_real_carry_may_become_complex():
    def loss(scale, scan, weights):
        return jnp.abs(scan(lambda c, w: (c * (w.sum() + 1j) * scale, None), 1.0, weights)[0])

    def streamed(f, init, xs):
        return fo.scan(f, init, xs, frozen=True, stream=True)

    expected = jax.grad(loss)(1.5, jax.lax.scan, WEIGHTS)
    assert_close(jax.grad(loss)(1.5, streamed, on_host(WEIGHTS)), expected)


# What has no derivative, of what is not differentiated.


def power(w):
    """A `while_loop`, which JAX does not differentiate in reverse mode."""
    return jax.lax.while_loop(lambda x: (x < 100.0).all(), lambda x: x * x, 2.0 + jnp.abs(w))


def decoded(w):
    return jax.pure_callback(lambda w: np.asarray(w) * np.float32(2), w, w)


@jax.custom_jvp
def refusing(w):
    return 3.0 * w


@refusing.defjvp
def _refuse(primals, tangents):
    raise AssertionError("differentiated")


@pytest.mark.parametrize("of", ["layer", "batch"])
@pytest.mark.parametrize("function", [power, decoded, refusing])
@pytest.mark.parametrize("way", ["scan", "streamed"])
def test_what_is_frozen_and_what_is_closed_over_need_no_derivative(way, function, of):
    def loss(scale, weights, batch, stream):
        def layer(x, w):
            w = function(w) if of == "layer" else w
            b = function(batch) if of == "batch" else batch
            return jnp.tanh(x * w * scale) + b, None

        if way == "scan":
            scan = jax.lax.scan
            if stream:
                return fo.scan(layer, X, weights, frozen=True, stream=True)[0].sum()
            return scan(layer, X, weights)[0].sum()

        def f(w, x):
            return layer(x, w[0])[0]

        return (fo.streamed(f) if stream else f)(weights, X).sum()

    def gradient(weights, batch, stream):
        return jax.grad(loss)(0.5, weights, batch, stream)

    expected = jax.jit(gradient, static_argnums=2)(WEIGHTS, X[0], False)
    assert_close(jax.jit(gradient, static_argnums=2)(on_host(WEIGHTS), X[0], True), expected)


def test_beside_layers_in_turns_a_leaf_that_trains_in_host_memory_comes_to_the_device():
    params = {"layers": WEIGHTS, "adapters": WEIGHTS + 1.0}
    placed = {"layers": WEIGHTS, "adapters": on_host(WEIGHTS + 1.0)}
    tx = fo.rotating(optax.sgd(0.1), "layers", 1, 1, order="ascending")

    def loss(params):
        def layer(x, p):
            return jnp.tanh(x * p[0] * p[1]), None

        layers = params["layers"], params["adapters"]
        return fo.scan(layer, X, layers, stream=True)[0].sum()

    state = tx.init(params)
    expected = fo.grad(loss, frozen=state)(params)
    actual = fo.grad(loss, frozen=state)(placed)
    jax.tree.map(assert_close, actual, expected)


# A scan on the device, whose frozen layers are read again.


def as_lax_scan(f, x, weights):
    def loss(scale, scan):
        return jnp.abs(scan(lambda x, w: (f(x, w, scale), None), x, weights)[0]).sum()

    expected = jax.grad(loss)(1.5, jax.lax.scan)
    assert_close(jax.grad(loss)(1.5, lambda *args: fo.scan(*args, frozen=True)), expected)


def test_a_complex_carry_is_differentiated():
    as_lax_scan(lambda x, w, s: x * w * s, jnp.ones(4, jnp.complex64), WEIGHTS + 1j)


def test_a_function_with_effects_is_differentiated():
    def f(x, w, scale):
        one = io_callback(lambda _: np.float32(1), jax.ShapeDtypeStruct((), jnp.float32), w)
        return x * w * scale * one

    as_lax_scan(f, X, WEIGHTS)
