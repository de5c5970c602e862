"""What a traced program does: its loops, what it copies between memories, what its loops keep."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np


def jaxprs_in(jaxpr: Any) -> Iterator[tuple[str, Any]]:
    """A jaxpr and all below it, each with the names of the primitives around it."""
    stack = [("", jaxpr)]
    while stack:
        around, one = stack.pop()
        yield around, one
        for eqn in one.eqns:
            for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
                below = getattr(value, "jaxpr", value)
                if hasattr(below, "eqns"):
                    stack.append((f"{around}/{eqn.primitive.name}", below))


def _is_jaxpr(x: Any) -> bool:
    return hasattr(x, "jaxpr") or hasattr(x, "eqns")


def _copied_by(jaxpr: Any) -> list[Any]:
    copies = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "device_put"]
    return [x.aval for eqn in copies for x in eqn.invars]


def copied(function: Callable[..., Any], *args: Any) -> list[Any]:
    """The types of all arrays that a program copies between memories."""
    program = jax.make_jaxpr(function)(*args).jaxpr
    return [x for _, jaxpr in jaxprs_in(program) for x in _copied_by(jaxpr)]


def copies_in_loops(function: Callable[..., Any], *args: Any) -> list[list[Any]]:
    """For each loop that copies arrays between memories, the types of these arrays."""
    program = jax.make_jaxpr(function)(*args).jaxpr
    found = [
        _copied_by(jaxpr)
        for around, jaxpr in jaxprs_in(program)
        if around.endswith(("/scan", "/while"))
    ]
    return [types for types in found if types]


def shapes_made_by_loops(function: Callable[..., Any], *args: Any) -> set[tuple[int, ...]]:
    """The shapes of what the loops of a program return, with what they keep for the other pass."""
    program = jax.make_jaxpr(function)(*args).jaxpr
    return {
        np.shape(x.aval)
        for _, jaxpr in jaxprs_in(program)
        for eqn in jaxpr.eqns
        if eqn.primitive.name in ("scan", "while")
        for x in eqn.outvars
    }
