"""The command line: what freezing saves, told from a checkpoint's headers."""

import argparse
import contextlib
import inspect
import json
import os
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import optax
import optax.contrib
from rich.console import Console

from freeze_optax._files.checkpoint_headers import read_headers
from freeze_optax._report.summary import summary
from freeze_optax._select.by_path import path
from freeze_optax._select.selector import nothing
from freeze_optax._tree.key_paths import nodes_of
from freeze_optax._tree.messages import nearest_names, printable

_DESCRIPTION = """\
Shows which parameters of a checkpoint a set of patterns freezes, and what optimizer state that
saves. Only names, shapes and dtypes are read: a .safetensors or .npz file, a msgpack file of Flax,
a folder of .safetensors files, or an Orbax checkpoint."""

_EPILOG = """\
example: freeze-optax summary model.safetensors --frozen embeddings 'encoder/layer/{0..3}'
--optimizer adamw"""


_LONGEST = 600
"""The most characters of an error: some come with the whole state of a reader."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # One line, where argparse would print the usage first.
        self.exit(2, f"{self.prog}: error: {_line(message) or 'no reason is given'}\n")


def _line(message: str) -> str:
    """A message in one line that can't command a terminal: names in it may hold anything."""
    line = printable(" ".join(message.split())[: _LONGEST + 1])
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} […]"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
      arguments: Those of the process if None.

    Raises:
      SystemExit: With code 2 and one line on stderr, if anything is wrong.
    """
    parser = _Parser(prog="freeze-optax", description="Parameter freezing for JAX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser(
        "summary",
        help="what is frozen in a checkpoint, and what that saves",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    command.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    command.add_argument(
        "--frozen",
        metavar="PATTERN",
        nargs="+",
        action="extend",
        default=[],
        help="globs over paths such as encoder/layer_{0..9}/kernel; dots in stored names are /",
    )
    command.add_argument(
        "--at", metavar="PATH", help="where the params are: params, in a TrainState"
    )
    command.add_argument("--optimizer", metavar="NAME", help="one of optax, such as adamw")
    command.add_argument("--depth", metavar="N", type=int, help="levels to show, unfolded")
    command.add_argument("--json", action="store_true", help="print JSON in place of a table")
    given = parser.parse_args(arguments)
    # Nothing is computed; where Orbax asks jax how many processes there are, this takes no
    # accelerator from those who need it.
    jax.config.update("jax_platforms", "cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of arguments that leave no trace in the state
            text = _summary(given)
        _write(text)
    except BrokenPipeError:
        raise SystemExit(1) from None  # whoever reads has read enough
    except OSError as error:
        command.error(f"{error.strerror or error}: {error.filename or given.checkpoint}")
    except Exception as error:  # noqa: BLE001
        # Optimizers and readers raise what they like; one line is what a command line owes.
        command.error(str(error) or repr(error))


def _summary(given: argparse.Namespace) -> str:
    frozen = path(*given.frozen) if given.frozen else nothing
    optimizer = None if given.optimizer is None else _optimizer(given.optimizer)
    params = read_headers(given.checkpoint)
    result = summary(_below(params, given.at), frozen, optimizer, given.depth)
    if given.json:
        return json.dumps(result.to_dict(), indent=2) + "\n"
    return result.render(Console()) + "\n"


def _below(params: dict[str, Any], node: str | None) -> dict[str, Any]:
    """The leaves below a node, by their paths from there."""
    if node is None:
        return params
    above = node.rstrip("/") + "/"
    pairs = ((path, leaf) for path, leaf in params.items() if path.startswith(above))
    below = OrderedDict((path[len(above) :], leaf) for path, leaf in pairs)
    if not below:
        raise ValueError(f"nothing is below {node!r}; {nearest_names(node, nodes_of(params))}")
    return below


def _write(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except OSError:
        # Python flushes once more at its end, and would print a traceback of that.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _optimizer(name: str) -> optax.GradientTransformation:
    factories = dict(_factories())
    if name not in factories:
        raise ValueError(f"optax has no optimizer {name!r}; {nearest_names(name, factories)}")
    needed = [
        parameter.name
        for parameter in inspect.signature(factories[name]).parameters.values()
        if parameter.default is inspect.Parameter.empty
    ]
    # A rate is a number in the updates, and leaves no trace in the state.
    others = [argument for argument in needed if not argument.endswith("learning_rate")]
    if others:
        raise ValueError(
            f"{name} needs {', '.join(others)}, which can't be told here; use "
            "freeze_optax.summary in Python"
        )
    return factories[name](**dict.fromkeys(needed, 1.0))


def _factories() -> Iterator[tuple[str, Any]]:
    for module in (optax.contrib, optax):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            given = inspect.signature(function).return_annotation
            if "GradientTransformation" in str(given) and not name.startswith("_"):
                yield name, function
