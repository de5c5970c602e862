"""From a plain optimizer's state to a freezable one and back, against the plain run."""

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
    encoder = {"kernel": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), "bias": jnp.zeros(3)}
    return {"encoder": encoder, "head": jnp.full((3, 2), 0.5)}


def grads_at(tree: Any, step: int) -> Any:
    return jax.tree.map(lambda x: jnp.sin(x * (step + 1)) + jnp.float32(0.1), tree)


def run(tx: Any, state: Any, tree: Any, steps: range) -> tuple[Any, Any]:
    update = jax.jit(tx.update)
    for step in steps:
        updates, state = update(grads_at(tree, step), state, tree)
        tree = jax.jit(optax.apply_updates)(tree, updates)
    return tree, state


def adam() -> optax.GradientTransformationExtraArgs:
    return optax.adam(0.1)


INNERS = {
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
    "lion": lambda: optax.lion(0.01),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "stateless": lambda: optax.sgd(0.1),
    "chain": lambda: optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(optax.cosine_decay_schedule(0.1, 10))
    ),
    "MultiSteps": lambda: optax.MultiSteps(adam(), 2).gradient_transformation(),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(
        learning_rate=optax.linear_schedule(0.1, 0.01, 5)
    ),
    "partition": lambda: optax.partition(
        {"a": adam(), "b": optax.sgd(0.1, momentum=0.9)}, {"encoder": "a", "head": "b"}
    ),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(0.1),
}


@pytest.mark.parametrize("name", INNERS)
def test_an_adopted_run_is_the_plain_run_and_so_is_one_released(name):
    inner = INNERS[name]()
    tx = fo.freezable(inner, "encoder")
    tree, plain = run(inner, inner.init(params()), params(), range(3))
    state = fo.adopt(tx, plain, tree)
    assert fo.mask(state, tree) == jax.tree.map(lambda _: False, tree)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (plain, state)), strict=True))

    expected, expected_state = run(inner, plain, tree, range(3, 6))
    tree, state = run(tx, state, tree, range(3, 6))
    fo.testing.assert_frozen(expected, tree, True)

    released = fo.release(state, tree)
    assert jax.tree.structure(released) == jax.tree.structure(expected_state)
    fo.testing.assert_frozen(expected_state, released, True)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (state, released)), strict=True))
    fo.testing.assert_frozen(
        run(inner, expected_state, expected, range(6, 8)),
        run(inner, released, tree, range(6, 8)),
        True,
    )


def test_an_adopted_state_can_be_frozen_and_loses_no_moment():
    tx = fo.freezable(adam())
    tree, plain = run(adam(), adam().init(params()), params(), range(3))
    state = fo.freeze(fo.adopt(tx, plain, tree), tree, "encoder")
    assert state.inner[0].mu["head"] is plain[0].mu["head"]
    new, _ = run(tx, state, tree, range(3, 5))
    start = (plain[0]._replace(**{m: getattr(plain[0], m)["head"] for m in ("mu", "nu")}), plain[1])
    head, _ = run(adam(), start, tree["head"], range(3, 5))
    np.testing.assert_allclose(new["head"], head, rtol=1e-6)
    fo.testing.assert_frozen(tree, new, "encoder")


@pytest.mark.parametrize("name", ["adamw", "adafactor", "momentum", "schedule_free"])
def test_a_leaf_without_state_is_released_with_a_fresh_one(name):
    inner = INNERS[name]()
    tx = fo.freezable(inner, "encoder")
    tree, state = run(tx, tx.init(params()), params(), range(3))
    released = fo.release(state, tree)
    fresh = inner.init(tree)
    assert jax.tree.structure(released) == jax.tree.structure(fresh)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(fresh)]
    of_encoder = [i for i, path in enumerate(paths) if "encoder" in path]
    assert of_encoder
    old, new = jax.tree.leaves(fresh), jax.tree.leaves(released)
    fo.testing.assert_frozen([old[i] for i in of_encoder], [new[i] for i in of_encoder], True)
    kept = [x for i, x in enumerate(new) if i not in of_encoder]
    assert all(a is b for a, b in zip(kept, jax.tree.leaves(state), strict=True))
    run(inner, released, tree, range(3, 4))


