"""Inner states to which the first update adds arrays, as `optax.monitor` does."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo

pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),
    pytest.mark.skipif(not hasattr(optax, "monitor"), reason="optax.monitor is of optax 0.2.7"),
]


def params():
    return {"a": jnp.ones((3, 2)), "b": jnp.full(2, 2.0), "c": jnp.full(2, 3.0)}


def monitored():
    measures = {
        "norm": optax.tree.norm,
        "average": optax.measure_with_ema(optax.tree.norm, 0.9),
        "gradient": lambda updates: updates,
    }
    return optax.chain(optax.monitor(measures), optax.adam(0.1))


def update(tx, state, tree):
    updates, state = jax.jit(tx.update)(jax.tree.map(jnp.sin, tree), state, tree)
    return optax.apply_updates(tree, updates), state


def run(tx, edits=()):
    tree = params()
    state = tx.init(tree)
    for edit in (*edits, lambda state, _: state):
        tree, state = update(tx, state, tree)
        state = edit(state, tree)
    return tree, state


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


EDITS = [
    lambda state, tree: fo.freeze(state, tree, "b", keep_state=True),
    lambda state, tree: fo.thaw(state, tree, "a"),
    lambda state, tree: fo.freeze(state, tree, fo.rows("a", [0])),
    lambda state, tree: fo.set_frozen(state, tree, "c"),
]


def test_edits_and_cohorts_train_as_without_the_monitor_and_its_measurements_go_on():
    tree, state = run(fo.freezable(monitored(), "a"), EDITS)
    expected, _ = run(fo.freezable(optax.adam(0.1), "a"), EDITS)
    assert_same(tree, expected)
    measurements = state.inner[0].measurements
    sines = [measurements["gradient"]["a"].values, measurements["gradient"]["b"]]
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(sines)))
    np.testing.assert_allclose(measurements["norm"], norm, rtol=1e-6)
    assert len(set(state.plan.cohorts)) > 2


def test_the_trainable_leaves_have_the_measurements_of_a_bare_monitor():
    _, state = run(fo.freezable(monitored(), "a"), [lambda state, _: state])
    tree, bare = {name: x for name, x in params().items() if name != "a"}, monitored()
    bare_state = bare.init(tree)
    for _ in range(2):
        tree, bare_state = update(bare, bare_state, tree)
    ours = state.inner[0].measurements
    assert_same(
        {**ours, "gradient": {k: ours["gradient"][k] for k in "bc"}}, bare_state[0].measurements
    )


def test_the_state_has_one_structure_from_init_on_so_a_scan_can_carry_it():
    tx = fo.freezable(monitored(), "a")

    def step(carry, _):
        return update(tx, carry[1], carry[0]), None

    carry, _ = jax.lax.scan(step, (params(), tx.init(params())), length=3)
    assert_same(carry, run(tx, [lambda state, _: state] * 2))


@pytest.mark.parametrize("steps", [0, 2])
def test_exports_adopt_and_release_take_states_before_and_after_the_first_update(steps):
    tx, bare, tree = fo.freezable(monitored()), monitored(), params()
    state, plain = tx.init(tree), bare.init(tree)
    for _ in range(steps):
        _, state = update(tx, state, tree)
        _, plain = update(bare, plain, tree)
    assert_same(fo.import_state(tx, tree, fo.export_state(state)), state)
    assert_same(fo.adopt(tx, plain, tree), state)
    released = fo.release(state, tree)
    assert_same(update(bare, released, tree), update(bare, plain, tree))
    mapped = optax.tree_map_params(tx, jnp.zeros_like, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)


def test_a_schedule_takes_a_monitor():
    tx = fo.scheduled(monitored(), fo.Phases({0: "a", 2: "b"}))
    plain = fo.scheduled(optax.adam(0.1), fo.Phases({0: "a", 2: "b"}))
    same = [lambda state, _: state] * 3
    assert_same(run(tx, same)[0], run(plain, same)[0])


class Late(NamedTuple):
    history: Any


def late(first):
    return optax.GradientTransformation(
        lambda params: Late(first),
        lambda updates, state, params=None: (updates, Late((jnp.zeros(3),))),
    )


def test_growth_that_is_not_foreseen_is_an_error_that_names_the_node_and_the_remedy():
    tx = fo.freezable(optax.chain(late(()), optax.adam(0.1)), "a")
    tree, state = run(tx)
    with pytest.raises(
        ValueError, match=r"'0/history/0'; if `update` is what makes them, let `init"
    ):
        fo.thaw(state, tree, "a")


def test_a_list_that_grows_is_foreseen():
    inner = optax.chain(late([]), optax.adam(0.1))
    state = fo.freezable(inner, "a").init(params())
    assert state.inner[0].history[0].shape == (3,)
