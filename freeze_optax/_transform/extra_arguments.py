"""Adapt the extra arguments of `update`: trees like the params, and functions of the params."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

Map = Callable[[Any], Any]


def adapt_extra_arguments(
    extra: Mapping[str, Any],
    is_like_params: Callable[[Any], bool],
    to_inner: Callable[[str, Any], Any],
    to_function: Map,
    from_function: Map,
) -> dict[str, Any]:
    """Returns the extra arguments as an inner transformation with other params needs them.

    The outer transformation has the user's params; the inner one has other params (with holes, for
    example). A tree like the params is mapped. A callable (the `value_fn` of a line search) is
    wrapped: it gets the user's params again, and the other extra arguments that the inner
    transformation passes on to it are the objects that the user passed. A callable that is a pytree
    too (`jax.tree_util.Partial`) is wrapped as well. A callable that is a tree like the params (an
    Equinox module) is mapped as a tree.

    Args:
      extra: The extra arguments that `update` got.
      is_like_params: Whether a value is a tree like the params, of either of the two kinds. The
        three functions below are called with such trees only.
      to_inner: Maps an extra argument, with its name, to the one for the inner transformation.
      to_function: Maps an argument that the inner transformation passes to a wrapped function.
      from_function: Maps the result of a wrapped function.
    """
    inner: dict[str, Any] = {}

    def map_argument(value: Any) -> Any:
        for name, inner_value in inner.items():
            if inner_value is value:
                return extra[name]
        return to_function(value) if is_like_params(value) else value

    def map_result(value: Any) -> Any:
        return from_function(value) if is_like_params(value) else value

    for name, value in extra.items():
        if is_like_params(value):
            inner[name] = to_inner(name, value)
        elif callable(value):
            inner[name] = _wrap_function(value, map_argument, map_result)
        else:
            inner[name] = value
    return inner


def _wrap_function(
    function: Callable[..., Any], map_argument: Map, map_result: Map
) -> Callable[..., Any]:
    # `functools.wraps` keeps the signature: optax reads it to find which extra arguments the
    # function takes.
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        mapped_kwargs = {name: map_argument(value) for name, value in kwargs.items()}
        return map_result(function(*map(map_argument, args), **mapped_kwargs))

    return call
