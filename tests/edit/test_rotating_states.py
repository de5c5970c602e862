"""The state of `rotating` through edits, storage, and the transformations of JAX and Optax."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import freeze_optax as fo
from freeze_optax import linen
from tests.edit.test_rotating import PARAMS, Rotating, assert_same_bits, batch, of_turns
from tests.support import rotating_worker

pytestmark = pytest.mark.usefixtures("standard_promotion")

assert linen  # registers the states with flax.serialization

CLOCK = optax.linear_schedule(0.1, 0.0, 30)
INNER = optax.chain(optax.adamw(CLOCK), fo.rates({"layers/w": 0.5, "head": 0.25}, default=1.0))
# The first turn ends after two steps, the second after four.
TX = fo.rotating(INNER, "layers", 2, 2, key=jax.random.key(7))
RUN = Rotating(TX)
STEP = jax.jit(RUN.plain)


def trained(tree, steps, start=0):
    params, state = tree
    for step in range(start, start + steps):
        params, state, _ = STEP(params, state, batch(step))
    return params, state


BEGUN = (PARAMS, jax.jit(TX.init)(PARAMS))


@pytest.fixture(scope="module")
def middle():
    """Params and state in the middle of the second turn, and where they end three steps later."""
    with jax.numpy_dtype_promotion("standard"):
        tree = trained(BEGUN, 3)
        return tree, trained(tree, 3, start=3)


def raw(tree):
    """The tree with keys as their bits, so that it can be compared."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def through_export(params, state):
    return fo.import_state(TX, params, fo.export_state(state))


def through_arrays(params, state):
    exported = jax.tree.map(np.asarray, fo.export_state(state))
    return fo.import_state(TX, jax.tree.map(np.asarray, params), exported)


def through_pickle(params, state):
    return pickle.loads(pickle.dumps(state))


def through_flax(params, state):
    tree = flax.serialization.to_state_dict(raw(state))
    stored = flax.serialization.msgpack_restore(flax.serialization.msgpack_serialize(tree))
    found = flax.serialization.from_state_dict(raw(TX.init(params)), stored)
    key = jax.random.wrap_key_data(jnp.asarray(found.key))
    return jax.tree.map(jnp.asarray, found._replace(key=None))._replace(key=key)


def through_mapping(params, state):
    return optax.tree_map_params(TX, lambda x, p: x + 0 * p.sum(), state, params)


WAYS = [through_export, through_arrays, through_pickle, through_flax]


@pytest.mark.parametrize("way", WAYS)
def test_a_stored_state_is_the_same_and_goes_on_alike(way, middle):
    (params, state), expected = middle
    found = way(params, state)
    assert found.state.plan == state.state.plan
    assert_same_bits(raw(found), raw(state))
    assert_same_bits(raw(trained((params, found), 3, start=3)), raw(expected))


def test_orbax_stores_the_state_as_it_is(middle, tmp_path):
    (params, state), _ = middle
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        found = checkpointer.restore(tmp_path / "state", jax.eval_shape(TX.init, params))
    assert_same_bits(raw(found), raw(state))


def test_an_export_of_another_rotation_is_an_error(middle):
    (params, state), _ = middle
    exported = fo.export_state(state)
    for other, message in [
        (fo.rotating(INNER, "layers", 2, 2, order="ascending"), "only in the export: 'key'"),
        (fo.rotating(INNER, "layers", 1, 2, key=jax.random.key(0)), r"'rows' is \(\[2\]"),
        (fo.freezable(INNER), "only in the export: 'step', 'rows', 'key'"),
    ]:
        with pytest.raises(ValueError, match=message):
            fo.import_state(other, params, exported)
    other = fo.export_state(fo.freezable(INNER).init(params))
    with pytest.raises(ValueError, match="only in the state to be: 'step', 'rows', 'key'"):
        fo.import_state(TX, params, other)
    with pytest.raises(ValueError, match="take turns"):
        fo.import_state(TX, params, exported, frozen="layers")


def test_the_params_in_a_state_are_found_by_optax(middle):
    (_, state), _ = middle
    assert_same_bits(raw(optax.tree_map_params(TX, lambda x: x, state)), raw(state))
    doubled = optax.tree_map_params(TX, lambda x: 2 * x, state)
    for name in ("mu", "nu"):
        before, after = (optax.tree_utils.tree_get(s, name) for s in (state, doubled))
        assert before["layers"]["w"].shape == (2, *PARAMS["layers"]["w"].shape[1:])
        assert_same_bits(after, jax.tree.map(lambda x: 2 * x, before))
    assert doubled.rows.tolist() == state.rows.tolist()


