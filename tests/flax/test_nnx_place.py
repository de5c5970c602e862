"""`nnx.place` and `nnx.place_state`, in place, in graph mode and in tree mode."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import freeze_optax as fo
from freeze_optax import nnx as fnnx
from freeze_optax.nnx._flax import AS_GRAPH
from tests.support.memories import DEVICE, HOST, assert_same_bits, jit_keeps_memory

pytestmark = pytest.mark.usefixtures("standard_promotion")


class Model(nnx.Module):
    def __init__(self):
        self.body, self.head = (nnx.Linear(2, 2, rngs=nnx.Rngs(i)) for i in range(2))
        self.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
        self.tied = self.head.kernel

    def __call__(self, x: Any) -> Any:
        kernel, bias = (
            jax.device_put(p[...], jax.memory.Space.Device)
            for p in (self.body.kernel, self.body.bias)
        )
        return self.head(self.norm(x @ kernel + bias)) @ self.tied


def loss(model: Any) -> Any:
    return (model(jnp.arange(6.0).reshape(3, 2)) ** 2).mean()


def kinds(tree: Any) -> dict[str, str]:
    flat = nnx.to_flat_state(tree)
    return {"/".join(map(str, path)): x[...].sharding.memory_kind for path, x in flat}


def model_kinds(model: Any) -> dict[str, str]:
    # A model of tree mode can be read as a graph too.
    return kinds(nnx.state(model, **AS_GRAPH))


def on_host(kinds: dict[str, str]) -> set[str]:
    return {path for path, kind in kinds.items() if kind == HOST}


def optimizer_of(model: Any, *frozen: str) -> Any:
    tx = fo.freezable(optax.adam(0.1), list(frozen) or fo.nothing)
    return nnx.Optimizer(model, tx, wrt=nnx.Param)


def test_frozen_variables_go_to_the_host_and_come_back_in_place():
    model, twin = Model(), Model()
    kernel, head = model.body.kernel, model.head.kernel
    optimizer = optimizer_of(model, "body")
    fnnx.place(model, optimizer)
    assert on_host(model_kinds(model)) == {"body/kernel", "body/bias"}
    assert model.body.kernel is kernel
    assert model.tied is head is model.head.kernel
    assert_same_bits(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(twin)))
    fnnx.place(model, optimizer, "device")
    assert on_host(model_kinds(model)) == set()
    assert_same_bits(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(twin)))
    fnnx.place(model, "tied")  # a shared variable, by its other path
    assert on_host(model_kinds(model)) == {"head/kernel"}
    fnnx.place(model, fo.everything, wrt=nnx.BatchStat)
    assert on_host(model_kinds(model)) == {"head/kernel", "norm/mean", "norm/var"}


def test_an_error_leaves_the_model_as_it_is():
    model = Model()
    with pytest.raises(ValueError, match="has no memory of the kind 'hbm'"):
        fnnx.place(model, "body", "hbm")
    with pytest.raises(ValueError, match="'bodi'"):
        fnnx.place(model, "bodi")
    with pytest.raises(ValueError, match="no variable of this Model is matched by wrt=LoRAParam"):
        fnnx.place(model, "body", wrt=nnx.LoRAParam)
    with pytest.raises(TypeError, match="module"):
        fnnx.place(nnx.state(model), "body")
    with pytest.raises(TypeError, match=r"nnx\.place_state takes an nnx\.Optimizer first"):
        fnnx.place_state(model)
    assert on_host(model_kinds(model)) == set()


def test_a_variable_that_holds_a_tree_is_placed():
    class Tree(nnx.Module):
        def __init__(self):
            self.p = nnx.Param({"a": jnp.ones(2), "b": jnp.ones(3)})

    model = Tree()
    fnnx.place(model, "p/a")
    values = [x.sharding.memory_kind for x in jax.tree.leaves(nnx.state(model))]
    assert values == [HOST, DEVICE]


def train(model: Any, optimizer: Any, jit: Any) -> None:
    @jit
    def step(model: Any, optimizer: Any) -> None:
        optimizer.update(model, fnnx.grad(loss, optimizer)(model))

    step(model, optimizer)


@pytest.mark.parametrize("jit", [pytest.param(lambda f: f, id="eager"), nnx.jit])
def test_training_with_parked_moments_and_frozen_variables_on_the_host(jit):
    results = []
    for placed in (False, True):
        model = Model()
        optimizer = optimizer_of(model)
        train(model, optimizer, jit)
        fnnx.freeze(optimizer, model, "body", keep_state=True)
        if placed:
            fnnx.place_state(optimizer)
            fnnx.place(model, optimizer)
        train(model, optimizer, jit)
        moments = kinds(optimizer.opt_state.inner[0].mu)
        if placed and jit_keeps_memory():  # In JAX 0.7.1 a sum is in device memory.
            assert on_host(moments) == {"body/kernel", "body/bias"}
            assert on_host(model_kinds(model)) == {"body/kernel", "body/bias"}
        fnnx.freeze(optimizer, model, "norm", keep_state=True)
        moments = kinds(optimizer.opt_state.inner[0].mu)
        if placed and jit_keeps_memory():  # In JAX 0.7.1 a sum is in device memory.
            assert on_host(moments) == {"body/kernel", "body/bias", "norm/scale", "norm/bias"}
        fnnx.place_state(optimizer, "device")
        assert on_host(kinds(optimizer.opt_state.inner[0].mu)) == set()
        fnnx.thaw(optimizer, model, "body")
        fnnx.place(model, optimizer)
        assert "body/kernel" not in on_host(model_kinds(model))
        results.append(jax.tree.leaves((nnx.state(model), nnx.state(optimizer))))
    assert_same_bits(*results)


@pytest.mark.skipif(not jit_keeps_memory(), reason="JAX 0.7.1 computes from both memories")
def test_a_loss_that_mixes_memories_names_the_variables_and_says_place():
    model = Model()
    optimizer = optimizer_of(model, "head")
    fnnx.place(model, optimizer)
    message = (
        "in host memory are 'head/bias', 'head/kernel', in device memory .*"
        r"freeze_optax\.nnx\.place\(model, frozen, 'device'\)"
    )
    with pytest.raises(ValueError, match=message):
        fnnx.grad(loss, optimizer)(model)
    fnnx.place(model, optimizer, "device")
    fnnx.grad(loss, optimizer)(model)


@pytest.mark.skipif(not hasattr(nnx, "set_graph_mode"), reason="this Flax has one mode")
def test_models_of_tree_mode_are_placed_too():
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        optimizer = optimizer_of(model)
        fnnx.freeze(optimizer, model, "kernel", keep_state=True)
        fnnx.place_state(optimizer)
        fnnx.place(model, optimizer)
    assert on_host(model_kinds(model)) == {"kernel"}
    assert on_host(kinds(optimizer.opt_state.inner[0].mu)) == {"kernel"}
