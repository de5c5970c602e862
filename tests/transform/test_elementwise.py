"""Single elements are refused by optimizers that compute along the axes of a leaf."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import freeze_optax as fo
from tests.support import optimizers

SHAPE = (130, 140)  # above the size from which Adafactor is factored
MASK = np.random.default_rng(0).random(SHAPE) < 0.1
PARAMS = {"layer": {"kernel": jnp.ones(SHAPE), "bias": jnp.ones(SHAPE[1])}, "head": jnp.ones(3)}
TRAINED = fo.elements("layer/kernel", MASK)

# By their definitions: factored or per-axis statistics, orthogonalised or projected matrices,
# norms of units, means over axes, and wrappers that tests/support builds with masks by rank.
ALONG_AXES = {
    *("adafactor", "adaptive_grad_clip", "centralize", "galore", "masked", "multi_transform"),
    *("muon", "partition", "scale_by_galore", "scale_by_sm3", "sm3"),
}


@pytest.mark.parametrize("pair", optimizers.every(), ids=lambda pair: pair[1])
def test_exactly_the_optimizers_that_compute_along_axes_refuse_elements(pair):
    tx = fo.freezable(optimizers.build(*pair), ~TRAINED)
    if pair[1] in ALONG_AXES:
        with pytest.raises(ValueError, match=r"'layer/kernel' would train in single elements"):
            tx.init(PARAMS)
    else:
        vector = tx.init(PARAMS)
        assert not [x for x in jax.tree.leaves(vector) if jnp.shape(x)[-2:] == SHAPE]


@pytest.mark.parametrize(
    ("inner", "reason"),
    [
        (optax.adafactor(0.1), r"its state has \(130,\) at '.*v_row.*' .* and \(1,\) for a vector"),
        (optax.sm3(0.1), r"its state \(.*\) is another one for a vector"),
        (optax.chain(optax.centralize(), optax.sgd(0.1)), "its update computes along the axes"),
        (
            optax.adamw(0.1, mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params)),
            "has a mask that depends on their number",
        ),
    ],
    ids=["factored", "per axis", "stateless", "decay masked by rank"],
)
def test_the_error_says_what_differs_and_what_to_choose(inner, reason):
    remedy = re.escape("choose rows (fo.rows), or for these leaves an optimizer")
    with pytest.raises(ValueError, match=rf"{reason}.*{remedy}"):
        fo.freezable(inner, ~TRAINED).init(PARAMS)


def test_a_matrix_below_the_size_of_factoring_may_train_in_elements():
    params = {"kernel": jnp.ones((6, 4))}
    tx = fo.freezable(optax.adafactor(0.1), ~fo.elements("kernel", np.eye(6, 4, dtype=bool)))
    assert optax.tree_utils.tree_get(tx.init(params), "v")["kernel"].shape == (4,)


def test_leaves_that_are_whole_may_have_any_optimizer():
    labels = {"layer": {"kernel": "adam", "bias": "adam"}, "head": "rest"}
    inner = optax.partition({"adam": optax.adam(0.1), "rest": optax.sm3(0.1)}, labels)
    state = fo.freezable(inner, fo.everything - TRAINED - "head").init(PARAMS)
    assert fo.mask(state, PARAMS)["head"] is False


def test_rows_of_any_axis_are_no_elements():
    frozen = fo.rows("layer/kernel", slice(0, 5), axis=1)
    state = fo.freezable(optax.adafactor(0.1), frozen).init(PARAMS)
    assert optax.tree_utils.tree_get(state, "v_row")["layer"]["kernel"].shape == (130,)


def test_an_edit_to_elements_is_refused_and_changes_nothing():
    tx = fo.freezable(optax.chain(optax.centralize(), optax.sgd(0.1, momentum=0.9)))
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="'layer/kernel' would train in single elements"):
        fo.freeze(state, PARAMS, TRAINED)
    assert fo.mask(state, PARAMS) == jax.tree.map(lambda _: False, PARAMS)


def test_a_phase_of_elements_is_refused_at_init():
    phases = fo.Phases({0: ~TRAINED, 5: fo.nothing})
    with pytest.raises(ValueError, match="'layer/kernel' would train in single elements"):
        fo.scheduled(optax.sm3(0.1), phases).init(PARAMS)
