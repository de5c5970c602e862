"""Freezing and thawing mid-training, against numbers from other systems and bare optimizers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import freeze_optax as fo

pytestmark = pytest.mark.usefixtures("standard_promotion")


def params() -> dict[str, Any]:
    return {"a": jnp.ones(()), "b": jnp.ones(2), "c": jnp.ones(3)}


def grads_of(tree: Any, value: float) -> Any:
    return jax.tree.map(lambda x: jnp.full_like(x, value), tree)


def run(tx: Any, state: Any, tree: Any, *values: float) -> tuple[Any, Any]:
    """Steps with these gradients, the same at every leaf."""
    for value in values:
        updates, state = jax.jit(tx.update)(grads_of(tree, value), state, tree)
        tree = fo.apply_updates(tree, updates, frozen=state)
    return tree, state


def alone(inner: Any, leaf: Any, *values: float) -> Any:
    """What the bare optimizer makes of one leaf."""
    state = inner.init(leaf)
    for value in values:
        updates, state = jax.jit(inner.update)(jnp.full_like(leaf, value), state, leaf)
        leaf = optax.apply_updates(leaf, updates)
    return leaf


NAN = float("nan")


@pytest.mark.parametrize(
    ("inner", "before", "while_parked", "after", "expected"),
    [
        pytest.param(optax.sgd(0.1, momentum=0.9), [1], [1] * 3, [1], 0.71, id="momentum"),
        pytest.param(optax.adam(0.1), [1], [1] * 8, [0.5], 0.806782, id="Adam"),
        pytest.param(
            optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
            [1],
            [100],
            [3],
            0.8,
            id="accumulation",
        ),
        pytest.param(optax.adam(0.1), [1], [NAN] * 8, [0.5], 0.806782, id="NaN while parked"),
    ],
)
def test_a_parked_leaf_goes_on_where_it_stopped_as_in_pytorch_and_optimisers_jl(
    inner, before, while_parked, after, expected
):
    tx, tree = fo.freezable(inner), params()
    tree, state = run(tx, tx.init(tree), tree, *before)
    stopped = tree["a"]
    state = fo.freeze(state, tree, "a", keep_state=True)
    for value in while_parked:
        updates, state = tx.update({**grads_of(tree, 1.0), "a": jnp.array(value)}, state, tree)
        tree = fo.apply_updates(tree, updates, frozen=state)
    assert tree["a"] is stopped
    tree, state = run(tx, fo.thaw(state, tree, "a"), tree, *after)
    np.testing.assert_allclose(tree["a"], expected, rtol=5e-6)


def test_a_leaf_thawed_after_a_thousand_steps_starts_like_a_fresh_adam():
    tx, tree = fo.freezable(optax.adam(0.1), "a"), params()
    state = tx.init(tree)
    counted = optax.tree_utils.tree_set(state, count=jnp.array(1000, jnp.int32))
    state = fo.thaw(counted, tree, "a")
    new, _ = run(tx, state, tree, 3.0)
    np.testing.assert_allclose(tree["a"] - new["a"], 0.1, rtol=1e-5)
    # With the count of the others, as any leaf that joins a shared one: 0.1 * 2.5.
    np.testing.assert_allclose(tree["b"] - new["b"], 0.2515, rtol=1e-3)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "inner",
    [
        pytest.param(optax.adamw(0.1, weight_decay=0.1), id="adamw"),
        pytest.param(optax.adafactor(0.1, min_dim_size_to_factor=2), id="adafactor"),
        pytest.param(optax.contrib.schedule_free_sgd(0.1), id="schedule_free"),
        pytest.param(optax.rprop(0.1), id="rprop"),
        pytest.param(optax.sgd(0.1), id="stateless"),
    ],
)
@pytest.mark.parametrize("thawed", ["a", "c"])
def test_a_thawed_leaf_follows_a_fresh_optimizer_and_survivors_theirs(inner, jit, thawed):
    tx, tree = fo.freezable(inner, thawed), params()
    tree, state = run(tx, tx.init(tree), tree, 0.3, -0.2)
    thaw = jax.jit(fo.thaw, static_argnums=2) if jit else fo.thaw
    state = thaw(state, tree, thawed)
    tree, _ = run(tx, state, tree, 0.5, 0.1)
    for name, start in params().items():
        values = (0.5, 0.1) if name == thawed else (0.3, -0.2, 0.5, 0.1)
        fo.testing.assert_frozen(alone(inner, start, *values), tree[name], True)


def mu(state: Any) -> Any:
    return optax.tree_utils.tree_get(state, "mu")


def pointers(tree: Any) -> list[int]:
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)]


def frozen_names(state: Any) -> set[str]:
    return {name for name, flag in fo.mask(state, params()).items() if flag}


@pytest.mark.parametrize("keep_state", [False, True], ids=["drop", "park"])
@pytest.mark.parametrize(
    ("verb", "where", "expected"),
    [
        ("freeze", "b", {"a", "b"}),
        ("freeze", fo.nothing, {"a"}),
        ("thaw", "a", set()),
        ("thaw", "b", {"a"}),
        ("thaw", fo.everything, set()),
        ("set_frozen", "b", {"b"}),
        ("set_frozen", ("a", "c"), {"a", "c"}),
        ("set_frozen", fo.nothing, set()),
        ("set_frozen", {"a": False, "b": True, "c": True}, {"b", "c"}),
    ],
)
def test_freeze_never_thaws_thaw_never_freezes_and_set_frozen_is_the_set(
    verb, where, expected, keep_state
):
    state = fo.freeze(fo.freezable(optax.adam(0.1)).init(params()), params(), "a", keep_state)
    kept = {} if verb == "thaw" else {"keep_state": keep_state}
    assert frozen_names(getattr(fo, verb)(state, params(), where, **kept)) == expected


def test_what_cannot_be_trained_stays_frozen():
    tree = {"v": 1.0, "w": jnp.ones(2), "steps": jnp.array(3), "key": jax.random.key(0)}
    state = fo.freezable(optax.adam(0.1), "w").init(tree)
    for edited in (fo.thaw(state, tree, "**"), fo.set_frozen(state, tree, fo.nothing)):
        assert fo.mask(edited, tree) == {"v": False, "w": False, "steps": True, "key": True}


EDITS = {
    "drop": lambda state, tree: fo.freeze(state, tree, "a"),
    "park": lambda state, tree: fo.freeze(state, tree, "a", keep_state=True),
    "thaw": lambda state, tree: fo.thaw(state, tree, "c"),
    "exchange": lambda state, tree: fo.set_frozen(state, tree, "a"),
    "exchange, parking": lambda state, tree: fo.set_frozen(state, tree, "a", keep_state=True),
}


@pytest.mark.parametrize("edit", EDITS)
def test_survivors_keep_their_very_buffers(edit):
    tx = fo.freezable(optax.chain(optax.clip(1.0), optax.amsgrad(0.1)), "c")
    _, state = run(tx, tx.init(params()), params(), 0.5, -0.3)
    before = jax.tree.leaves(state)
    addresses = pointers(state)
    edited = EDITS[edit](state, params())
    kept = "ab" if "a" in mu(edited) and edit in ("thaw", "park", "exchange, parking") else "b"
    for moment in ("mu", "nu", "nu_max"):
        old, new = (optax.tree_utils.tree_get(s, moment) for s in (state, edited))
        for name in kept:
            assert new[name] is old[name]
            assert pointers(new[name]) == pointers(old[name])
        dropped = {"a", "b"} - set(kept)
        assert all(isinstance(new[name], optax.MaskedNode) for name in dropped)
    count, edited_count = (optax.tree_utils.tree_get(s, "count") for s in (state, edited))
    assert edited_count is count
    # What was there before is as it was: nothing was donated or written to.
    assert all(a is b for a, b in zip(before, jax.tree.leaves(state), strict=True))
    assert pointers(state) == addresses


def train_state(opt: optax.GradientTransformation) -> TrainState:
    return TrainState.create(apply_fn=None, params=params(), tx=opt)


TREES = {
    "itself": lambda state: state,
    "chain": lambda state: (optax.EmptyState(), (state,)),
    "TrainState": lambda state: train_state(optax.identity()).replace(opt_state=state),
    "dict": lambda state: {"opt": state, "epoch": 3, "none": None},
}


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize(
    ("verb", "where"),
    [
        ("freeze", "a"),
        ("freeze", ("a", "b")),
        ("freeze", fo.nothing),
        ("thaw", "c"),
        ("thaw", fo.nothing),
        ("set_frozen", ("a", "b")),
    ],
)
def test_an_edit_to_the_standing_plan_returns_the_very_object(verb, where, tree):
    state = fo.freezable(optax.adam(0.1), "a").init(params())
    held = TREES[tree](fo.freeze(state, params(), "b", keep_state=True))
    assert getattr(fo, verb)(held, params(), where) is held
    if verb != "thaw":
        assert getattr(fo, verb)(held, params(), where, keep_state=True) is held


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda s: fo.freeze(s, params(), ("b", "nonsense")), "'nonsense' selects no leaf"),
        (lambda s: fo.thaw(s, params(), "nonsense"), "'nonsense' selects no leaf"),
        (lambda s: fo.set_frozen(s, {**params(), "d": 1.0}, "b"), "only in the params: 'd'"),
        (lambda s: fo.set_frozen(s, params(), {"a": True, "z": True}), "'z'"),
    ],
)
def test_an_edit_that_raises_has_changed_nothing(edit, match):
    tx = fo.freezable(optax.adam(0.1), "a")
    tree, state = run(tx, tx.init(params()), params(), 0.5)
    leaves, addresses, structure = jax.tree.leaves(state), pointers(state), jax.tree.structure(tree)
    expected = run(tx, state, tree, 0.25)
    plan, plan_hash = state.plan, hash(state.plan)
    with pytest.raises(ValueError, match=match):
        edit(state)
    assert all(a is b for a, b in zip(leaves, jax.tree.leaves(state), strict=True))
    assert pointers(state) == addresses
    assert (state.plan, hash(state.plan)) == (plan, plan_hash)
    assert frozen_names(state) == {"a"}
    assert jax.tree.structure(tree) == structure
    fo.testing.assert_frozen(expected, run(tx, state, tree, 0.25), True)


def test_one_retrace_for_each_distinct_plan_and_none_on_going_back():
    traces = []
    tx = fo.freezable(optax.adam(0.1), "a")

    @jax.jit
    def step(tree, state):
        traces.append(state.plan)
        updates, state = tx.update(grads_of(tree, 1.0), state, tree)
        return fo.apply_updates(tree, updates, frozen=state), state

    tree, state = params(), tx.init(params())
    edits = [
        lambda s, t: s,
        lambda s, t: fo.thaw(s, t, "a"),  # a cohort of its own
        lambda s, t: fo.freeze(s, t, "a"),  # as at init
        lambda s, t: fo.thaw(s, t, "a"),
        lambda s, t: fo.freeze(s, t, "a", keep_state=True),
        lambda s, t: fo.thaw(s, t, "a"),
        lambda s, t: fo.set_frozen(s, t, "a"),
    ]
    counts = []
    for edit in edits:
        state = edit(state, tree)
        for _ in range(2):
            tree, state = step(tree, state)
        counts.append(len(traces))
    assert counts == [1, 2, 2, 2, 3, 3, 3]


def test_a_schedule_inside_keeps_the_global_step_for_a_thawed_leaf():
    tx = fo.freezable(optax.adam(optax.cosine_decay_schedule(1.0, 10)), "c")
    tree, state = run(tx, tx.init(params()), params(), 1.0, 1.0, 1.0, 1.0)
    new, _ = run(tx, fo.thaw(state, tree, "c"), tree, 1.0)
    # The first step of Adam is the learning rate itself, at step 4 of the cosine.
    rate = 0.5 * (1 + np.cos(0.4 * np.pi))
    np.testing.assert_allclose(tree["c"] - new["c"], np.full(3, rate), rtol=1e-4)


@pytest.mark.parametrize("keep_state", [False, True], ids=["drop", "park"])
def test_a_norm_inside_is_that_of_all_live_leaves_of_all_cohorts_and_of_no_frozen_one(keep_state):
    # Without memory, so that the update shows the clipped gradient, but with a count of its own.
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.ema(0.0))
    tx, tree = fo.freezable(inner, "c"), params()
    grads = {"a": jnp.array(1e6), "b": jnp.array([3.0, 0.0]), "c": jnp.array([0.0, 4.0, 0.0])}
    state = fo.freeze(fo.thaw(tx.init(tree), tree, "c"), tree, "a", keep_state)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(grads, state, tree)
        np.testing.assert_allclose(updates["b"], [0.6, 0.0], rtol=1e-6)
        np.testing.assert_allclose(updates["c"], [0.0, 0.8, 0.0], rtol=1e-6)
        np.testing.assert_array_equal(updates["a"], 0.0)
    updates, _ = tx.update(grads, fo.freeze(state, tree, "c", keep_state), tree)
    np.testing.assert_allclose(updates["b"], [1.0, 0.0], rtol=1e-6)


GRADS = [0.3, -0.2, 0.5, 0.1, -0.7, 0.4, 0.9, -0.6]

# The edits before some steps, and for each leaf the steps that train it: a list for each state
# that it has had, as dropped state starts afresh.
COURSES = {
    "a part of the first cohort is parked": (
        "",
        {2: lambda s, t: fo.freeze(s, t, "a", True), 5: lambda s, t: fo.thaw(s, t, "a")},
        {"a": [[0, 1, 5, 6, 7]], "b": [range(8)], "c": [range(8)]},
    ),
    "a part of a later cohort is parked": (
        ("a", "c"),
        {
            2: lambda s, t: fo.thaw(s, t, "**"),
            4: lambda s, t: fo.freeze(s, t, "c", True),
            6: lambda s, t: fo.thaw(s, t, "c"),
        },
        {"a": [range(2, 8)], "b": [range(8)], "c": [[2, 3, 6, 7]]},
    ),
    "one leaf of a cohort is parked, one dropped": (
        "",
        {
            2: lambda s, t: fo.freeze(fo.freeze(s, t, "a", True), t, "b"),
            4: lambda s, t: fo.thaw(s, t, "{a,b}"),
        },
        {"a": [[0, 1, 4, 5, 6, 7]], "b": [[0, 1], range(4, 8)], "c": [range(8)]},
    ),
    "two are parked at different times, then thawed together": (
        "",
        {
            1: lambda s, t: fo.freeze(s, t, "a", True),
            3: lambda s, t: fo.freeze(s, t, "b", True),
            5: lambda s, t: fo.thaw(s, t, "**"),
        },
        {"a": [[0, 5, 6, 7]], "b": [[0, 1, 2, 5, 6, 7]], "c": [range(8)]},
    ),
    "a parked leaf is frozen again, to be dropped": (
        "",
        {
            2: lambda s, t: fo.freeze(s, t, "a", True),
            3: lambda s, t: fo.freeze(s, t, "{a,b}"),
            5: lambda s, t: fo.thaw(s, t, "**"),
        },
        {"a": [[0, 1, 5, 6, 7]], "b": [[0, 1, 2], range(5, 8)], "c": [range(8)]},
    ),
    "everything is dropped": (
        "c",
        {3: lambda s, t: fo.freeze(s, t, "**"), 5: lambda s, t: fo.thaw(s, t, "{a,b}")},
        {"a": [range(3), range(5, 8)], "b": [range(3), range(5, 8)], "c": []},
    ),
    "everything is parked": (
        "c",
        {3: lambda s, t: fo.freeze(s, t, "**", True), 5: lambda s, t: fo.thaw(s, t, "**")},
        {"a": [[0, 1, 2, 5, 6, 7]], "b": [[0, 1, 2, 5, 6, 7]], "c": [range(5, 8)]},
    ),
    "the first cohort is dropped and comes back": (
        "c",
        {2: lambda s, t: fo.set_frozen(s, t, ("a", "b")), 5: lambda s, t: fo.thaw(s, t, "a")},
        {"a": [range(2), range(5, 8)], "b": [range(2)], "c": [range(2, 8)]},
    ),
}


@pytest.mark.parametrize("course", COURSES)
def test_each_leaf_follows_a_bare_optimizer_over_the_steps_that_train_it(course):
    frozen, edits, trained = COURSES[course]
    inner = optax.adamw(0.1, weight_decay=0.1)
    tx, tree = fo.freezable(inner, frozen or fo.nothing), params()
    state = tx.init(tree)
    for i, value in enumerate(GRADS):
        state = edits.get(i, lambda s, t: s)(state, tree)
        tree, state = run(tx, state, tree, value)
    for name, lives in trained.items():
        expected = params()[name]
        for steps in lives:
            expected = alone(inner, expected, *[GRADS[i] for i in steps])
        # XLA fuses a leaf alone and one among others differently, to the last bit.
        np.testing.assert_allclose(tree[name], expected, rtol=1e-6, atol=1e-6)


def test_clocks_run_on_while_everything_is_frozen():
    schedule = optax.piecewise_constant_schedule(1.0, {2: 0.1, 3: 0.1})
    for keep_state in (False, True):
        tx, tree = fo.freezable(optax.adam(schedule)), params()
        state = fo.freeze(tx.init(tree), tree, "**", keep_state)
        tree, state = run(tx, state, tree, NAN, NAN, NAN)
        new, _ = run(tx, fo.thaw(state, tree, "**"), tree, 1.0)
        np.testing.assert_allclose(tree["b"] - new["b"], np.full(2, 0.01), rtol=1e-4)


@pytest.mark.parametrize("again", ["freeze", "set_frozen"])
def test_a_cohort_that_no_leaf_belongs_to_leaves_nothing_behind(again):
    tx, tree = fo.freezable(optax.adam(0.1), "{a,c}"), params()
    first = tx.init(tree)
    _, state = run(tx, fo.thaw(first, tree, "c"), tree, 1.0)
    _, state = run(tx, fo.thaw(state, tree, "a"), tree, 1.0)
    assert [age.shape for age in state.ages] == [(2,)]
    state = fo.freeze(state, tree, "c")
    # The row that is left is that of "a", one step old.
    assert [age.tolist() for age in state.ages] == [[1]]
    where = "a" if again == "freeze" else ("a", "c")
    state = getattr(fo, again)(state, tree, where)
    assert state.ages == ()
    assert state.plan == first.plan
    assert jax.tree.structure(state) == jax.tree.structure(first)
