#!/usr/bin/env bash
# XLA writes zeros over the last rows of a sharded array where a jitted function takes all rows
# before them, computes with these, and puts them back in place (`dynamic_update_slice`). The rows
# that it takes are whole on each device, as 7 rows do not divide among 4.
#
# Seen with jax 0.10.2 on Python 3.11 and 0.12.0.1 on 3.13, CPU with 4 virtual devices; with 0.7.1
# all three are right. A scatter, and a concatenation with the last row, are right everywhere.
#
# Output seen:
#   update in place: [0. 0. 0. 0.]
#   scatter: [29. 30. 31. 32.]
#   concatenation: [29. 30. 31. 32.]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "jax==0.10.2" "jaxlib==0.10.2"
export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4
"$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

mesh = jax.make_mesh((4,), ("x",))
by_rows = NamedSharding(mesh, PartitionSpec("x", None))
whole = NamedSharding(mesh, PartitionSpec(None, None))
values = np.arange(1, 33, dtype=np.float32).reshape(8, 4)
x = jax.device_put(values, by_rows)


def first_seven(x):
    return jax.lax.slice_in_dim(x, 0, 7)


ways = {
    "update in place": lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, 0, 0),
    "scatter": lambda x, new: x.at[np.arange(7)].set(new),
    "concatenation": lambda x, new: jnp.concatenate([new, x[7:]]),
}
seen = {}
for name, put in ways.items():
    take = jax.sharding.auto_axes(first_seven, axes="x", out_sharding=whole)
    back = jax.sharding.auto_axes(put, axes="x", out_sharding=by_rows)
    result = np.asarray(jax.jit(lambda x: back(x, take(x) + 1))(x))
    np.testing.assert_array_equal(result[:7], values[:7] + 1)
    seen[name] = result[7]
    print(f"{name}: {result[7]}")
np.testing.assert_array_equal(seen["scatter"], values[7])
np.testing.assert_array_equal(seen["concatenation"], values[7])
assert not seen["update in place"].any(), "XLA keeps the last row now"
PYTHON
