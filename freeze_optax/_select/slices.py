"""Slices that users write, of layers and of rows."""

import operator


def checked_slice(index: slice, what: str) -> slice:
    """The slice, if its ends are ints; `what` begins the error if they are not."""
    ends = (index.start, index.stop, index.step)
    try:
        checked = slice(*(None if end is None else operator.index(end) for end in ends))
    except TypeError:
        raise TypeError(f"{what} a slice of ints, not {index!r}") from None
    if checked.step == 0:
        raise ValueError(f"{what} {index!r}, but a slice step cannot be zero")
    return checked


def ends_of(index: slice) -> list[int | None]:
    """The ends of a slice, with the step if it has one."""
    return [index.start, index.stop] + ([] if index.step is None else [index.step])
