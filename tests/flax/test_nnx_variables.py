"""NNX models whose variables are not `nnx.Param`s: an argument or the optimizer gives the type."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import freeze_optax as fo
from freeze_optax import nnx as fnnx

pytestmark = pytest.mark.usefixtures("standard_promotion")


class Weight(nnx.Variable):
    pass


class Model(nnx.Module):
    def __init__(self):
        self.a, self.b = Weight(jnp.arange(1.0, 4.0)), Weight(jnp.ones(3))
        self.count = nnx.BatchStat(jnp.zeros(()))

    def __call__(self):
        self.count[...] += 1.0
        return (self.a[...] * self.b[...] ** 2).sum()


ADAM = optax.adam(0.1)
# Of sum(a * b**2) at a = 1, 2, 3 and b = 1.
GRADIENT = {"a": np.ones(3), "b": 2 * np.arange(1.0, 4.0)}
NONE = (
    r"no variable of this Model is matched by wrt=Param; it has variables of the types "
    r"'Weight', 'BatchStat'; pass the type of those to train as wrt"
)


@pytest.mark.parametrize(
    ("frozen", "wrt"),
    [
        (lambda optimizer: "a", Weight),
        (lambda optimizer: "a", nnx.Not(nnx.BatchStat)),
        (lambda optimizer: optimizer, None),
        (lambda optimizer: optimizer.opt_state, None),
        (lambda optimizer: optimizer, Weight),
    ],
    ids=["type", "filter", "optimizer", "state", "optimizer and type"],
)
def test_gradients_are_of_the_type_of_variable_that_is_asked_for(frozen, wrt):
    model = Model()
    optimizer = nnx.Optimizer(model, fo.freezable(ADAM, "a"), wrt=Weight)
    value, grads = fnnx.value_and_grad(Model.__call__, frozen(optimizer), wrt=wrt)(model)
    assert value == 6.0
    assert model.count[...] == 1.0
    expected = {"a": np.zeros(3), "b": GRADIENT["b"]}
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(grads), expected)
    optimizer.update(model, fnnx.grad(Model.__call__, frozen(optimizer), wrt=wrt)(model))
    updates, _ = ADAM.update(jnp.asarray(GRADIENT["b"]), ADAM.init(jnp.ones(3)))
    np.testing.assert_array_equal(model.b[...], 1.0 + updates)
    np.testing.assert_array_equal(model.a[...], np.arange(1.0, 4.0))


def test_a_filter_is_of_the_type_of_variable_that_is_asked_for():
    filter_ = fnnx.wrt(Model(), "a", wrt=Weight)
    assert set(nnx.state(Model(), filter_)) == {"b"}
    optimizer = nnx.Optimizer(Model(), ADAM, wrt=filter_)
    assert set(optimizer.opt_state[0].mu) == {"b"}


@pytest.mark.parametrize("edit", [fnnx.freeze, fnnx.set_frozen])
def test_edits_are_of_the_variables_of_the_optimizer(edit):
    model = Model()
    optimizer = nnx.Optimizer(model, fo.freezable(ADAM), wrt=Weight)
    edit(optimizer, model, "b")
    assert fo.mask(optimizer, nnx.to_pure_dict(nnx.state(model, Weight))) == {
        "a": False,
        "b": True,
    }


def test_no_variable_of_the_type_is_an_error_that_names_the_types_of_the_model():
    for call in (
        lambda: fnnx.wrt(Model(), "a"),
        lambda: fnnx.wrt(Model(), fo.nothing),
        lambda: fnnx.grad(Model.__call__, "a")(Model()),
        lambda: fnnx.value_and_grad(Model.__call__, fo.nothing)(Model()),
        lambda: fnnx.grad(
            Model.__call__, nnx.Optimizer(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), ADAM, wrt=nnx.Param)
        )(Model()),
    ):
        with pytest.raises(ValueError, match=NONE):
            call()
    with pytest.raises(
        ValueError, match=r"this Module is matched by wrt=Param; it has no variable"
    ):
        fnnx.wrt(nnx.Module(), fo.nothing)


def test_a_state_of_another_model_is_an_error_that_names_its_paths():
    other = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    state = nnx.Optimizer(other, fo.freezable(ADAM), wrt=nnx.Param).opt_state
    with pytest.raises(
        ValueError, match=r"different params: only in the .*state: 'bias', 'kernel'"
    ):
        fnnx.grad(Model.__call__, state)(Model())
