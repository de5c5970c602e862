"""Writes docs/explanation/tpu.md from the results of `benchmarks.tpu`.

Its prose is tpu_page.md, beside this file.

Run with `python -m benchmarks.tpu_report`, after `make bench-tpu`.
"""

import re
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.tpu_cases import IN_INT32, STREAMED
from benchmarks.tpu_cases import ON_DEVICE as FIRST

DOCS = Path(__file__).parents[1] / "docs" / "explanation"
PAGE = Path(__file__).with_name("tpu_page.md")
TARGET = 2
"""How many layers of the base may be on the device at most."""
IN_MEMORY = [
    "case",
    "base, GB",
    "base is",
    "device memory, GB",
    "base on the device, in layers",
    "host memory, GB",
]
OF_COPIES = [
    "case",
    "base is",
    "copies from the host",
    "asynchronous",
    "beside a matrix product",
    "in loops",
    "in loops, beside a matrix product",
    "largest, MB",
]
Figures = dict[str, Any]


def reason(error: str) -> str:
    """Why a way could not be compiled, in few words."""
    found = re.search(r"required .*?\(([\d.]+)G\) exceeds .*?\(([\d.]+)G\)", error)
    if found:
        return f"does not fit: {found[1]} of {found[2]} GiB"
    return f"error: {error.splitlines()[0].split(' while ')[0].removesuffix('.')}"


def layers_on_device(cases: Figures, name: str, way: str) -> float | None:
    """How many layers of the base a way has on the device, beside what the first way has anyway."""
    case = cases[name]
    # On the device nobody would pack int8: there the whole stack gets unpacked.
    reference = cases.get(name.replace(IN_INT32, ""), case)
    of_first, of_way = reference["ways"][FIRST], case["ways"][way]
    if "error" in of_first or "error" in of_way:
        return None
    more = of_way["device"]["all"] - of_first["device"]["all"] + case["base bytes"]
    return more * case["layers in the base"] / case["base bytes"]


def _named(name: str, ways: Figures) -> list[tuple[str, str]]:
    """The ways, the first of them with the name of the case."""
    return [("" if i else name, way) for i, way in enumerate(ways)]


def memory(cases: Figures) -> str:
    rows: list[list[str]] = []
    for name, case in cases.items():
        for shown, way in _named(name, case["ways"]):
            x, layers = case["ways"][way], layers_on_device(cases, name, way)
            base = f"{case['base bytes'] / 1e9:.2f}" if shown else ""
            if "error" in x:
                rows.append([shown, base, way, reason(x["error"]), "—", "—"])
            else:
                of_device, of_host = (f"{x[kind]['all'] / 1e9:.2f}" for kind in ("device", "host"))
                of_base = "—" if layers is None else f"{layers:.2f}"
                rows.append([shown, base, way, of_device, of_base, of_host])
    return results.markdown(results.table(None, IN_MEMORY, rows))


def copies(cases: Figures) -> str:
    rows: list[list[str]] = []
    for name, case in cases.items():
        ways = {
            way: x["copies"] for way, x in case["ways"].items() if x.get("copies", {}).get("copies")
        }
        for shown, way in _named(name, ways):
            *counts, largest = ways[way].values()
            rows.append([shown, way, *map(str, counts), f"{largest / 1e6:,.1f}"])
    return results.markdown(results.table(None, OF_COPIES, rows))


def short(cases: Figures) -> str:
    lines: list[str] = []
    for name, case in cases.items():
        lines.append(
            f"- **{name}** ({case['params'] / 1e9:.1f} billion params, a base of "
            f"{case['base bytes'] / 1e9:.1f} GB):"
        )
        for way in (FIRST, STREAMED):
            x = case["ways"][way]
            held = f"{x['device']['all'] / 1e9:.1f} GB of device memory" if "device" in x else ""
            lines.append(f"  - base {way}: {held or reason(x['error'])}")
        layers = layers_on_device(cases, name, STREAMED)
        if layers is not None:
            kept = "kept" if layers <= TARGET else "MISSED"
            lines[-1] += f", {layers:.2f} layers of the base; target {TARGET}: {kept}"
    return "\n".join(lines)


def page(found: Figures) -> str:
    """The page in Markdown."""
    on, cases = found["machine"], found["cases"]
    return PAGE.read_text().format(
        device=on["device"],
        topology=on["topology"],
        packages=", ".join(f"{x} {on[x]}" for x in ("jax", "jaxlib", "libtpu", "optax")),
        tokens=f"{next(iter(cases.values()))['tokens']:,}",
        target=TARGET,
        short=short(cases),
        memory=memory(cases),
        copies=copies(cases),
    )


def main() -> None:
    (DOCS / "tpu.md").write_text(page(results.read("tpu")))


if __name__ == "__main__":
    main()
