"""Clauses of error messages: lists of names, nearest paths, and differences of two trees."""

import difflib
import itertools
from collections.abc import Iterable

_MOST_CANDIDATES = 20_000


def nearest_names(text: str, paths: Iterable[str], count: int = 3) -> str:
    """Returns a clause for an error that names the paths most similar to `text`."""
    candidates = list(itertools.islice(dict.fromkeys(paths), _MOST_CANDIDATES))
    if not candidates:
        return "the tree has no leaves"
    close = difflib.get_close_matches(text, candidates, n=count, cutoff=0.5)
    if close:
        return "nearest: " + ", ".join(map(repr, close))
    return "the tree has " + quoted_list(candidates)


def printable(text: str) -> str:
    """Returns a text with an escape for each character that can control a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def quoted_list(names: Iterable[str], most: int = 5) -> str:
    """Returns the first few names, quoted, and the number of those left out."""
    names = list(names)
    shown = ", ".join(map(repr, names[:most]))
    return shown + (f" and {len(names) - most:,} more" if len(names) > most else "")


def few_clauses(clauses: list[str], most: int = 3) -> str:
    """Returns the first few clauses, and the number of those left out."""
    more = [f"and {len(clauses) - most:,} more"] if len(clauses) > most else []
    return "; ".join([*clauses[:most], *more])


def path_differences(
    ours: tuple[str, ...], theirs: tuple[str, ...], our_name: str, their_name: str
) -> str:
    """Returns a clause for an error that names the paths that only one of two trees has."""
    our_set, their_set = set(ours), set(theirs)
    only_ours = [path for path in ours if path not in their_set]
    only_theirs = [path for path in theirs if path not in our_set]
    clauses = [f"only {our_name}: {quoted_list(only_ours)}"] if only_ours else []
    clauses += [f"only {their_name}: {quoted_list(only_theirs)}"] if only_theirs else []
    return "; ".join(clauses) or "the same paths, in other containers or another order"