# Edits.


def test_other_leaves_are_frozen_and_thawed_and_the_layers_do_not_notice(middle):
    (params, state), _ = middle
    frozen = fo.freeze(state, params, ("embed", fo.rows("head", [0])))
    assert fo.mask(frozen, params)["embed"] is True
    assert frozen.rows is state.rows
    for name in ("mu", "nu"):
        before, after = (optax.tree_utils.tree_get(s, name)["layers"] for s in (state, frozen))
        assert all(
            a is b for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
        )
    params, frozen = trained((params, frozen), 3)
    fo.testing.assert_frozen(middle[0][0], params, ("embed", fo.rows("head", [0])))
    assert not np.array_equal(params["head"], PARAMS["head"])
    thawed = fo.thaw(frozen, params, fo.everything)
    assert not any(jax.tree.leaves(fo.mask(thawed, params)))
    # New Adam, whose first step is as long as its rate: for the leaf thawed now, and for no other.
    after, _ = trained((params, thawed), 1)
    rate = CLOCK(6)
    np.testing.assert_allclose(
        abs(after["embed"] - params["embed"]).max(),
        rate * (1 + 1e-4 * abs(params["embed"]).max()),
        rtol=0.01,
    )


def test_parked_leaves_go_on_after_turns_in_which_they_were_frozen(middle):
    (params, state), _ = middle
    parked = fo.freeze(state, params, "head", keep_state=True)
    assert fo.set_frozen(state, params, "head", keep_state=True).state.plan == parked.state.plan
    same = fo.thaw(parked, params, "head")
    assert_same_bits(raw(same.state.inner), raw(state.state.inner))
    later, parked = trained((params, parked), 2)
    assert parked.rows.tolist() != state.rows.tolist()
    again = fo.thaw(parked, later, "head")
    for name in ("mu", "nu"):
        before, after = (optax.tree_utils.tree_get(s, name)["head"] for s in (state, again))
        assert_same_bits(after, before)
    fo.testing.assert_frozen(params, later, "head")


@pytest.mark.parametrize(
    "edit",
    [
        lambda state, params: fo.freeze(state, params, "layers"),
        lambda state, params: fo.freeze(state, params, "layers/b", keep_state=True),
        lambda state, params: fo.freeze(state, params, fo.rows("layers/w", [0])),
        lambda state, params: fo.set_frozen(state, params, fo.everything),
    ],
    ids=["freeze", "a leaf", "rows", "set_frozen"],
)
def test_an_edit_of_the_stack_is_an_error_that_names_it(edit, middle):
    (params, state), _ = middle
    with pytest.raises(ValueError, match=r"'layers/.*take turns") as error:
        edit(state, params)
    assert "fo.rotating(…, frozen=…)" in str(error.value)


def test_a_plain_optimizer_s_state_is_none_of_layers_in_turn(middle):
    (params, state), _ = middle
    with pytest.raises(ValueError, match=r"release was given the state of fo\.rotating"):
        fo.release(state, params)
    with pytest.raises(TypeError, match="the state of this one is a RotatingState"):
        fo.adopt(TX, INNER.init(params), params)


def test_a_factor_stays_with_its_leaf_whichever_layers_train(middle):
    (params, state), _ = middle
    adjusted = fo.adjust(state, params, "layers/w", 0.0)
    trained((params, state), 1)  # the caches may have been cleared since the fixture was made
    traced = RUN.traces
    later, adjusted = trained((params, adjusted), 4)
    assert RUN.traces == traced
    assert_same_bits(later["layers"]["w"], params["layers"]["w"])
    assert not np.array_equal(later["layers"]["b"], params["layers"]["b"])
    factors = optax.tree_utils.tree_get(adjusted, "factors")
    assert (float(factors["layers"]["w"]), float(factors["head"])) == (0.0, 0.25)


