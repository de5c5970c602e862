#!/usr/bin/env bash
# A copy of the next layer from host memory waits for all products of this one, if the loop has outputs.
#
# A scan fetches the next layer while it applies this one; no data depends on the order. Compiled for a
# GPU, the copy starts before the product, and is awaited behind it. If the scan also stacks an output
# (as each scan does that will be differentiated), the copy starts behind the product, so nothing runs
# beside it: XLA saves a copy on the device by writing the next layer over this one. An
# `optimization_barrier` over all that the step returns brings the order back. Seen with jax 0.10.2,
# 0.11.2 and 0.12.0.1 in the list of commands that XLA compiles for an H100; no GPU is needed.
#
# Output seen (S starts the copy, P is the product, D awaits the copy):
#   no output: S P D
#   an output: P S D
#   an output, behind a barrier: S P D
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "jax==0.10.2" "jaxlib==0.10.2" numpy
# The compiler for CUDA alone: it needs no GPU and nothing of CUDA.
"$folder/venv/bin/pip" install --quiet --no-deps "jax-cuda12-pjrt==0.10.2" "jax-cuda12-plugin==0.10.2"
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


def order(name, keeps, ends):
    def loop(stack, x):
        def step(state, _):
            x, kernel, i = state
            following = layer_at(stack, i + 1)
            x = jnp.tanh(x @ kernel)
            if ends:
                x, following = jax.lax.optimization_barrier((x, following))
            return (x, following, i + 1), (x if keeps else None)

        first = x, layer_at(stack, 0), jnp.int32(0)
        (x_after, kernel, _), outputs = jax.lax.scan(step, first, None, 15)
        return x_after @ kernel, outputs

    folder = Path(os.environ["FOLDER"]) / name.replace(" ", "_")
    compiled(loop, xla_dump_to=str(folder), xla_dump_hlo_module_re=".*")
    (path,) = folder.glob("*thunk_sequence.txt")
    body = path.read_text().split("  body:\n")[1]
    kinds = re.findall(r"^ {4}\d+: (kAsyncStart|kCublasLtMatmul|kAsyncDone) ", body, re.M)
    letters = {"kAsyncStart": "S", "kCublasLtMatmul": "P", "kAsyncDone": "D"}
    found = " ".join(letters[kind] for kind in kinds)
    print(f"{name}: {found}")
    return found


found = [
    order("no output", False, False),
    order("an output", True, False),
    order("an output, behind a barrier", True, True),
]
assert found == ["S P D", "P S D", "S P D"], "XLA orders them in another way now"
PYTHON
