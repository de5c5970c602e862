"""Writes docs/explanation/costs.md and its plots from the results of the other benchmarks.

Its prose is page.md, beside this file.

Run with `python -m benchmarks.report`, after the others.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import host, results, wall
from benchmarks.compiled import FIGURES, LIMIT, of, ratio, worst
from benchmarks.steps import BY_HAND, BY_HAND_PART, DROP_IN, PARTITION_STYLE, WAYS

DOCS = Path(__file__).parents[1] / "docs" / "explanation"
SHOWN = [way for way in WAYS if way not in (BY_HAND, BY_HAND_PART)]
OURS = (DROP_IN, PARTITION_STYLE)
MODES = ("donated", "kept")
Cases = dict[str, Any]

PAGE = Path(__file__).with_name("page.md")


def ratios(cases: Cases, figure: str, mode: str = "donated") -> str:
    """A table of one figure: cases by ways."""

    def cell(by_way: dict[str, Any], way: str) -> str:
        if by_way[way] is None:
            return "—"
        return f"{ratio(by_way[way][figure], of(by_way, way)[figure]):.2f}"

    rows = ([name, *(cell(case[mode], way) for way in SHOWN)] for name, case in cases.items())
    return results.markdown(results.table(None, ["case", *SHOWN], rows))


def largest(cases: Cases, mode: str) -> str:
    rows = ([name, *(worst(case[mode], way) for way in SHOWN)] for name, case in cases.items())
    return results.markdown(results.table(None, ["case", *SHOWN], rows))


def figures(cases: Cases) -> Iterator[tuple[list[str], dict[str, Any], str, str]]:
    """Each figure of ours: its name as cells, the figures of all ways, ours, and which it is."""
    for name, case in cases.items():
        for mode in MODES:
            for way in OURS:
                for figure in FIGURES:
                    yield [f"{name}, {mode}", way, figure], case[mode], way, figure


def over_limit(cases: Cases) -> str:
    rows = [
        [*cells, f"{by_way[way][figure]:,.0f}", f"{of(by_way, way)[figure]:,.0f}"]
        for cells, by_way, way, figure in figures(cases)
        if by_way[way][figure] > LIMIT * of(by_way, way)[figure]
    ]
    if not rows:
        return "Nothing."
    columns = ["case", "way", "figure", "here", "split by hand"]
    return (
        "Each cohort after the first has two bias corrections of its own, in 64 bytes each. Where "
        "the other\nintermediate results find room in the output buffers, they are all that is "
        "temporary:\n\n" + results.markdown(results.table(None, columns, rows))
    )


def peers_with_less(cases: Cases) -> str:
    rows = []
    for cells, by_way, way, figure in figures(cases):
        for peer, costs in by_way.items():
            is_peer = peer not in (BY_HAND, BY_HAND_PART, *OURS)
            if way == DROP_IN and is_peer and costs and costs[figure] < by_way[way][figure]:
                values = (costs[figure], by_way[way][figure], of(by_way, way)[figure])
                rows.append([cells[0], figure, peer, *(f"{value:,.0f}" for value in values)])
    if not rows:
        return "Nowhere."
    columns = ["case", "figure", "peer", "the peer", "here", "split by hand"]
    return (
        "Only in temporary bytes: such a peer writes gradients or moments of frozen leaves to "
        "outputs, and XLA uses\nthe output buffers meanwhile. Its peak is no smaller in any of "
        "these.\n\n"
        if all(row[1] == "temporary bytes" for row in rows)
        else ""
    ) + results.markdown(results.table(None, columns, rows))


def walls(found: dict[str, Any]) -> str:
    parts = []
    for name, by_way in found["cases"].items():
        made = results.table(None, ["way", *wall.COLUMNS[1:]], wall.rows(by_way))
        parts.append(f"{name}:\n\n{results.markdown(made)}")
    return "\n\n".join(parts)


def draw_cases(cases: Cases) -> Figure:
    """A row for each case, a column for each way, the largest ratio in each field."""
    figure = Figure(figsize=(10, 7), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    cells = [[worst(case["donated"], way) for way in SHOWN] for case in cases.values()]
    # Above three times all are as dark, or the largest would hide what the others say.
    shades = [
        [min(float(cell), 3) if cell != "—" else float("nan") for cell in row] for row in cells
    ]
    axes.imshow(shades, cmap="Oranges", vmin=0.9, vmax=4.5, aspect="auto")
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            axes.text(x, y, cell, ha="center", va="center", fontsize=9)
    labels = [way.replace(", ", ",\n").replace("(", "(\n").replace("_t", "_\nt") for way in SHOWN]
    axes.set_xticks(range(len(SHOWN)), labels, fontsize=9)
    axes.set_yticks(range(len(cases)), list(cases), fontsize=9)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("largest ratio of any compiled figure to code split by hand, buffers donated")
    return figure


def draw_host(found: dict[str, Any]) -> Figure:
    """Milliseconds over leaves, on log scales."""
    figure = Figure(figsize=(11, 3.8), layout="constrained", facecolor="white")
    shown = ["init", *host.EACH]
    styles = {
        host.BARE: ("#777777", "o"),
        host.BARE_WHOLE: ("#111111", "s"),
        host.PEER: ("#d95f02", "^"),
        host.OURS: ("#1f77b4", "o"),
        host.PARTITION_STYLE: ("#2ca02c", "D"),
    }
    handles = {}
    axes: Axes
    for axes, what in zip(figure.subplots(1, len(shown), sharey=True), shown, strict=True):
        for row in found["times"]:
            if row["what"] == what and row["who"] in styles:
                color, marker = styles[row["who"]]
                (line,) = axes.loglog(
                    found["leaves"], row["milliseconds"], color=color, marker=marker, markersize=4
                )
                handles[row["who"]] = line
        axes.set_title(what, fontsize=10)
        axes.set_xlabel("leaves", fontsize=9)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("milliseconds", fontsize=9)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles))
    return figure


def main() -> None:
    compiled, timed, hosted = (results.read(name) for name in ("compiled", "wall", "host"))
    cases = compiled["cases"]
    per: Callable[..., str] = lambda case, way, figure: (  # noqa: E731
        f"{ratio(cases[case]['donated'][way][figure], cases[case]['donated'][BY_HAND][figure]):.2f}"
    )
    machines = {results.described(found["machine"]) for found in (compiled, timed, hosted)}
    host_times, host_ratios = map(results.markdown, host.tables(hosted))
    freeze = "chain(…, optax.freeze)"
    page = PAGE.read_text().format(
        machine="; ".join(sorted(machines)),
        worst_donated=largest(cases, "donated"),
        worst_kept=largest(cases, "kept"),
        flops=ratios(cases, "FLOPs"),
        accessed=ratios(cases, "bytes accessed"),
        peak=ratios(cases, "peak bytes"),
        state=ratios(cases, "state bytes"),
        limit=LIMIT,
        over=over_limit(cases),
        less=peers_with_less(cases),
        partition_flops=per("norm logged", "optax.partition", "FLOPs"),
        freeze_state=per("nine tenths frozen", freeze, "state bytes"),
        freeze_flops=per("nine tenths frozen", freeze, "FLOPs"),
        rounds=timed["rounds"],
        wall=walls(timed),
        host_times=host_times,
        host_ratios=host_ratios,
    )
    (DOCS / "costs.md").write_text(page)
    draw_cases(cases).savefig(DOCS / "costs.png", dpi=130)
    draw_host(hosted).savefig(DOCS / "costs_host.png", dpi=130)


if __name__ == "__main__":
    main()
