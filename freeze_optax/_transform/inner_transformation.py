"""Check the inner transformation that another one is made of."""

from typing import Any

import optax


def as_transformation(verb: str, inner: Any) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation, made to take extra arguments.

    Args:
      verb: The name of the public function, for the error.
      inner: The argument that the user passed.

    Raises:
      TypeError: If `inner` is not a transformation.
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
