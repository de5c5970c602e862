#!/usr/bin/env bash
# Under jit, jnp.full_like of an array on an explicit mesh gives an array on one device, unless
# jax.set_mesh is in force. Other operations on the array keep its sharding.
#
# Seen with jax 0.12.0.1 on Python 3.13, CPU, four virtual devices. With jax 0.10.2 the same call
# raises ValueError ("Length of device assignment 1 is not equal to the size of the mesh 4").
#
# Output seen:
#   full_like SingleDeviceSharding
#   times 0   NamedSharding
#   full_like with jax.set_mesh NamedSharding
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.13}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "jax==0.12.0.1" "jaxlib==0.12.0.1" numpy
XLA_FLAGS=--xla_force_host_platform_device_count=4 JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Explicit,))
x = jax.device_put(np.ones((8, 2), np.float32), NamedSharding(mesh, PartitionSpec("x")))


def kind(fun):
    return type(jax.jit(fun)(x).sharding).__name__


full, times = kind(lambda x: jnp.full_like(x, 0.0)), kind(lambda x: x * 0)
with jax.set_mesh(mesh):
    inside = kind(lambda x: jnp.full_like(x, 1.0))
print("full_like", full)
print("times 0  ", times)
print("full_like with jax.set_mesh", inside)
assert full == "SingleDeviceSharding", "full_like keeps the sharding now"
assert times == inside == "NamedSharding"
PYTHON
