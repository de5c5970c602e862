"""Summaries of NNX models, which hold more than the variables of their optimizer."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import freeze_optax as fo
from freeze_optax import nnx as fnnx
from tests.support.nnx_models import Net, Tied, params_of

pytestmark = pytest.mark.usefixtures("standard_promotion")

ADAM = optax.adam(0.1)


def sizes(tree):
    return [np.size(x) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("follow", ["optimizer", "opt_state", "with its transformation"])
def test_what_the_optimizer_does_not_have_counts_as_frozen(follow):
    model = Net()  # with BatchNorm and Dropout
    optimizer = nnx.Optimizer(model, fo.freezable(ADAM, "backbone"), wrt=nnx.Param)
    frozen = optimizer.opt_state if follow == "opt_state" else optimizer
    tx = optimizer.tx if follow == "with its transformation" else None
    summary = fo.summary(model, frozen, tx)
    params = fo.summary(params_of(model), optimizer)
    # By hand: the head and the params of the norm train, 10 and 8.
    assert summary.trainable == params.trainable == 18
    assert summary.total == sum(sizes(model))
    assert summary.frozen == summary.total - 18
    assert (summary.state_bytes, summary.saved_bytes) == (params.state_bytes, params.saved_bytes)
    # Adam's two moments of float32, its counter aside.
    rows = {row.path: row for row in fo.summary(model, frozen, tx, depth=2).rows}
    assert rows["head"].state_bytes == 2 * 4 * 10
    assert (rows["norm"].trainable, rows["norm"].frozen) == (8, 8)
    assert (rows["norm/mean"].status, rows["norm/mean"].state_bytes) == ("frozen", 0)
    assert rows["drop"].status == "frozen"


def test_the_base_of_a_lora_that_the_optimizer_does_not_have_counts_as_frozen():
    model = nnx.LoRALinear(3, 2, lora_rank=1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, fo.freezable(ADAM), wrt=nnx.LoRAParam)
    summary = fo.summary(nnx.state(model), optimizer)
    assert (summary.trainable, summary.frozen) == (5, 8)
    assert summary.state_bytes == 2 * 4 * 5 + 4


@pytest.mark.parametrize("frozen", ["a/kernel", "head/bias"])
def test_a_shared_variable_counts_once_and_as_its_one_path_in_the_state(frozen):
    model = Tied()
    optimizer = nnx.Optimizer(model, fo.freezable(ADAM, frozen), wrt=nnx.Param)
    summary, expected = fo.summary(model, optimizer), fo.summary(params_of(model), optimizer)
    assert summary.to_dict() | {"rows": 0} == expected.to_dict() | {"rows": 0}
    assert summary.total == 9 + 9 + 3 * 3


def test_a_state_of_another_model_is_an_error():
    optimizer = nnx.Optimizer(Tied(), fo.freezable(ADAM), wrt=nnx.Param)
    with pytest.raises(ValueError, match="different params: only in the tree: 'backbone/bias'"):
        fo.summary(Net(), optimizer)


def test_an_edit_shows_in_the_summary_of_the_model():
    model = Net()
    optimizer = nnx.Optimizer(model, fo.freezable(ADAM), wrt=nnx.Param)
    fnnx.freeze(optimizer, model, fo.of_type(nnx.BatchNorm) | "head")
    assert fo.summary(model, optimizer).trainable == 16
