"""Edits of a state that is anywhere inside a tree, what reads it afterwards, and misuse."""

import pickle
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict
from flax.training.train_state import TrainState

import freeze_optax as fo
from tests.support.sampling import cases

pytestmark = pytest.mark.usefixtures("standard_promotion")

HOLE = optax.MaskedNode()
VALUES = [0.3, -0.2, 0.5, 0.1]


def params() -> dict[str, Any]:
    return {"a": jnp.ones(()), "b": jnp.ones(2), "c": jnp.ones(3)}


def ones(tree: Any) -> Any:
    return jax.tree.map(jnp.ones_like, tree)


def grads_of(tree: Any, value: float) -> Any:
    return jax.tree.map(lambda x: jnp.full_like(x, value), tree)


def run(tx: Any, state: Any, tree: Any, values: list[float]) -> tuple[Any, Any]:
    for value in values:
        updates, state = jax.jit(tx.update)(grads_of(tree, value), state, tree)
        tree = optax.apply_updates(tree, updates)
    return tree, state


def adam() -> optax.GradientTransformationExtraArgs:
    return optax.adam(0.1)


def with_rate(rate: Any) -> optax.GradientTransformationExtraArgs:
    return fo.freezable(optax.adam(rate), "c")


def bare_with_rate(rate: Any) -> optax.GradientTransformationExtraArgs:
    return optax.adam(rate)


