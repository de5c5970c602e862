"""`freezable`: what it promises beside the optimizers' own arithmetic."""

import functools
import pickle
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo

pytestmark = pytest.mark.usefixtures("standard_promotion")


def params() -> dict[str, Any]:
    return {
        "encoder": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)},
        "head": {"kernel": jnp.full((2, 2), 2.0, jnp.float32)},
    }


def ones(tree: Any) -> Any:
    return jax.tree.map(jnp.ones_like, tree)


HOLE = optax.MaskedNode()


def test_inner_sees_holes_and_keeps_no_state_for_frozen_leaves():
    state = fo.freezable(optax.adam(0.1), "encoder").init(params())
    moments = {"encoder": {"kernel": HOLE, "bias": HOLE}, "head": {"kernel": jnp.zeros((2, 2))}}
    expected = optax.ScaleByAdamState(jnp.zeros((), jnp.int32), moments, moments)
    fo.testing.assert_frozen(expected, state.inner[0], True)
    assert len(jax.tree.leaves(state)) == 3


def test_nothing_is_frozen_by_default():
    state = fo.freezable(optax.sgd(0.1)).init(params())
    assert fo.mask(state, params()) == jax.tree.map(lambda _: False, params())


def test_untrainable_leaves_are_frozen_whatever_the_spec_says():
    tree = {"w": jnp.ones(2), "steps": jnp.array(3), "key": jax.random.key(0), "act": jnp.tanh}
    state = fo.freezable(optax.adam(0.1), fo.nothing).init(tree)
    assert fo.mask(state, tree) == {"w": False, "steps": True, "key": True, "act": True}


def test_it_warns_when_nothing_is_left_to_train():
    match = "all 3 leaves are frozen, nothing is left to train"
    with pytest.warns(UserWarning, match=match) as caught:
        fo.freezable(optax.sgd(0.1), fo.everything).init(params())
    assert [warning.filename for warning in caught] == [__file__]


def test_a_pattern_that_selects_nothing_is_an_error_at_init():
    with pytest.raises(ValueError, match=r"'encodr' selects no leaf; nearest: 'encoder'"):
        fo.freezable(optax.sgd(0.1), "encodr").init(params())


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        ({"encoder": {"kernel": 1.0}}, ValueError, "only in the state: 'encoder/bias', 'head/ke"),
        ({"decoder": 1.0}, ValueError, "only in the gradient: 'decoder'; only in the state: 'en"),
        (
            {"encoder": {"kernel": HOLE, "bias": HOLE}, "head": {"kernel": HOLE}},
            ValueError,
            "no gradient at 'head/kernel'.*fo.value_and_grad",
        ),
        (
            {"encoder": {"kernel": None, "bias": None}, "head": {"kernel": None}},
            ValueError,
            "no gradient at 'head/kernel'",
        ),
        (
            {"encoder": {"kernel": {"a": 1.0}, "bias": 1.0}, "head": {"kernel": 1.0}},
            ValueError,
            "only in the gradient: 'encoder/kernel/a'",
        ),
    ],
)
def test_a_gradient_that_does_not_fit_names_the_paths(bad, error, match):
    tx = fo.freezable(optax.sgd(0.1), "encoder")
    with pytest.raises(error, match=match):
        tx.update(bad, tx.init(params()), params())


def test_params_of_another_tree_name_the_paths():
    tx = fo.freezable(optax.sgd(0.1), "encoder")
    with pytest.raises(ValueError, match=r"the params and the optimizer state.*'decoder'"):
        tx.update(ones(params()), tx.init(params()), {"decoder": jnp.ones(2)})


def test_another_state_is_an_error_that_says_what_to_pass():
    tx = fo.freezable(optax.sgd(0.1), "encoder")
    with pytest.raises(TypeError, match=r"given a dict .* update\(gradients, state, params\)"):
        tx.update(ones(params()), params(), tx.init(params()))
    with pytest.raises(ValueError, match="no plan; states are made by freezable"):
        tx.update(ones(params()), fo.FreezeState(optax.EmptyState(), ()), params())


class Point(NamedTuple):
    x: jax.Array
    y: jax.Array


