"""`measured` computes all norms as one array, which no transformation of JAX shows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo

pytestmark = pytest.mark.usefixtures("standard_promotion")

MEASURED = fo.measured(optax.sgd(0.1))


def test_a_leaf_with_a_gradient_of_zeros_has_no_part_in_the_slope_of_another_norm():
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    state = MEASURED.init(params)

    def norm_of_b(grads: Any) -> Any:
        return MEASURED.update(grads, state, params)[1].norms["b"][1]

    grads = {"a": jnp.zeros(2), "b": jnp.ones(3)}
    for slope in (jax.grad(norm_of_b)(grads), jax.jit(jax.grad(norm_of_b))(grads)):
        np.testing.assert_array_equal(slope["a"], 0)
        np.testing.assert_allclose(slope["b"], 3**-0.5, rtol=1e-6)


def test_under_vmap_the_norms_of_a_shared_leaf_stay_shared():
    params = {"own": jnp.ones((4, 3)), "shared": jnp.ones(2)}
    first = MEASURED.init({"own": params["own"][0], "shared": params["shared"]})
    norms = {"own": jnp.stack([first.norms["own"]] * 4), "shared": first.norms["shared"]}
    axes = {"own": 0, "shared": None}
    state_axes = first._replace(norms=axes, state=None)

    def step(params: Any, state: Any) -> Any:
        grads = {"own": 3 * params["own"], "shared": 2 * params["shared"]}
        return MEASURED.update(grads, state, params)[1]

    after = jax.jit(jax.vmap(step, (axes, state_axes), state_axes))(
        params, first._replace(norms=norms)
    )
    np.testing.assert_allclose(after.norms["own"][:, 1], np.full(4, 3 * 3**0.5), rtol=1e-6)
    np.testing.assert_allclose(after.norms["shared"][1], 2 * 2**0.5, rtol=1e-6)
