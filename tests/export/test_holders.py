"""Exports of a tree around the state: a `TrainState`, a chain, a dict of several things."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec

import freeze_optax as fo

pytestmark = pytest.mark.usefixtures("standard_promotion")


def params():
    return {"encoder": {"w": jnp.ones((4, 2))}, "head": jnp.ones((2, 2), jnp.bfloat16)}


TX = optax.chain(
    optax.trace(0.9),
    fo.freezable(
        optax.chain(optax.add_noise(0.01, 0.5, jax.random.key(1)), optax.adam(0.1)), "head"
    ),
)


@functools.cache
def trained():
    """A state with a parked row and two cohorts."""
    tree, state = params(), TX.init(params())
    for edit in (
        lambda state: fo.freeze(state, tree, fo.rows("encoder/w", [1]), keep_state=True),
        lambda state: fo.thaw(state, tree, "head"),
        lambda state: state,
    ):
        state = edit(jax.jit(TX.update)(tree, state, tree)[1])
    return state


class Several(NamedTuple):
    params: Any
    state: Any


def train_state(state):
    return TrainState.create(apply_fn=None, params=params(), tx=TX).replace(opt_state=state)


TREES = {
    "chain": lambda state: state,
    "TrainState": train_state,
    "stepped TrainState": lambda state: train_state(state).replace(step=jnp.asarray(7)),
    "dict": lambda state: {"params": params(), "state": state, "key": jax.random.key(3)},
    "numbers": lambda state: [0.5, True, 1j, np.int64(1 << 40), np.arange(3.0), {"a": state}],
    "named tuple": lambda state: Several(params(), state),
}


def plain(x):
    is_key = jnp.issubdtype(getattr(x, "dtype", float), jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if is_key else x)


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert isinstance(a, type(b))
        assert plain(a).dtype == plain(b).dtype
        assert plain(a).tobytes() == plain(b).tobytes()


@pytest.mark.parametrize("around", TREES.values(), ids=TREES)
def test_whatever_is_exported_is_given_back(around):
    tree = around(trained())
    exported = jax.tree.map(np.asarray, fo.export_state(tree))
    like = jax.tree.map(lambda x: x, around(TX.init(params())))
    assert_same(fo.import_state(like, params(), exported), tree)
    frozen = fo.import_state(like, params(), exported, frozen="encoder")
    assert_same(frozen, fo.set_frozen(tree, params(), "encoder"))


def test_the_transformation_gives_back_a_chain_and_names_the_tree_that_a_train_state_needs():
    exported = fo.export_state(trained())
    assert_same(fo.import_state(TX, params(), exported), trained())
    match = r"the state at 'opt_state', beside 'step', 'params/encoder/w', 'params/head'; give such"
    with pytest.raises(ValueError, match=match):
        fo.import_state(TX, params(), fo.export_state(train_state(trained())))


def test_a_schedule_and_its_train_state_are_given_back():
    tx = fo.scheduled(optax.adam(0.1), fo.Phases({0: "head", 5: "encoder"}))
    state = TrainState.create(apply_fn=None, params=params(), tx=tx)
    stepped = state.apply_gradients(grads=params())
    assert_same(fo.import_state(state, params(), fo.export_state(stepped)), stepped)


def test_leaves_beside_the_state_have_the_sharding_of_the_tree():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    tree = jax.device_put(params(), sharding)
    like = {"params": tree, "state": TX.init(tree)}
    exported = jax.tree.map(np.asarray, fo.export_state(like))
    for leaf in jax.tree.leaves(fo.import_state(like, tree, exported)["params"]):
        assert leaf.sharding == sharding


def optimizer():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    return nnx.Optimizer(model, fo.freezable(optax.adam(0.1), "bias"), wrt=nnx.Param)


@pytest.mark.parametrize("around", [lambda x: x, lambda x: {"a": [x]}])
def test_an_object_of_nnx_is_refused_at_the_save(around):
    with pytest.raises(TypeError, match=r"NNX \(Optimizer\).*export_state\(optimizer\.opt_state\)"):
        fo.export_state(around(optimizer()))


def test_a_leaf_that_is_no_array_is_refused_at_the_save():
    with pytest.raises(TypeError, match="the leaf at 'name' is a str; export"):
        fo.export_state({"state": trained(), "name": "run 7"})


def test_a_tree_of_other_params_or_without_a_state_is_an_error():
    exported = fo.export_state(train_state(trained()))
    other = {"other": jnp.ones(2)}
    with pytest.raises(ValueError, match="different params: only in the params: 'other'"):
        fo.import_state(train_state(TX.init(params())), other, exported)
    with pytest.raises(TypeError, match="takes a transformation first"):
        fo.import_state({"params": params()}, params(), exported)
    with pytest.raises(
        ValueError, match="not of a state of this transformation: only in the export: 'step'"
    ):
        fo.import_state({"a": jnp.ones(2), "s": TX.init(params())}, params(), exported)
