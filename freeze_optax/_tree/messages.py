"""Clauses of error messages: names, nearest paths, and what differs between two trees."""

import difflib
import itertools
from collections.abc import Iterable

_MOST_CANDIDATES = 20_000


def nearest_names(text: str, paths: Iterable[str], count: int = 3) -> str:
    """A clause for an error: the paths most like `text`."""
    candidates = list(itertools.islice(dict.fromkeys(paths), _MOST_CANDIDATES))
    if not candidates:
        return "the tree has no leaves"
    close = difflib.get_close_matches(text, candidates, n=count, cutoff=0.5)
    if close:
        return "nearest: " + ", ".join(map(repr, close))
    return "the tree has " + quoted_list(candidates)


def printable(text: str) -> str:
    """A text without the characters that move the cursor of a terminal, or do worse."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def quoted_list(names: Iterable[str], most: int = 5) -> str:
    """A few of the names, quoted, and how many more there are."""
    names = list(names)
    shown = ", ".join(map(repr, names[:most]))
    return shown + (f" and {len(names) - most:,} more" if len(names) > most else "")


def few_clauses(clauses: list[str], most: int = 3) -> str:
    """A few of the clauses, and how many more there are."""
    more = [f"and {len(clauses) - most:,} more"] if len(clauses) > most else []
    return "; ".join([*clauses[:most], *more])


def path_differences(
    ours: tuple[str, ...], theirs: tuple[str, ...], our_name: str, their_name: str
) -> str:
    """A clause for an error: the paths that only one of two trees has."""
    mine, others = set(ours), set(theirs)
    left = [path for path in ours if path not in others]
    right = [path for path in theirs if path not in mine]
    parts = [f"only {our_name}: {quoted_list(left)}"] if left else []
    parts += [f"only {their_name}: {quoted_list(right)}"] if right else []
    return "; ".join(parts) or "the same paths, in other containers or another order"
