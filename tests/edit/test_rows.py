"""Freezing and thawing rows mid-training, against a bare optimizer for each row."""

import copy
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from tests.support.sampling import cases

pytestmark = pytest.mark.usefixtures("standard_promotion")

GRADS = [0.3, -0.2, 0.5, 0.1, -0.7, 0.4, 0.9, -0.6]
ADAM = optax.adam(0.1)


def params(rows: int = 6) -> dict[str, Any]:
    values = jnp.arange(1, 2 * rows + 1, dtype=jnp.float32).reshape(rows, 2) / 8
    return {"embed": values, "head": jnp.array([1.0, -2.0, 3.0])}


def rows(*indices: int) -> fo.Selector:
    return fo.rows("embed", list(indices))


def park(state: Any, tree: Any, where: Any) -> Any:
    return fo.freeze(state, tree, where, keep_state=True)


def grads_of(tree: Any, value: float) -> Any:
    return jax.tree.map(lambda x: x * x * value, params(len(tree["embed"])))


def run(tx: Any, tree: Any, state: Any, values: Any, wrap: Any = jax.jit) -> tuple[Any, Any]:
    update = wrap(tx.update)
    for value in values:
        updates, state = update(grads_of(tree, value), state, tree)
        tree = fo.apply_updates(tree, updates, frozen=state)
    return tree, state


def same(expected: Any, new: Any) -> None:
    """Whether two trees have the same arrays, bit by bit, and one structure."""
    assert jax.tree.structure(expected) == jax.tree.structure(new)
    fo.testing.assert_frozen(expected, new, True)


def each(indices: list[int], *courses: Any) -> dict[int, list[Any]]:
    return {row: list(courses) for row in indices}


# The edits before some steps, and for each row the steps that train it: a list for each state
# that it has had, as dropped state starts afresh.
COURSES = {
    "rows are thawed in two lots": (
        rows(0, 1, 2),
        {2: lambda s, t: fo.thaw(s, t, rows(0)), 5: lambda s, t: fo.thaw(s, t, rows(1, 3))},
        {0: [range(2, 8)], 1: [range(5, 8)], 2: []},
    ),
    "rows of a whole leaf are dropped": (
        fo.nothing,
        {2: lambda s, t: fo.freeze(s, t, rows(1, 4)), 5: lambda s, t: fo.thaw(s, t, rows(1, 4))},
        each([1, 4], range(2), range(5, 8)),
    ),
    "rows of a whole leaf are parked": (
        fo.nothing,
        {2: lambda s, t: park(s, t, rows(1, 4)), 5: lambda s, t: fo.thaw(s, t, rows(1, 4))},
        each([1, 4], [0, 1, 5, 6, 7]),
    ),
    "parked rows are cut again": (
        fo.nothing,
        {
            1: lambda s, t: park(s, t, rows(0, 1, 2)),
            3: lambda s, t: fo.thaw(s, t, rows(1)),
            5: lambda s, t: fo.thaw(s, t, rows(0, 2)),
        },
        {0: [[0, 5, 6, 7]], 1: [[0, 3, 4, 5, 6, 7]], 2: [[0, 5, 6, 7]]},
    ),
    "parked rows are frozen again, to be dropped": (
        fo.nothing,
        {
            2: lambda s, t: park(s, t, rows(0, 1)),
            3: lambda s, t: fo.freeze(s, t, rows(1, 2)),
            5: lambda s, t: fo.thaw(s, t, "embed"),
        },
        {**each([0, 1], [0, 1, 5, 6, 7]), 2: [range(3), range(5, 8)]},
    ),
    "all are thawed, parked, and thawed": (
        rows(0, 3),
        {
            2: lambda s, t: fo.thaw(s, t, "**"),
            4: lambda s, t: park(s, t, "embed"),
            6: lambda s, t: fo.thaw(s, t, "**"),
        },
        {**each([1, 2, 4, 5], [0, 1, 2, 3, 6, 7]), 0: [[2, 3, 6, 7]], 3: [[2, 3, 6, 7]]},
    ),
    "the frozen rows move": (
        rows(0, 1),
        {
            2: lambda s, t: fo.set_frozen(s, t, rows(1, 2)),
            4: lambda s, t: fo.set_frozen(s, t, rows(2, 3), keep_state=True),
            6: lambda s, t: fo.set_frozen(s, t, fo.nothing),
        },
        {0: [range(2, 8)], 1: [range(4, 8)], 2: [[0, 1], [6, 7]], 3: [[0, 1, 2, 3, 6, 7]]},
    ),
    "a row is dropped, then the leaf, and two rows come back": (
        fo.nothing,
        {
            2: lambda s, t: fo.freeze(s, t, rows(0)),
            3: lambda s, t: fo.freeze(s, t, "embed"),
            5: lambda s, t: fo.thaw(s, t, rows(0, 5)),
        },
        {
            **each([1, 2, 3, 4], range(3)),
            0: [range(2), range(5, 8)],
            5: [range(3), range(5, 8)],
        },
    ),
}

