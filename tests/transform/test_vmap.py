"""An update outside of `jax.vmap` names the axis where it would mix models."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo

pytestmark = pytest.mark.usefixtures("standard_promotion")

# As many models as elements, so that the counters broadcast without an error.
PARAMS = {"a": jnp.ones((4, 4)), "b": jnp.arange(16.0).reshape(4, 4)}
JITS = [pytest.param(lambda f: f, id="eager"), pytest.param(jax.jit, id="jit")]


def member(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[0], tree)


@pytest.mark.parametrize("jit", JITS)
@pytest.mark.parametrize("inner", [optax.adam(0.1), optax.chain(optax.add_noise(0.1, 0.5, 0))])
def test_a_state_of_many_models_is_not_updated_as_one(inner, jit):
    tx = fo.freezable(inner, "a")
    states = jax.vmap(tx.init)(PARAMS)
    with pytest.raises(ValueError, match=r"state has one more axis, of length 4, .*jax.vmap\(tx"):
        jit(tx.update)(PARAMS, states, PARAMS)


@pytest.mark.parametrize("jit", JITS)
@pytest.mark.parametrize("inner", [optax.adam(0.1), optax.sgd(0.1, momentum=0.9)])
def test_params_of_many_models_are_not_updated_with_the_state_of_one(inner, jit):
    tx = fo.freezable(inner, "a")
    state = tx.init(member(PARAMS))
    names = "mu/b', '0/nu/b" if tx.init(member(PARAMS)).plan.layout.counters else "trace/b"
    with pytest.raises(ValueError, match=f"the state is that of one model: .*{names}"):
        jit(tx.update)(PARAMS, state, PARAMS)
    with pytest.raises(ValueError, match="the state is that of one model"):
        jit(tx.update)(PARAMS, state)


def test_statistics_without_counters_may_be_stacked_as_they_are():
    tx = fo.freezable(optax.sgd(0.1, momentum=0.9), "a")
    states = jax.vmap(tx.init)(PARAMS)
    updates, _ = tx.update(PARAMS, states, PARAMS)
    expected, _ = jax.vmap(tx.update)(PARAMS, states, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_an_axis_of_examples_is_none_of_models():
    tx = fo.freezable(optax.contrib.dpsgd(0.1, 1.0, 0.0, 0), "a")
    params = member(PARAMS)
    updates, _ = tx.update(PARAMS, tx.init(params), params)
    inner = optax.contrib.dpsgd(0.1, 1.0, 0.0, 0)
    alone = {"b": params["b"]}
    expected, _ = inner.update({"b": PARAMS["b"]}, inner.init(alone), alone)
    np.testing.assert_array_equal(updates["b"], expected["b"])
