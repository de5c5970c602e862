"""Frozen layers in host memory that a scan brings in: the bits, and what is copied and kept."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import freeze_optax as fo
from freeze_optax.testing import assert_frozen
from tests.support.jaxprs import copied, copies_in_loops, shapes_made_by_loops
from tests.support.memories import assert_same_bits, jit_keeps_memory, kinds, on_host
from tests.support.sampling import cases

DEPTH, WIDTH, HIDDEN = 5, 4, 6
BASE = fo.path("layers/base")


def make_params(dtype: Any = jnp.float32) -> Any:
    draw = np.random.default_rng(0).normal

    def array(*shape: int) -> Any:
        return jnp.asarray(draw(size=shape) / 2, dtype)

    return {
        "embed": array(WIDTH),
        "head": array(WIDTH),
        "layers": {
            "base": {"up": array(DEPTH, WIDTH, HIDDEN), "down": array(DEPTH, HIDDEN, WIDTH)},
            "lora": {"a": array(DEPTH, WIDTH, 2), "b": array(DEPTH, 2, WIDTH)},
        },
    }


def with_base_on_host(params: Any) -> Any:
    layers = params["layers"]
    return {**params, "layers": {**layers, "base": on_host(layers["base"])}}


X = jnp.linspace(-1.0, 1.0, 3 * WIDTH).reshape(3, WIDTH)


def layer(x: Any, p: Any) -> tuple[Any, Any]:
    base, lora = p["base"], p["lora"]
    x = x + jnp.tanh(x @ base["up"]) @ base["down"] + x @ lora["a"] @ lora["b"]
    return x, x.sum()


def partly_rematerialised(x: Any, p: Any) -> tuple[Any, Any]:
    up = jax.checkpoint(lambda x, w: jnp.tanh(x @ w))(x, p["base"]["up"])
    return layer(x + up @ p["base"]["down"], p)


LAYERS = {
    "plain": layer,
    "jitted": jax.jit(layer),
    "rematerialised": jax.checkpoint(layer),
    "in part": partly_rematerialised,
}


def loss_of(frozen: Any, f: Any = layer, **kwargs: Any) -> Any:
    def loss(params: Any) -> Any:
        mask = fo.mask(frozen, params)["layers"]
        x, outputs = fo.scan(f, X * params["embed"], params["layers"], frozen=mask, **kwargs)
        return (x @ params["head"]).sum() + outputs.sum()

    return loss


SPECS = {
    "adapters": BASE,
    "all layers": fo.path("layers"),
    "adapters of two runs": [BASE, fo.rows("layers/lora", [0, 3]), "embed"],
    "nothing below": ["embed", BASE, fo.rows("layers/lora", slice(0, 3))],
}


@pytest.mark.parametrize("jit", [jax.jit, pytest.param(lambda f: f, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("f", cases(LAYERS, {"plain", "rematerialised"}))
def test_value_and_gradients_have_the_bits_of_a_scan_on_the_device(f, spec, jit):
    params = make_params()

    def run(stream: bool) -> Any:
        return jit(fo.value_and_grad(loss_of(spec, f, stream=stream), spec, holes=True))

    assert_same_bits(run(True)(with_base_on_host(params)), run(False)(params))


@pytest.mark.parametrize("f", cases(LAYERS, {"plain", "in part"}))
@pytest.mark.parametrize("spec", [BASE, fo.path("layers")], ids=["adapters", "all"])
def test_each_pass_copies_each_frozen_leaf_once_a_layer_and_keeps_no_stack(f, spec):
    hosted = with_base_on_host(make_params())
    step = fo.value_and_grad(loss_of(spec, f, stream=True), spec, holes=True)
    shapes = sorted([(WIDTH, HIDDEN), (HIDDEN, WIDTH)])
    loops = copies_in_loops(step, hosted)
    if spec is not BASE and not jit_keeps_memory():  # then all that is frozen may be on the host
        shapes = sorted([*shapes, (WIDTH, 2), (2, WIDTH)])
    assert [sorted(x.shape for x in loop) for loop in loops] == [shapes, shapes], "two passes"
    stacks = {x.shape for x in jax.tree.leaves(hosted["layers"]["base"])}
    assert not stacks & shapes_made_by_loops(step, hosted)


def test_below_the_lowest_layer_that_trains_there_is_one_pass():
    hosted = with_base_on_host(make_params())
    spec = ["embed", "layers"]
    step = fo.value_and_grad(loss_of(spec, stream=True), spec, holes=True)
    assert len(copies_in_loops(step, hosted)) == 1


def quantized(params: Any) -> Any:
    layers = params["layers"]

    def stored(x: Any) -> Any:
        return {
            "qvalue": jnp.round(x * 50).astype(jnp.int8),
            "scale": jnp.full((DEPTH, 1, x.shape[-1]), 0.02),
        }

    base = {name: stored(x) for name, x in layers["base"].items()}
    return {**params, "layers": {**layers, "base": base}}


def dequantizing(f: Any) -> Any:
    def of_quantized(x: Any, p: Any) -> Any:
        base = {k: w["qvalue"].astype(jnp.float32) * w["scale"] for k, w in p["base"].items()}
        return f(x, {**p, "base": base})

    return of_quantized


@pytest.mark.parametrize("f", [layer, jax.checkpoint(layer)], ids=["plain", "rematerialised"])
def test_of_quantized_layers_the_integers_travel_and_no_floats_are_kept(f):
    params = quantized(make_params())
    hosted, f = with_base_on_host(params), dequantizing(f)
    step = fo.value_and_grad(loss_of(BASE, f, stream=True), BASE, holes=True)
    reference = fo.value_and_grad(loss_of(BASE, f), BASE, holes=True)
    assert_same_bits(jax.jit(step)(hosted), jax.jit(reference)(params))
    for loop in copies_in_loops(step, hosted):
        assert sorted(x.dtype.name for x in loop) == ["float32"] * 2 + ["int8"] * 2
        assert {x.shape for x in loop if x.dtype == jnp.float32} == {(1, HIDDEN), (1, WIDTH)}
    floats = {(DEPTH, WIDTH, HIDDEN), (DEPTH, HIDDEN, WIDTH)}
    assert not floats & shapes_made_by_loops(step, hosted)


SIMPLE = {
    "plain": lambda x, w: (jnp.tanh(x @ w), None),
    "rematerialised": jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)),
    "in part": lambda x, w: (jax.checkpoint(jnp.tanh)(x @ w), None),
}


@pytest.mark.parametrize("f", SIMPLE.values(), ids=SIMPLE)
def test_the_compiled_step_has_two_layers_more_at_most_than_one_on_the_device(f):
    depth, width = 8, 128
    of_layer = 4 * width * width
    params = {
        "layers": jax.ShapeDtypeStruct((depth, width, width), jnp.float32),
        "scale": jax.ShapeDtypeStruct((), jnp.float32),
    }

    def temporary(stream: bool) -> int:
        def loss(params: Any) -> Any:
            x = jnp.ones((2, width)) * params["scale"]
            return fo.scan(f, x, params["layers"], frozen=True, stream=stream)[0].sum()

        step = jax.jit(fo.grad(loss, "layers", holes=True)).lower(params).compile()
        return step.memory_analysis().temp_size_in_bytes

    assert temporary(True) <= temporary(False) + 2 * of_layer


@pytest.mark.usefixtures("standard_promotion")
def test_a_training_step_leaves_the_base_in_host_memory_with_every_bit():
    params = make_params()
    params["layers"]["base"]["up"] = params["layers"]["base"]["up"].at[0, 0].set(-0.0)
    tx = fo.freezable(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)), BASE)

    def train(params: Any, stream: bool) -> Any:
        def step(params: Any, state: Any) -> Any:
            grads = fo.grad(loss_of(BASE, stream=stream), frozen=state)(params)
            updates, state = tx.update(grads, state, params)
            return fo.apply_updates(params, updates, frozen=state), state

        state = tx.init(params)
        for _ in range(2):
            params, state = jax.jit(step)(params, state)
        return params, state

    hosted = with_base_on_host(params)
    after, state = train(hosted, stream=True)
    assert_same_bits((after, state), train(params, stream=False))
    assert_frozen(params, after, BASE)
    if jit_keeps_memory():
        assert kinds(after) == kinds(hosted)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("f", [layer, jax.checkpoint(layer)], ids=["plain", "rematerialised"])
def test_layers_in_turns_stream_and_are_updated_in_host_memory(f):
    params, frozen = make_params(), fo.path("layers/lora")
    tx = fo.rotating(optax.adamw(0.1), "layers", 2, 1, order="descending", frozen=frozen)

    def run(params: Any, stream: bool) -> Any:
        def step(params: Any, state: Any) -> Any:
            def loss(params: Any) -> Any:
                x, outputs = fo.scan(f, X * params["embed"], params["layers"], stream=stream)
                return (x @ params["head"]).sum() + outputs.sum()

            grads = fo.grad(loss, frozen=state)(params)
            updates, state = tx.update(grads, state, params)
            return fo.apply_updates(params, updates, frozen=state), state

        return step, tx.init(params)

    hosted = with_base_on_host(params)
    (step, state), (reference, expected_state) = run(hosted, stream=True), run(params, stream=False)
    after, expected = (hosted, state), (params, expected_state)
    assert set(jax.tree.leaves(kinds(state))) == {"device"}
    for _ in range(3):
        after, expected = jax.jit(step)(*after), jax.jit(reference)(*expected)
        assert_same_bits(after, expected)
    if not jit_keeps_memory():
        return
    assert kinds(after[0]) == kinds(hosted)
    shapes = {x.shape for x in jax.tree.leaves(params["layers"]["base"])}
    assert not shapes & {x.shape for x in copied(step, hosted, state)}, "layers, no stacks"


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_on_a_mesh_each_device_copies_its_own_shard(kind):
    if kind == AxisType.Explicit and not jit_keeps_memory():
        pytest.skip("XLA's partitioner fails on copies between memories (JAX 0.7.1)")
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",), axis_types=(kind,))
    params = make_params()

    def placed(x: Any, *spec: Any) -> Any:
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    base = params["layers"]["base"]
    sharded = jax.tree.map(placed, params)
    sharded["layers"]["base"] = {
        "up": placed(base["up"], None, None, "x"),
        "down": placed(base["down"], None, "x", None),
    }

    def f(x: Any, p: Any) -> Any:
        up, down = p["base"]["up"], p["base"]["down"]
        hidden = jnp.tanh(x @ up)
        kwargs = {"out_sharding": PartitionSpec()} if kind == AxisType.Explicit else {}
        x = x + jnp.matmul(hidden, down, **kwargs) + x @ p["lora"]["a"] @ p["lora"]["b"]
        return x, x.sum()

    def run(stream: bool, params: Any) -> Any:
        step = fo.value_and_grad(loss_of(BASE, f, stream=stream), BASE, holes=True)
        with jax.set_mesh(mesh):
            return jax.jit(step)(params)

    hosted = with_base_on_host(sharded)
    actual, expected = run(True, hosted), run(False, sharded)
    assert_same_bits(actual, expected)
    shards = {"up": (WIDTH, HIDDEN // 2), "down": (HIDDEN // 2, WIDTH)}
    assert hosted["layers"]["base"]["up"].addressable_shards[0].data.shape[1:] == shards["up"]


def test_an_axis_of_layers_that_is_sharded_is_an_error_that_names_the_leaf():
    mesh = Mesh(np.array(jax.devices()[:5]), ("x",), axis_types=(AxisType.Explicit,))
    sharding = NamedSharding(mesh, PartitionSpec("x"), memory_kind="pinned_host")
    stack = {"w": jax.device_put(np.ones((5, 2), np.float32), sharding)}

    def run(stack: Any) -> Any:
        return fo.scan(lambda x, p: (x * p["w"], None), jnp.ones(2), stack, True, stream=True)

    message = r"'w' is in host memory.*sharded over 'x'.*shard another axis"
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        jax.jit(run)(stack)


def test_layers_along_another_axis_unrolled_and_with_integers_in_the_carry():
    params = make_params()
    stack = {name: jnp.moveaxis(x, 0, 1) for name, x in params["layers"]["base"].items()}

    def f(carry: Any, p: Any) -> Any:
        (x, i), scale = carry, 1.0 + jnp.asarray(carry[1], jnp.float32)
        return (x + jnp.tanh(x @ p["up"]) @ p["down"] * scale, i + 1), i

    def run(stack: Any, **kwargs: Any) -> Any:
        def loss(x: Any) -> Any:
            carry, order = fo.scan(f, (x, jnp.int32(0)), stack, frozen=True, axis=1, **kwargs)
            return carry[0].sum(), order

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(X)

    assert_same_bits(run(on_host(stack), stream=True, unroll=2), run(stack, unroll=2))


def assert_derivatives_are_those_of_a_scan(**tolerance: float) -> None:
    params = make_params()
    hosted, tangent = with_base_on_host(params), jnp.ones(WIDTH)

    def of_embed(params: Any, stream: bool) -> Any:
        return lambda embed: loss_of(BASE, stream=stream)({**params, "embed": embed})

    def derivatives(params: Any, stream: bool) -> Any:
        f = of_embed(params, stream)
        many = jax.vmap(jax.grad(f))(jnp.stack([params["embed"], tangent]))
        _, product = jax.jvp(jax.grad(f), (params["embed"],), (tangent,))
        twice = jax.grad(lambda e: jax.grad(f)(e) @ tangent)(params["embed"])
        return many, product, twice

    actual = jax.jit(functools.partial(derivatives, stream=True))(hosted)
    expected = jax.jit(functools.partial(derivatives, stream=False))(params)
    for x, y in zip(actual, expected, strict=True):
        np.testing.assert_allclose(x, y, **tolerance)
    with pytest.raises(TypeError, match=r"forward-mode|jvp"):
        jax.jvp(of_embed(hosted, True), (params["embed"],), (tangent,))


def test_under_vmap_and_in_second_derivatives_it_is_a_scan_like_any():
    assert_derivatives_are_those_of_a_scan(rtol=1e-5)


def test_with_everything_on_the_device_or_in_numpy_it_is_a_scan_too():
    params = make_params()
    reference = jax.jit(fo.grad(loss_of(BASE), BASE))(params)
    streamed = fo.grad(loss_of(BASE, stream=True), BASE)
    assert_same_bits(jax.jit(streamed)(params), reference)
    as_numpy = {**params, "layers": jax.tree.map(np.asarray, params["layers"])}
    assert_same_bits(jax.jit(streamed)(as_numpy), reference)
    assert not copies_in_loops(lambda x: loss_of(BASE, stream=True)({**params, "head": x}), X[0])


def test_a_step_that_is_compiled_ahead_for_host_memory_streams():
    hosted = with_base_on_host(make_params())
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), hosted
    )
    step = fo.grad(loss_of(BASE, stream=True), BASE, holes=True)
    assert copies_in_loops(step, shapes)
    assert_same_bits(jax.jit(step).lower(shapes).compile()(hosted), jax.jit(step)(hosted))
