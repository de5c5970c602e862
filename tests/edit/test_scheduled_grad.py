"""Gradients that follow the phases of `scheduled`, and dtypes that its branches have to share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo

pytestmark = pytest.mark.usefixtures("standard_promotion")

PARAMS = {"encoder": jnp.full(2, 2.0), "head": jnp.full(2, 3.0), "other": jnp.full(2, 5.0)}
PHASES = fo.Phases({0: "encoder", 2: fo.nothing})


def loss(params):
    return (params["encoder"] * params["head"] * params["other"]).sum()


def expected(frozen):
    grads = {"encoder": 15.0, "head": 10.0, "other": 6.0}
    return {path: np.full(2, 0.0 if path in frozen else x) for path, x in grads.items()}


@pytest.mark.parametrize(("step", "frozen"), [(0, "encoder"), (2, "")])
def test_specs_beside_a_scheduled_state_freeze_as_well(step, frozen):
    tx = fo.scheduled(optax.sgd(0.1), PHASES)
    state = tx.init(PARAMS)
    for _ in range(step):
        _, state = tx.update(PARAMS, state, PARAMS)
    grads = fo.grad(loss, frozen=[state, "head"])(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, grads, expected({frozen, "head"}))


def test_phases_go_by_path_where_the_leaves_are_in_another_order():
    params = {"b": {"x": jnp.ones(2)}, "a": jnp.full(2, 3.0)}
    state = fo.scheduled(optax.sgd(0.1), fo.Phases({0: "a"})).init(params)

    @jax.tree_util.register_pytree_with_keys_class
    class Reversed(dict):
        def tree_flatten_with_keys(self):
            keys = sorted(self, reverse=True)
            return [(jax.tree_util.DictKey(key), self[key]) for key in keys], tuple(keys)

        @classmethod
        def tree_unflatten(cls, keys, values):
            return cls(zip(keys, values, strict=True))

    def product(params):
        return (params["a"] * params["b"]["x"]).sum()

    grads = fo.grad(product, frozen=state)(Reversed(params))
    np.testing.assert_array_equal(grads["a"], [0.0, 0.0])
    np.testing.assert_array_equal(grads["b"]["x"], [3.0, 3.0])


def test_two_scheduled_states_are_an_error():
    state = fo.scheduled(optax.sgd(0.1), PHASES).init(PARAMS)
    with pytest.raises(ValueError, match="follows the phases of one state"):
        fo.grad(loss, frozen=[state, state])


@pytest.mark.parametrize(
    "dtype",
    ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float4_e2m1fn"],
)
def test_phases_train_and_freeze_small_floats(dtype):
    params = {path: jnp.ones(3, getattr(jnp, dtype)) for path in ("a", "b")}
    tx = fo.scheduled(optax.sgd(0.5), fo.Phases({0: "a", 1: fo.nothing}))
    state = tx.init(params)
    for trained in ({"b"}, {"a", "b"}):
        before = params
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = fo.apply_updates(params, updates, frozen=state)
        for path, x in params.items():
            moved = before[path].astype(jnp.float32) - (0.5 if path in trained else 0.0)
            np.testing.assert_array_equal(x.astype(jnp.float32), moved)


def test_statistics_that_change_their_dtype_are_an_error_that_names_them():
    params = {path: jnp.ones(2, jnp.bfloat16) for path in ("a", "b")}
    grads = {path: jnp.ones(2) for path in params}
    tx = fo.scheduled(optax.sgd(0.1, momentum=0.9), fo.Phases({0: "a", 1: fo.nothing}))
    message = "'inner/0/trace/a' is of bfloat16 in one phase and of float32 in another"
    with pytest.raises(ValueError, match=message):
        tx.update(grads, tx.init(params), params)


def test_statistics_that_change_their_dtype_in_every_phase_go_as_in_the_bare_optimizer():
    params, grads = {"a": jnp.ones(2, jnp.bfloat16)}, {"a": jnp.ones(2)}
    bare = optax.sgd(0.1, momentum=0.9)
    tx = fo.scheduled(bare, fo.Phases({0: fo.nothing}))
    updates, _ = tx.update(grads, tx.init(params), params)
    wanted, _ = bare.update(grads, bare.init(params), params)
    assert updates["a"].dtype == wanted["a"].dtype == jnp.float32
    np.testing.assert_array_equal(updates["a"], wanted["a"])


def test_extra_arguments_reach_the_optimizer_in_each_phase():
    def update(updates, state, params=None, *, factor):
        del params
        return jax.tree.map(lambda x: factor * x, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    tx = fo.scheduled(inner, PHASES)
    state = tx.init(PARAMS)
    for frozen in ["encoder", "encoder", ""]:
        updates, state = tx.update(PARAMS, state, PARAMS, factor=2.0)
        wanted = {path: np.zeros(2) if path == frozen else 2 * x for path, x in PARAMS.items()}
        jax.tree.map(np.testing.assert_array_equal, updates, wanted)
