"""Haliax: named axes, on Equinox modules, and layers stacked along an axis with a name."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import freeze_optax as fo
from tests.support.bare_steps import assert_same_bits, bare_steps, steps_with

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it calls a function of Equinox that is deprecated
    hax = pytest.importorskip("haliax", reason="make lane-ecosystem installs it")

pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),
    pytest.mark.filterwarnings("ignore"),
]

Wide, Same, Layers = hax.Axis("wide", 4), hax.Axis("same", 4), hax.Axis("layers", 3)
X = hax.named(jnp.linspace(-1.0, 1.0, 4), Wide)


class Block(eqx.Module):
    linear: hax.nn.Linear

    @staticmethod
    def init(*, key):
        return Block(hax.nn.Linear.init(Wide, Same, key=key))

    def __call__(self, x):
        return hax.tanh(self.linear(x).rename({"same": "wide"}))


def new_model():
    keys = jax.random.split(jax.random.key(0), Layers.size)
    return hax.nn.Stacked.init(Layers, Block)(key=keys)


def loss_of(model):
    return (model.fold(X).array ** 2).sum()


def trained(spec):
    return steps_with(spec, loss_of, new_model(), eqx.filter_jit)


@pytest.mark.parametrize(
    "spec",
    ["stacked/linear/weight", fo.of_type(hax.nn.Linear, fields=("weight",))],
    ids=["path", "type"],
)
def test_a_named_array_is_named_by_its_field(spec):
    expected = bare_steps(loss_of, new_model(), lambda path: "bias" in path)
    assert_same_bits(trained(spec), expected)


def test_layers_of_a_stack_are_rows_of_its_first_axis():
    before, after = new_model(), trained(fo.rows("stacked", slice(2)))
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        if eqx.is_array(x):
            assert (x[:2] == y[:2]).all()
            assert (x[2] != y[2]).all()
