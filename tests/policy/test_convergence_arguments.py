"""`Convergence`: arguments that are wrong raise, and say what to write instead."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import freeze_optax as fo

PARAMS = {"encoder": jnp.ones(4), "head": jnp.ones(4)}
MEASURED = fo.freezable(fo.measured(optax.sgd(0.1)))

TYPES = [
    ({"order": "encoder"}, r"order is a list of specs .* not 'encoder'; write \['encoder'\]"),
    ({"order": fo.path("encoder")}, r"order is a list of specs from input to output, not path"),
    ({"threshold": "small"}, r"the threshold of Convergence is a number, not 'small'"),
    ({"threshold": True}, r"the threshold of Convergence is a number, not True"),
    ({"threshold": None, "quantile": [0.5]}, r"the quantile of Convergence is a number, not \["),
    ({"patience": 2.0}, r"patience is a number of steps, an integer, not 2\.0"),
    ({"every": None}, r"every is a number of steps, an integer, not None"),
    ({"probe": True}, r"probe is a number of steps, an integer, not True"),
    ({"score": "update"}, r"score is a function of a Score and a norm, not 'update'"),
]


@pytest.mark.parametrize(("options", "message"), TYPES, ids=lambda x: str(x)[:30])
def test_a_wrong_type_is_an_error(options, message):
    with pytest.raises(TypeError, match=message):
        fo.Convergence(**{"threshold": 0.1, **options})


VALUES = [
    ({"threshold": None}, r"takes a threshold or a quantile, and not both"),
    ({"quantile": 0.5}, r"takes a threshold or a quantile, and not both"),
    ({"order": []}, r"order is an empty list, so nothing would ever be frozen"),
    ({"threshold": -0.1}, r"the threshold of Convergence is 0 or more, not -0\.1"),
    ({"threshold": float("nan")}, r"the threshold of Convergence is 0 or more, not nan"),
    ({"threshold": None, "quantile": 1.5}, r"the quantile of Convergence is from 0 to 1, not 1\.5"),
    ({"patience": 0}, r"patience is 0, but it is 1 or more steps"),
    ({"every": -1}, r"every is -1, but it is 1 or more steps"),
    ({"every": 20, "probe": 50}, r"probe is 50, but decisions come every 20 steps; .*, probe=60"),
]


@pytest.mark.parametrize(("options", "message"), VALUES, ids=lambda x: str(x)[:30])
def test_a_wrong_value_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        fo.Convergence(**{"threshold": 0.1, **options})


POLICY = fo.Convergence(["encoder"], threshold=0.1, patience=1, every=2)


def test_a_step_is_a_known_number():
    state = MEASURED.init(PARAMS)
    for step in (1.0, "1", None):
        with pytest.raises(TypeError, match=r"a step is an integer known outside of jit"):
            POLICY.at(step, state, PARAMS)
    with pytest.raises(ValueError, match=r"step -1 is negative; steps count from 0"):
        POLICY.is_due(-1)
    with pytest.raises(TypeError, match=r"a step is an integer known outside of jit"):
        jax.jit(POLICY.is_due)(1)
    with pytest.raises(ValueError, match=r"steps is -1, but it is 0 or more steps"):
        POLICY.most_changes(-1)
    assert POLICY.is_due(jnp.asarray(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": ["encodr"]}, r"rule 1 of fo\.Convergence, path\('encodr'\), does not fit: "),
        ({"order": ["*", "head"]}, r"rule 2 .* wins no leaf"),
        (
            {"order": [fo.rows("encoder", [0])]},
            r"selects a part of 'encoder' .* a group is for a w",
        ),
        ({"floor": "haed"}, r"pattern 'haed' selects no leaf; nearest: 'head'"),
        ({"frozen": "haed"}, r"pattern 'haed' selects no leaf; nearest: 'head'"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_a_spec_that_does_not_fit_raises_at_the_first_step(options, message):
    policy = fo.Convergence(**{"threshold": 0.1, **options})
    with pytest.raises(ValueError, match=message):
        policy.at(0, MEASURED.init(PARAMS), PARAMS)


def after_a_step(tx: Any) -> Any:
    return tx.update(PARAMS, tx.init(PARAMS), PARAMS)[1]


STATES = [
    (optax.sgd(0.1), TypeError, r"Convergence\.at was given .* which holds no FreezeState"),
    (
        fo.freezable(optax.sgd(0.1)),
        TypeError,
        r"no state of fo\.measured is; measure the optimizer",
    ),
    (
        fo.freezable(fo.measured(optax.sgd(0.1), by={"encoder": "a", "head": "b"})),
        ValueError,
        r"the norms in the state are those of 'a', 'b', which are no leaves of the params; ",
    ),
    (
        fo.scheduled(fo.measured(optax.sgd(0.1)), fo.Phases({0: fo.nothing})),
        ValueError,
        r"the state of fo\.scheduled follows its phases; it can't be edited by Convergence\.at",
    ),
]


@pytest.mark.parametrize(
    ("tx", "kind", "message"), STATES, ids=["no state", "not measured", "groups", "phases"]
)
def test_a_state_that_it_cannot_read_or_edit_is_an_error(tx, kind, message):
    with pytest.raises(kind, match=message):
        POLICY.at(2, after_a_step(tx), PARAMS)


def test_layers_in_turns_are_an_error():
    params = {"layers": jnp.ones((3, 4))}
    tx = fo.rotating(fo.measured(optax.sgd(0.1)), "layers", count=1, every=2, order="ascending")
    with pytest.raises(ValueError, match=r"a state of fo\.rotating, whose layers take turns"):
        fo.Convergence(threshold=0.1).at(1, tx.init(params), params)


def test_other_params_are_an_error():
    with pytest.raises(ValueError, match=r"params and the optimizer state are of different params"):
        POLICY.at(1, MEASURED.init(PARAMS), {"head": jnp.ones(4)})


def test_a_score_that_is_no_number_is_an_error():
    for wrong in (None, "low", jnp.ones(2), True):
        policy = fo.Convergence(
            threshold=0.1, patience=1, every=2, score=lambda score, norm, x=wrong: x
        )
        with pytest.raises(TypeError, match=r"the function `score` of Convergence returned "):
            policy.at(2, after_a_step(MEASURED), PARAMS)
