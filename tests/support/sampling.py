"""How many cases a test draws: a sample in `make test`, all of them in `make test-all`.

A test that draws is marked `sampled`, so that `make test-all` runs it a second time, in full.
"""

import os
from collections.abc import Callable, Container, Mapping
from typing import Any, TypeVar

import hypothesis
import pytest

_Test = TypeVar("_Test", bound=Callable[..., Any])
IS_FULL = bool(os.environ.get("FREEZE_OPTAX_TEST_ALL"))
_SHARE = 8
"""One of so many examples, or places in a file, is in the sample."""


def examples(count: int) -> Callable[[_Test], _Test]:
    """Lets hypothesis draw so many examples of a test when it runs in full."""
    drawn = hypothesis.settings(max_examples=count if IS_FULL else max(count // _SHARE, 2))
    return lambda test: pytest.mark.sampled(drawn(test))


def stride(full: int) -> int:
    """The distance between the places that a test tries, given that of a test in full."""
    return full if IS_FULL else _SHARE * full + 1


def cases(values: Mapping[str, Any], always: Container[str]) -> list[Any]:
    """The parameters of a test by their ids: a tuple for several arguments.

    `make test` runs those whose id is in `always`. The others are exhaustive: they go through the
    same code of ours.
    """
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            id=name,
            marks=[] if name in always else pytest.mark.exhaustive,
        )
        for name, value in values.items()
    ]
