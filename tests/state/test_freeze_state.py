"""The repr of an optimizer state: what is frozen, and no arrays."""

import dataclasses
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import freeze_optax as fo

pytestmark = pytest.mark.usefixtures("standard_promotion")

ADAM = optax.adam(0.1)


def params() -> dict[str, Any]:
    return {"a": jnp.ones(2), "b": {"c": jnp.ones(3), "d": jnp.ones((4, 2))}, "e": jnp.ones(5)}


def init(inner: Any, frozen: Any) -> Any:
    return fo.freezable(inner, frozen).init(params())


def thawed() -> Any:
    tx, state = fo.freezable(ADAM, "b"), init(ADAM, "b")
    return fo.thaw(tx.update(params(), state, params())[1], params(), "b/c")


INNER = "inner=(ScaleByAdamState, EmptyState)"
REPRS = {
    "nothing": (lambda: init(ADAM, fo.nothing), f"FreezeState(frozen=0 of 4 leaves, {INNER})"),
    "one": (lambda: init(ADAM, "a"), f"FreezeState(frozen=1 of 4 leaves ['a'], {INNER})"),
    "three": (
        lambda: init(ADAM, ("a", "b")),
        f"FreezeState(frozen=3 of 4 leaves ['a', 'b/c', 'b/d'], {INNER})",
    ),
    "two cohorts": (thawed, f"FreezeState(frozen=1 of 4 leaves ['b/d'], cohorts=2, {INNER})"),
    "parked": (
        lambda: fo.freeze(init(ADAM, "a"), params(), "e", keep_state=True),
        f"FreezeState(frozen=2 of 4 leaves ['a', 'e'], parked=1, cohorts=2, {INNER})",
    ),
    "sgd": (
        lambda: init(optax.sgd(0.1), "a"),
        "FreezeState(frozen=1 of 4 leaves ['a'], inner=(EmptyState, EmptyState))",
    ),
    "wrapped": (
        lambda: init(optax.MultiSteps(ADAM, 2).gradient_transformation(), "a"),
        "FreezeState(frozen=1 of 4 leaves ['a'], inner=MultiStepsState)",
    ),
    "chain": (
        lambda: init(optax.chain(optax.clip(1.0), ADAM), "a"),
        f"FreezeState(frozen=1 of 4 leaves ['a'], inner=(EmptyState, {INNER[6:]}))",
    ),
    "unpickled": (
        lambda: pickle.loads(pickle.dumps(init(ADAM, "a"))),
        f"FreezeState(frozen=1 of 4 leaves ['a'], {INNER})",
    ),
    "abstract": (
        lambda: jax.eval_shape(fo.freezable(ADAM, "a").init, params()),
        f"FreezeState(frozen=1 of 4 leaves ['a'], {INNER})",
    ),
    "mapped": (
        lambda: optax.tree_map_params(fo.freezable(ADAM, "a"), lambda x: x, init(ADAM, "a")),
        f"FreezeState(frozen=1 of 4 leaves ['a'], {INNER})",
    ),
}


@pytest.mark.parametrize(("make", "text"), REPRS.values(), ids=REPRS)
def test_a_state_says_what_is_frozen(make, text):
    state = make()
    assert repr(state) == text
    assert str(state) == text


def test_a_leaf_that_is_frozen_in_part_is_not_said_to_be_frozen_whole():
    text = repr(init(ADAM, ("a", fo.rows("e", [0, 1]))))
    assert text.startswith("FreezeState(frozen=1 of 4 leaves")
    assert "in part" in text


def test_of_many_leaves_that_are_frozen_in_part_three_are_named():
    tree = {f"layer_{i}": jnp.ones(2) for i in range(5)}
    text = repr(fo.freezable(ADAM, fo.rows("*", [0])).init(tree))
    in_part = "in part: ['layer_0', 'layer_1', 'layer_2' and 2 more]"
    assert text == f"FreezeState(frozen=0 of 5 leaves, {in_part}, {INNER})"


def test_a_state_can_not_be_written_to():
    state = init(ADAM, "a")
    for name in ("inner", "ages", "plan"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(state, name, None)


def test_everything_frozen_is_said_too():
    with pytest.warns(UserWarning, match="nothing"):
        state = init(ADAM, True)
    expected = f"FreezeState(frozen=4 of 4 leaves ['a', 'b/c', 'b/d' and 1 more], {INNER})"
    assert repr(state) == expected


def test_the_repr_of_a_large_state_is_one_line():
    tree = {f"layer_{i:04d}": jnp.ones(1) for i in range(2000)}
    text = repr(fo.freezable(ADAM, "layer_0*").init(tree))
    assert text == (
        "FreezeState(frozen=1000 of 2000 leaves ['layer_0000', 'layer_0001', 'layer_0002' and 997 "
        f"more], {INNER})"
    )


def test_a_state_within_another_shows_its_own_repr():
    state = optax.chain(fo.freezable(ADAM, "a"), optax.scale(0.5)).init(params())
    assert repr(state) == f"(FreezeState(frozen=1 of 4 leaves ['a'], {INNER}), EmptyState())"
    outer = fo.freezable(optax.chain(fo.freezable(optax.sgd(0.1)), optax.clip(1.0)), "a")
    assert repr(outer.init(params())).endswith("inner=(FreezeState, EmptyState))")


def test_under_jit_and_in_an_nnx_optimizer_there_are_no_tracers_in_it():
    seen = []

    @jax.jit
    def look(state):
        seen.append(repr(state))
        return state

    look(init(ADAM, "a"))
    assert seen == [f"FreezeState(frozen=1 of 4 leaves ['a'], {INNER})"]
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, fo.freezable(ADAM, "bias"), wrt=nnx.Param)
    text = repr(optimizer.opt_state)
    assert text.startswith("FreezeState(frozen=1 of 2 leaves ['bias'], inner=")
    assert len(text.splitlines()) == 1


def test_the_state_of_phases_says_what_it_keeps():
    state = fo.scheduled(ADAM, fo.Phases({0: "b", 5: "b/d"})).init(params())
    expected = f"FreezeState(frozen=1 of 4 leaves ['b/d'], cohorts=2, {INNER})"
    assert repr(state.state) == expected
    assert repr(state) == f"ScheduledState(step={state.step!r}, state={expected})"
