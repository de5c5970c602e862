"""LoRA on bases that qwix has quantized: only what is no part of a quantized node trains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from flax import linen, nnx

import freeze_optax as fo
from freeze_optax import nnx as fnnx

# qwix mixes int8 with float32.
pytestmark = pytest.mark.usefixtures("standard_promotion")

DTYPES = [jnp.int8, pytest.param(jnp.float8_e4m3fn, marks=pytest.mark.exhaustive)]
X, Y = jnp.linspace(-1, 1, 8).reshape(2, 4), jnp.ones((2, 2))


def provider(dtype):
    return qwix.LoraProvider(module_path=".*", rank=2, alpha=2.0, weight_qtype=dtype)


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(2, name="b")(linen.relu(linen.Dense(8, name="a")(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.b(nnx.relu(self.a(x)))


LIVE = ("bias", "kernel_lora_a", "kernel_lora_b")


def bare_steps(loss, params, steps=2):
    """Trains the biases and LoRA weights alone, with bare optax, in dicts of dicts."""
    tx, live = optax.adamw(0.1), {k: {n: v[n] for n in LIVE} for k, v in params.items()}
    state = tx.init(live)

    def of_live(live):
        return loss({k: {**v, **live[k]} for k, v in params.items()})

    for _ in range(steps):
        updates, state = tx.update(jax.grad(of_live)(live), state, live)
        live = optax.apply_updates(live, updates)
    return {k: {**v, **live[k]} for k, v in params.items()}


def assert_same(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linen_model_with_nothing_frozen_trains_no_part_of_its_base(dtype):
    model = qwix.apply_lora_to_model(Linen(), provider(dtype))
    params = model.init(jax.random.key(0), X)["params"]

    def loss(params):
        return ((model.apply({"params": params}, X) - Y) ** 2).sum()

    mask = fo.mask(fo.nothing, params)
    assert mask["a"]["kernel"].array.scale is True
    assert mask["a"]["kernel_lora_a"] is False
    tx = fo.freezable(optax.adamw(0.1))
    after, state = params, tx.init(params)
    for _ in range(2):
        grads = fo.grad(loss, frozen=state)(after)
        updates, state = tx.update(grads, state, after)
        after = fo.apply_updates(after, updates, frozen=state)
    assert_same(after, bare_steps(loss, params))
    assert "frozen as a whole: 'a/kernel/array', 'b/kernel/array'" in str(fo.summary(params))


@pytest.mark.skipif(
    not hasattr(nnx.Variable, "get_raw_value"), reason="qwix 0.1.8 calls what this Flax has not"
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_nnx_model_with_nothing_frozen_trains_no_part_of_its_base(dtype):
    model = qwix.apply_lora_to_model(Nnx(nnx.Rngs(0)), provider(dtype), X, rngs=nnx.Rngs(1))
    graph, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    qvalue = params["a"]["kernel"]["array"]["qvalue"]
    assert qvalue.dtype == dtype
    # The class of a QArray is lost in an nnx.State and in a dict. Its names are not.
    for tree in (state, params, model):
        mask = jax.tree.leaves(fo.mask(fo.nothing, tree))
        assert mask == [False, True, True, False, False] * 2

    def loss_of_model(model):
        return ((model(X) - Y) ** 2).sum()

    def loss(params):
        new = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(new, params)
        return loss_of_model(nnx.merge(graph, new))

    optimizer = nnx.Optimizer(model, fo.freezable(optax.adamw(0.1)), wrt=nnx.Param)
    expected = bare_steps(loss, jax.tree.map(jnp.copy, params))
    for _ in range(2):
        optimizer.update(model, fnnx.grad(loss_of_model, frozen=optimizer)(model))
    assert_same(nnx.to_pure_dict(nnx.state(model)), expected)


def test_scales_of_qwix_train_where_a_spec_names_them():
    model = qwix.apply_lora_to_model(Linen(), provider(jnp.int8))
    params = model.init(jax.random.key(0), X)["params"]
    state = fo.freezable(optax.adamw(0.1), fo.everything - fo.path("**/scale")).init(params)
    mask = fo.mask(state, params)
    assert mask["b"]["kernel"].array.scale is False
    assert mask["b"]["kernel_lora_a"] is mask["b"]["kernel"].array.qvalue is True