def multi_steps(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.MultiSteps(inner, 2).gradient_transformation()


SCHEDULE = optax.constant_schedule(0.1)

# A transformation with a freezable somewhere, and what it is for one leaf alone.
WRAPPED = {
    "chain": (
        optax.chain(optax.clip(0.4), fo.freezable(adam(), "c"), optax.scale(0.5)),
        optax.chain(optax.clip(0.4), adam(), optax.scale(0.5)),
    ),
    "named_chain": (
        optax.named_chain(("clip/0", optax.clip(0.4)), ("adam", fo.freezable(adam(), "c"))),
        optax.chain(optax.clip(0.4), adam()),
    ),
    "MultiSteps outside": (multi_steps(fo.freezable(adam(), "c")), multi_steps(adam())),
    "MultiSteps inside": (fo.freezable(multi_steps(adam()), "c"), multi_steps(adam())),
    "inject_hyperparams outside": (
        optax.inject_hyperparams(with_rate)(rate=SCHEDULE),
        optax.inject_hyperparams(bare_with_rate)(rate=SCHEDULE),
    ),
    "inject_hyperparams inside": (
        fo.freezable(optax.inject_hyperparams(optax.adam)(learning_rate=SCHEDULE), "c"),
        optax.inject_hyperparams(optax.adam)(learning_rate=SCHEDULE),
    ),
    "apply_if_finite outside": (
        optax.apply_if_finite(fo.freezable(adam(), "c"), 3),
        optax.apply_if_finite(adam(), 3),
    ),
    "apply_if_finite inside": (
        fo.freezable(optax.apply_if_finite(adam(), 3), "c"),
        optax.apply_if_finite(adam(), 3),
    ),
    "masked outside": (
        optax.masked(fo.freezable(adam(), "c"), {"a": True, "b": True, "c": True}),
        adam(),
    ),
    "partition inside": (
        fo.freezable(optax.partition({0: adam(), 1: adam()}, {"a": 0, "b": 1, "c": 1}), "c"),
        adam(),
    ),
}


INSIDE = ["chain", "masked outside", *(name for name in WRAPPED if name.endswith("inside"))]


@pytest.mark.parametrize("name", cases({name: name for name in WRAPPED}, INSIDE))
def test_a_state_is_edited_wherever_it_is(name):
    tx, bare = WRAPPED[name]
    tree, state = run(tx, tx.init(params()), params(), VALUES[:2])
    stopped = tree["a"]
    state = fo.freeze(fo.thaw(state, tree, "c"), tree, "a", keep_state=True)
    assert fo.mask(state, tree) == {"a": True, "b": False, "c": False}
    tree, state = run(tx, state, tree, VALUES[2:])
    fo.testing.assert_frozen(stopped, tree["a"], True)
    state = fo.set_frozen(state, tree, fo.nothing)
    tree, _ = run(tx, state, tree, VALUES[2:])
    trained = {"a": VALUES, "b": VALUES + VALUES[2:], "c": VALUES[2:] * 2}
    for leaf, values in trained.items():
        start = params()[leaf]
        expected, _ = run(bare, bare.init(start), start, values)
        np.testing.assert_allclose(tree[leaf], expected, rtol=1e-6, atol=1e-6)


def test_a_train_state_is_edited_with_nothing_else_touched():
    tx = optax.chain(optax.clip(1.0), fo.freezable(adam(), "c"))
    before = TrainState.create(apply_fn=None, params=params(), tx=tx)
    before = before.apply_gradients(grads=grads_of(params(), 0.3))
    after = fo.thaw(before, before.params, "c")
    assert isinstance(after, TrainState)
    assert (after.tx, after.apply_fn) == (before.tx, before.apply_fn)
    assert all(after.params[name] is before.params[name] for name in "abc")
    assert after.step is before.step
    after = after.apply_gradients(grads=grads_of(params(), 0.5))
    for name, values in {"a": [0.3, 0.5], "c": [0.5]}.items():
        start = params()[name]
        expected, _ = run(adam(), adam().init(start), start, values)
        np.testing.assert_allclose(after.params[name], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("given", ["pair", "fast"])
def test_both_copies_of_lookahead_are_edited_together(given):
    bare = optax.lookahead(adam(), 2, 0.5)
    tx = fo.freezable(bare, "c")

    def steps(opt, state, pair, values):
        for value in values:
            updates, state = jax.jit(opt.update)(grads_of(pair.fast, value), state, pair)
            pair = optax.apply_updates(pair, updates)
        return pair, state

    pair = optax.LookaheadParams.init_synced(params())
    pair, state = steps(tx, tx.init(pair), pair, VALUES[:2])
    shown = pair if given == "pair" else pair.fast
    state = fo.freeze(fo.thaw(state, shown, "c"), shown, "a", keep_state=True)
    stopped = pair
    pair, state = steps(tx, state, pair, VALUES[2:])
    for copy, old in zip(pair, stopped, strict=True):
        fo.testing.assert_frozen(old, copy, "a")
    pair, _ = steps(tx, fo.thaw(state, shown, "a"), pair, VALUES[2:])
    trained = {"a": VALUES, "b": VALUES + VALUES[2:], "c": VALUES[2:] * 2}
    for name, values in trained.items():
        alone = optax.LookaheadParams.init_synced(params()[name])
        expected, _ = steps(bare, bare.init(alone), alone, values)
        for copy, bare_copy in zip(pair, expected, strict=True):
            np.testing.assert_allclose(copy[name], bare_copy, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("verb", ["thaw", "set_frozen"])
def test_an_edit_works_under_jit_and_gives_what_it_gives_outside(verb):
    tx = fo.freezable(optax.amsgrad(0.1), "c")
    tree, state = run(tx, tx.init(params()), params(), VALUES)
    where = "c" if verb == "thaw" else "a"
    inside = jax.jit(getattr(fo, verb), static_argnums=2)(state, tree, where)
    outside = getattr(fo, verb)(state, tree, where)
    assert jax.tree.structure(inside) == jax.tree.structure(outside)
    fo.testing.assert_frozen(outside, inside, True)


def two_cohorts_and_a_parked_leaf() -> tuple[Any, Any]:
    tx = optax.chain(optax.clip(1.0), fo.freezable(adam(), "c"))
    tree, state = run(tx, tx.init(params()), params(), VALUES[:3])
    state = fo.freeze(fo.thaw(state, tree, "c"), tree, "a", keep_state=True)
    return tx, run(tx, state, tree, VALUES[3:])[1]


def test_optax_reads_and_sets_an_edited_state():
    tx, state = two_cohorts_and_a_parked_leaf()
    _, bare = run(adam(), adam().init(params()), params(), VALUES[:3])
    mu = optax.tree_utils.tree_get(state, "mu")
    fo.testing.assert_frozen(optax.tree_utils.tree_get(bare, "mu")["a"], mu["a"], True)
    np.testing.assert_allclose(mu["c"], np.full(3, 0.1 * VALUES[3]), rtol=1e-6)
    assert int(optax.tree_utils.tree_get(state, "count")) == 4
    new = optax.tree_utils.tree_set(state, nu=grads_of(params(), 4.0))
    assert optax.tree_utils.tree_get(new, "nu")["c"].tolist() == [4.0] * 3
    assert optax.tree_utils.tree_get(new, "mu")["c"] is mu["c"]
    tx.update(grads_of(params(), 1.0), new, params())


def test_tree_map_params_fits_an_edited_state():
    tx, state = two_cohorts_and_a_parked_leaf()
    mapped = optax.tree_map_params(tx, lambda x: x + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    for moment in ("mu", "nu"):
        old, new = (optax.tree_utils.tree_get(s, moment) for s in (state, mapped))
        fo.testing.assert_frozen(jax.tree.map(lambda x: x + 1, old), new, True)
    fo.testing.assert_frozen(state[1].ages, mapped[1].ages, True)
    fo.testing.assert_frozen(state[1].inner[0].count, mapped[1].inner[0].count, True)
    tx.update(grads_of(params(), 1.0), mapped, params())

    specs = optax.tree_map_params(
        tx,
        lambda leaf, name: leaf if isinstance(leaf, optax.MaskedNode) else name,
        state,
        {"a": "A", "b": "B", "c": "C"},
        transform_non_params=lambda _: "counter",
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    pairs = jax.tree.map(lambda x, spec: (x.shape, spec), state, specs)
    assert pairs[1].inner[0].mu == {"a": ((), "A"), "b": ((2,), "B"), "c": ((3,), "C")}
    assert pairs[1].inner[0].count == ((), "counter")
    ages = jax.tree.leaves(pairs[1].ages, is_leaf=lambda x: isinstance(x, tuple) and "counter" in x)
    assert ages == [((2,), "counter")]

    # A name for each of two axes, as an old PartitionSpec was: one thing, though it is a tuple.
    specs = optax.tree_map_params(
        tx, lambda leaf: leaf, state, transform_non_params=lambda _: ("data", "model")
    )
    assert specs[1].ages == (("data", "model"),)


def test_transform_non_params_is_called_on_arrays_one_by_one():
    inner = optax.chain(adam(), optax.scale_by_schedule(lambda count: 1.0), optax.ema(0.9))
    plain = inner.init(params())

    def seen(tx, state):
        calls = []
        new = optax.tree_map_params(
            tx,
            lambda x: x,
            state,
            transform_non_params=lambda x: calls.append(x) or x.astype("int8"),
        )
        assert jax.tree.structure(new) == jax.tree.structure(state)
        return [(type(x), x.shape) for x in calls], new

    expected, _ = seen(inner, plain)
    assert len(expected) == 3
    tx = fo.freezable(inner, "c")
    state = tx.init(params())
    assert seen(tx, state)[0] == expected
    around = optax.chain(tx, optax.scale_by_schedule(lambda count: 1.0))
    assert seen(around, around.init(params()))[0] == [*expected, expected[0]]
    state = fo.thaw(state, params(), "c")
    calls, mapped = seen(tx, state)
    assert calls == [*expected, *((kind, (1,)) for kind, _ in (expected[0], expected[2]))]
    assert [age.dtype for age in mapped.ages] == ["int8", "int8"]
    scheduled = fo.scheduled(inner, fo.Phases({0: "a", 1: "b"}))
    calls, _ = seen(scheduled, scheduled.init(params()))
    assert calls == [
        expected[0],
        *expected,
        *((kind, (2,)) for kind, _ in (expected[0], expected[2])),
    ]


def test_several_states_of_the_same_cohorts_are_mapped_array_by_array():
    tx = optax.chain(fo.freezable(adam(), "a"), fo.freezable(optax.trace(0.9), "b"))
    state = tx.init(params())
    assert optax.tree_map_params(tx, jnp.ones_like, state, transform_non_params=jnp.ones_like)
    first, second = state
    state = (fo.thaw(first, params(), "a"), second)
    assert optax.tree_map_params(tx, jnp.ones_like, state)[0].ages == state[0].ages


class Backwards(NamedTuple):
    c: jax.Array
    b: jax.Array
    a: jax.Array


@pytest.mark.parametrize("first", [dict, FrozenDict, lambda tree: Backwards(**tree)])
@pytest.mark.parametrize("later", [dict, FrozenDict, lambda tree: Backwards(**tree)])
def test_params_may_come_in_other_containers_and_another_order_than_at_init(first, later):
    tx = fo.freezable(adam(), "c")
    state = tx.init(first(params()))
    state = fo.freeze(state, later(params()), "a", keep_state=True)
    state = fo.thaw(state, later(grads_of(params(), 2.0)), "c")
    # In the containers of init: the state's structure must not depend on who edits it.
    mu = optax.tree_utils.tree_get(state, "mu")
    expected = first({"a": jnp.zeros(()), "b": jnp.zeros(2), "c": jnp.zeros(3)})
    fo.testing.assert_frozen(expected, mu, True)
    assert type(mu) is type(expected)
    assert fo.mask(state, first(params())) == first({"a": True, "b": False, "c": False})
    tree = first(params())
    updates, _ = tx.update(grads_of(tree, 1.0), state, tree)
    for path, value in {"a": 0.0, "b": -0.1, "c": -0.1}.items():
        leaf = getattr(updates, path) if isinstance(updates, tuple) else updates[path]
        np.testing.assert_allclose(leaf, np.full_like(leaf, value), rtol=1e-5)


VERBS = {
    "freeze": lambda state, tree: fo.freeze(state, tree, "b"),
    "thaw": lambda state, tree: fo.thaw(state, tree, "a"),
    "set_frozen": lambda state, tree: fo.set_frozen(state, tree, "b"),
    "release": fo.release,
}


def make(tree: Any = None) -> Any:
    return fo.freezable(adam(), "a").init(params() if tree is None else tree)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        pytest.param(
            lambda: (params(), make()),
            TypeError,
            r"{verb} was given a dict for its state.*holds no FreezeState.*order is {verb}\(state",
            id="params where a state belongs",
        ),
        pytest.param(
            lambda: (adam().init(params()), params()),
            TypeError,
            "{verb} was given a tuple.*holds no FreezeState",
            id="a state without one",
        ),
        pytest.param(
            lambda: ({"generator": make(), "critic": (make(),)}, params()),
            ValueError,
            "{verb} was given a dict with 2 FreezeStates.*edit one of them",
            id="two states",
        ),
        pytest.param(
            lambda: (fo.freezable(adam()), params()),
            TypeError,
            r"{verb} takes an optimizer state, not a transformation.*fo\.{verb}\(opt_state, params",
            id="a transformation",
        ),
        pytest.param(
            lambda: (make(), {"a": jnp.ones(()), "b": jnp.ones(2), "d": jnp.ones(3)}),
            ValueError,
            "different params: only in the params: 'd'; only in the state: 'c'",
            id="another model",
        ),
        pytest.param(lambda: (make(), make()), ValueError, "different params", id="state twice"),
        pytest.param(lambda: (make(), None), (TypeError, ValueError), "params", id="no params"),
    ],
)
def test_misuse_has_its_own_error(verb, given, error, match):
    state, tree = given()
    with pytest.raises(error, match=match.format(verb=verb)):
        VERBS[verb](state, tree)


@pytest.mark.parametrize("around", [lambda x: x, lambda x: optax.chain(optax.clip(9.0), x)])
@pytest.mark.parametrize("verb", VERBS)
def test_a_flattened_inner_works_until_it_is_edited_and_is_then_named(verb, around):
    tx = fo.freezable(around(optax.flatten(optax.sgd(0.1, momentum=0.9))), "a")
    tree, state = run(tx, tx.init(params()), params(), [1.0, 1.0])
    np.testing.assert_allclose(tree["b"], np.full(2, 1 - 0.1 - 0.19), rtol=1e-6)
    with pytest.raises(ValueError, match=r"(?s)can't be edited.*flatten|flatten.*can't be edited"):
        VERBS[verb](state, tree)


def flattened_by_hand() -> optax.GradientTransformation:
    """Momentum in one vector, whose init takes holes as well."""

    def init(tree):
        return {"vector": jnp.zeros(sum(x.size for x in jax.tree.leaves(tree)))}

    def update(updates, state, tree=None):
        return jax.tree.map(jnp.negative, updates), state

    return optax.GradientTransformation(init, update)


def with_state(init: Any) -> optax.GradientTransformation:
    """What keeps a state, and does nothing."""
    return optax.GradientTransformation(init, lambda updates, state, tree=None: (updates, state))


def counted_by_hand() -> optax.GradientTransformation:
    """As many steps as there are leaves, beside a statistic of each."""

    def init(tree):
        return {"counts": jnp.zeros(len(jax.tree.leaves(tree))), "sum": tree}

    return with_state(init)


def of_one_leaf() -> optax.GradientTransformation:
    """A statistic of the first leaf alone."""

    def init(tree):
        return {"first": {"_": tree["_"]}}

    return with_state(init)


@pytest.mark.parametrize(
    ("inner", "match"),
    [
        (
            counted_by_hand,
            r"'1/counts' has \[\(3,\)\], but with all leaves frozen it has \[\(0,\)\]",
        ),
        (of_one_leaf, r"'1/first/_' has \[\(3,\)\], but with all leaves frozen it has \[\]"),
    ],
)
@pytest.mark.parametrize("verb", VERBS)
def test_a_counter_or_statistic_that_is_of_some_leaves_alone_is_named(verb, inner, match):
    tree = {"_": jnp.ones(3), **params()}
    state = fo.freezable(optax.chain(adam(), inner()), "a").init(tree)
    with pytest.raises(ValueError, match=match):
        VERBS[verb](state, tree)


def helpless() -> optax.GradientTransformation:
    """An init that fails on holes, in a function of its own."""

    def init(tree):
        def shape_of(x):
            return x.shape

        return jax.tree.map(shape_of, tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode))

    return with_state(init)


def test_the_transformation_whose_init_fails_on_holes_is_named_and_no_helper_of_it():
    tree = {"a": jnp.ones(3), "b": jnp.ones(2)}
    state = fo.freezable(helpless()).init(tree)
    with pytest.raises(ValueError, match="the state of helpless can't be edited"):
        fo.freeze(state, tree, "a")


@pytest.mark.parametrize("verb", VERBS)
def test_a_part_of_the_state_that_mixes_leaves_is_named(verb):
    tx = fo.freezable(optax.chain(flattened_by_hand(), adam()), "a")
    tree, state = run(tx, tx.init(params()), params(), [1.0])
    with pytest.raises(ValueError, match=r"'0/vector' has \[\(5,\)\].*\[\(0,\)\]"):
        VERBS[verb](state, tree)


def test_an_unpickled_state_can_be_edited_after_an_update_and_says_so_before():
    tx, tree = fo.freezable(adam(), "a"), params()
    _, state = run(tx, tx.init(tree), tree, VALUES[:2])
    loaded = pickle.loads(pickle.dumps(state))
    for verb in VERBS.values():
        with pytest.raises(ValueError, match=r"unpickled without its transf.*an update before"):
            verb(loaded, tree)
    _, loaded = run(tx, loaded, tree, VALUES[2:])
    expected = fo.thaw(run(tx, state, tree, VALUES[2:])[1], tree, "a")
    fo.testing.assert_frozen(expected, fo.thaw(loaded, tree, "a"), True)


def test_an_unpickled_state_of_two_cohorts_trains_on_as_if_it_had_never_left():
    tx, state = two_cohorts_and_a_parked_leaf()
    loaded = pickle.loads(pickle.dumps(state))
    assert loaded[1].plan == state[1].plan
    expected = run(tx, state, params(), VALUES)
    fo.testing.assert_frozen(expected, run(tx, loaded, params(), VALUES), True)


def test_a_state_of_numpy_arrays_can_be_edited():
    tree = {"a": jnp.ones(2), "b": jnp.ones(3)}
    tx = fo.freezable(optax.adam(0.1), "b")
    state = jax.device_get(tx.init(tree))
    thawed = fo.thaw(state, tree, "b")
    updates, _ = tx.update(tree, thawed, tree)
    np.testing.assert_allclose(updates["b"], np.full(3, -0.1), rtol=1e-5)


@pytest.mark.parametrize("leaves", [1, 2, 3, 4])
def test_a_node_that_a_label_leaves_out_may_have_any_number_of_leaves(leaves):
    tree = {"a": {f"w{i}": jnp.ones(i + 1) for i in range(leaves)}, "b": jnp.ones(2)}
    inner = optax.partition({"x": adam(), "y": optax.sgd(0.1, 0.9)}, {"a": "x", "b": "y"})
    tx = fo.freezable(inner, "b")
    state = fo.thaw(tx.init(tree), tree, "b")
    whole = fo.freezable(inner).init(tree)
    assert jax.tree.structure(state.inner) == jax.tree.structure(whole.inner)
    fo.testing.assert_frozen(whole.inner, state.inner, True)
    fo.testing.assert_frozen(tx.init(tree).inner, fo.freeze(state, tree, "b").inner, True)
