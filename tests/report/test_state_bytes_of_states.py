"""The bytes that a summary tells of states, and of specs that only values can tell."""

import pickle
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax.training.train_state import TrainState

import freeze_optax as fo
from tests.support import optimizers

pytestmark = pytest.mark.usefixtures("standard_promotion")

ADAM, SGD = optax.adam(0.1), optax.sgd(0.1, momentum=0.9)


def small() -> dict[str, Any]:
    return {"body": {"b": jnp.ones(3), "w": jnp.zeros((2, 3))}, "head": jnp.ones(5)}


def initialised(inner: Any, spec: Any) -> Any:
    return fo.freezable(inner, spec).init(small())


# Optimizers that are not those of the state.

OTHERS = {
    "another statistic": (SGD, "only in one of the optimizer: '0/trace/body/b'"),
    "no statistics": (
        optax.sgd(0.1),
        "and 2 more; pass the optimizer that made the state, or none",
    ),
    "in a chain": (
        optax.chain(optax.clip(1.0), ADAM),
        r"only in one of the optimizer: '1/0/count'",
    ),
    "in a freezable": (
        fo.freezable(SGD, "head"),
        r"only in one of the optimizer: '0/trace/body/b'",
    ),
    "around it": (optax.MultiSteps(ADAM, 2), r"only in one of the optimizer: 'mini_step'"),
}
MADE = {
    "fresh": lambda: initialised(ADAM, "body"),
    "in a tuple": lambda: (initialised(ADAM, "body"), optax.EmptyState()),
    "in a list": lambda: [initialised(ADAM, "body")],
    "unpickled": lambda: pickle.loads(pickle.dumps(initialised(ADAM, "body"))),
    "of rows": lambda: initialised(ADAM, fo.rows("head", [1])),
    "abstract": lambda: jax.eval_shape(lambda: initialised(ADAM, "body")),
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
@pytest.mark.parametrize(("optimizer", "match"), OTHERS.values(), ids=OTHERS)
def test_the_optimizer_of_another_state_is_an_error_that_shows_both_sides(optimizer, match, make):
    match = rf"the state is not one of the optimizer .*only in the state: '0/count', .*{match}"
    with pytest.raises(ValueError, match=match):
        fo.summary(small(), make(), optimizer)


SOME = ["adam", "adafactor", "scale_by_lbfgs", "masked", "partition", "inject_hyperparams"]
SOME += ["MultiSteps", "novograd", "sm3", "sgd"]
SPEC = (fo.rows("bottom/kernel", slice(0, 2)), "middle/bias")


@pytest.mark.parametrize("name", SOME)
def test_the_own_optimizer_of_a_state_says_the_same_as_none(name):
    params, tx = optimizers.params(), optimizers.build(optax, name)
    state = fo.freezable(tx, SPEC).init(params)
    assert fo.summary(params, state, tx) == fo.summary(params, state)


# Lists of one state.

PHASES = fo.scheduled(ADAM, fo.Phases({0: "body", 5: "body/w"}))
HOLDERS = {
    "FreezeState": lambda: initialised(ADAM, "body"),
    "scheduled": lambda: PHASES.init(small()),
    "TrainState": lambda: TrainState.create(
        apply_fn=None, params=small(), tx=fo.freezable(ADAM, "body")
    ),
}


@pytest.mark.parametrize("make", HOLDERS.values(), ids=HOLDERS)
@pytest.mark.parametrize("optimizer", [None, ADAM], ids=["state alone", "optimizer"])
def test_a_list_of_one_state_says_the_same_as_the_state(make, optimizer):
    state = make()
    expected = fo.summary(small(), state, optimizer)
    assert expected.state_bytes > 0
    for frozen in ([state], [[state]], (state,)):
        assert fo.summary(small(), frozen, optimizer) == expected


def test_a_list_of_a_state_and_more_is_a_spec_whose_state_is_not_known():
    state = initialised(ADAM, "body")
    assert fo.summary(small(), [state, "head"]).state_bytes is None
    assert fo.summary(small(), [state, "head"], ADAM).state_bytes == 4


# Specs that read values, which an abstract `init` has not.


def is_all_zeros(path: str, leaf: Any) -> bool:
    return not leaf.any()


READS = fo.where(is_all_zeros)
READING = {
    "plain": ADAM,
    "told the same": fo.freezable(ADAM, READS),
    "told the same, in a chain": optax.chain(optax.clip(1.0), fo.freezable(ADAM, READS)),
}


@pytest.mark.parametrize("optimizer", READING.values(), ids=READING)
def test_a_spec_that_reads_values_says_the_same_as_what_it_comes_to(optimizer):
    assert fo.summary(small(), READS, optimizer) == fo.summary(small(), "body/w", ADAM)


def test_a_spec_is_resolved_once():
    asked = []
    fo.summary(small(), fo.where(lambda path, leaf: bool(asked.append(path))), ADAM)
    assert asked == ["body/b", "body/w", "head"]
