"""The section of a GPU's page about a base in host memory."""

from typing import Any

from benchmarks import results
from benchmarks.streaming import ON_DEVICE, ON_HOST, STREAMED

COLUMNS = [
    "case",
    "way",
    "ms a step",
    "ratio to the first way",
    "its quartiles",
    "transfer, ms at least",
    "ratio to the transfer",
    "peak, GB",
    "base on the device, in layers",
    "base on the host, GB",
]
OF_STEP, OF_TRANSFER, LAYERS = 1.15, 1.10, 2
"""The targets: of the step in device memory, of the transfer's time, and of the device's memory."""
NOTHING = "These cases were not measured in this run, so whether the targets are kept is not known."
Figures = dict[str, Any]


def layers_on_device(found: Figures, way: str) -> float | None:
    """How many layers of the base a way has on the device, beside what the first way has anyway."""
    ways = found["ways"]
    peaks = [ways.get(name, {}).get("peak bytes") for name in (ON_DEVICE, way)]
    if None in peaks or "layer bytes" not in found:
        return None
    first, of_way = peaks
    return (of_way - first + found["base bytes"]) / found["layer bytes"]


def to_transfer(found: Figures, way: str) -> float | None:
    """The ratio of a step's time to that of its transfer alone."""
    least = found.get("least milliseconds", {}).get(way)
    time = found["ways"].get(way, {}).get("milliseconds")
    return time / least if least and time else None


def cells(found: Figures, way: str, why: str | None) -> list[str]:
    x = found["ways"][way]

    def text(value: float | None, form: str, scale: float = 1.0) -> str:
        return "—" if value is None else format(value * scale, form)

    return [
        way,
        why or text(x.get("milliseconds"), ".2f"),
        text(x.get("ratio"), ".3f"),
        f"{x['low']:.3f} to {x['high']:.3f}" if "low" in x else "—",
        text(found.get("least milliseconds", {}).get(way), ".2f"),
        text(to_transfer(found, way), ".3f"),
        text(x.get("peak bytes"), ".2f", 1e-9),
        text(layers_on_device(found, way), ".2f"),
        text(x.get("host bytes", 0), ".2f", 1e-9),
    ]


def verdict(case: str, found: Figures) -> str:
    """Whether a case keeps the targets."""
    of_first, of_way = (found["ways"].get(way, {}) for way in (ON_DEVICE, STREAMED))
    least = found.get("least milliseconds", {}).get(STREAMED)
    layers, transfer = layers_on_device(found, STREAMED), to_transfer(found, STREAMED)
    if layers is None or transfer is None or least is None or "ratio" not in of_way:
        return f"- {case}: no figure, see below."

    def said(what: str, value: float, target: float) -> str:
        return f"{what} {value:.2f}, target {target:g}: {'kept' if value <= target else 'MISSED'}"

    # Which of the two bounds the step, computing or copying, was measured too.
    if of_first["milliseconds"] > least:
        time = said("step time to that in device memory", of_way["ratio"], OF_STEP)
    else:
        time = said("step time to that of the transfer", transfer, OF_TRANSFER)
    return f"- {case}: {time}. {said('Layers of the base on the device', layers, LAYERS)}."


def of_cases(steps: Figures) -> dict[str, Figures]:
    return {name: x for name, x in steps.items() if name.endswith(ON_HOST)}


def section(steps: Figures, reason: Any) -> str:
    """The table and the verdicts; `reason` says of a way why it has no times."""
    measured = {name: x for name, x in of_cases(steps).items() if "ways" in x}
    if not measured:
        return NOTHING
    rows: list[list[str]] = []
    for case, found in measured.items():
        names = [case, *[""] * (len(found["ways"]) - 1)]
        pairs = zip(names, found["ways"], strict=True)
        rows += [[name, *cells(found, way, reason(found["ways"][way]))] for name, way in pairs]
    widths = [x["bandwidth"] for x in measured.values() if "bandwidth" in x]
    rate = f"{widths[0] / 1e9:.1f} GB/s" if widths else "an unknown rate"
    parts = [
        f"The host sends {rate} to the device, in one jitted copy of pinned memory.",
        results.markdown(results.table(None, COLUMNS, rows)),
        "\n".join(verdict(*item) for item in measured.items()),
    ]
    return "\n\n".join(parts)