def test_none_in_the_params_is_no_leaf():
    tree = {"point": Point(jnp.ones(2), jnp.ones(2)), "absent": None}
    tx = fo.freezable(optax.sgd(1.0), "point/x")
    updates, _ = tx.update({"point": Point(None, jnp.ones(2)), "absent": None}, tx.init(tree), tree)
    expected = {"point": Point(-jnp.zeros(2), -jnp.ones(2)), "absent": None}
    fo.testing.assert_frozen(expected, updates, True)


@pytest.mark.parametrize("given", [None, HOLE], ids=["None", "hole"])
def test_a_missing_gradient_of_a_frozen_leaf(given):
    tx = fo.freezable(optax.sgd(1.0), "encoder")
    grads = {"encoder": {"kernel": given, "bias": given}, "head": {"kernel": jnp.ones((2, 2))}}
    state = tx.init(params())
    updates, _ = tx.update(grads, state, params())
    zeros = given if given is HOLE else -jnp.zeros((3, 2))
    bias = given if given is HOLE else -jnp.zeros(2)
    expected = {"encoder": {"kernel": zeros, "bias": bias}, "head": {"kernel": -jnp.ones((2, 2))}}
    fo.testing.assert_frozen(expected, updates, True)
    # Without params nothing tells the dtype, and None leaves a leaf alone as well.
    updates, _ = tx.update(grads, state)
    assert updates["encoder"] == {"kernel": given, "bias": given}


def test_the_step_retraces_when_the_plan_changes_and_only_then():
    traces = []
    tx = fo.freezable(optax.adam(0.1), "encoder")

    @jax.jit
    def step(grads, state):
        traces.append(state.plan)
        return tx.update(grads, state)[1]

    state = tx.init(params())
    for _ in range(3):
        state = step(ones(params()), state)
    twin = fo.freezable(optax.adam(0.1), fo.regex("encoder/.*")).init(params())
    step(ones(params()), twin)
    assert len(traces) == 1
    step(ones(params()), fo.freezable(optax.adam(0.1), "head").init(params()))
    assert len(traces) == 2


def test_equal_plans_are_equal_and_hash_alike():
    plans = [
        fo.freezable(optax.sgd(1.0), s).init(params()).plan for s in ("head", "head", "encoder")
    ]
    assert plans[0] == plans[1]
    assert hash(plans[0]) == hash(plans[1])
    assert plans[0] != plans[2]
    assert plans[0] != "head"


def test_update_looks_at_no_path(monkeypatch):
    tx = fo.freezable(optax.adam(0.1), "encoder")
    state = tx.init(params())

    def refuse(*_args, **_kwargs):
        raise AssertionError("paths were looked at")

    monkeypatch.setattr(jax.tree_util, "tree_flatten_with_path", refuse)

    @jax.jit
    def step(params, state):
        grads = fo.grad(lambda p: (p["encoder"]["kernel"] @ p["head"]["kernel"]).sum(), state)(
            params
        )
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    jax.block_until_ready(step(params(), state))


def test_a_trace_has_the_equations_of_the_bare_one_and_a_zero_for_each_shape():
    tree = {f"layer_{i}": {"w": jnp.ones((3, 1 + i % 2))} for i in range(20)}
    tx, bare = fo.freezable(optax.adam(0.1), "layer_{0..17}"), optax.adam(0.1)
    subtree = {k: tree[k] for k in ("layer_18", "layer_19")}
    jaxpr = jax.make_jaxpr(tx.update)(tree, tx.init(tree), tree)
    expected = jax.make_jaxpr(bare.update)(subtree, bare.init(subtree), subtree)
    assert len(jaxpr.eqns) == len(expected.eqns) + 2


def test_a_frozen_leaf_does_not_count_in_a_norm_inside():
    grads = {"encoder": {"kernel": jnp.full((3, 2), 1e6), "bias": jnp.full(2, jnp.nan)}}
    grads |= {"head": {"kernel": jnp.full((2, 2), 2.0)}}  # of norm 4
    tx = fo.freezable(optax.clip_by_global_norm(1.0), "encoder")
    updates, _ = tx.update(grads, tx.init(params()), params())
    np.testing.assert_array_equal(updates["head"]["kernel"], np.full((2, 2), 0.5, np.float32))


