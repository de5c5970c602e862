#!/usr/bin/env bash
# A donated array of which a slice is replaced is copied twice if another gradient reads it too.
#
# Seen with jax 0.7.1, 0.10.2 and 0.12.0.1, CPU. One step replaces the last columns of `head`, which is
# donated, with `dynamic_update_slice`. If nothing else trains, XLA writes them in place. If `body`
# below it trains too, whose gradient reads `head`, the whole array is copied, and the copy is copied
# again, though the gradient could be computed first. `jax.lax.optimization_barrier` between the two
# does not help.
#
# Output seen, the number of copies of the whole array:
#   body frozen 0, body trained 2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "jax==0.10.2" "jaxlib==0.10.2" numpy
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import re

import jax
import jax.numpy as jnp

head = jax.ShapeDtypeStruct((64, 4_000), jnp.float32)
body = jax.ShapeDtypeStruct((64, 64), jnp.float32)
x = jax.ShapeDtypeStruct((8, 64), jnp.float32)


def copies(body_trains):
    def step(head, body, x):
        def loss(body, columns):
            y = jnp.tanh(jnp.tanh(x @ body) @ head)
            return (y**2).mean() + (columns**2).sum()

        columns = head[:, -80:]
        of_body, of_columns = jax.grad(loss, argnums=(0, 1))(body, columns)
        body = body - of_body if body_trains else body
        return jax.lax.dynamic_update_slice(head, columns - of_columns, (0, 3_920)), body

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(head, body, x).compile()
    return len(re.findall(r"f32\[64,4000\]\S* copy\(", compiled.as_text()))


frozen, trained = copies(False), copies(True)
print(f"body frozen {frozen}, body trained {trained}")
assert (frozen, trained) == (0, 2), "XLA makes other copies now"
PYTHON
