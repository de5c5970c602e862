"""The transformation that others are made of."""

from typing import Any

import optax


def as_transformation(verb: str, inner: Any) -> optax.GradientTransformationExtraArgs:
    """The transformation, which then takes extra arguments; a TypeError if it is none.

    Args:
      verb: The function that it was given to.
      inner: What was given.
    """
    if isinstance(inner, type) or not (
        callable(getattr(inner, "init", None)) and callable(getattr(inner, "update", None))
    ):
        called = " (call it: optax.adam(1e-3))" if callable(inner) else ""
        raise TypeError(
            f"{verb} takes a transformation first, as optax.adam(1e-3) is one, but was given "
            f"{type(inner).__name__}{called}"
        )
    return optax.with_extra_args_support(inner)