def test_a_param_shaped_extra_argument_gets_holes_and_others_pass():
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    tx = fo.freezable(inner, "encoder")
    extra = {"tags": ones(params()), "scalar": 3.0, "batch": [jnp.ones(2)], "name": "x", "no": None}
    tx.update(ones(params()), tx.init(params()), params(), **extra)
    tags = seen.pop("tags")
    assert tags["encoder"] == {"kernel": HOLE, "bias": HOLE}
    assert isinstance(tags["head"]["kernel"], jax.Array)
    del extra["tags"]
    assert all(seen[name] is value for name, value in extra.items())


def test_a_callable_is_handed_whole_params_and_its_gradients_get_holes():
    seen = []

    def update(updates, state, params=None, *, grad_fn):
        grads = grad_fn(params, scale=2.0)
        seen.append(jax.tree.structure(grads))
        return grads, state

    def grad_fn(whole, scale):
        assert jax.tree.structure(whole) == jax.tree.structure(params())
        return jax.tree.map(lambda x: x * scale, whole)

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    tx = fo.freezable(inner, "encoder")
    state = tx.init(params())
    updates, _ = tx.update(ones(params()), state, params(), grad_fn=grad_fn)
    np.testing.assert_array_equal(updates["head"]["kernel"], np.full((2, 2), 4.0))
    assert seen == [jax.tree.structure(fo.partition(params(), "encoder")[0])]
    # params of None reach the callable as None: there is nothing to fill in.
    holes = fo.partition(params(), "encoder")[0]
    inner = optax.GradientTransformationExtraArgs(
        lambda _: optax.EmptyState(), lambda u, s, p=None, *, grad_fn: (grad_fn(u, scale=1.0), s)
    )
    with pytest.raises(ValueError, match=r"needs whole params.*update\(gradients, state, params"):
        fo.freezable(inner, "encoder").update(holes, state, None, grad_fn=grad_fn)


def test_lbfgs_finds_the_minimum_of_the_trainable_part():
    def loss(p):
        return ((p["encoder"]["kernel"] @ p["head"]["kernel"] - 1.0) ** 2).sum()

    tx, tree = fo.freezable(optax.lbfgs(), "encoder"), params()
    state = tx.init(tree)

    @jax.jit
    def step(tree, state):
        value, grads = fo.value_and_grad(loss, frozen=state)(tree)
        updates, state = tx.update(grads, state, tree, value=value, grad=grads, value_fn=loss)
        return fo.apply_updates(tree, updates, frozen=state), state

    for _ in range(5):
        tree, state = step(tree, state)
    assert loss(tree) < 1e-6
    fo.testing.assert_frozen(params(), tree, "encoder")


def test_the_partition_style_reuses_the_value_and_gradient_of_the_line_search():
    def loss(p):
        return ((p["encoder"]["kernel"] @ p["head"]["kernel"] - 1.0) ** 2).sum()

    tx = fo.freezable(optax.lbfgs(), "encoder")
    trainable, rest = fo.partition(params(), "encoder")
    state = tx.init(params())
    of_trainable = lambda t: loss(fo.merge(t, rest))  # noqa: E731
    value_and_grad = optax.value_and_grad_from_state(of_trainable)
    for _ in range(5):
        value, grads = value_and_grad(trainable, state=state)
        updates, state = tx.update(
            grads, state, trainable, value=value, grad=grads, value_fn=of_trainable
        )
        trainable = fo.apply_updates(trainable, updates)
    assert loss(fo.merge(trainable, rest)) < 1e-6


def test_init_is_abstract_under_eval_shape_and_carries_the_plan():
    tx = fo.freezable(optax.adam(0.1), "encoder")
    abstract = jax.eval_shape(tx.init, params())
    assert jax.tree.structure(abstract) == jax.tree.structure(tx.init(params()))
    assert fo.mask(abstract, params()) == fo.mask("encoder", params())


