#!/usr/bin/env bash
# Two layers under `jax.checkpoint` that copy their weights from host memory do not compile for a TPU.
#
# Seen with jax 0.10.2 and libtpu 0.0.42.1 on Python 3.11, Linux x86-64; nothing runs on a TPU, libtpu alone
# compiles. The usual advice for weights in `pinned_host` is `jax.device_put(w, jax.memory.Space.Device)`
# where the layer uses them, and to rematerialise the layer, so that the backward pass copies them again.
# With one layer that compiles. With two in a row, XLA raises: it takes a value that comes out of the
# optimization barrier of `jax.checkpoint`, which has the weights and the activations as its arguments, for
# the weights themselves, and finds that in the result. Without `jax.checkpoint` it compiles, and so it does
# on a CPU. One barrier for each array of weights compiles too.
#
# Output seen:
#   1 layer: compiled; 2 layers: E1200 CompileTimeHostOffloadOutputLocationMismatch; 2 layers, own barriers: compiled
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "jax==0.10.2" "jaxlib==0.10.2" "libtpu==0.0.42.1" numpy
TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost JAX_PLATFORMS=cpu "$folder/venv/bin/python" - 2>"$folder/log" <<'PYTHON'
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

chip = topologies.get_topology_desc(topology_name="v5e:2x2", platform="tpu").devices[:1]
mesh = Mesh(np.array(chip), ("x",))


def array(shape, kind):
    sharding = NamedSharding(mesh, PartitionSpec(), memory_kind=kind)
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)


def layer(w, x):
    return jnp.tanh(x @ jax.device_put(w, jax.memory.Space.Device))


def own_barrier(w, x):
    return layer(jax.lax.optimization_barrier(w), x)


def outcome(f, count):
    def loss(weights, x):
        for w in weights:
            x = f(w, x)
        return x.astype(jnp.float32).sum()

    weights = [array((1024, 1024), "pinned_host")] * count
    lowered = jax.jit(jax.grad(loss, argnums=1)).lower(weights, array((512, 1024), "device"))
    try:
        lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return " ".join(re.search(r"(E\d+): (\w+)", str(error)).groups())
    return "compiled"


one, two = (outcome(jax.checkpoint(layer), count) for count in (1, 2))
own = outcome(own_barrier, 2)
print(f"1 layer: {one}; 2 layers: {two}; 2 layers, own barriers: {own}")
expected = ("compiled", "E1200 CompileTimeHostOffloadOutputLocationMismatch", "compiled")
assert (one, two, own) == expected, "XLA compiles it otherwise now"
PYTHON
