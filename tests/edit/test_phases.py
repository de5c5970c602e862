"""Phases: what is frozen is a function of the step alone, so a loop can stop and go on anywhere."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freeze_optax as fo
from tests.support import by_hand

pytestmark = pytest.mark.usefixtures("standard_promotion")

# Out of order, as a dict that was put together from several may be.
PHASES = fo.Phases({5: fo.nothing, 0: "encoder", 7: "head", 2: "encoder/a"})
ENCODER, A, NOTHING, HEAD = {"encoder/a", "encoder/b"}, {"encoder/a"}, set(), {"head"}
FROZEN = [ENCODER, ENCODER, A, A, A, NOTHING, NOTHING, HEAD, HEAD]
STEPS = len(FROZEN)


def make_params() -> Any:
    keys = jax.random.split(jax.random.key(0), 3)
    a, b, head = (jax.random.normal(key, (3, 3)) for key in keys)
    return {"encoder": {"a": a, "b": b}, "head": head}


def batch(step: Any) -> jax.Array:
    return jax.random.normal(jax.random.key(step + 1), (4, 3))


def loss(params: Any, x: Any) -> Any:
    hidden = jnp.tanh(jnp.tanh(x @ params["encoder"]["a"]) @ params["encoder"]["b"])
    return ((hidden @ params["head"]) ** 2).mean()


@pytest.mark.parametrize(
    ("step", "spec"),
    [
        (0, "encoder"),
        (1, "encoder"),
        (2, "encoder/a"),
        (4, "encoder/a"),
        (5, fo.nothing),
        (6, fo.nothing),
        (7, "head"),
        (10**12, "head"),
    ],
)
def test_the_spec_at_a_step_is_that_of_the_last_phase_that_began(step, spec):
    assert PHASES.at(step) is spec


@pytest.mark.parametrize(
    "of_kind",
    [
        np.int32,
        np.int64,
        np.uint8,
        np.array,
        lambda step: jnp.array(step, jnp.int32),
        lambda step: jax.jit(lambda x: x + 1)(step - 1),
    ],
    ids=["int32", "int64", "uint8", "0-d array", "jax array", "jitted"],
)
def test_a_step_counted_in_numpy_or_jax_is_a_step(of_kind):
    expected = ["encoder", "encoder", "encoder/a", "encoder/a", "encoder/a"]
    assert [PHASES.at(of_kind(step)) for step in range(5)] == expected
    assert fo.Phases({np.int64(2): "head", 0: "encoder"}).at(of_kind(2)) == "head"


def test_asking_has_no_memory():
    forward = [PHASES.at(step) for step in range(STEPS)]
    backward = [PHASES.at(step) for step in reversed(range(STEPS))]
    assert forward == backward[::-1]


def test_phases_do_not_follow_the_dict_they_were_made_of():
    specs = {0: "encoder"}
    phases = fo.Phases(specs)
    specs[1] = "head"
    assert phases.at(1) == "encoder"


@pytest.mark.parametrize("step", [-1, 0, 2, np.int64(2)])
def test_a_step_before_the_first_phase_is_an_error(step):
    phases = fo.Phases({3: "encoder", 9: fo.nothing})
    with pytest.raises(ValueError, match=rf"step {step} is before the first phase.*begins at 3"):
        phases.at(step)
    assert phases.at(3) == "encoder"


@pytest.mark.parametrize(
    "ask",
    [
        lambda: jax.jit(PHASES.at)(3),
        lambda: jax.lax.scan(lambda c, step: (c, PHASES.at(step)), 0, jnp.arange(3)),
        lambda: PHASES.at(3.0),
        lambda: PHASES.at(np.float32(3)),
        lambda: PHASES.at(jnp.float32(3)),
        lambda: PHASES.at("3"),
        lambda: PHASES.at(None),
        lambda: PHASES.at(jnp.array([3, 4])),
    ],
    ids=["jit", "scan", "float", "float32", "jax float", "text", "None", "vector"],
)
def test_a_step_that_is_traced_or_no_integer_is_an_error_that_names_scheduled(ask):
    with pytest.raises(TypeError, match=r"a step is an integer .*fo\.scheduled\(inner, phases\)"):
        ask()


@pytest.mark.parametrize(
    ("specs", "error", "message"),
    [
        ({}, ValueError, r"needs a phase; .*Phases\(\{0: fo\.nothing\}\)"),
        ({-1: "a", 0: "b"}, ValueError, r"a phase begins at step -1; steps count from 0"),
        ({0: "a", 2.5: "b"}, TypeError, r"a step is an integer .*not 2\.5"),
        ({"0": "a"}, TypeError, r"a step is an integer .*not '0'"),
    ],
    ids=["empty", "negative", "float", "text"],
)
def test_steps_that_can_not_be_are_an_error_when_phases_are_made(specs, error, message):
    with pytest.raises(error, match=message):
        fo.Phases(specs)


def test_the_representation_is_the_phases_in_order():
    phases = fo.Phases({500: "encoder/a", 0: "encoder"})
    assert repr(phases) == "Phases({0: 'encoder', 500: 'encoder/a'})"


@pytest.mark.parametrize("abstract", [False, True], ids=["arrays", "shapes"])
def test_validate_resolves_every_kind_of_spec(abstract):
    params = jax.eval_shape(make_params) if abstract else make_params()
    every_kind = {
        0: "encoder",
        1: ["encoder/a", fo.path("head")],
        2: fo.everything - "head",
        3: {"encoder": True, "head": False},
        4: False,
        5: lambda tree: jax.tree.map(lambda x: x.ndim == 2, tree),
    }
    assert fo.Phases(every_kind).validate(params) is None


@pytest.mark.parametrize(
    ("typo", "error", "message"),
    [
        ("encodr", ValueError, r"'encodr' selects no leaf; nearest: 'encoder'"),
        (["head", "encoder/c"], ValueError, r"'encoder/c' selects no leaf"),
        ({"encoder": True}, ValueError, r"the mask does not fit.*'head'"),
        (fo.layers("encoder/*")[2], IndexError, r"encoder/\*"),
        ({"encoder": 1, "head": False}, TypeError, r"bool"),
    ],
    ids=["pattern", "list", "mask", "index", "no bool"],
)
def test_validate_names_the_phase_of_a_typo(typo, error, message):
    phases = fo.Phases({0: "encoder", 500: fo.nothing, 1000: typo, 2000: "head"})
    with pytest.raises(error, match=rf"(?s)in the phase from step 1000 on: .*{message}"):
        phases.validate(make_params())


def make_step(tx: Any) -> Any:
    @jax.jit
    def step(params, state, x):
        grads = fo.grad(loss, frozen=state)(params, x)
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    return step


def loop(step_fn: Any, params: Any, state: Any, start: int, keep_state: bool) -> list[Any]:
    """Params and state before each step, as a checkpoint would hold them, and after the last."""
    history = [(params, state)]
    for step in range(start, STEPS):
        state = fo.set_frozen(state, params, PHASES.at(step), keep_state=keep_state)
        params, state = step_fn(params, state, batch(step))
        history.append((params, state))
    return history


@pytest.mark.parametrize("keep_state", [False, True], ids=["dropped", "parked"])
@pytest.mark.parametrize("name", ["clip and adamw", "cosine"])
def test_a_loop_over_phases_equals_optimizers_kept_per_leaf_by_hand(name, keep_state):
    case = by_hand.CASES[name]
    tx, params = fo.freezable(case.inner, PHASES.at(0)), make_params()
    ours = loop(make_step(tx), params, tx.init(params), 0, keep_state)
    batches = [batch(step) for step in range(STEPS)]
    theirs = by_hand.train(case, loss, params, batches, FROZEN, keep_state)
    for (tree, _), expected in zip(ours, theirs, strict=True):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), tree, expected
        )


@pytest.mark.parametrize("keep_state", [False, True], ids=["dropped", "parked"])
def test_a_loop_killed_at_any_step_and_resumed_ends_bitwise_where_the_uninterrupted_one_ends(
    keep_state,
):
    inner = by_hand.CASES["cosine"].inner
    tx, params = fo.freezable(inner, PHASES.at(0)), make_params()
    uninterrupted = loop(make_step(tx), params, tx.init(params), 0, keep_state)
    stored = [[np.asarray(x) for x in jax.tree.leaves(saved)] for saved in uninterrupted]
    # What a restart has: the same script, and of the run no more than numbers and a step.
    tx = fo.freezable(inner, PHASES.at(0))
    step_fn = make_step(tx)
    for start, leaves in enumerate(stored):

        def replayed(params, start=start):
            state = tx.init(params)
            for step in range(start):
                state = fo.set_frozen(state, params, PHASES.at(step), keep_state=keep_state)
            return params, state

        structure = jax.tree.structure(jax.eval_shape(replayed, jax.eval_shape(make_params)))
        resumed = jax.tree.unflatten(structure, [jnp.asarray(x) for x in leaves])
        resumed = loop(step_fn, *resumed, start, keep_state)
        assert jax.tree.structure(resumed[-1]) == jax.tree.structure(uninterrupted[-1])
        fo.testing.assert_frozen(uninterrupted[-1], resumed[-1], True)


def test_errors_that_are_not_made_of_a_text_keep_their_type_and_say_the_phase():
    phases = fo.Phases({3: fo.where(lambda path, x: bool(x.sum() > 0))})
    with pytest.raises(jax.errors.TracerBoolConversionError) as caught:
        jax.eval_shape(phases.validate, make_params())
    assert "in the phase from step 3 on" in caught.value.__notes__
