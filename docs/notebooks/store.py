"""Stores the notebooks with their outputs, or checks that those stored are those of the sources.

The source of `x.ipynb` is `x.py`, in the percent format of jupytext. With `--write` the notebooks
are executed and stored. Without it nothing is executed: `make docs` does that. `--write minilm`
does it for that one alone.
"""

import argparse
import hashlib
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

SCREEN = 30
"""The most lines of a cell."""

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def execute(notebook, folder):
    """Executes in place, and leaves out all that differs from one machine or run to the next."""
    options = {"timeout": 3600, "kernel_name": "python3", "record_timing": False}
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, resources=resources, coalesce_streams=True, **options).execute()
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    for cell in notebook.cells:
        cell.id = hashlib.sha256(cell.source.encode()).hexdigest()[:8]
        cell.metadata = nbformat.from_dict({})


def cells(notebook):
    """Gives what the source determines of each cell."""
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def faults(notebook):
    """Gives what a reader would stumble over."""
    first, *_ = notebook.cells
    if "After this notebook you can" not in " ".join(first.source.split()):
        yield "the first cell does not say what the reader can do after it"
    for cell in notebook.cells:
        count = len(cell.source.splitlines())
        if count > SCREEN:
            yield f"a cell of {count} lines is past a screen: {cell.source.splitlines()[0]}"


def main():
    """Goes through all notebooks, and exits with 1 if something is wrong with one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="execute and store the notebooks")
    parser.add_argument("names", nargs="*", help="those to do; all of them if there are none")
    arguments = parser.parse_args()
    write, failed = arguments.write, False
    for source in sorted(set(Path(__file__).parent.glob("*.py")) - {Path(__file__)}):
        if arguments.names and source.stem not in arguments.names:
            continue
        notebook, target = jupytext.read(source), source.with_suffix(".ipynb")
        begin = time.perf_counter()
        found = list(faults(notebook))
        if write:
            execute(notebook, source.parent)
            nbformat.write(notebook, target)
        elif cells(notebook) != cells(nbformat.read(target, as_version=4)):
            found.append("the stored notebook differs from its source; use --write")
        failed = failed or bool(found)
        verdict = "; ".join(["FAILED", *found]) if found else "ok"
        print(f"{source.stem}: {time.perf_counter() - begin:.0f} s, {verdict}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
