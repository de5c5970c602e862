#!/usr/bin/env bash
# A jitted function with an ordered effect (`jax.debug.print(…, ordered=True)`, an ordered
# `io_callback`) that uses an array in host memory does not compile in JAX 0.7.1 to 0.12.0.1. The
# error is of a `safe_zip` and names neither.
#
# JAX puts a token for the effect before the outputs, and does not count it in the list of their
# memories (jax-ml/jax#40108 is open). Without `ordered` the same function runs.
#
# Output seen with jax 0.10.2 on Python 3.11, CPU (with 0.7.1 "argument 2 is longer than argument 1"):
#   unordered: ran
#   ordered: ValueError: safe_zip() argument 1 has length 2 but argument 0 has length 1. …
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "jax==0.10.2" "jaxlib==0.10.2"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp

on_host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
weights = jax.device_put(jnp.ones(3), on_host)


def outcome(ordered):
    def step(weights):
        jax.debug.callback(lambda: None, ordered=ordered)
        return jax.device_put(weights, jax.memory.Space.Device).sum()

    try:
        jax.jit(step)(weights)
    except ValueError as error:
        return f"ValueError: {error}"
    return "ran"


unordered, ordered = outcome(False), outcome(True)
print("unordered:", unordered)
print("ordered:", ordered)
assert unordered == "ran"
assert "safe_zip" in ordered, "ordered effects beside host memory compile now"
PYTHON
