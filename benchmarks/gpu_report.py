"""Writes docs/explanation/gpu.md and its plot from the results of `benchmarks.gpu`.

Its prose is gpu_page.md, beside this file.

Run with `python -m benchmarks.gpu_report`, after `make bench-gpu`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import results, rotation, streaming_report
from benchmarks.decoder import FACTORS, FIRST, PARTITION, TURNS
from benchmarks.gpu import BANDWIDTH, BITS, DECODER, EDITS, PEAKS, failure
from benchmarks.steps import BY_HAND
from benchmarks.streaming import ON_HOST

DOCS = Path(__file__).parents[1] / "docs" / "explanation"
PAGE = Path(__file__).with_name("gpu_page.md")
COLUMNS = [
    "case",
    "way",
    "ms a step",
    "ratio to the first way",
    "its quartiles",
    "tokens per second",
    "peak, GB",
    "state, GB",
]
OUTSIDE, INSIDE = "clip outside", "clip inside"
APART = (OUTSIDE, INSIDE, TURNS, FACTORS, ON_HOST)
"""How the names of the cases end that have a table of their own."""
COLORS = {"ours": "#1f77b4", PARTITION: "#d95f02"}
Figures = dict[str, Any]


def reason(found: Figures) -> str | None:
    """Why there are no times: nothing, if there are some."""
    if "RESOURCE_EXHAUSTED" in found.get("error", ""):
        found = failure(RuntimeError(found["error"]))
    if "out of memory" in found:
        return f"out of memory: XLA asked for {found['out of memory'] / 1e9:.1f} GB"
    return found.get("left out", found.get("error"))


def ways(steps: Figures) -> list[tuple[str, str, Figures]]:
    """Each way of each case that has any."""
    return [
        (case, way, figures)
        for case, found in steps.items()
        for way, figures in found.get("ways", {}).items()
    ]


def ratios(steps: Figures, wanted: Callable[[str, str], bool], figure: str) -> list[float]:
    """Ratios to the split by hand, of the ways of cases that are wanted and have the figure."""
    found = []
    for case, way, figures in ways(steps):
        by_hand = steps[case]["ways"].get(BY_HAND, {})
        if way != BY_HAND and wanted(case, way) and figure in figures and figure in by_hand:
            # The ratio of times is a median of its own.
            is_time = figure == "milliseconds"
            found.append(figures["ratio"] if is_time else figures[figure] / by_hand[figure])
    return found


def cells(case: str, way: str, x: Figures) -> list[str]:
    def cell(name: str, form: str, scale: float = 1.0) -> str:
        return format(x[name] * scale, form) if name in x else "—"

    why = reason(x)
    return [
        case,
        way,
        why or cell("milliseconds", ".2f"),
        cell("ratio", ".3f"),
        f"{x['low']:.3f} to {x['high']:.3f}" if "low" in x else "—",
        cell("tokens per second", ",.0f"),
        cell("peak bytes", ".2f", 1e-9),
        cell("state bytes", ".2f", 1e-9),
    ]


def stepped(steps: Figures, wanted: Callable[[str], bool]) -> str:
    rows = []
    for case, found in steps.items():
        if wanted(case):
            of_ways: Figures = found.get("ways") or {"all ways": found}
            names = [case, *[""] * (len(of_ways) - 1)]
            pairs = zip(names, of_ways.items(), strict=True)
            rows += [cells(name, way, figures) for name, (way, figures) in pairs]
    return results.markdown(results.table(None, COLUMNS, rows)) if rows else "Nothing was measured."


def span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3f}" if f"{low:.3f}" == f"{high:.3f}" else f"{low:.3f} to {high:.3f}"


def short(found: Figures) -> str:
    steps, lines = found["steps"], []
    kinds = (OUTSIDE, INSIDE)
    of_ours = lambda case, way: way != PARTITION and case.endswith(kinds)  # noqa: E731
    of_peer = {
        kind: (lambda case, way, kind=kind: way == PARTITION and case.endswith(kind))
        for kind in kinds
    }
    for figure, what in (("milliseconds", "Step time"), ("peak bytes", "Peak memory")):
        lines.append(f"- **{what}**, as a ratio to the split by hand:")
        for who, wanted in {
            "ours, wherever the clip is": of_ours,
            f"`{PARTITION}`, {OUTSIDE}": of_peer[OUTSIDE],
            f"`{PARTITION}`, {INSIDE}": of_peer[INSIDE],
            "ours, in rows, cohorts and phases": lambda case, _: not case.endswith(kinds),
        }.items():
            values = ratios(steps, wanted, figure)
            lines.append(f"  - {who}: {span(values) if values else 'no figure, see below'}")
    lines.append(f"- **Layers in turns**, as a ratio to {rotation.BY_ROWS}: {turns(steps)}")
    lines.append(f"- **Bits**: {kept(found)}")
    return "\n".join(lines)


def turns(steps: Figures) -> str:
    of_turns = [
        (found["ways"][rotation.IN_TURNS], found["ways"][rotation.FULL])
        for case, found in steps.items()
        if case.endswith(TURNS) and "ways" in found
    ]
    timed = [(x, full) for x, full in of_turns if "ratio" in x and "ratio" in full]
    if not timed:
        return "no figure, see below"
    times = span([x["ratio"] for x, _ in timed])
    of_full = span([x["ratio"] / full["ratio"] for x, full in timed])
    peak = span([x["peak bytes"] / full["peak bytes"] for x, full in timed])
    return f"time {times}; to training all layers: time {of_full}, peak memory {peak}"


def kept(found: Figures) -> str:
    of_all = found.get(BITS, {})
    measured = [x for x in of_all.values() if isinstance(x, dict) and "ulps" in x]
    count = sum(x["frozen bits kept"] for x in measured)
    same = sum(x["ulps"] == 0 for x in measured)
    return (
        f"{count} of {len(measured)} optimizers keep every bit of the frozen leaves. {same} give "
        "the trainable leaves the bits that the bare optimizer gives."
    )


def bits(found: Figures) -> str:
    of_all = {k: x for k, x in found.get(BITS, {}).items() if isinstance(x, dict)}
    rows = [
        [
            f"`{name}`",
            "yes" if x.get("frozen bits kept") else "no" if "ulps" in x else "—",
            f"{x['ulps']:,}" if "ulps" in x else reason(x) or "",
        ]
        for name, x in of_all.items()
        if not (x.get("frozen bits kept") and x.get("ulps") == 0)
    ]
    if not rows:
        return kept(found)
    made = results.table(None, ["optimizer", "frozen bits kept", "ulps from the bare one"], rows)
    return f"{kept(found)} The others:\n\n{results.markdown(made)}"


def edits(found: Figures) -> tuple[str, str]:
    of_all = {k: x for k, x in found.get(EDITS, {}).items() if isinstance(x, dict)}
    edited = [
        [
            name,
            f"{x['milliseconds']:.2f}",
            str(x["survivors kept in place"]),
            f"{x['bytes made'] / 1e6:,.1f}",
        ]
        for name, x in of_all.items()
        if "milliseconds" in x
    ]
    traced = [
        [name, f"{x['trace seconds']:.2f}", f"{x['compile seconds']:.2f}"]
        for name, x in of_all.items()
        if "trace seconds" in x
    ]
    columns = ["edit", "ms", "arrays kept in place", "MB made"]
    tables = (
        results.table(None, columns, edited),
        results.table(None, ["", "trace, s", "compile, s"], traced),
    )
    return results.markdown(tables[0]), results.markdown(tables[1])


def peaks(found: Figures) -> str:
    rows = [
        [way, f"{x / 1e9:.2f}" if isinstance(x, int) else (x and reason(x)) or "not counted"]
        for way, x in found.get(PEAKS, {}).items()
        if way not in ("error", "left out")
    ]
    if not rows:
        return reason(found.get(PEAKS, {})) or "Nothing was measured."
    return results.markdown(results.table(None, ["way", "peak, GB"], rows))


def missing(found: Figures) -> str:
    lines = [f"- {case}: {why}." for case, x in found["steps"].items() if (why := reason(x))]
    lines += [
        f"- {case}, {way}: {why}."
        for case, way, figures in ways(found["steps"])
        if (why := reason(figures))
    ]
    for name in (PEAKS, EDITS, BITS):
        why = reason(found.get(name, {"left out": "not measured"}))
        lines += [f"- {name}: {why}."] if why else []
    if why := reason(found.get(BANDWIDTH, {})):
        lines.append(f"- {BANDWIDTH}: {why}.")
    return "\n".join([*lines, "- State in the host's memory."])


def drawn(steps: Figures) -> Figure:
    """A row for each case, with a point for each way and its quartiles."""
    rows: list[tuple[str, list[tuple[str, Figures]]]] = []
    for case, found in steps.items():
        timed = {way: x for way, x in found.get("ways", {}).items() if "ratio" in x}
        if BY_HAND not in timed:
            continue
        peer = [(PARTITION, timed[PARTITION])] if PARTITION in timed else []
        others = {way: x for way, x in timed.items() if way not in (BY_HAND, PARTITION)}
        for way, x in others.items():
            rows.append((case if len(others) == 1 else f"{case}: {way}", [("ours", x), *peer]))
        if peer and not others:
            rows.append((case, peer))
    figure = Figure(figsize=(9, 1.4 + 0.34 * len(rows)), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    named = set()
    for y, (_, points) in enumerate(rows):
        for who, x in points:
            error = [[x["ratio"] - x["low"]], [x["high"] - x["ratio"]]]
            axes.errorbar(
                x["ratio"],
                y + (0.14 if who == PARTITION else -0.14),
                xerr=error,
                color=COLORS[who],
                marker="^" if who == PARTITION else "o",
                markersize=5,
                capsize=2,
                label=None if who in named else who,
            )
            named.add(who)
    axes.axvline(1, color="#111111", linewidth=1)
    # A percent or less must not look large.
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.9), max(high, 1.1))
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=9)
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    axes.set_xlabel("ratio of the step time to the split by hand", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if named:
        figure.legend(loc="outside lower right", ncols=len(named), fontsize=9, frameon=False)
    return figure


def page(found: Figures) -> str:
    """The page in Markdown."""
    steps, decoder = found["steps"], found[DECODER]
    rounds = sorted({x["rounds"] for x in steps.values() if "ways" in x})
    fewest, most = (rounds or [0])[0], (rounds or [0])[-1]
    of_edits, retraces = edits(found)
    return PAGE.read_text().format(
        machine=results.described(found["machine"]),
        short=short(found),
        params=decoder["params"],
        dtype=decoder["dtype"],
        layers=decoder["layers"],
        width=decoder["width"],
        rows=decoder["batch"][0],
        tokens=decoder["batch"][1],
        frozen=100 * (1 - decoder["trained"] / decoder["params"]),
        rounds=f"{fewest}" if fewest == most else f"{fewest} to {most}",
        outside=stepped(steps, lambda case: case.endswith(OUTSIDE)),
        inside=stepped(steps, lambda case: case.endswith(INSIDE)),
        ours=stepped(steps, lambda case: not case.endswith(APART)),
        turns=stepped(steps, lambda case: case.endswith((TURNS, FACTORS))),
        on_host=streaming_report.section(steps, reason),
        first=FIRST,
        peaks=peaks(found),
        edited=found.get(EDITS, {}).get("params edited", 0),
        edits=of_edits,
        retraces=retraces,
        bits=bits(found),
        missing=missing(found),
    )


def main() -> None:
    found = results.read("gpu")
    (DOCS / "gpu.md").write_text(page(found))
    drawn(found["steps"]).savefig(DOCS / "gpu.png", dpi=130)


if __name__ == "__main__":
    main()
