"""Executes the notebooks, and checks that the stored ones are what their sources say.

The source of `x.ipynb` is `x.py`, in the percent format of jupytext. With `--write` the executed
notebooks are stored, without it nothing is.
"""

import argparse
import hashlib
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

SCREEN = 30
"""The most lines of a cell."""

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def execute(notebook, folder):
    """Executes in place, and leaves out all that differs from one machine or run to the next."""
    options = {"timeout": 600, "kernel_name": "python3", "record_timing": False}
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
    parser.add_argument("--write", action="store_true", help="store the executed notebooks")
    write, failed = parser.parse_args().write, False
    for source in sorted(set(Path(__file__).parent.glob("*.py")) - {Path(__file__)}):
        notebook, target = jupytext.read(source), source.with_suffix(".ipynb")
        begin, verdict = time.perf_counter(), "ok"
        try:
            if not (write or cells(notebook) == cells(nbformat.read(target, as_version=4))):
                verdict = "FAILED: the stored notebook differs from its source; use --write"
            for fault in faults(notebook):
                verdict = f"FAILED: {fault}"
            execute(notebook, source.parent)
            if write:
                nbformat.write(notebook, target)
        except CellExecutionError as error:
            verdict = f"FAILED: a cell raises\n{error}"
        failed = failed or verdict != "ok"
        print(f"{source.stem}: {time.perf_counter() - begin:.0f} s, {verdict}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
