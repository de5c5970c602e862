"""Where the figures of the benchmarks are kept, and how they are shown."""

import json
import os
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "Python": platform.python_version(),
        **{name: version(name) for name in ("jax", "optax", "flax", "equinox")},
    }


def path(name: str) -> Path:
    return RESULTS / f"{name}.json"


def write(
    to: str | Path, results: dict[str, Any], measured_on: dict[str, Any] | None = None
) -> None:
    """Keeps the results of one benchmark, with the machine, under a name or in a file."""
    on = measured_on or machine()
    file = path(to) if isinstance(to, str) else to
    file.parent.mkdir(exist_ok=True)
    text = json.dumps({"machine": on, **results}, indent=1, ensure_ascii=False)
    file.write_text(text + "\n")


def read(name: str) -> dict[str, Any]:
    return json.loads(path(name).read_text())


def described(machine: dict[str, Any]) -> str:
    """The machine in a line."""
    packages = (f"{name} {machine[name]}" for name in ("jax", "optax", "flax", "equinox"))
    return (
        f"{machine['platform']}, {machine['cores']} cores, {machine['devices']}, "
        f"Python {machine['Python']}, {', '.join(packages)}"
    )


def table(title: str | None, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    """A table whose first column is text and whose others are figures."""
    first, *others = columns
    made = Table(first, title=title, title_justify="left")
    for column in others:
        made.add_column(column, justify="right")
    for row in rows:
        made.add_row(*row)
    return made


def show(*shown: Table | str) -> None:
    console = Console(width=None if Console().is_terminal else 200)
    for one in shown:
        console.print(one)


def markdown(made: Table) -> str:
    made.box, made.title = box.MARKDOWN, None
    console = Console(width=1000, no_color=True)
    with console.capture() as capture:
        console.print(made)
    return "\n".join(line.strip() for line in capture.get().splitlines() if line.strip())
