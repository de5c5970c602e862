"""A streamed scan as it runs on a GPU, where its loops end one layer early: the same promises."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import freeze_optax as fo
from freeze_optax._params import index_scan
from tests.params import test_scan_stream as streamed
from tests.params import test_scan_stream_cases as of_functions
from tests.support.jaxprs import copies_in_loops
from tests.support.memories import assert_same_bits, on_host


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_scan, "is_for_gpu", lambda: True)
    monkeypatch.setattr(index_scan, "_MISREADS_COUNTS", ())


test_stacks = streamed.test_each_pass_copies_each_frozen_leaf_once_a_layer_and_keeps_no_stack
test_unrolled = streamed.test_layers_along_another_axis_unrolled_and_with_integers_in_the_carry
test_lists = of_functions.test_a_function_may_return_a_list_and_what_is_no_pair_is_an_error


@pytest.mark.parametrize(
    ("f", "spec"),
    [
        ("plain", "all layers"),
        ("rematerialised", "adapters"),
        pytest.param("plain", "adapters of two runs", marks=pytest.mark.exhaustive),
        pytest.param("in part", "nothing below", marks=pytest.mark.exhaustive),
    ],
)
def test_value_and_gradients_have_the_bits_of_a_scan_on_the_device(f, spec):
    params, spec = streamed.make_params(), streamed.SPECS[spec]

    def run(stream: bool) -> Any:
        loss = streamed.loss_of(spec, streamed.LAYERS[f], stream=stream)
        return jax.jit(fo.value_and_grad(loss, spec, holes=True))

    assert_same_bits(run(True)(streamed.with_base_on_host(params)), run(False)(params))


def test_under_vmap_and_in_second_derivatives_it_is_a_scan_like_any():
    # XLA rounds the layer beside the loop in another way (JAX 0.12.0.1: 1.8e-5 of one number).
    streamed.assert_derivatives_are_those_of_a_scan(rtol=1e-5, atol=1e-5)


@pytest.mark.exhaustive
def test_on_meshes_with_callbacks_in_turns_and_quantized_it_is_the_same():
    for kind in (AxisType.Auto, AxisType.Explicit):
        streamed.test_on_a_mesh_each_device_copies_its_own_shard(kind)
    for f in (streamed.layer, jax.checkpoint(streamed.layer)):
        streamed.test_of_quantized_layers_the_integers_travel_and_no_floats_are_kept(f)
    name = "test_callbacks_run_once_a_layer_in_the_forward_pass_and_keep_no_weights"
    getattr(of_functions, name)(lambda f: f)


@pytest.mark.parametrize("depth", [pytest.param(1, marks=pytest.mark.exhaustive), 2, 3])
def test_a_stack_of_few_layers_has_the_bits_of_one_on_the_device(depth):
    x = jnp.linspace(-1.0, 1.0, 4)
    stack = jnp.linspace(-0.5, 0.5, depth * 16).reshape(depth, 4, 4)

    def run(stream: bool) -> Any:
        def loss(x: Any, stack: Any) -> Any:
            def f(x: Any, w: Any) -> Any:
                return jnp.tanh(x @ w), (x.sum(), jnp.argmax(x))

            x, (sums, places) = fo.scan(f, x, stack, frozen=True, stream=stream)
            return (x * sums.sum()).sum(), places

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    hosted = on_host(stack)
    assert_same_bits(run(True)(x, hosted), run(False)(x, stack))
    loops = copies_in_loops(run(True), x, hosted)
    assert [[y.shape for y in loop] for loop in loops] == [[(4, 4)]] * {1: 2, 2: 1, 3: 2}[depth]


def test_keys_of_random_numbers_may_be_outputs_and_carried():
    stack, key = jnp.ones((3, 4)), jax.random.key(0)

    def run(stream: bool, stack: Any) -> Any:
        def f(carry: Any, w: Any) -> Any:
            x, key = carry
            key, own = jax.random.split(key)
            return (x * w + jax.random.normal(own, x.shape), key), own

        (x, key_after), keys = fo.scan(f, (jnp.ones(4), key), stack, True, stream=stream)
        return x, jax.random.key_data(key_after), jax.random.key_data(keys)

    assert_same_bits(jax.jit(run, static_argnums=0)(True, on_host(stack)), run(False, stack))


def test_in_a_shard_map_weights_may_be_the_same_on_all_devices_where_the_carry_is_not():
    mesh = jax.make_mesh((2,), ("x",))
    everywhere = NamedSharding(mesh, PartitionSpec(), memory_kind="pinned_host")
    stack = jax.device_put(jnp.linspace(-1.0, 1.0, 48).reshape(3, 4, 4), everywhere)
    x = jax.device_put(jnp.ones((2, 4)), NamedSharding(mesh, PartitionSpec("x")))

    def loss(x: Any, stack: Any) -> Any:
        f = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        return fo.scan(f, x, stack, frozen=True, stream=True)[0].sum()

    specs = {"in_specs": (PartitionSpec("x"), PartitionSpec()), "out_specs": PartitionSpec("x")}
    actual = jax.jit(jax.shard_map(jax.grad(loss), mesh=mesh, **specs))(x, stack)
    np.testing.assert_allclose(actual, jax.jit(jax.grad(loss))(x, stack), rtol=1e-5)
