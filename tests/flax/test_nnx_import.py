"""An `nnx.Optimizer` that goes on with the state that was exported from another."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization

import freeze_optax as fo
from freeze_optax import nnx as fnnx
from tests.support.nnx_models import Tied, loss, plain

pytestmark = pytest.mark.usefixtures("standard_promotion")


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.backbone, self.head = nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.backbone(x)))


ADAM = optax.adam(0.1)
TX = fo.freezable(ADAM, "backbone")


def steps(model, optimizer, count=1):
    for _ in range(count):
        optimizer.update(model, fnnx.grad(loss, optimizer)(model))


def resumed(model, tx, exported, frozen=None):
    """As docs/how-to/flax-nnx.md has it."""

    def init(params):
        return fo.import_state(tx, params, exported, frozen)

    optimizer = nnx.Optimizer(model, tx._replace(init=init), wrt=nnx.Param)
    optimizer.tx = tx
    return optimizer


def thaw(optimizer, model):
    fnnx.thaw(optimizer, model, "backbone/bias")
    steps(model, optimizer)


def park(optimizer, model):
    thaw(optimizer, model)
    fnnx.freeze(optimizer, model, "head", keep_state=True)
    steps(model, optimizer)


def cut(optimizer, model):
    park(optimizer, model)
    fnnx.thaw(optimizer, model, fo.rows("backbone/kernel", [1]))
    steps(model, optimizer)


TRANSFORMATIONS = {
    "in a chain": optax.chain(optax.clip(0.01), TX),
    "in MultiSteps": optax.MultiSteps(TX, 2).gradient_transformation(),
}


def by_msgpack(exported):
    return serialization.msgpack_restore(serialization.msgpack_serialize(exported))


def by_savez(exported):
    file = io.BytesIO()
    np.savez(file, about=exported["about"], **exported["leaves"])
    loaded = dict(np.load(io.BytesIO(file.getvalue())))
    return {"about": loaded.pop("about"), "leaves": loaded}


def assert_goes_on_alike(model, optimizer, twin, other):
    """That both take the same steps, bitwise, through an edit as well."""
    for edit in (lambda *_: None, lambda o, m: fnnx.thaw(o, m, fo.everything)):
        for each, own in ((optimizer, model), (other, twin)):
            edit(each, own)
            steps(own, each)
        fo.testing.assert_frozen(plain(model), plain(twin), True)
        states = [jax.tree.leaves(each.opt_state) for each in (optimizer, other)]
        fo.testing.assert_frozen(*states, True)


@pytest.mark.parametrize(
    ("history", "store"),
    [(thaw, by_msgpack), (park, by_savez), (cut, by_msgpack)],
    ids=["thawed", "parked", "rows"],
)
def test_an_imported_optimizer_goes_on_bitwise_as_the_one_that_was_exported(history, store):
    model = Net()
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    steps(model, optimizer)
    history(optimizer, model)
    twin = nnx.clone(model)
    other = resumed(twin, TX, store(fo.export_state(optimizer.opt_state)))
    assert other.opt_state.plan == optimizer.opt_state.plan
    assert_goes_on_alike(model, optimizer, twin, other)


@pytest.mark.parametrize("tx", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
def test_the_freezable_may_stand_anywhere_in_the_transformation(tx):
    model = Net()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    steps(model, optimizer, 3)
    fnnx.thaw(optimizer, model, "backbone/bias")
    twin = nnx.clone(model)
    other = resumed(twin, tx, fo.export_state(optimizer.opt_state))
    assert_goes_on_alike(model, optimizer, twin, other)


def test_another_set_may_be_frozen_on_the_way():
    model = Net()
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    steps(model, optimizer)
    twin = nnx.clone(model)
    other = resumed(twin, TX, fo.export_state(optimizer.opt_state), frozen="head/bias")
    fnnx.set_frozen(optimizer, model, "head/bias")
    assert_goes_on_alike(model, optimizer, twin, other)


def test_the_export_goes_with_the_transformation_that_is_put_back():
    model = Net()
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    other = resumed(model, TX, fo.export_state(optimizer.opt_state))
    assert other.tx is TX
    steps(model, other)
    traces = []

    @nnx.jit
    def step(model, optimizer):
        traces.append(1)
        steps(model, optimizer, 1)

    for _ in range(3):
        step(model, other)
    assert len(traces) == 1
    assert all(isinstance(x, nnx.Variable) for x in variables(other.opt_state))


def variables(state):
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    assert leaves
    return leaves


def test_the_export_of_another_model_or_optimizer_is_an_error():
    exported = fo.export_state(nnx.Optimizer(Tied(), fo.freezable(ADAM), wrt=nnx.Param).opt_state)
    with pytest.raises(ValueError, match=r"other params: only in it: 'a/bias'.*'backbone/bias'"):
        resumed(Net(), TX, exported)
    exported = fo.export_state(nnx.Optimizer(Net(), TX, wrt=nnx.Param).opt_state)
    with pytest.raises(ValueError, match="not of a state of this transformation"):
        resumed(Net(), fo.freezable(optax.sgd(0.1, momentum=0.9)), exported)


def test_the_step_of_nnx_is_set_by_hand():
    model = Net()
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    steps(model, optimizer, 3)
    other = resumed(model, TX, fo.export_state(optimizer.opt_state))
    assert other.step[...] == 0
    other.step[...] = optimizer.step[...]
    steps(model, other, 1)
    assert jnp.array_equal(other.step[...], 4)


@pytest.mark.parametrize(
    "where", ["head", fo.rows("backbone/kernel", [0, 2])], ids=["leaf", "rows"]
)
def test_statistics_of_variables_come_back_in_variables(where):
    params = nnx.state(Net(), nnx.Param)
    tx = fo.freezable(ADAM, where)
    for state in (tx.init(params), fo.thaw(tx.init(params), params, "head")):
        restored = fo.import_state(tx, params, fo.export_state(state))
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        fo.testing.assert_frozen(state, restored, True)
