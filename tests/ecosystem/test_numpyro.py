"""NumPyro: variational inference, with an optimizer from optax and params in a flat dict."""

import jax
import jax.numpy as jnp
import pytest

import freeze_optax as fo
from tests.support.bare_steps import DECAYING_ADAM, assert_same_bits, bare_steps

numpyro = pytest.importorskip("numpyro", reason="make lane-ecosystem installs it")
dist = pytest.importorskip("numpyro.distributions")
infer = pytest.importorskip("numpyro.infer")
autoguide = pytest.importorskip("numpyro.infer.autoguide")

pytestmark = pytest.mark.usefixtures("standard_promotion")

X = jnp.linspace(-1.0, 1.0, 8)
Y = 2.0 * X + 0.1
SCALES = "*_auto_scale"


def model():
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    spread = numpyro.sample("spread", dist.HalfNormal(1.0))
    numpyro.sample("y", dist.Normal(slope * X, spread), obs=Y)


def inference():
    tx = numpyro.optim.optax_to_numpyro(fo.freezable(DECAYING_ADAM, SCALES))
    # The params alone say where the loss is: with the points drawn, a step depends on a key.
    loss = infer.Trace_ELBO()
    return infer.SVI(model, autoguide.AutoNormal(model), tx, loss)


def params_of(state):
    """The values that the optimizer sees; `get_params` gives the constrained ones."""
    return state.optim_state[1][0]


def test_a_step_moves_what_trains_as_by_hand():
    svi = inference()
    state = svi.init(jax.random.key(0))
    before = params_of(state)
    drawn = jax.random.split(state.rng_key)[1]

    def loss_of(params):
        return svi.loss.loss(drawn, svi.constrain_fn(params), svi.model, svi.guide)

    after, _ = jax.jit(svi.update)(state)
    expected = bare_steps(loss_of, before, lambda path: "scale" not in path, steps=1)
    assert_same_bits(params_of(after), expected)


def test_its_state_holds_ours_and_is_edited():
    svi = inference()
    state = svi.init(jax.random.key(0))
    update = jax.jit(svi.update)
    for _ in range(3):
        state, _ = update(state)
    before = params_of(state)
    state = fo.thaw(state, before, "slope_auto_scale")
    state, _ = update(state)
    fo.testing.assert_frozen(before, params_of(state), "spread_auto_scale")
    # Adam's first step is the learning rate; the decay is 0.1 of a value, of which 0.1 counts.
    moved = jnp.abs(params_of(state)["slope_auto_scale"] - before["slope_auto_scale"] * 0.99)
    assert jnp.allclose(moved, 0.1, rtol=1e-3)


def test_a_run_in_one_loop_keeps_what_is_frozen():
    svi = inference()
    before = svi.init(jax.random.key(0))
    result = svi.run(jax.random.key(0), 5, progress_bar=False)
    fo.testing.assert_frozen(params_of(before), params_of(result.state), SCALES)
    assert jnp.isfinite(result.losses).all()
