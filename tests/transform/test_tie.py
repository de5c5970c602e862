"""`tie`: what it promises beside the optimizers' own arithmetic, alone and inside `freezable`."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

import freeze_optax as fo

pytestmark = pytest.mark.usefixtures("standard_promotion")

HOLE = optax.MaskedNode()
GROUP = ("embed", "head/kernel")


def params() -> dict[str, Any]:
    head = {"bias": jnp.ones(3), "kernel": jnp.full(2, 3.0)}
    return {"body": jnp.full(2, 2.0), "embed": jnp.full(2, 3.0), "head": head}


def grads(value: float = 1.0) -> dict[str, Any]:
    """Of `embed` and of `head/kernel` different ones; their sum is `[4, -1]` times the value."""
    tree = {
        "body": jnp.array([1.0, 2.0]),
        "embed": jnp.array([3.0, 1.0]),
        "head": {"bias": jnp.array([1.0, -1.0, 0.5]), "kernel": jnp.array([1.0, -2.0])},
    }
    return jax.tree.map(lambda x: x * jnp.float32(value), tree)


SUM = jnp.array([4.0, -1.0])


def once(tree: Any) -> Any:
    """The tree of a person who keeps the shared leaf at `embed` alone."""
    return {"body": tree["body"], "embed": tree["embed"], "head": {"bias": tree["head"]["bias"]}}


def once_grads(value: float = 1.0) -> Any:
    return {**once(grads(value)), "embed": SUM * jnp.float32(value)}


def twice(tree: Any) -> Any:
    return {**tree, "head": {**tree["head"], "kernel": tree["embed"]}}


def run(tx, state, tree, *values, of=grads, jit=True) -> tuple[Any, Any]:
    update = jax.jit(tx.update) if jit else tx.update
    for value in values:
        updates, state = update(of(value), state, tree)
        frozen = state if isinstance(state, fo.FreezeState) else fo.nothing
        tree = fo.apply_updates(tree, updates, frozen=frozen)
    return tree, state


def alone(inner: Any, leaf: Any, *gradients: Any) -> Any:
    """What the bare optimizer makes of one leaf."""
    state = inner.init(leaf)
    for gradient in gradients:
        updates, state = jax.jit(inner.update)(gradient, state, leaf)
        leaf = optax.apply_updates(leaf, updates)
    return leaf


@pytest.mark.parametrize("group", [GROUP, GROUP[::-1], list(GROUP)], ids=["", "reversed", "list"])
def test_the_updates_of_all_members_are_that_of_the_summed_gradients(group):
    expected = twice(jax.tree.map(lambda x: x * -0.5, once_grads()))
    for tx in (fo.tie(optax.sgd(0.5), group), fo.freezable(fo.tie(optax.sgd(0.5), group))):
        for tree in (params(), {**params(), "embed": jnp.zeros(2)}, None):
            state = tx.init(params())
            updates, _ = tx.update(grads(), state, tree)
            fo.testing.assert_frozen(expected, updates, True)


def test_a_global_norm_counts_the_sum_once():
    tree = {"a": jnp.zeros(2), "b": jnp.zeros(2), "c": jnp.zeros(())}
    gradients = {"a": jnp.array([3.0, 1.0]), "b": jnp.array([-1.0, 2.0]), "c": jnp.array(6.0)}
    tx = fo.freezable(fo.tie(optax.clip_by_global_norm(1.0), ("a", "b")))
    updates, _ = tx.update(gradients, tx.init(tree), tree)
    # The norm of [2, 3] and 6 is 7.
    for name in "ab":
        np.testing.assert_allclose(updates[name], [2 / 7, 3 / 7], rtol=1e-6)
    np.testing.assert_allclose(updates["c"], 6 / 7, rtol=1e-6)


def test_groups_of_three_and_several_groups():
    tree = {name: jnp.ones(2) for name in "abcdef"}
    gradients = {name: jnp.full(2, 2.0**i) for i, name in enumerate("abcdef")}
    tx = fo.tie(optax.sgd(1.0), ("e", "a", "c"), ["b", "f"])
    updates, _ = tx.update(gradients, tx.init(tree), tree)
    expected = {"a": 21, "b": 34, "c": 21, "d": 8, "e": 21, "f": 34}
    assert {name: -float(x[0]) for name, x in updates.items()} == expected


def test_the_groups_of_tied_paths_train_the_shared_params_on():
    array = jnp.full(2, 3.0)
    tree = {**params(), "embed": array, "head": {"bias": jnp.ones(3), "kernel": array}}
    tx = fo.freezable(fo.tie(optax.adam(0.1), *fo.tied_paths(tree)))
    new, _ = run(tx, tx.init(tree), tree, 1.0, -0.5, 2.0)
    expected = alone(optax.adam(0.1), array, SUM, SUM * -0.5, SUM * 2.0)
    np.testing.assert_allclose(new["embed"], expected, rtol=1e-6)
    np.testing.assert_array_equal(new["embed"], new["head"]["kernel"])


@pytest.mark.parametrize("tree", [params(), jnp.ones(2), []], ids=["dict", "one array", "empty"])
def test_without_groups_it_is_the_bare_optimizer(tree):
    bare, tx = optax.adamw(0.1), fo.tie(optax.adamw(0.1))
    state, expected = tx.init(tree), bare.init(tree)
    fo.testing.assert_frozen(expected, state, True)
    gradients = jax.tree.map(lambda x: x * 0.5, tree)
    given, wanted = (t.update(gradients, s, tree) for t, s in ((tx, state), (bare, expected)))
    fo.testing.assert_frozen(wanted, given, True)
    assert fo.tie(optax.sgd(0.1), *fo.tied_paths(params())).init(params()) == bare_sgd_state()


def bare_sgd_state() -> Any:
    return optax.sgd(0.1).init(params())


@pytest.mark.parametrize("inner", [optax.adam(0.1), optax.sgd(0.1, momentum=0.9)])
def test_the_state_is_that_without_tie_less_the_dropped_leaves(inner):
    state, bare = fo.tie(inner, GROUP).init(params()), inner.init(params())
    entries = lambda tree: jax.tree_util.tree_flatten_with_path(tree)[0]  # noqa: E731
    kept = [(k, x) for k, x in entries(bare) if "kernel" not in str(k[-1])]
    assert len(kept) < len(entries(bare))
    given = entries(state)
    assert [k for k, _ in given] == [k for k, _ in kept]
    for (_, x), (_, y) in zip(given, kept, strict=True):
        np.testing.assert_array_equal(x, y)
    fo.testing.assert_frozen(state, fo.freezable(fo.tie(inner, GROUP)).init(params()).inner, True)


TREES = {
    "FrozenDict": (FrozenDict(params()), FrozenDict(grads()), GROUP),
    "nnx.State": (
        nnx.State({"a": nnx.Param(jnp.ones(2)), "b": nnx.Param(jnp.ones(2))}),
        nnx.State({"a": nnx.Param(jnp.ones(2)), "b": nnx.Param(jnp.full(2, 2.0))}),
        ("a", "b"),
    ),
    "a list": ([jnp.ones(2), jnp.ones(2)], [jnp.ones(2), jnp.full(2, 2.0)], ("0", "1")),
    "bfloat16": (
        {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2, jnp.bfloat16)},
        {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.full(2, 2.0, jnp.bfloat16)},
        ("a", "b"),
    ),
    "complex": (
        {"a": jnp.ones(2, jnp.complex64), "b": jnp.ones(2, jnp.complex64)},
        {"a": jnp.full(2, 1j), "b": jnp.ones(2, jnp.complex64)},
        ("a", "b"),
    ),
    "Python numbers": ({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 2.0}, ("a", "b")),
}


@pytest.mark.parametrize("kind", TREES)
def test_any_containers_and_dtypes(kind):
    tree, gradients, group = TREES[kind]
    tx = fo.freezable(fo.tie(optax.sgd(0.5), group))
    updates, _ = tx.update(gradients, tx.init(tree), tree)
    paths = [fo.path(path) for path in group]
    values = [jax.tree.leaves(fo.partition(updates, ~path)[0])[0] for path in paths]
    total = sum(jax.tree.leaves(fo.partition(gradients, ~path)[0])[0] for path in paths)
    for value in values:
        np.testing.assert_array_equal(value, total * -0.5)
    assert jax.tree.structure(updates) == jax.tree.structure(tree)


def test_fields_of_an_equinox_module():
    keys = jax.random.split(jax.random.key(0))
    model = [eqx.nn.Linear(2, 2, key=key) for key in keys]
    tx = fo.freezable(fo.tie(optax.sgd(1.0), ("0/weight", "1/weight")))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, model), tx.init(model), model)
    for layer in updates:
        np.testing.assert_array_equal(layer.weight, np.full((2, 2), -2.0))
        np.testing.assert_array_equal(layer.bias, np.full(2, -1.0))


def spy(seen: list[Any]) -> optax.GradientTransformationExtraArgs:
    def update(updates, state, params=None, **extra):
        seen.append({"params": params, **extra})
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def test_extra_arguments_shaped_like_the_params_have_one_leaf_for_a_group():
    seen, tree = [], params()
    expected = {**tree, "head": {**tree["head"], "kernel": HOLE}}
    tx = fo.tie(spy(seen), GROUP)
    rates = jax.tree.map(lambda x: x * 0.1, tree)
    tx.update(grads(), (), tree, rates=rates, step=3, other=[tree["embed"]], value=jnp.ones(()))
    (got,) = seen
    fo.testing.assert_frozen(expected, got["params"], True)
    fo.testing.assert_frozen(jax.tree.map(lambda x: x * 0.1, expected), got["rates"], True)
    assert got["step"] == 3
    assert got["other"][0] is tree["embed"]
    assert got["value"] == 1.0


@pytest.mark.parametrize("frozen", [fo.nothing, "body"], ids=["none frozen", "some frozen"])
def test_a_function_of_the_params_is_handed_whole_ones(frozen):
    def calls(updates, state, params=None, *, obj_fn, **extra):
        assert isinstance(params["head"]["kernel"], optax.MaskedNode)
        return jax.grad(obj_fn)(params), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), calls)
    tx, tree = fo.freezable(fo.tie(inner, GROUP), frozen), params()

    def objective(tree):
        return (tree["embed"] * tree["head"]["kernel"] * tree["body"]).sum()

    updates, _ = tx.update(grads(), tx.init(tree), tree, obj_fn=objective)
    # The derivative of 2 x * x at 3.
    np.testing.assert_array_equal(updates["embed"], [12.0, 12.0])
    np.testing.assert_array_equal(updates["head"]["kernel"], [12.0, 12.0])


VALUES = [1.0, -0.5, 2.0, 0.25, -1.0, 0.5]
BOTH = ("embed", "head/kernel")
# The edits before some steps, and the steps that train the group: a list for each state it had.
COURSES = {
    "trained": (fo.nothing, {}, [range(6)]),
    "others frozen": (("body", "head/bias"), {}, [range(6)]),
    "frozen": (BOTH, {}, []),
    "thawed": (BOTH, {2: lambda s, t: fo.thaw(s, t, BOTH)}, [range(2, 6)]),
    "parked": (
        fo.nothing,
        {1: lambda s, t: fo.freeze(s, t, BOTH, True), 4: lambda s, t: fo.thaw(s, t, BOTH)},
        [[0, 4, 5]],
    ),
    "dropped": (
        fo.nothing,
        {
            2: lambda s, t: fo.freeze(s, t, "{embed,head}"),
            3: lambda s, t: fo.set_frozen(s, t, fo.nothing),
        },
        [range(2), range(3, 6)],
    ),
    "another leaf thawed": ("body", {3: lambda s, t: fo.thaw(s, t, "body")}, [range(6)]),
}
ADAMW = optax.adamw(0.1, weight_decay=0.1)


def expected_group(lives: list[Any], inner: Any = ADAMW) -> Any:
    leaf = params()["embed"]
    for steps in lives:
        leaf = alone(inner, leaf, *[SUM * jnp.float32(VALUES[i]) for i in steps])
    return leaf


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("course", COURSES)
def test_a_group_frozen_and_thawed_follows_the_bare_optimizer_of_one_leaf(course, jit):
    frozen, edits, lives = COURSES[course]
    tx, tree = fo.freezable(fo.tie(ADAMW, GROUP), frozen), params()
    state = tx.init(tree)
    for i, value in enumerate(VALUES):
        state = edits.get(i, lambda s, t: s)(state, tree)
        before = tree
        tree, state = run(tx, state, tree, value, jit=jit)
        fo.testing.assert_frozen(before, tree, state)
        moment = optax.tree_utils.tree_get(state, "mu")["head"]["kernel"]
        assert isinstance(moment, optax.MaskedNode)
    np.testing.assert_array_equal(tree["embed"], tree["head"]["kernel"])
    # XLA fuses a leaf alone and one among others differently, to the last bit.
    np.testing.assert_allclose(tree["embed"], expected_group(lives), rtol=2e-6)


PHASES = fo.Phases({0: BOTH, 2: "body", 4: ("head/bias", *BOTH), 5: fo.nothing})


def test_phases_and_scheduled_agree_with_the_bare_optimizer_of_one_leaf():
    tx, tree = fo.freezable(fo.tie(ADAMW, GROUP)), params()
    state = tx.init(tree)
    for i, value in enumerate(VALUES):
        state = fo.set_frozen(state, tree, PHASES.at(i), keep_state=True)
        tree, state = run(tx, state, tree, value)
    inside, moving = fo.scheduled(fo.tie(ADAMW, GROUP), PHASES), params()
    state = inside.init(moving)
    for value in VALUES:
        updates, state = jax.jit(inside.update)(grads(value), state, moving)
        moving = fo.apply_updates(moving, updates, frozen=state)
    for new in (tree, moving):
        np.testing.assert_allclose(new["embed"], expected_group([[2, 3, 5]]), rtol=2e-6)
        np.testing.assert_array_equal(new["embed"], new["head"]["kernel"])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6), tree, moving)


def test_an_export_goes_on_bitwise():
    tx, tree = fo.freezable(fo.tie(optax.adam(0.1), GROUP), BOTH), params()
    state = fo.thaw(run(tx, tx.init(tree), tree, 1.0)[1], tree, BOTH)
    tree, state = run(tx, state, tree, 0.5)
    again = fo.import_state(tx, tree, fo.export_state(state))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    expected = run(tx, state, tree, *VALUES)
    fo.testing.assert_frozen(expected, run(tx, again, tree, *VALUES), True)


def test_adopt_and_release_take_and_give_the_state_of_the_tied_optimizer():
    tied, tree = fo.tie(ADAMW, GROUP), params()
    tree, plain = run(tied, tied.init(tree), tree, 1.0, -0.5)
    tx = fo.freezable(tied)
    state = fo.adopt(tx, plain, tree)
    fo.testing.assert_frozen(plain, fo.release(state, tree), True)
    expected = run(tied, plain, tree, 2.0)[0]
    fo.testing.assert_frozen(expected, run(tx, state, tree, 2.0)[0], True)
    released = fo.release(fo.freeze(state, tree, BOTH), tree)
    assert jax.tree.structure(released) == jax.tree.structure(plain)
    assert not optax.tree_utils.tree_get(released, "mu")["embed"].any()
    with pytest.raises(ValueError, match="head/kernel"):
        fo.adopt(tx, ADAMW.init(tree), tree)


def test_tree_map_params_reaches_the_moments_of_one_leaf():
    tx, tree = fo.freezable(fo.tie(optax.adam(0.1), GROUP), "body"), params()
    state = run(tx, tx.init(tree), tree, 1.0)[1]
    mapped = optax.tree_map_params(tx, lambda x: x + 1, state)
    assert mapped.plan == state.plan
    expected = jax.tree.map(lambda x: x + 1, optax.tree_utils.tree_get(state, "mu"))
    fo.testing.assert_frozen(expected, optax.tree_utils.tree_get(mapped, "mu"), True)
    assert len(jax.tree.leaves(expected)) == 2


def test_gradients_with_holes_at_a_frozen_group():
    tx, tree = fo.freezable(fo.tie(optax.adam(0.1), GROUP), BOTH), params()
    for missing in (HOLE, None):
        given = {**grads(), "embed": missing, "head": {**grads()["head"], "kernel": missing}}
        updates, _ = tx.update(given, tx.init(tree), tree)
        if missing is HOLE:
            assert updates["embed"] == updates["head"]["kernel"] == HOLE
        np.testing.assert_array_equal(np.sign(updates["body"]), [-1.0, -1.0])


TIED = "fo.tie ties them; freeze all or none of them"


@pytest.mark.parametrize(
    ("groups", "error", "match"),
    [
        (("embed",), TypeError, r"takes groups of paths.*got 'embed': .*\('embed', "),
        ((["embed"],), ValueError, r"needs two paths or more, not \['embed'\]"),
        (([],), ValueError, r"needs two paths or more, not \[\]"),
        ((GROUP, ("body", "embed")), ValueError, "'embed' is in the groups of fo.tie more than"),
        ((("embed", "embed"),), ValueError, "'embed' is in the groups of fo.tie more than once"),
        ((("embed", "head/kernl"),), ValueError, "'head/kernl', which is no leaf; nearest: 'head/"),
        ((("embed", "head"),), ValueError, "'head', which is no leaf"),
        ((("embed", "head/bias"),), ValueError, r"float32\[2\].*'head/bias' float32\[3\].*one sha"),
        ((("embed", "half"),), ValueError, r"'embed' is float32\[2\] and 'half' float16\[2\]"),
        ((("embed", "hole"),), ValueError, f"'hole' would be frozen and 'embed' .*{TIED}"),
        ((("embed", "x/y"),), ValueError, "'x/y'"),
    ],
)
def test_groups_that_do_not_fit_are_errors_that_name_the_paths(groups, error, match):
    tree = {**params(), "half": jnp.ones(2, jnp.float16), "hole": HOLE}
    tree |= {"x/y": jnp.ones(2), "x": {"y": jnp.ones(2)}}  # one path for two leaves
    for wrap in (lambda tx: tx, fo.freezable):
        with pytest.raises(error, match=match):
            wrap(fo.tie(optax.adam(0.1), *groups)).init(tree)


def test_gradients_of_only_a_part_of_a_group_are_an_error():
    tx, tree = fo.tie(optax.sgd(0.1), GROUP), params()
    state = tx.init(tree)
    with pytest.raises(ValueError, match=f"'embed' would be frozen and 'head/kernel' .*{TIED}"):
        tx.update({**grads(), "embed": HOLE}, state, tree)
    with pytest.raises(ValueError, match="'head/kernel', which is no leaf"):
        tx.update(once(grads()), state, once(tree))
    whole = fo.freezable(tx)
    with pytest.raises(ValueError, match="no gradient at 'embed'"):
        whole.update({**grads(), "embed": None}, whole.init(tree), tree)


def test_a_freezable_inside_is_an_error_that_says_which_goes_inside():
    for inner in (fo.freezable(optax.adam(0.1), "body"), fo.freezable(optax.adam(0.1))):
        tx = fo.tie(optax.chain(inner), GROUP)
        with pytest.raises(ValueError, match=r"write fo\.freezable\(fo\.tie\(inner, \*groups\)"):
            tx.init(params())
