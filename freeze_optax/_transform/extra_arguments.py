"""Extra arguments of `update`: trees like the params, and functions of them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

Map = Callable[[Any], Any]


def adapt_extra_arguments(
    extra: Mapping[str, Any],
    is_like_params: Callable[[Any], bool],
    tree: Callable[[str, Any], Any],
    argument: Map,
    result: Map,
) -> dict[str, Any]:
    """Extra arguments as an inner transformation, which knows other params, should see them.

    A function, as a line search's `value_fn` is, may be a pytree too (`jax.tree_util.Partial`),
    unless it is one like the params (an Equinox module). It is given the params that it knows,
    and the other extra arguments, which an inner transformation passes on to it, as they came.

    Args:
      extra: What `update` was given.
      is_like_params: Tells a tree like the params. All that follow are asked of such alone.
      tree: What becomes of an argument, by name.
      argument: What becomes of an argument that the inner transformation passes to a function.
      result: What becomes of what a function gives.
    """
    inner: dict[str, Any] = {}

    def given(value: Any) -> Any:
        for name, own in inner.items():
            if own is value:
                return extra[name]
        return argument(value) if is_like_params(value) else value

    def returned(value: Any) -> Any:
        return result(value) if is_like_params(value) else value

    for name, value in extra.items():
        if is_like_params(value):
            inner[name] = tree(name, value)
        else:
            inner[name] = _adapt_function(value, given, returned) if callable(value) else value
    return inner


def _adapt_function(function: Callable[..., Any], argument: Map, result: Map) -> Callable[..., Any]:
    # By `functools.wraps`, as optax reads the signature to tell which extra arguments it takes.
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        named = {name: argument(value) for name, value in kwargs.items()}
        return result(function(*map(argument, args), **named))

    return call
