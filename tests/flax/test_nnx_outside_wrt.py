"""An edit that names variables which the optimizer was made without."""

import optax
import pytest
from flax import nnx

import freeze_optax as fo
from freeze_optax import nnx as fnnx

SPECS = {"path": "norm", "type": fo.of_type(nnx.LayerNorm), "layer": fo.layers("norm")[0]}


class Net(nnx.Module):
    def __init__(self):
        self.norm = nnx.LayerNorm(4, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(4, 2, rngs=nnx.Rngs(0))


@pytest.fixture
def model():
    return Net()


@pytest.fixture
def optimizer(model):
    wrt = nnx.All(nnx.Param, lambda path, _: "norm" not in path)
    return nnx.Optimizer(model, fo.freezable(optax.adam(0.1), "head/bias"), wrt=wrt)


@pytest.mark.parametrize(
    "edit", [fnnx.freeze, fnnx.thaw, fnnx.set_frozen], ids=lambda x: x.__name__
)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_error_says_to_make_the_optimizer_with_all_params(spec, edit, optimizer, model):
    state = optimizer.opt_state
    with pytest.raises(ValueError, match=r"wrt of the optimizer leaves it out: .* wrt=nnx.Param"):
        edit(optimizer, model, spec)
    assert optimizer.opt_state is state


def test_factors_too(model):
    wrt = nnx.All(nnx.Param, lambda path, _: "norm" not in path)
    tx = fo.freezable(optax.chain(optax.adam(0.1), fo.rates({"head": 0.5})))
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)
    with pytest.raises(ValueError, match=r"wrt of the optimizer leaves it out: .* wrt=nnx.Param"):
        fnnx.adjust(optimizer, model, "norm", 0.1)


def test_another_error_of_an_edit_is_no_such_case(model):
    tx = fo.freezable(optax.chain(optax.adam(0.1), fo.rates({"head": 0.5})))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    with pytest.raises(ValueError, match="finite number, 0 or more") as raised:
        fnnx.adjust(optimizer, model, "norm", -1.0)
    assert "wrt" not in str(raised.value)


def test_a_typo_is_no_such_case(optimizer, model):
    with pytest.raises(ValueError, match=r"pattern 'nrom' selects no leaf") as raised:
        fnnx.thaw(optimizer, model, "nrom")
    assert "wrt" not in str(raised.value)


def test_an_error_of_a_predicate_keeps_its_own_class(optimizer, model):
    class OddError(ValueError):
        def __init__(self, path, why):
            super().__init__(f"{path}: {why}")

    def predicate(path, leaf):
        raise OddError(path, "unknown")

    with pytest.raises(OddError, match="head/bias: unknown"):
        fnnx.thaw(optimizer, model, fo.where(predicate))