INNERS = {
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "MultiSteps": optax.MultiSteps(ADAM, 2).gradient_transformation(),
    "labels": optax.partition({"a": ADAM, "b": optax.sgd(0.1)}, {"embed": "a", "head": "b"}),
    "a mask tree": optax.adamw(0.1, weight_decay=0.1, mask={"embed": True, "head": False}),
    "a mask by shape": optax.adamw(
        0.1, weight_decay=0.1, mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
    ),
    "a mask by glob": optax.chain(
        optax.masked(optax.add_decayed_weights(0.1), fo.path("embed")), ADAM
    ),
    "a mask by regex": optax.chain(
        optax.masked(optax.add_decayed_weights(0.1), fo.regex("embed")), ADAM
    ),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "apply_if_finite": optax.apply_if_finite(ADAM, 3),
}
CHECKS = [(name, course) for name in ("adamw", "momentum") for course in COURSES]
CHECKS += [(name, "parked rows are cut again") for name in INNERS]


def bare_row(init: Any, update: Any, row: int, courses: Any) -> Any:
    """What bare optimizers make of one row, a new one for each list of steps."""
    tree = {**params(), "embed": params()["embed"][row : row + 1]}
    grads = {**params(), "embed": tree["embed"]}
    for steps in courses:
        state = init(tree)
        for step in steps:
            given = jax.tree.map(lambda x, step=step: x * x * GRADS[step], grads)
            updates, state = update(given, state, tree)
            tree = optax.apply_updates(tree, updates)
    return tree["embed"][0]


@pytest.mark.parametrize(
    ("name", "course"),
    cases(
        {f"{name}-{course}": (name, course) for name, course in CHECKS},
        [f"adamw-{course}" for course in COURSES] + ["labels-parked rows are cut again"],
    ),
)
def test_each_row_follows_a_bare_optimizer_over_the_steps_that_train_it(name, course):
    frozen, edits, trained = COURSES[course]
    trained = {row: trained.get(row, [range(8)]) for row in range(6)}
    inner, tx, tree = INNERS[name], fo.freezable(INNERS[name], frozen), params()
    # In eager mode a conditional is compiled at every step.
    wrap = jax.jit if name in ("MultiSteps", "apply_if_finite") else lambda f: f
    state, update = tx.init(tree), wrap(tx.update)
    for step, value in enumerate(GRADS):
        state = edits[step](state, tree) if step in edits else state
        still = [r for r, lists in trained.items() if not any(step in steps for steps in lists)]
        flag = np.isin(np.arange(6), still)
        mask = np.broadcast_to(fo.mask(state, tree)["embed"], 6)
        np.testing.assert_array_equal(mask, flag)
        grads = grads_of(tree, value)
        grads["embed"] = jnp.where(flag[:, None], jnp.nan, grads["embed"])
        updates, state = update(grads, state, tree)
        new = fo.apply_updates(tree, updates, frozen=state)
        fo.testing.assert_frozen(tree, new, fo.rows("embed", flag))
        tree = new
    bare = wrap(inner.update)
    expected = [bare_row(inner.init, bare, row, lists) for row, lists in trained.items()]
    np.testing.assert_allclose(tree["embed"], jnp.stack(expected), rtol=2e-5, atol=1e-6)


def test_a_row_thawed_after_a_thousand_steps_starts_like_a_fresh_adam():
    tx, tree = fo.freezable(ADAM, rows(0)), params()
    state = optax.tree_utils.tree_set(tx.init(tree), count=jnp.array(1000, jnp.int32))
    new, state = run(tx, tree, fo.thaw(state, tree, rows(0)), [3.0])
    moved = np.asarray(tree["embed"] - new["embed"])
    np.testing.assert_allclose(moved[0], 0.1, rtol=1e-4)
    np.testing.assert_allclose(moved[1:], 0.2515, rtol=1e-3)
    assert [int(x) for x in (state.inner[0].count, *state.ages[0])] == [1001, 1]


def moments(state: Any, name: str = "mu") -> list[Any]:
    return jax.tree.leaves(optax.tree_utils.tree_get(state, name)["embed"])


