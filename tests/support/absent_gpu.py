"""An H100 that is not there: XLA compiles programs for it, on any machine, and nothing runs.

Needs the plugin of JAX for CUDA (`make lane-gpu`), but no library of CUDA.
"""

import functools
import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax._src import xla_bridge
from jax.experimental import topologies

# As `xla/tools/hlo_opt/gpu_specs` of XLA describes it.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# To choose the fastest kernels, XLA would have to run them.
_OPTIONS: dict[str, str | bool] = {
    "xla_gpu_autotune_level": "0",
    "xla_gpu_enable_triton_gemm": False,
    "xla_backend_optimization_level": "3",
    "xla_llvm_disable_expensive_passes": False,
}


def is_installed() -> bool:
    return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{x}") for x in (12, 13))


@functools.cache
def device() -> Any:
    # JAX asks for a GPU by a name that it knows only where there is one (jax-ml/jax#23971).
    name_of: Any = xla_bridge.canonicalize_platform

    def with_cuda(platform: str) -> str:
        return platform if platform == "cuda" else name_of(platform)

    xla_bridge.canonicalize_platform = with_cuda
    options = {"target_config": _H100, "topology": "1x1x1"}
    return topologies.get_topology_desc(platform="cuda", **options).devices[0]


def compiled(
    f: Callable[..., Any], *args: Any, donated: Sequence[int] = (), folder: Path | None = None
) -> Any:
    """What XLA makes of a function for arguments of which the shapes and dtypes count.

    What it writes on the way goes into a folder, if there is one.
    """
    on_device = jax.sharding.SingleDeviceSharding(device())

    def placed(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_device)

    jitted = jax.jit(f, out_shardings=on_device, donate_argnums=donated)
    lowered = jitted.lower(*jax.tree.map(placed, args))
    dump = {"xla_dump_to": str(folder), "xla_dump_hlo_module_re": ".*"} if folder else {}
    return lowered.compile(compiler_options={**_OPTIONS, **dump})


def on_host(tree: Any) -> Any:
    """Puts arrays in host memory, in a program: arguments of an absent device are never there."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host), tree)


class Reads(NamedTuple):
    """Where a loop reads a part of an array: a linear function of the loop's count, in bytes."""

    first: int
    step: int


def linear_reads(program: Any) -> list[Reads]:
    """What XLA takes the slices of the loops to read, where it takes them to be linear."""
    text = program.runtime_executable().hlo_modules()[0].as_serialized_hlo_module_proto()
    found = re.findall(rb'"dynamic_slice_config":(\{[^{}]*(?:\{[^{}]*\})?\})', text)
    # JAX 0.12 writes zeros before the linear function.
    last = re.compile(rb'"byte_offset":"(-?\d+)","byte_stride":"(-?\d+)"')
    pairs = [last.findall(x)[-1] for x in found]
    return [Reads(int(first), int(step)) for first, step in pairs]


def commands(folder: Path) -> str:
    """The list of commands that XLA has the device run, one a line, indented in loops."""
    (path,) = folder.glob("*thunk_sequence.txt")
    return path.read_text(encoding="utf-8")