@pytest.mark.parametrize("depth", ["direct", "chained", "accumulated"])
def test_tree_map_params_maps_moments_and_keeps_the_plan(depth):
    tx = fo.freezable(optax.adam(0.1), "encoder")
    if depth == "chained":
        tx = optax.chain(optax.clip(1.0), tx)
    if depth == "accumulated":
        tx = optax.MultiSteps(tx, 2).gradient_transformation()
    state = tx.init(params())
    mapped = optax.tree_map_params(tx, lambda x: x + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    mu = optax.tree_utils.tree_get(mapped, "mu")
    np.testing.assert_array_equal(mu["head"]["kernel"], np.ones((2, 2)))
    tx.update(ones(params()), mapped, params())

    names = {"encoder": {"kernel": "ek", "bias": "eb"}, "head": {"kernel": "hk"}}
    specs = optax.tree_map_params(
        tx,
        lambda leaf, name: leaf if isinstance(leaf, optax.MaskedNode) else name,
        state,
        names,
        transform_non_params=lambda _: "counter",
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    moments = {"encoder": {"kernel": HOLE, "bias": HOLE}, "head": {"kernel": "hk"}}
    assert optax.tree_utils.tree_get(specs, "nu") == moments
    pairs = jax.tree.map(lambda x, name: (x.shape, name), state, specs)
    assert optax.tree_utils.tree_get(pairs, "mu")["head"]["kernel"] == ((2, 2), "hk")


def test_tree_get_and_tree_set_reach_into_the_state():
    tx = fo.freezable(optax.inject_hyperparams(optax.adam)(learning_rate=0.1), "encoder")
    state = tx.init(params())
    state = optax.tree_utils.tree_set(state, learning_rate=jnp.array(0.5))
    assert optax.tree_utils.tree_get(state, "learning_rate") == 0.5
    assert isinstance(state, fo.FreezeState)
    tx.update(ones(params()), state, params())


def test_a_state_survives_pickling_though_transformations_do_not():
    tx = fo.freezable(optax.adam(0.1), "encoder")
    _, state = tx.update(ones(params()), tx.init(params()), params())
    loaded = pickle.loads(pickle.dumps(state))
    assert loaded.plan == state.plan
    expected, _ = tx.update(ones(params()), state, params())
    updates, _ = tx.update(ones(params()), loaded, params())
    fo.testing.assert_frozen(expected, updates, True)


def test_the_state_says_what_is_frozen():
    text = repr(fo.freezable(optax.sgd(0.1), "encoder").init(params()))
    assert "frozen=2 of 3 leaves ['encoder/bias', 'encoder/kernel']" in text


def test_other_containers_of_the_same_paths_are_the_same_params():
    tx = fo.freezable(optax.sgd(1.0), "point/x")
    state = tx.init({"point": {"x": jnp.ones(2), "y": jnp.ones(2)}})
    grads = {"point": Point(jnp.ones(2), jnp.ones(2))}
    updates, _ = tx.update(grads, state, grads)
    fo.testing.assert_frozen({"point": Point(-jnp.zeros(2), -jnp.ones(2))}, updates, True)


def test_several_optimizers_and_a_frozen_group():
    labels = {"encoder": {"kernel": "slow", "bias": "frozen"}, "head": "fast"}
    groups = {"slow": optax.sgd(0.1), "fast": optax.sgd(1.0), "frozen": optax.set_to_zero()}
    tx = fo.freezable(optax.partition(groups, labels), fo.labelled(labels, "frozen"))
    updates, _ = tx.update(ones(params()), tx.init(params()), params())
    expected = {
        "encoder": {"kernel": jnp.full((3, 2), -0.1), "bias": -jnp.zeros(2)},
        "head": {"kernel": -jnp.ones((2, 2))},
    }
    fo.testing.assert_frozen(expected, updates, True)


@pytest.mark.parametrize("negative", [jnp.float32, jnp.bfloat16, jnp.complex64])
def test_plain_optax_apply_updates_keeps_the_sign_of_zero(negative):
    tree = {"a": -jnp.zeros(3, negative), "b": jnp.ones(3)}
    tx = fo.freezable(optax.sgd(0.1), "a")
    apply = functools.partial(tx.update, ones(tree), tx.init(tree), tree)
    new = optax.apply_updates(tree, apply()[0])
    fo.testing.assert_frozen(tree, new, "a")


def test_a_plan_that_was_mapped_is_a_plan_like_any_other():
    tx = fo.freezable(optax.adam(0.1), "encoder")
    state = tx.init(params())
    mapped = optax.tree_map_params(tx, lambda x: x, state)
    repr(optax.tree_map_params(tx, lambda x: x, mapped))
    assert hash(mapped.plan) == hash(state.plan)
    thawed = fo.thaw(mapped, params(), "encoder")
    assert jax.tree.structure(thawed) == jax.tree.structure(fo.thaw(state, params(), "encoder"))