def test_a_part_that_is_not_cut_keeps_its_very_buffers():
    tx, tree = fo.freezable(ADAM, rows(0, 1)), params()
    tree, state = run(tx, tree, tx.init(tree), [0.5])
    (first,), head = moments(state), optax.tree_utils.tree_get(state, "mu")["head"]
    tree, thawed = run(tx, tree, fo.thaw(state, tree, rows(0)), [])
    assert moments(thawed)[0] is first
    for edited in (
        fo.freeze(thawed, tree, rows(0)),
        park(thawed, tree, rows(0)),
        fo.thaw(park(thawed, tree, rows(0)), tree, rows(0)),
        park(state, tree, "embed"),
        fo.thaw(state, tree, "**"),
    ):
        assert first in [x for x in moments(edited) if x is first]
        assert optax.tree_utils.tree_get(edited, "mu")["head"] is head
    cut = fo.freeze(state, tree, rows(5))
    assert [x.shape for x in moments(cut)] == [(3, 2)]
    np.testing.assert_array_equal(moments(cut)[0], first[:3])
    assert optax.tree_utils.tree_get(cut, "mu")["head"] is head
    assert first.shape == (4, 2)


def test_an_edit_to_the_standing_plan_returns_the_very_object():
    tree = params()
    state = park(fo.freezable(ADAM, rows(0, 1)).init(tree), tree, rows(2))
    held = {"opt": state, "epoch": 3}
    for edited in (
        fo.freeze(held, tree, rows(0, 2)),
        fo.freeze(held, tree, rows(1), keep_state=True),
        fo.thaw(held, tree, rows(3, 4)),
        fo.thaw(held, tree, fo.rows("embed", [])),
        fo.set_frozen(held, tree, fo.rows("embed", slice(0, 3))),
        fo.set_frozen(held, tree, fo.mask(state, tree)),
    ):
        assert edited is held


def test_one_retrace_for_each_plan_and_equal_plans_share_a_trace():
    traces, tx = [], fo.freezable(ADAM, rows(0, 1))

    @jax.jit
    def step(tree, state):
        traces.append(state.plan)
        updates, state = tx.update(grads_of(tree, 1.0), state, tree)
        return fo.apply_updates(tree, updates, frozen=state), state

    tree, counts = params(), []
    state = tx.init(tree)
    whole = fo.freezable(ADAM).init(tree)
    edits = [
        lambda s: s,
        lambda s: fo.thaw(s, tree, rows(0)),
        lambda s: fo.freeze(s, tree, rows(0)),
        lambda s: fo.freeze(whole, tree, fo.rows("embed", [True, True, *[False] * 4])),
        lambda s: fo.set_frozen(s, tree, rows(1, 2)),
        lambda s: fo.set_frozen(tx.init(tree), tree, rows(1, 2)),
        lambda s: fo.freezable(ADAM, fo.rows("embed", slice(0, 2))).init(tree),
    ]
    for edit in edits:
        state = edit(state)
        for _ in range(2):
            tree, state = step(tree, state)
        counts.append(len(traces))
    assert counts == [1, 2, 2, 2, 3, 3, 3]


def test_cohorts_of_nobody_and_parts_without_state_leave_nothing_behind():
    tx, tree = fo.freezable(ADAM, rows(0, 1)), params()
    state = tx.init(tree)
    busy = state
    for row in (0, 1):
        tree, busy = run(tx, tree, fo.thaw(busy, tree, rows(row)), [0.5])
    busy = park(busy, tree, rows(3))
    assert busy.ages[0].shape == (3,)
    back = fo.freeze(fo.thaw(busy, tree, rows(3)), tree, rows(0, 1))
    assert back.ages[0].shape == (1,)
    gone = fo.freeze(state, tree, "embed")
    assert isinstance(optax.tree_utils.tree_get(gone, "mu")["embed"], optax.MaskedNode)
    plain = fo.freezable(ADAM, "embed").init(tree)
    assert jax.tree.structure(gone) == jax.tree.structure(plain)


def gram() -> optax.GradientTransformation:
    """Statistics of pairs of rows, as second-order optimizers keep."""

    def init(params):
        return {"gram": jax.tree.map(lambda x: jnp.zeros((len(x), len(x))), params)}

    def update(updates, state, params=None):
        add = jax.tree.map(lambda g, u: g + u @ u.T, state["gram"], updates)
        return updates, {"gram": add}

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize("shape", [(6, 4), (6, 6), (4, 4)])
@pytest.mark.parametrize(
    "inner", [optax.adafactor(0.1, min_dim_size_to_factor=2), gram()], ids=["adafactor", "gram"]
)
def test_statistics_that_have_no_rows_are_an_error_naming_the_path_and_change_nothing(inner, shape):
    tree = {"net": {"w": jnp.ones(shape)}}
    tx = fo.freezable(inner)
    _, state = tx.update(tree, tx.init(tree), tree)
    leaves, plan = jax.tree.leaves(state), state.plan
    for keep_state in (False, True):
        with pytest.raises(ValueError, match=r"net/w.*rows"):
            fo.freeze(state, tree, fo.rows("net/w", [0, 1]), keep_state)
    assert all(a is b for a, b in zip(leaves, jax.tree.leaves(state), strict=True))
    assert state.plan is plan


