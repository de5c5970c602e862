"""The modules in docs/code, which the code of the pages imports."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

CODE = Path(__file__).parents[2] / "docs" / "code"


@contextlib.contextmanager
def fresh_page_modules() -> Iterator[None]:
    """Lets a page import them as in a process of its own: another page may donate their arrays."""
    names = [path.stem for path in CODE.glob("*.py")]
    sys.path.insert(0, str(CODE))
    try:
        for name in names:
            sys.modules.pop(name, None)
        yield
    finally:
        sys.path.remove(str(CODE))
        for name in names:
            sys.modules.pop(name, None)
