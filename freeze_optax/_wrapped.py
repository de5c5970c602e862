"""Functions of the params that are passed to `update`, as a line search's `value_fn` is."""

import functools
from collections.abc import Callable
from typing import Any

Map = Callable[[Any], Any]


def wrapped(function: Callable[..., Any], argument: Map, result: Map) -> Callable[..., Any]:
    """A function that is given other arguments, and whose result is changed.

    Args:
      function: The user's.
      argument: What becomes of each argument that the transformation passes.
      result: What becomes of what the function gives.
    """

    # By `functools.wraps`, as optax reads the signature to tell which extra arguments it takes.
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        named = {name: argument(value) for name, value in kwargs.items()}
        return result(function(*map(argument, args), **named))

    return call
