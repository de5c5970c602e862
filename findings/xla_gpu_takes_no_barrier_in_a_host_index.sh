#!/usr/bin/env bash
# For a GPU, a slice of host memory does not compile if its index went through an optimization barrier.
#
# In a loop, `jax.lax.optimization_barrier` around the index of a layer in host memory is an error of
# XLA's: it evaluates the index for each step, to copy at addresses that it knows, and stops at the
# barrier instead of leaving the copy as it is. In jax 0.10.2 it compiles. Seen with jax 0.11.2 and
# 0.12.0.1 (these need Python 3.12), for an H100; no GPU is needed.
#
# Output seen:
#   without a barrier: compiles
#   with a barrier: UNIMPLEMENTED: HloEvaluator does not implement the opt-barrier opcode.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "jax==0.11.2" "jaxlib==0.11.2" numpy
# The compiler for CUDA alone: it needs no GPU and nothing of CUDA.
"$folder/venv/bin/pip" install --quiet --no-deps "jax-cuda12-pjrt==0.11.2" "jax-cuda12-plugin==0.11.2"
FOLDER="$folder/dump" JAX_PLATFORMS=cpu "$folder/venv/bin/python" 2>"$folder/log" - <<'PYTHON' || { tail -5 "$folder/log"; exit 1; }
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
from jax._src import xla_bridge
from jax.experimental import topologies

# An H100. JAX asks for it by a name that it knows only where there is a GPU (jax-ml/jax#23971).
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 } threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84929347584
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
name_of = xla_bridge.canonicalize_platform
xla_bridge.canonicalize_platform = lambda x: x if x == "cuda" else name_of(x)
(device,) = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1").devices
sharding = jax.sharding.SingleDeviceSharding(device)
stack = jax.ShapeDtypeStruct((16, 2048, 2048), jnp.float32, sharding=sharding)
x = jax.ShapeDtypeStruct((512, 2048), jnp.float32, sharding=sharding)
HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
OPTIONS = {"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": False}


def compiled(f, **options):
    def on_host(stack, x):
        return f(jax.device_put(stack, HOST), x)

    lowered = jax.jit(on_host, out_shardings=sharding).lower(stack, x)
    return lowered.compile(compiler_options={**OPTIONS, **options})


def layer_at(stack, i):
    return jax.device_put(jax.lax.dynamic_index_in_dim(stack, i, keepdims=False), DEVICE)


def outcome(guarded):
    def loop(stack, x):
        def step(state, _):
            x, i = state
            index = jax.lax.optimization_barrier(i + 1) if guarded else i + 1
            return (jnp.tanh(x @ layer_at(stack, index)), i + 1), None

        return jax.lax.scan(step, (x, jnp.int32(0)), None, 15)[0][0]

    try:
        compiled(loop)
    except jax.errors.JaxRuntimeError as error:
        return str(error).splitlines()[0]
    return "compiles"


plain, guarded = outcome(False), outcome(True)
print(f"without a barrier: {plain}")
print(f"with a barrier: {guarded}")
assert plain == "compiles"
assert "does not implement the opt-barrier opcode" in guarded, "XLA takes the index now"
PYTHON
