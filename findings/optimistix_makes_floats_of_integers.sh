#!/usr/bin/env bash
# `optimistix.minimise` gives an integer array in `y0` back as floats, and its optimizer sees floats.
#
# Seen with optimistix 0.1.0, optax 0.2.8, jax 0.10.2 on Python 3.11, CPU. A count or an index among
# the params so trains (weight decay moves it), while jax.grad of the same function refuses it.
#
# Output seen:
#   dtype int32 -> float32 values [1 2] -> [0.81, 1.62]
#   jax.grad: TypeError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "optimistix==0.1.0" "optax==0.2.8" "jax==0.10.2" \
    "jaxlib==0.10.2" "equinox==0.13.8"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import optax
import optimistix as optx

y0 = {"count": jnp.array([1, 2]), "weight": jnp.array([1.0, 2.0])}


def loss(y, args=None):
    return (y["weight"] ** 2).sum()


decaying = optax.chain(optax.sgd(0.1), optax.add_decayed_weights(-0.1))
solver = optx.OptaxMinimiser(decaying, rtol=1e-3, atol=1e-3)
count = optx.minimise(loss, solver, y0, max_steps=2, throw=False).value["count"]
values = [round(float(x), 2) for x in count]
print("dtype", y0["count"].dtype, "->", count.dtype, "values", y0["count"], "->", values)
try:
    jax.grad(loss)(y0)
except TypeError:
    print("jax.grad: TypeError")
assert count.dtype == jnp.float32, "integers stay integers now"
assert values == [0.81, 1.62]
PYTHON
