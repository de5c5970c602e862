"""What XLA's compiler for a TPU makes of a frozen base in host memory; it needs no TPU.

Training steps are compiled for a topology, on abstract arrays. So the figures are the compiler's:
bytes, and which copies run beside matrix products. Nothing is run, and no time is measured. Run
with `make bench-tpu`, which installs libtpu. What is known is written after each case.
`python -m benchmarks.tpu_report` writes the page.
"""

import argparse
import os
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Before libtpu is loaded. It looks for no TPU, and no other process can disturb it.
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import freeze_optax as fo
from benchmarks import hlo, results
from benchmarks.tpu_cases import PACKED, Case, tpu_cases

TOPOLOGY = "v5e:2x2"
MEMORIES = ("device", "pinned_host")
FIGURES = ("argument", "output", "alias", "temp")
Figures = dict[str, Any]


def shardings() -> dict[str, NamedSharding]:
    """For each kind of memory, that of one device of the topology."""
    topology = topologies.get_topology_desc(topology_name=TOPOLOGY, platform="tpu")
    mesh = Mesh(np.array(topology.devices[:1]), ("x",))
    return {
        kind: NamedSharding(mesh, PartitionSpec(), memory_kind=None if kind == "device" else kind)
        for kind in MEMORIES
    }


def machine() -> dict[str, Any]:
    """What compiled, and for which device."""
    topology = topologies.get_topology_desc(topology_name=TOPOLOGY, platform="tpu")
    packages = ("jax", "jaxlib", "libtpu", "optax")
    return {
        "topology": TOPOLOGY,
        "device": topology.devices[0].device_kind,
        **{name: version(name) for name in packages},
    }


def size(case: Case) -> Figures:
    """What the page says of a case."""
    params = jax.eval_shape(case.params)
    leaves = jax.tree.leaves(params)
    flags = jax.tree.leaves(fo.mask(case.base, params))
    base = [x for x, flag in zip(leaves, flags, strict=True) if flag]
    depth = len(params["layers"]) if case.layers_apart else base[0].shape[0]
    return {
        "params": sum(x.size * (PACKED if x.dtype == np.int32 else 1) for x in leaves),
        "base bytes": sum(x.size * x.dtype.itemsize for x in base),
        "layers in the base": depth,
        "tokens": int(np.prod(case.sizes.batch)),
    }


def compiled(case: Case, way: str) -> Figures:
    """The figures of one step, or why there are none."""
    kinds = shardings()
    arguments = case.arguments(way, *(kinds[kind] for kind in MEMORIES))
    same = jax.tree.map(lambda x: x.sharding, arguments[:2])
    step = jax.jit(case.step(way), donate_argnums=(0, 1), out_shardings=(*same, kinds["device"]))
    begin = time.perf_counter()
    try:
        made = step.lower(*arguments).compile()
    except Exception as error:  # noqa: BLE001  (the other ways go on)
        return {"error": f"{type(error).__name__}: {error}"[:600]}
    memory = made.memory_analysis()

    def bytes_in(prefix: str) -> Figures:
        found = {name: getattr(memory, f"{prefix}{name}_size_in_bytes") for name in FIGURES}
        return {**found, "all": sum(found.values()) - 2 * found["alias"]}

    return {
        "device": bytes_in(""),
        "host": bytes_in("host_"),
        "copies": hlo.described(made.as_text()),
        "compile seconds": time.perf_counter() - begin,
    }


def line(way: str, x: Figures) -> str:
    if "error" in x:
        return f"    {way}: {x['error']}"
    device, host = (
        ", ".join(f"{name} {count / 1e9:.2f}" for name, count in x[kind].items())
        for kind in ("device", "host")
    )
    seconds = x["compile seconds"]
    return f"    {way}: device {device}; host {host}; {x['copies']}; {seconds:.0f} s"


def measure(cases: dict[str, Case], only: Sequence[str], path: Path | None) -> Figures:
    found: Figures = {}
    for name, case in cases.items():
        if only and not any(word in name for word in only):
            continue
        found[name] = {**size(case), "ways": {}}
        print(f"{name}: {size(case)}", flush=True)
        for way in case.ways:
            found[name]["ways"][way] = compiled(case, way)
            print(line(way, found[name]["ways"][way]), flush=True)
        if path:
            results.write(path, {"cases": found}, machine())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="tiny models; not kept")
    parser.add_argument("--out", type=Path, help="where to write, if not to benchmarks/results")
    parser.add_argument("--only", nargs="+", default=[], help="cases with such a word in the name")
    args = parser.parse_args()
    path = args.out or (None if args.tiny or args.only else results.path("tpu"))
    measure(tpu_cases(args.tiny), args.only, path)
    print(machine())


if __name__ == "__main__":
    main()
