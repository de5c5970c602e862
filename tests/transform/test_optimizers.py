"""A trainable leaf cannot tell: every optimizer of optax, bitwise, against the bare one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from tests.support import optimizers

pytestmark = pytest.mark.usefixtures("standard_promotion")

FROZEN = ("middle", "top/bias")
STEPS = 4


def trainable_subtree(tree: Any) -> Any:
    """What a person would keep by hand: the tree without the frozen leaves, and no holes."""
    return {"bottom": tree["bottom"], "top": {"kernel": tree["top"]["kernel"]}}


def whole(subtree: Any, params: Any) -> Any:
    return {
        "bottom": subtree["bottom"],
        "middle": params["middle"],
        "top": {"kernel": subtree["top"]["kernel"], "bias": params["top"]["bias"]},
    }


def loss(params: Any) -> jax.Array:
    x = jnp.tanh(jnp.linspace(-1.0, 1.0, 18).reshape(3, 6) @ params["bottom"]["kernel"])
    x = (x + params["bottom"]["bias"]) * params["middle"]["kernel"][:3]
    x = x + params["middle"]["bias"] - params["top"]["kernel"][3:] * params["top"]["bias"]
    return (x**2).mean()


def nbytes(state: Any) -> int:
    leaves = jax.tree.leaves(state)
    keys = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
    raw = [jax.random.key_data(x) if k else x for x, k in zip(leaves, keys, strict=True)]
    return sum(x.nbytes for x in raw)


def train(tx, params, loss_fn, grads_fn, name="") -> tuple[list[Any], Any]:
    """The params and updates after each step, and the last state."""

    @jax.jit
    def step(params, state):
        value, grads = grads_fn(params)
        extra = optimizers.extras(name, loss_fn, value, grads)
        updates, state = tx.update(grads, state, params, **extra)
        return fo.apply_updates(params, updates), updates, state

    state, history = jax.jit(tx.init)(params), []
    for _ in range(STEPS):
        params, updates, state = step(params, state)
        history.append((params, updates))
    return history, state


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("module", "name"), optimizers.cases(optimizers.every()))
def test_trainable_leaves_follow_the_bare_optimizer_bitwise(module, name):
    params = optimizers.params()
    start = trainable_subtree(params)

    def bare_loss(subtree):
        return loss(whole(subtree, params))

    bare = optimizers.build(module, name)
    bare_grads = jax.value_and_grad(bare_loss)
    expected, bare_state = train(bare, start, bare_loss, bare_grads, name)
    tx = fo.freezable(optimizers.build(module, name), FROZEN)
    history, state = train(tx, params, loss, fo.value_and_grad(loss, FROZEN), name)

    assert nbytes(state) == nbytes(bare_state)
    for (new, updates), (bare_new, bare_updates) in zip(history, expected, strict=True):
        fo.testing.assert_frozen(params, new, FROZEN)
        fo.testing.assert_frozen(bare_new, trainable_subtree(new), True)
        fo.testing.assert_frozen(bare_updates, trainable_subtree(updates), True)
        for zeros in jax.tree.leaves(fo.partition(updates, FROZEN)[1]):
            np.testing.assert_array_equal(zeros, 0.0)


def test_the_list_covers_optax():
    aliases = {n for m, n in optimizers.every() if m is optax}
    assert {"adam", "adamw", "sgd", "lbfgs", "adafactor", "polyak_sgd", "noisy_sgd"} <= aliases
    contrib = {n for m, n in optimizers.every() if m is optax.contrib}
    assert {"muon", "prodigy", "sophia", "momo", "schedule_free_adamw"} <= contrib


def test_there_is_a_case_for_each_kind():
    assert {n for _, n in optimizers.every()} >= optimizers.KINDS


def test_what_is_excluded_exists_in_some_optax():
    present = {n for m in (optax, optax.contrib) for n in optimizers.names(m)}
    assert set(optimizers.EXCLUDED) & present
    assert not set(optimizers.WRAPPERS) & set(optimizers.EXCLUDED)


def outside(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    return fo.freezable(inner, FROZEN)


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(), id="MultiSteps"),
        pytest.param(lambda tx: optax.apply_if_finite(tx, 3), id="apply_if_finite"),
        pytest.param(lambda tx: optax.chain(optax.clip(0.1), tx), id="clip by value"),
        pytest.param(lambda tx: optax.chain(optax.apply_every(2), tx), id="apply_every"),
        pytest.param(lambda tx: optax.chain(tx, optax.scale(0.5)), id="scaled after"),
    ],
)
def test_wrappers_work_inside_and_outside(wrap):
    params = optimizers.params()
    grads_fn = fo.value_and_grad(loss, FROZEN)

    def bare_loss(subtree):
        return loss(whole(subtree, params))

    expected, _ = train(
        optax.with_extra_args_support(wrap(optax.adam(0.1))),
        trainable_subtree(params),
        bare_loss,
        jax.value_and_grad(bare_loss),
    )
    for tx in (fo.freezable(wrap(optax.adam(0.1)), FROZEN), wrap(outside(optax.adam(0.1)))):
        history, _ = train(optax.with_extra_args_support(tx), params, loss, grads_fn)
        for (new, _), (bare_new, _) in zip(history, expected, strict=True):
            fo.testing.assert_frozen(params, new, FROZEN)
            fo.testing.assert_frozen(bare_new, trainable_subtree(new), True)


def test_inject_hyperparams_around_it_leaks_no_tracer():
    params = optimizers.params()
    grads = jax.tree.map(jnp.ones_like, params)
    tx = optax.inject_hyperparams(lambda rate: fo.freezable(optax.adam(rate), FROZEN))(
        rate=optax.linear_schedule(0.1, 0.01, 3)
    )

    # Not optax.adam itself: all its arguments would be injected, as traced numbers.
    def with_rate(rate):
        return optax.adam(rate)

    bare = optax.inject_hyperparams(with_rate)(rate=optax.linear_schedule(0.1, 0.01, 3))
    state, bare_state = tx.init(params), bare.init(trainable_subtree(params))
    with jax.checking_leaks():
        for _ in range(STEPS):
            updates, state = jax.jit(tx.update)(grads, state, params)
            expected, bare_state = jax.jit(bare.update)(trainable_subtree(grads), bare_state)
            fo.testing.assert_frozen(expected, trainable_subtree(updates), True)
    # The plan must go on holding the transformation that init was given, for later edits.
    fresh = state.inner_state.plan.context.init(params)
    assert jax.tree.structure(fresh) == jax.tree.structure(optax.adam(0.1).init(params))


def lookahead_run(tx, fast, steps):
    params = optax.LookaheadParams.init_synced(fast)
    state = tx.init(params)
    for i in range(steps):
        grads = jax.tree.map(lambda x, i=i: jnp.full_like(x, 0.5 + i), params.fast)
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize(
    "tx",
    [
        pytest.param(outside(optax.lookahead(optax.adam(0.1), 2, 0.5)), id="inside"),
        pytest.param(optax.lookahead(outside(optax.adam(0.1)), 2, 0.5), id="outside"),
    ],
)
def test_lookahead_keeps_both_copies_of_a_frozen_leaf(tx):
    params = optimizers.params()
    bare = optax.lookahead(optax.adam(0.1), 2, 0.5)
    new, state = lookahead_run(tx, params, STEPS)
    expected, bare_state = lookahead_run(bare, trainable_subtree(params), STEPS)
    for copy, bare_copy in zip(new, expected, strict=True):
        fo.testing.assert_frozen(params, copy, FROZEN)
        fo.testing.assert_frozen(bare_copy, trainable_subtree(copy), True)
    assert nbytes(state) == nbytes(bare_state)


def test_a_lookahead_pair_fits_the_state():
    params = optimizers.params()
    tx = outside(optax.lookahead(optax.sgd(0.1), 2, 0.5))
    pair = optax.LookaheadParams.init_synced(params)
    state = tx.init(pair)
    updates, state = tx.update(params, state, pair)
    new = fo.apply_updates(pair, updates, frozen=state)
    assert new.slow["middle"]["bias"] is params["middle"]["bias"]
    assert fo.mask(state, pair) == optax.LookaheadParams(*[fo.mask(FROZEN, params)] * 2)
