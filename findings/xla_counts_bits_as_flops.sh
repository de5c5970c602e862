#!/usr/bin/env bash
# XLA's cost analysis counts the reading of floats as bits as one FLOP for each element.
#
# Seen with jax 0.10.2 on Python 3.11 and jax 0.12.0.1 on Python 3.13, CPU. `bitcast_convert_type` from
# float32 to uint32 computes nothing. Yet `cost_analysis()` of a program with it has as many more FLOPs as
# the array has elements; a program that only moves the elements has none. So a gate on FLOPs sees a
# program that moves floats as bits as one that computes.
#
# Output seen:
#   moved 0.0, moved as bits 2000.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "jax==0.10.2" "jaxlib==0.10.2" numpy
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp

x = jax.ShapeDtypeStruct((1_000,), jnp.float32)


def flops(function):
    return jax.jit(function).lower(x).compile().cost_analysis().get("flops", 0.0)


def moved_as_bits(x):
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type(jnp.flip(bits), jnp.float32)


plain, as_bits = flops(jnp.flip), flops(moved_as_bits)
print(f"moved {plain}, moved as bits {as_bits}")
assert (plain, as_bits) == (0.0, 2000.0), "XLA counts otherwise now"
PYTHON
