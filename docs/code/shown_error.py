"""Shows the error, or the warnings, of a block of code."""

import contextlib
import textwrap
import warnings


@contextlib.contextmanager
def shown():
    """Prints what the block raises, or warns of."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        try:
            yield
        except Exception as error:  # noqa: BLE001
            found.append(error)
    assert found, "nothing went wrong"
    for one in found:
        error = getattr(one, "message", one)
        text = f"{type(error).__name__}: {error}"
        for line in text.splitlines():
            print(textwrap.fill(line, 88, break_long_words=False, break_on_hyphens=False))
