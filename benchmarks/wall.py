"""How long a training step takes, as ratios to code split by hand, measured in turns in one run.

Run with `python -m benchmarks.wall`. `benchmarks.gpu` does the same for a large model on a GPU.
"""

import argparse

from benchmarks import results
from benchmarks.cases import TIMED
from benchmarks.run import Run, Times, in_turns, quartiles
from benchmarks.steps import BY_HAND, BY_HAND_PART, WAYS


def compared(seconds: Times) -> dict[str, dict[str, float]]:
    """For each way the median time, and the quartiles of its ratios to the split by hand."""
    by_hand = {name: BY_HAND if WAYS[name].whole else BY_HAND_PART for name in seconds}
    return {name: quartiles(seconds[name], seconds[by_hand[name]]) for name in seconds}


def rows(by_way: dict[str, dict[str, float]]) -> list[list[str]]:
    return [
        [
            name,
            f"{of_way['milliseconds']:.1f}",
            f"{of_way['ratio']:.2f}",
            f"{of_way['low']:.2f} to {of_way['high']:.2f}",
        ]
        for name, of_way in by_way.items()
    ]


COLUMNS = ["", "ms a step", "ratio to split by hand", "its quartiles"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100, help="steps of each way")
    args = parser.parse_args()
    cases = {}
    for name, case in TIMED.items():
        runs = {way: Run(case, WAYS[way].parts) for way in WAYS}
        cases[name] = compared(in_turns(runs, args.rounds))
    results.write("wall", {"rounds": args.rounds, "cases": cases})
    for name, by_way in cases.items():
        results.show(results.table(name, COLUMNS, rows(by_way)))
    results.show(results.described(results.machine()))


if __name__ == "__main__":
    main()