def test_what_counts_since_a_thaw_counts_each_turn_of_a_layer():
    schedule = optax.piecewise_constant_schedule(1.0, {1: 10.0, 2: 10.0, 3: 10.0, 4: 10.0})
    tx = of_turns(optax.chain(optax.sgd(1.0), fo.since_thaw(schedule)), every=2)

    def body(carry, _):
        params, state = carry
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        moved = -updates["layers"]["w"].min(), -updates["head"].min()
        return (params, state), moved

    layers, head = jax.jit(
        lambda params: jax.lax.scan(body, (params, tx.init(params)), length=5)[1]
    )(PARAMS)
    np.testing.assert_allclose(layers, [1, 10, 1, 10, 1], rtol=1e-5)
    np.testing.assert_allclose(head, [1, 10, 100, 1000, 10000], rtol=1e-5)


# Transformations of JAX and Optax.


def test_a_scan_of_steps_is_a_loop_of_steps(middle):
    tree, expected = middle

    def body(tree, x):
        params, state, _ = RUN.plain(*tree, x)
        return (params, state), None

    batches = jnp.stack([batch(step) for step in range(3, 6)])
    found = jax.jit(lambda tree: jax.lax.scan(body, tree, batches)[0])(tree)
    assert_same_bits(found[1].rows, expected[1].rows)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        raw(found),
        raw(expected),
    )


def test_each_model_of_a_population_has_layers_of_its_own():
    tx = fo.rotating(optax.adam(0.1), "layers", 1, 1, key=jax.random.key(0))
    run = Rotating(tx)
    count = 5
    params = jax.tree.map(lambda x: jnp.stack([x * (1 + i / 9) for i in range(count)]), PARAMS)
    keys = jax.random.split(jax.random.key(1), count)

    def body(tree, x):
        params, state, _ = run.plain(*tree, x)
        return (params, state), tree[1].rows

    def of_model(params, key):
        tree = params, tx.init(params)._replace(key=key)
        (params, _), rows = jax.lax.scan(body, tree, jnp.stack([batch(i) for i in range(3)]))
        return params, rows

    found, rows = jax.jit(jax.vmap(of_model))(params, keys)
    assert len(set(map(str, rows.tolist()))) > 1
    changed = (found["layers"]["w"] != params["layers"]["w"]).any((2, 3))
    for own, is_changed in zip(rows, changed, strict=True):
        assert set(np.ravel(own)) == set(np.flatnonzero(is_changed))
    one = jax.jit(of_model)(jax.tree.map(lambda x: x[2], params), keys[2])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[2], b, rtol=1e-4, atol=1e-5), (found, rows), one
    )


def test_a_turn_counts_updates_where_gradients_are_accumulated():
    tx = of_turns(optax.adam(0.1), ([0, 1], [2, 3]), every=2)
    steps = optax.MultiSteps(tx, 2)
    run = Rotating(steps)
    params, state = PARAMS, steps.init(PARAMS)
    rows = []
    for step in range(6):
        rows.append(state.inner_opt_state.rows.tolist())
        params, state, _ = run.step(jax.tree.map(jnp.copy, params), state, batch(step // 2))
    assert rows == [[0, 1]] * 4 + [[2, 3]] * 2
    plain, single = Rotating(tx), (jax.tree.map(jnp.copy, PARAMS), tx.init(PARAMS))
    for step in range(3):
        *single, _ = plain.step(*single, batch(step))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), params, single[0]
    )


def test_extra_arguments_like_the_params_have_the_layers_that_train():
    seen = []

    def update(updates, state, params=None, *, value, like, value_fn, **_):
        seen.append((jnp.shape(like["layers"]["w"]), float(value_fn(params))))
        return jax.tree.map(lambda u, x: u + 0 * x, updates, like), state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    tx = of_turns(inner)
    whole = lambda params: sum(x.sum() for x in jax.tree.leaves(params))  # noqa: E731
    tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=1.0, like=PARAMS, value_fn=whole)
    assert seen == [((2, *PARAMS["layers"]["w"].shape[1:]), float(whole(PARAMS)))]


# A run that is killed.


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_that_is_killed_at_any_step_ends_bitwise_where_another_ends(tmp_path):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, rotating_worker.__file__, str(tmp_path)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    lives = json.loads((tmp_path / "lives.json").read_text())
    # It was cut after each step of three turns, so also where the layers change.
    assert [life["code"] for life in lives["killed"]] == [-signal.SIGKILL] * len(lives["killed"])
    assert [life["step"] for life in lives["killed"]] == [0, *range(rotating_worker.STEPS - 1)]
    assert len(set(map(str, lives["rows"]))) >= 3
    assert lives["ended killed"] == lives["ended whole"]
