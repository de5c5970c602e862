#!/usr/bin/env bash
# `gpjax.fit` with a decaying optimizer moves a parameter that `paramax.non_trainable` marks as fixed.
#
# Seen with gpjax 1.0.0, paramax 0.0.5, jax 0.10.2, optax 0.2.8 on Python 3.11, CPU. `fit` gives all
# arrays of the model to the optimizer. The mark makes the gradient zero, so `adam` leaves the
# parameter, but the decay of `adamw` acts on its unconstrained value.
#
# Output seen, the lengthscale after 50 steps, 0.5 before:
#   adam  0.5
#   adamw 0.5708
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "gpjax==1.0.0" "paramax==0.0.5" "jax==0.10.2" \
    "jaxlib==0.10.2" "optax==0.2.8" "numpyro==0.22.0" "equinox==0.13.8"
JAX_PLATFORMS=cpu JAX_ENABLE_X64=1 "$folder/venv/bin/python" - <<'PYTHON'
import equinox as eqx
import gpjax as gpx
import jax.numpy as jnp
import optax
import paramax

x = jnp.linspace(0.0, 1.0, 20).reshape(-1, 1)
data = gpx.Dataset(X=x, y=jnp.sin(6.0 * x))
kernel = gpx.kernels.RBF(lengthscale=gpx.parameters.PositiveReal(0.5))
kernel = eqx.tree_at(lambda k: k.lengthscale, kernel, replace_fn=paramax.non_trainable)
prior = gpx.gps.Prior(mean_function=gpx.mean_functions.Constant(), kernel=kernel)
posterior = prior * gpx.likelihoods.Gaussian()


def lengthscale_after(optimizer):
    fitted, _ = gpx.fit(
        model=posterior,
        objective=lambda model, data: -gpx.objectives.conjugate_mll(model, data),
        train_data=data,
        optim=optimizer,
        num_iters=50,
        verbose=False,
    )
    return float(gpx.parameters.val(fitted.prior.kernel.lengthscale))


adam = lengthscale_after(optax.adam(0.1))
adamw = lengthscale_after(optax.adamw(0.1, weight_decay=0.1))
print("adam ", round(adam, 4))
print("adamw", round(adamw, 4))
assert adam == 0.5
assert abs(adamw - 0.5708) < 1e-3, "fixed parameters keep their values now"
PYTHON
