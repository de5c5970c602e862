"""What one compiled training step costs, by XLA's own analysis: the same in every run.

Each way of freezing, in each case, with params and optimizer state donated and not. Run with
`python -m benchmarks.compiled`.
"""

import dataclasses
import functools
from typing import Any

import jax
from rich.progress import track

from benchmarks import results
from benchmarks.cases import COMPILED, Case
from benchmarks.steps import BY_HAND, BY_HAND_PART, WAYS, Way, stages

FIGURES = (
    "FLOPs",
    "bytes accessed",
    "temporary bytes",
    "output bytes",
    "peak bytes",
    "state bytes",
)
Costs = dict[str, float]
Options = tuple[tuple[str, Any], ...] | None
"""Names and values for `compiler_options`, hashable."""
LIMIT = 1.02


def nbytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def has(way: Way, case: Case) -> bool:
    return way.cohorts or case.cohorts == 1


def costs(case: Case, way: Way, donated: bool, options: Options = None) -> Costs:
    """The figures of a step, compiled with these options, or with those of the process.

    Of gradients and update jitted apart these are the sums, and of temporary and peak bytes the
    larger ones. Peak bytes are those of arguments, outputs and temporaries together, donated
    buffers counted once.
    """
    parts = way.parts(case)
    each = []
    for stage in stages(case, parts):
        jitted = jax.jit(stage.function, donate_argnums=stage.donated if donated else ())
        compiled = jitted.lower(*stage.args).compile(compiler_options=options and dict(options))
        analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
        held = memory.argument_size_in_bytes - memory.alias_size_in_bytes
        each.append(
            {
                "FLOPs": analysis["flops"],
                "bytes accessed": analysis["bytes accessed"],
                "temporary bytes": memory.temp_size_in_bytes,
                "output bytes": memory.output_size_in_bytes,
                "peak bytes": held + memory.output_size_in_bytes + memory.temp_size_in_bytes,
            }
        )
    merge = {"temporary bytes": max, "peak bytes": max}
    merged = {name: merge.get(name, sum)(figures[name] for figures in each) for name in each[0]}
    return {**merged, "state bytes": nbytes(parts.state)}


_limits = functools.cache(costs)


def limits(case: Case, way: Way, donated: bool, options: Options = None) -> Costs:
    """The figures of code split by hand that returns as much; it has one cohort in any case."""
    reference = WAYS[BY_HAND if way.whole else BY_HAND_PART]
    return _limits(dataclasses.replace(case, cohorts=1), reference, donated, options)


def ratio(figure: float, limit: float) -> float:
    return 1.0 if figure == limit else figure / limit if limit else float("inf")


def of(by_way: dict[str, Costs], name: str) -> Costs:
    """The figures of the split by hand that the way of this name is compared with."""
    return by_way[BY_HAND if WAYS[name].whole else BY_HAND_PART]


def worst(by_way: dict[str, Costs | None], name: str) -> str:
    """The largest ratio to the split by hand of a way's figures."""
    figures = by_way[name]
    if figures is None:
        return "—"
    return f"{max(ratio(figures[figure], of(by_way, name)[figure]) for figure in FIGURES):.2f}"


def main() -> None:
    found: dict[str, dict[str, dict[str, Costs | None]]] = {}
    for case_name, case in track(COMPILED.items(), "compiling"):
        found[case_name] = {
            mode: {
                name: costs(case, way, mode == "donated") if has(way, case) else None
                for name, way in WAYS.items()
            }
            for mode in ("donated", "kept")
        }
    results.write("compiled", {"cases": found})
    shown = [way for way in WAYS if way not in (BY_HAND, BY_HAND_PART)]
    for mode in ("donated", "kept"):
        rows = ([name, *(worst(case[mode], way) for way in shown)] for name, case in found.items())
        title = f"the largest ratio of any figure to the split by hand, buffers {mode}"
        results.show(results.table(title, ["", *shown], rows))
    results.show(results.described(results.machine()))


if __name__ == "__main__":
    main()