def test_a_state_of_several_cohorts_is_released_with_the_counters_of_the_first():
    tx = fo.freezable(adam(), "encoder")
    tree, state = run(tx, tx.init(params()), params(), range(3))
    tree, state = run(tx, fo.thaw(state, tree, "encoder/kernel"), tree, range(3, 5))
    state = fo.freeze(state, tree, "encoder/kernel", keep_state=True)
    released = fo.release(state, tree)
    assert int(released[0].count) == 5
    # Parked state is state too.
    assert released[0].mu["encoder"]["kernel"] is state.inner[0].mu["encoder"]["kernel"]
    fo.testing.assert_frozen(jnp.zeros(3), released[0].nu["encoder"]["bias"], True)
    again = fo.adopt(tx, released, tree)
    assert fo.mask(again, tree) == jax.tree.map(lambda _: False, tree)


def test_a_state_that_no_leaf_has_a_part_in_is_released_as_a_fresh_one():
    # With the steps that went by while all was frozen, Adam's first update would be 2.5 times lr.
    tx = fo.freezable(adam())
    tree, state = run(tx, tx.init(params()), params(), range(3))
    _, state = run(tx, fo.freeze(state, tree, "**"), tree, range(3, 6))
    fo.testing.assert_frozen(adam().init(tree), fo.release(state, tree), True)


def test_clocks_after_statistics_that_are_not_there_are_released():
    body = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3), "scale": jnp.ones(3)}
    tree = {"body": body, "head": jnp.ones(3)}
    rate = optax.scale_by_schedule(lambda count: 0.1)
    inner = optax.chain(optax.masked(optax.scale_by_adam(), {"body": False, "head": True}), rate)
    tx = fo.freezable(inner, "head")
    state = tx.init(tree)
    for _ in range(3):
        _, state = tx.update(tree, state, tree)
    released = fo.release(state, tree)
    assert jax.tree.structure(released) == jax.tree.structure(inner.init(tree))
    assert int(released[1].count) == 3
    assert int(fo.thaw(state, tree, fo.rows("head", [0])).inner[1].count) == 3


def test_release_reaches_into_a_tree():
    tx = optax.chain(optax.clip(1.0), fo.freezable(adam(), "encoder"))
    whole = TrainState.create(apply_fn=None, params=params(), tx=tx)
    released = fo.release(whole, params())
    fo.testing.assert_frozen(
        optax.chain(optax.clip(1.0), adam()).init(params()), released.opt_state, True
    )
    pairs = zip(*map(jax.tree.leaves, (released.params, whole.params)), strict=True)
    assert all(a is b for a, b in pairs)


def test_untrainable_leaves_are_frozen_by_adopt_and_come_back_by_release():
    inner = optax.adam(0.1)
    tree = {"w": jnp.ones(2), "a_count": jnp.array([3, 4]), "z_flag": jnp.array(True), "lr": 0.5}
    plain = inner.init(tree)
    tx = fo.freezable(inner)
    state = fo.adopt(tx, plain, tree)
    expected = tx.init(tree)
    assert state.plan == expected.plan
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    assert fo.mask(state, tree) == {"w": False, "a_count": True, "z_flag": True, "lr": False}
    assert jax.tree.structure(fo.release(state, tree)) == jax.tree.structure(plain)
    fo.testing.assert_frozen(plain, fo.release(state, tree), True)


def test_what_no_optimizer_keeps_state_for_stays_out_of_release():
    tree = {"w": jnp.ones(2), "key": jax.random.key(0), "act": jnp.tanh}
    state = fo.freezable(adam()).init(tree)
    released = fo.release(state, tree)
    hole = optax.MaskedNode()
    expected = {"w": jnp.zeros(2), "key": hole, "act": hole}
    fo.testing.assert_frozen(expected, released[0].mu, True)


def test_lookahead_is_adopted_and_released_with_its_pair():
    inner = optax.lookahead(adam(), 2, 0.5)
    tx = fo.freezable(inner, "encoder")

    def steps(opt, state, pair, numbers):
        for step in numbers:
            updates, state = jax.jit(opt.update)(grads_at(pair.fast, step), state, pair)
            pair = jax.jit(optax.apply_updates)(pair, updates)
        return pair, state

    pair = optax.LookaheadParams.init_synced(params())
    pair, plain = steps(inner, inner.init(pair), pair, range(3))
    expected = steps(inner, plain, pair, range(3, 6))
    pair, state = steps(tx, fo.adopt(tx, plain, pair), pair, range(3, 6))
    fo.testing.assert_frozen(expected, (pair, fo.release(state, pair)), True)


