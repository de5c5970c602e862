"""Check the slices that users write, of layers and of rows."""

import operator


def checked_slice(index: slice, what: str) -> slice:
    """Returns a slice with ends that are ints, or raises an error that begins with `what`."""
    ends = (index.start, index.stop, index.step)
    try:
        checked = slice(*(None if end is None else operator.index(end) for end in ends))
    except TypeError:
        raise TypeError(f"{what} a slice of ints, not {index!r}") from None
    if checked.step == 0:
        raise ValueError(f"{what} {index!r}, but a slice step cannot be zero")
    return checked


def ends_of(index: slice) -> list[int | None]:
    """Returns the ends of a slice, and its step if it has one."""
    return [index.start, index.stop] + ([] if index.step is None else [index.step])
