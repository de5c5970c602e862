"""GPJax: Gaussian processes, whose parameters are stored unconstrained."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import freeze_optax as fo
from tests.support.bare_steps import DECAYING_ADAM, bare_steps

gpx = pytest.importorskip("gpjax", reason="make lane-ecosystem installs it")
paramax = pytest.importorskip("paramax")

pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),
    pytest.mark.filterwarnings("ignore:(X|y) is not of type float64"),
]


def data():
    x = jnp.linspace(0.0, 1.0, 12).reshape(-1, 1)
    return gpx.Dataset(X=x, y=jnp.sin(6.0 * x))


def new_posterior():
    lengthscale = gpx.parameters.PositiveReal(jnp.array(0.5, jnp.float32))
    variance = gpx.parameters.NonNegativeReal(jnp.array(1.0, jnp.float32))
    kernel = gpx.kernels.RBF(lengthscale=lengthscale, variance=variance)
    mean = gpx.mean_functions.Constant(jnp.array(0.1, jnp.float32))
    noise = gpx.parameters.NonNegativeReal(jnp.array(0.3, jnp.float32))
    return gpx.gps.Prior(mean_function=mean, kernel=kernel) * gpx.likelihoods.Gaussian(noise)


def objective(posterior, data):
    return -gpx.objectives.conjugate_mll(posterior, data)


def fitted(posterior, tx):
    options = {"num_iters": 3, "verbose": False}
    return gpx.fit(model=posterior, objective=objective, train_data=data(), optim=tx, **options)[0]


@pytest.mark.parametrize(
    "spec", ["prior/kernel", fo.of_type(gpx.kernels.RBF)], ids=["path", "type"]
)
def test_fit_holds_a_kernel_and_trains_the_rest_as_by_hand(spec):
    before = new_posterior()
    after = fitted(before, fo.freezable(DECAYING_ADAM, spec))
    expected = bare_steps(
        lambda posterior: objective(posterior, data()), before, lambda path: "kernel" not in path
    )
    fo.testing.assert_frozen(before, after, spec)
    for ours, theirs in zip(jax.tree.leaves(after), jax.tree.leaves(expected), strict=True):
        if eqx.is_array(theirs):
            assert jnp.allclose(ours, theirs, rtol=1e-5)


def test_what_it_marks_as_fixed_decays_unless_it_is_frozen():
    # gpjax 1.0.0: `fit` gives these parameters to the optimizer, with gradients of zero.
    where = lambda x: x.prior.kernel.lengthscale  # noqa: E731
    fixed = eqx.tree_at(where, new_posterior(), replace_fn=paramax.non_trainable)
    raw = lambda x: where(x)._unconstrained.tree  # noqa: E731
    assert raw(fitted(fixed, optax.adam(0.1))) == raw(fixed)
    assert raw(fitted(fixed, DECAYING_ADAM)) != raw(fixed)
    held = fo.freezable(DECAYING_ADAM, fo.of_type(paramax.NonTrainable))
    assert raw(fitted(fixed, held)) == raw(fixed)
