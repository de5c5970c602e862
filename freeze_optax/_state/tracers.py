"""Finds tracers in functions: such a function can't be called after its trace has ended."""

import functools
from typing import Any

import jax
from jax.core import Tracer


def holds_tracers(x: Any) -> bool:
    """Returns whether a function, or a tuple of functions, was made from tracers.

    `optax.inject_hyperparams` makes a new transformation in each trace, from the values of that
    trace. If such a transformation is kept and called after the trace, jax raises an error.

    Examples:
      >>> import jax
      >>> import optax
      >>> jax.eval_shape(lambda rate: print(holds_tracers(optax.sgd(rate))), 0.1)
      True
      >>> holds_tracers(optax.sgd(0.1))
      False
    """
    return _holds(x, set())


def _holds(x: Any, seen: set[int]) -> bool:
    if isinstance(x, Tracer):
        return True
    if id(x) in seen:
        return False
    seen.add(id(x))
    return any(_holds(part, seen) for part in _parts(x))


def _parts(x: Any) -> list[Any]:
    """Returns what a function closes over, or the leaves of a tree."""
    if isinstance(x, functools.partial):
        return [x.func, x.args, x.keywords]
    parts = [leaf for leaf in jax.tree.leaves(x) if leaf is not x]
    bound = [x.__self__] if hasattr(x, "__self__") and hasattr(x, "__func__") else []
    for cell in getattr(x, "__closure__", None) or ():
        try:
            parts.append(cell.cell_contents)
        except ValueError:  # the name is not bound yet
            continue
    return [*parts, *bound, *(getattr(x, "__defaults__", None) or ())]