def other_params(**changes: Any) -> dict[str, Any]:
    return params() | changes


@pytest.mark.parametrize(
    ("tx", "state", "tree", "error", "match"),
    [
        pytest.param(
            adam(),
            adam().init(params()),
            params(),
            TypeError,
            "freezable gives.* a tuple",
            id="adam",
        ),
        pytest.param(
            optax.chain(optax.clip(1.0), fo.freezable(adam())),
            (optax.EmptyState(), adam().init(params())),
            params(),
            TypeError,
            "pass the freezable itself, not a chain around it",
            id="chain around",
        ),
        pytest.param(
            fo.freezable(adam()),
            optax.sgd(0.1, momentum=0.9).init(params()),
            params(),
            ValueError,
            r"(?s)does not have the structure .* gives(?=.*0/trace)(?=.*0/mu)",
            id="another optimizer",
        ),
        pytest.param(
            fo.freezable(adam()),
            fo.freezable(adam()).init(params()),
            params(),
            ValueError,
            "FreezeState, does not have the structure that its transformation gives",
            id="adopted already",
        ),
        pytest.param(
            fo.freezable(optax.lbfgs()),
            optax.lbfgs().init(params()),
            params(),
            ValueError,
            "can't be edited",
            id="no layout",
        ),
        pytest.param(
            fo.freezable(adam()),
            adam().init(params()),
            {"encoder": params()["encoder"], "tail": jnp.ones((3, 2))},
            ValueError,
            r"only in the inner state: '0/mu/head'.*only in that structure: '0/mu/tail'",
            id="other paths",
        ),
        pytest.param(
            fo.freezable(adam()),
            adam().init(params()),
            other_params(head=jnp.ones((3, 7))),
            ValueError,
            r"other params: .*'0/mu/head' has \[\(3, 2\)\], where the params give \[\(3, 7\)\]",
            id="other shapes",
        ),
        pytest.param(
            fo.freezable(adam()),
            adam().init(params()),
            other_params(head={"kernel": jnp.ones((3, 2))}),
            ValueError,
            "head",
            id="a node for a leaf",
        ),
        pytest.param(
            fo.freezable(adam()),
            adam().init(params()),
            other_params(encoder=jnp.ones((4, 3))),
            ValueError,
            "'0/mu/encoder' has ",
            id="a leaf for a node",
        ),
        pytest.param(
            fo.freezable(adam()),
            adam().init(params()),
            other_params(encoder=jnp.array(3)),
            ValueError,
            "'0/mu/encoder' has ",
            id="an integer for a node",
        ),
        pytest.param(
            fo.freezable(adam()),
            adam().init(params()),
            None,
            (TypeError, ValueError),
            "params",
            id="no params",
        ),
    ],
)
def test_what_does_not_fit_is_named_by_adopt(tx, state, tree, error, match):
    with pytest.raises(error, match=match) as caught:
        fo.adopt(tx, state, tree)
    # Of a large model the numbers would fill the screen.
    assert "Array(" not in str(caught.value)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "chain"])
def test_shapes_of_another_model_are_named_even_where_moments_are_factored(name):
    inner = INNERS[name]()
    wider = other_params(head=jnp.ones((3, 7)))
    with pytest.raises(ValueError, match=r"is of other params: \W*'[^']*/head' has \[\("):
        fo.adopt(fo.freezable(inner), inner.init(params()), wider)


@pytest.mark.parametrize("name", ["adopt", "import_state"])
@pytest.mark.parametrize(
    "spec",
    ["a typo", fo.where(lambda path, x: bool((x == 1).all()))],
    ids=["selects nothing", "reads values"],
)
def test_the_spec_of_the_transformation_does_not_count_where_a_state_has_its_own(name, spec):
    params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
    tx, plain = fo.freezable(optax.adam(0.1), spec), optax.adam(0.1)
    whole = fo.freezable(plain).init(params)
    if name == "adopt":
        state = fo.adopt(tx, plain.init(params), params)
    else:
        state = fo.import_state(tx, params, fo.export_state(whole))
    assert jax.tree.structure(state) == jax.tree.structure(whole)


def test_the_spec_of_a_transformation_inside_another_counts():
    params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
    tx = fo.freezable(fo.freezable(optax.sgd(0.1, momentum=0.9), "encoder"))
    state = tx.init(params)
    imported = fo.import_state(tx, params, fo.export_state(state))
    assert jax.tree.structure(imported) == jax.tree.structure(state)
