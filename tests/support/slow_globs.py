"""Random globs as parts, their text, and a matcher that tries everything."""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from hypothesis import strategies as st

from tests.support.random_trees import NAMES


class Letter(NamedTuple):
    char: str


class Wildcard(NamedTuple):
    many: bool


class Class(NamedTuple):
    negated: bool
    members: str
    span: str


class Braces(NamedTuple):
    choices: tuple[tuple[Any, ...], ...]


class Range(NamedTuple):
    first: str
    last: str


Parts = Sequence[Any]
"""A glob as it was meant: to match it, no text has to be parsed."""

SLASH, STAR = Letter("/"), Wildcard(True)
STARS = (STAR, STAR)


def written(parts: Parts, inside: bool = False) -> str:
    """The text of a glob."""
    return "".join(_written(part, inside) for part in parts)


def _written(part: Any, inside: bool) -> str:
    match part:
        case Letter(char):
            return f"[{char}]" if char in "*?[]{}" or (inside and char in ",.") else char
        case Wildcard(many):
            return "*" if many else "?"
        case Range(first, last):
            return f"{{{first}..{last}}}"
        case Braces(choices):
            return "{" + ",".join(written(choice, True) for choice in choices) + "}"
    first = "]" if "]" in part.members else ""
    last = "-" if "-" in part.members else ""
    others = sorted(set(part.members) - {"]", "-"}, key=lambda c: (c in "!^", c))
    span = f"{part.span[0]}-{part.span[1]}" if part.span else ""
    return f"[{'!' if part.negated else ''}{first}{span}{''.join(others)}{last}]"


def _choices(part: Any) -> list[tuple[Any, ...]]:
    if isinstance(part, Braces):
        return [own for choice in part.choices for own in written_out(choice)]
    if isinstance(part, Range):
        ends = (part.first, part.last)
        wide = any(len(end) > 1 and end[0] == "0" for end in ends)
        width = max(map(len, ends)) if wide else 0
        low, high = sorted(map(int, ends))
        return [tuple(map(Letter, str(n).rjust(width, "0"))) for n in range(low, high + 1)]
    return [(part,)]


def written_out(parts: Parts) -> list[tuple[Any, ...]]:
    """All globs without braces that a glob stands for."""
    products = itertools.product(*map(_choices, parts))
    return [tuple(itertools.chain.from_iterable(product)) for product in products]


def _components(glob: Parts) -> list[tuple[Any, ...]]:
    grouped: list[tuple[Any, ...]] = [()]
    for part in glob:
        if part == SLASH:
            grouped.append(())
        else:
            grouped[-1] += (part,)
    return grouped


def is_well_formed(parts: Parts) -> bool:
    """Whether two stars come together only as a whole component."""
    components = [own for glob in written_out(parts) for own in _components(glob)]
    return not any(STARS in itertools.pairwise(own) and own != STARS for own in components)


def _fits(parts: Parts, text: str) -> bool:
    if not parts:
        return not text
    first, *rest = parts
    if first == STAR:
        return any(_fits(rest, text[i:]) for i in range(len(text) + 1))
    return bool(text) and _fits_one(first, text[0]) and _fits(rest, text[1:])


def _fits_one(part: Any, char: str) -> bool:
    match part:
        case Letter(own):
            return char == own
        case Wildcard():
            return True
    inside = char in part.members or (part.span and part.span[0] <= char <= part.span[1])
    return bool(inside) != part.negated


def _names(components: Parts, path: Sequence[str]) -> bool:
    if not components:
        return not path
    first, *rest = components
    if first == STARS:
        return any(_names(rest, path[i:]) for i in range(len(path) + 1))
    return bool(path) and _fits(first, path[0]) and _names(rest, path[1:])


def matcher(parts: Parts) -> Callable[[Sequence[str]], bool]:
    """Whether a glob names the very node that has these components for its path."""
    globs = [_components(glob) for glob in written_out(parts)]
    return lambda path: any(_names(glob, path) for glob in globs)


def letters(text: str) -> tuple[Letter, ...]:
    """A glob that is nothing but its text."""
    return tuple(map(Letter, text))


@st.composite
def _component(draw: Any, text: str) -> tuple[Any, ...]:
    how = draw(
        st.sampled_from(["same", "same", "same", "parts", "star", "stars", "braces", "range"])
    )
    if how == "star":
        return (*letters(text[: draw(st.integers(0, len(text)))]), STAR)
    if how == "stars":
        return STARS
    if how == "braces":
        other = letters(draw(st.sampled_from(NAMES)))
        return (Braces(tuple(draw(st.permutations([letters(text), other])))),)
    digits = re.search("[0-9]+$", text)
    if how == "range" and digits:
        ends = [digits.group(), draw(st.sampled_from(["0", "1", "3", "08", "12"]))]
        return (*letters(text[: digits.start()]), Range(*draw(st.permutations(ends))))
    if how == "parts":
        return tuple(draw(_character(char)) for char in text)
    return letters(text)


@st.composite
def _character(draw: Any, char: str) -> Any:
    how = draw(st.sampled_from(["same", "same", "any", "class", "star"]))
    if how == "class":
        # A letter is always among them, as a class can't begin with its negation.
        members = draw(st.text("ab1]-^!{}*?,é[\\", max_size=3)) + draw(st.sampled_from("ab"))
        members += char if draw(st.booleans()) and char not in "/-" else ""
        return Class(draw(st.booleans()), members, draw(st.sampled_from(["", "", "af", "09"])))
    if how == "star":
        return STAR
    return Wildcard(False) if how == "any" else Letter(char)


def joined(components: Parts) -> tuple[Any, ...]:
    """The glob with these components."""
    return tuple(itertools.chain(*([*own, SLASH] for own in components)))[:-1]


@st.composite
def _globs(draw: Any, paths: Sequence[str]) -> tuple[Any, ...]:
    near = paths and draw(st.integers(0, 9))
    text = draw(st.sampled_from(paths)) if near else draw(st.sampled_from(NAMES))
    components = text.split("/")
    parts = [draw(_component(own)) for own in components[: draw(st.integers(1, 4))]]
    if draw(st.integers(0, 3)) == 0:
        parts.insert(draw(st.integers(0, len(parts))), STARS)
    glob = joined(parts)
    if draw(st.integers(0, 4)) == 0:
        names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=2))
        return (Braces((glob, joined([*map(letters, names)]))),)
    return glob


def globs(paths: Sequence[str]) -> st.SearchStrategy[tuple[Any, ...]]:
    """Globs, most of them near to one of the paths."""
    return _globs(paths).filter(is_well_formed)
