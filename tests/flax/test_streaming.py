"""Stacked layers of Linen and NNX in host memory, in `fo.scan` and in their own loops."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import freeze_optax as fo
import freeze_optax.nnx
from tests.support.jaxprs import copies_in_loops, shapes_made_by_loops
from tests.support.memories import assert_same_bits, on_host

DEPTH, WIDTH = 3, 4
X = jnp.linspace(-1.0, 1.0, 2 * WIDTH).reshape(2, WIDTH)


def to_device(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), tree)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        return x + nn.Dense(WIDTH)(jnp.tanh(nn.Dense(2 * WIDTH)(x))), None


StreamedBlock = nn.map_variables(Block, "params", trans_in_fn=to_device, mutable=False)
RematerialisedBlock = nn.remat(StreamedBlock, prevent_cse=False)


class Model(nn.Module):
    block: Any = Block

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(WIDTH, name="embed")(x)
        layers = nn.scan(
            self.block, variable_axes={"params": 0}, split_rngs={"params": True}, length=DEPTH
        )
        return layers(name="layers")(x, None)[0].sum()


def scan_of_linen(params: Any) -> Any:
    x = nn.Dense(WIDTH).apply({"params": params["embed"]}, X)

    def f(x: Any, layer: Any) -> Any:
        return Block().apply({"params": layer}, x)

    return fo.scan(f, x, params["layers"], frozen=True, stream=True)[0].sum()


def loop_of_linen(params: Any) -> Any:
    return Model(RematerialisedBlock).apply({"params": params}, X)


@pytest.mark.parametrize("loss", [scan_of_linen, loop_of_linen])
def test_layers_stacked_by_linen_stream_in_our_scan_and_rematerialised_in_theirs(loss):
    params = Model().init(jax.random.key(0), X)["params"]
    hosted = {**params, "layers": on_host(params["layers"])}

    def reference(params: Any) -> Any:
        return Model().apply({"params": params}, X)

    step = fo.value_and_grad(loss, "layers", holes=True)
    expected = jax.jit(fo.value_and_grad(reference, "layers", holes=True))(params)
    assert_same_bits(jax.jit(step)(hosted), expected)
    weights = {x.shape for x in jax.tree.leaves(params["layers"])}
    assert copies_in_loops(step, hosted)
    assert not weights & shapes_made_by_loops(step, hosted)


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return x + self.down(jnp.tanh(self.up(x)))


class Deep(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.layers = nnx.split_rngs(splits=DEPTH)(nnx.vmap(Layer))(rngs)


def loop_of_nnx(call: Any) -> Any:
    def loss(model: Deep) -> Any:
        loop = nnx.scan(lambda x, layer: call(layer, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return loop(model.embed(X), model.layers).sum()

    return loss


def streamed(layer: Layer, x: Any) -> Any:
    graphdef, state = nnx.split(layer)
    return fo.streamed(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)


def scan_of_nnx(model: Deep) -> Any:
    graphdef, layers = nnx.split(model.layers)

    def f(x: Any, layer: Any) -> Any:
        return nnx.merge(graphdef, layer)(x), None

    return fo.scan(f, model.embed(X), layers, frozen=True, stream=True)[0].sum()


LOSSES = {"fo.scan": scan_of_nnx, "nnx.scan": loop_of_nnx(streamed)}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_layers_stacked_by_nnx_stream_in_our_scan_and_in_theirs(loss):
    model = Deep(nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    hosted = jax.tree.map(lambda x: x, state)
    hosted["layers"] = on_host(hosted["layers"])

    def gradients(loss: Any) -> Any:
        grad = freeze_optax.nnx.grad(loss, "layers")
        return lambda state: jax.tree.leaves(grad(nnx.merge(graphdef, state)))

    expected = jax.jit(gradients(loop_of_nnx(lambda layer, x: layer(x))))(state)
    assert_same_bits(jax.jit(gradients(loss))(hosted), expected)
    assert np.any(expected[0])
    loops = copies_in_loops(gradients(loss), hosted)
    assert [len(loop) for loop in loops] == [4, 4], "each weight once a pass"
    weights = {x.shape for x in jax.tree.leaves(state["layers"])}
    assert not weights & shapes_made_by_loops(gradients(loss), hosted)