def test_rows_thawed_under_a_factored_optimizer_are_an_array_of_their_own():
    inner = optax.adafactor(0.1, min_dim_size_to_factor=2)
    tree = {"w": jnp.arange(1.0, 33, dtype=jnp.float32).reshape(8, 4)}
    grads = {"w": jnp.cos(tree["w"])}
    tx = fo.freezable(inner, fo.rows("w", slice(0, 5)))
    state = fo.thaw(tx.init(tree), tree, fo.rows("w", [0, 1]))
    updates, _ = tx.update(grads, state, tree)
    for part in (slice(5, 8), slice(0, 2)):
        own = {"w": tree["w"][part]}
        expected, _ = inner.update({"w": grads["w"][part]}, inner.init(own), own)
        np.testing.assert_allclose(updates["w"][part], expected["w"], rtol=1e-5)


def test_rows_of_tied_leaves_are_thawed_together():
    tree = {"a": params()["embed"], "b": jnp.copy(params()["embed"])}
    tx = fo.freezable(fo.tie(ADAM, ("a", "b")), fo.rows("{a,b}", [0, 1, 2]))
    state = fo.thaw(tx.init(tree), tree, fo.rows("{a,b}", [0]))
    updates, _ = tx.update(tree, state, tree)
    np.testing.assert_array_equal(updates["a"], updates["b"])
    np.testing.assert_allclose(updates["a"][jnp.array([0, 3, 4, 5])], -0.1, rtol=1e-5)
    with pytest.raises(ValueError, match=r"'a'.*'b'"):
        fo.thaw(state, tree, fo.rows("a", [1]))


def test_a_bare_array_is_edited_too():
    tree = params()["embed"]
    tx = fo.freezable(ADAM, fo.rows(True, [0, 1]))
    state = fo.thaw(tx.init(tree), tree, fo.rows(True, [1]))
    updates, _ = tx.update(tree, state, tree)
    np.testing.assert_allclose(updates[1:], -0.1, rtol=1e-5)
    np.testing.assert_array_equal(updates[0], 0)


def test_adopted_state_is_cut_and_released_whole():
    tree = params()
    _, plain = ADAM.update(tree, ADAM.init(tree), tree)
    tx = fo.freezable(ADAM)
    state = fo.adopt(tx, plain, tree)
    parked = park(state, tree, rows(0, 4))
    same(plain, fo.release(parked, tree))
    same(plain, fo.release(fo.thaw(parked, tree, rows(4)), tree))
    dropped = fo.release(fo.freeze(state, tree, rows(0, 4)), tree)
    kept = jnp.array([0.0, 1, 1, 1, 0, 1])[:, None]
    for name in ("mu", "nu"):
        expected = optax.tree_utils.tree_get(plain, name)
        expected = {**expected, "embed": expected["embed"] * kept}
        same(expected, optax.tree_utils.tree_get(dropped, name))


def test_copies_are_equal_and_tell_what_is_frozen():
    tree = params()
    state = fo.thaw(fo.freezable(ADAM, rows(0, 1)).init(tree), tree, rows(0))
    for copied in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        same(state, copied)
        assert hash(copied.plan) == hash(state.plan)
    assert "embed" in repr(state)
    assert "1 in part" in repr(state.plan)


@pytest.mark.usefixtures("standard_promotion")
def test_statistics_that_are_lists_of_arrays_are_edited_by_rows():
    # SM3 keeps a list of accumulators for each leaf, an array for each of its axes.
    tx, bare = fo.freezable(optax.sm3(0.1), fo.rows("v", [0, 1])), optax.sm3(0.1)
    params = grads = {"v": jnp.arange(1.0, 6.0)}
    state = tx.init(params)
    for edit in (None, None, lambda s: fo.freeze(s, params, fo.rows("v", [3]), keep_state=True)):
        state = edit(state) if edit else state
        updates, state = tx.update(grads, state, params)
    state = fo.thaw(state, params, fo.rows("v", [0, 3]))
    updates, state = tx.update(grads, state, params)
    for row, steps in enumerate([1, 0, 4, 3, 4]):
        own = {"v": params["v"][row : row + 1]}
        expected, bare_state = {"v": jnp.zeros(1)}, bare.init(own)
        for _ in range(steps):
            expected, bare_state = bare.update(own, bare_state, own)
        np.testing.assert_array_equal(updates["v"][row : row + 1], expected["v"])
        released = optax.tree_utils.tree_get(fo.release(state, params), "mu")["v"][0]
        mu = optax.tree_utils.tree_get(bare_state, "mu")["v"][0]
        np.testing.assert_array_equal(released[row : row + 1], mu)
