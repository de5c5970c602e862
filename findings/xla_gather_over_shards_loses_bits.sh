#!/usr/bin/env bash
# Rows gathered from an array that is sharded along its rows lose -0.0 and subnormal numbers.
#
# Seen with jax 0.10.2 on Python 3.11 and jax 0.12.0.1 on Python 3.13, CPU, four virtual devices, an
# Auto mesh. XLA sends the rows to all devices as a masked sum with zeros: -0.0 + 0.0 is 0.0, and a sum
# of float32 on a CPU flushes subnormal numbers. Values compare as equal, bits do not. The same gather
# of the same array on one device keeps every bit.
#
# Output seen, as the bits of float32 numbers:
#   one device [2147483648, 714, 2147483648]
#   sharded    [0, 0, 0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "jax==0.10.2" "jaxlib==0.10.2" numpy
XLA_FLAGS=--xla_force_host_platform_device_count=4 JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
values = np.full((8, 1), -0.0, np.float32)
values[3] = 1e-42
rows = np.array([0, 3, 6])


@jax.jit
def take(x):
    return x.at[rows].get(mode="promise_in_bounds")


def bits(x):
    return np.asarray(x).view(np.uint32).ravel().tolist()


one = bits(take(jax.device_put(values, jax.devices()[0])))
sharded = bits(take(jax.device_put(values, NamedSharding(mesh, PartitionSpec("x")))))
print("one device", one)
print("sharded   ", sharded)
assert one == bits(values[rows]) == [2147483648, 714, 2147483648]
assert sharded == [0, 0, 0], "a gather over shards keeps bits now"
PYTHON
