"""The command line: shows from the headers of a checkpoint what freezing saves."""

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
"""The most characters of an error. The errors of some readers contain their whole state."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        # argparse would print the usage first.
        self.exit(2, f"{self.prog}: error: {_line(message) or 'no reason is given'}\n")


def _line(message: str) -> str:
    """Returns a message as one line that cannot command a terminal; names may hold anything."""
    line = printable(" ".join(message.split())[: _LONGEST + 1])
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} […]"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
      arguments: The arguments; None for those of the process.

    Raises:
      SystemExit: With code 2, after one line on stderr, if anything is wrong. With code 1 if the
        reader of stdout has closed it.
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
    options = parser.parse_args(arguments)
    # Nothing is computed. But Orbax asks jax for the number of processes, which starts a backend:
    # that of the CPU takes no accelerator from other programs.
    jax.config.update("jax_platforms", "cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about arguments that do not affect the state
            text = _summary(options)
        _write(text)
    except BrokenPipeError:
        raise SystemExit(1) from None  # the reader of stdout has closed it
    except OSError as error:
        command.error(f"{error.strerror or error}: {error.filename or options.checkpoint}")
    except Exception as error:  # noqa: BLE001
        # Optimizers and readers may raise any error. The command line prints one line for it.
        command.error(str(error) or repr(error))


def _summary(options: argparse.Namespace) -> str:
    """Returns the text that the command prints."""
    frozen = path(*options.frozen) if options.frozen else nothing
    optimizer = None if options.optimizer is None else _optimizer(options.optimizer)
    params = read_headers(options.checkpoint)
    result = summary(_below(params, options.at), frozen, optimizer, options.depth)
    if options.json:
        return json.dumps(result.to_dict(), indent=2) + "\n"
    return result.render(Console()) + "\n"


def _below(params: dict[str, Any], node: str | None) -> dict[str, Any]:
    """Returns the leaves below a node, by their paths from there."""
    if node is None:
        return params
    prefix = node.rstrip("/") + "/"
    pairs = ((path, leaf) for path, leaf in params.items() if path.startswith(prefix))
    below = OrderedDict((path[len(prefix) :], leaf) for path, leaf in pairs)
    if not below:
        raise ValueError(f"nothing is below {node!r}; {nearest_names(node, nodes_of(params))}")
    return below


def _write(text: str) -> None:
    """Writes text to stdout; characters outside its encoding are escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except OSError:
        # Python flushes stdout again at exit, and would print a traceback if that fails.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _optimizer(name: str) -> optax.GradientTransformation:
    """Makes the optimizer of optax with this name; its rates are 1."""
    factories = dict(_factories())
    if name not in factories:
        raise ValueError(f"optax has no optimizer {name!r}; {nearest_names(name, factories)}")
    required = [
        parameter.name
        for parameter in inspect.signature(factories[name]).parameters.values()
        if parameter.default is inspect.Parameter.empty
    ]
    # A learning rate scales the updates and does not affect the size of the state.
    others = [argument for argument in required if not argument.endswith("learning_rate")]
    if others:
        raise ValueError(
            f"{name} needs {', '.join(others)}, which the command line can't set; "
            "use freeze_optax.summary in Python"
        )
    return factories[name](**dict.fromkeys(required, 1.0))


def _factories() -> Iterator[tuple[str, Any]]:
    """Yields the functions of optax that return a transformation, with their names."""
    for module in (optax.contrib, optax):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            returned = inspect.signature(function).return_annotation
            if "GradientTransformation" in str(returned) and not name.startswith("_"):
                yield name, function
