"""Glob patterns over key paths, and what to suggest when one matches nothing."""

import itertools
import re
from collections.abc import Iterator

MOST_ALTERNATIVES = 10_000

MOST_DIGITS = 100

_MOST_NESTED = 200


def expand_braces(pattern: str, depth: int = 0) -> list[str]:
    """Writes out `{a,b}` and `{0..9}`: the globs without braces that `pattern` stands for."""
    if depth > _MOST_NESTED:
        raise ValueError(f"pattern {pattern!r}: braces are nested more than {_MOST_NESTED} deep")
    pieces: list[list[str]] = [[""]]
    position = 0
    while position < len(pattern):
        char = pattern[position]
        if char == "[":
            end = _class_end(pattern, position)
            pieces.append([pattern[position:end]])
        elif char == "{":
            end = _brace_end(pattern, position)
            inside = pattern[position + 1 : end - 1]
            pieces.append(
                [p for part in _alternatives(inside) for p in expand_braces(part, depth + 1)]
            )
        elif char == "}":
            raise ValueError(
                f"pattern {pattern!r}: `}}` without `{{`; write [}}] for the character"
            )
        else:
            end = position + 1
            pieces.append([char])
        position = end
    count = 1
    for piece in pieces:
        count *= len(piece)
    if count > MOST_ALTERNATIVES:
        raise ValueError(
            f"pattern {pattern!r} stands for {count:,} globs, over the limit of "
            f"{MOST_ALTERNATIVES:,}; use `*` or fo.regex"
        )
    return ["".join(choice) for choice in itertools.product(*pieces)]


def _class_end(pattern: str, start: int) -> int:
    # As in fnmatch, a `]` right after the opening (or its negation) is a member.
    first = start + 1 + (pattern[start + 1 : start + 2] in ("!", "^"))
    end = pattern.find("]", first + 1)
    if end < 0 or "/" in pattern[start:end]:
        raise ValueError(f"pattern {pattern!r}: `[` without `]`; write [[] for the character")
    return end + 1


def _brace_end(pattern: str, start: int) -> int:
    depth, position = 0, start
    while position < len(pattern):
        char = pattern[position]
        if char == "[":
            position = _class_end(pattern, position)
            continue
        depth += (char == "{") - (char == "}")
        position += 1
        if depth == 0:
            return position
    raise ValueError(f"pattern {pattern!r}: `{{` without `}}`; write [{{] for the character")


def _alternatives(inside: str) -> list[str]:
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if numbers:
        first, last = numbers.groups()
        longest = max(len(first), len(last))
        if longest > MOST_DIGITS or abs(int(last) - int(first)) >= MOST_ALTERNATIVES:
            raise ValueError(f"`{{{inside}}}` is too long a range; use `*` or fo.regex")
        low, high = int(first), int(last)
        # As in a shell, a leading zero asks for that width: {08..11} is 08 09 10 11.
        padded = any(text != "0" and text.startswith("0") for text in (first, last))
        width = longest if padded else 0
        return [f"{n:0{width}d}" for n in range(low, high + 1) or range(low, high - 1, -1)]
    parts, depth, start, position = [], 0, 0, 0
    while position < len(inside):
        char = inside[position]
        if char == "[":
            position = _class_end(inside, position)
            continue
        depth += (char == "{") - (char == "}")
        if char == "," and depth == 0:
            parts.append(inside[start:position])
            start = position + 1
        position += 1
    return [*parts, inside[start:]]


def _component_regex(component: str, pattern: str) -> str:
    pieces = [""]
    position = 0
    while position < len(component):
        char = component[position]
        end = position + 1
        if component.startswith("**", position):
            raise ValueError(
                f"pattern {pattern!r}: `**` stands for whole components, so it can't share "
                f"one with {component.replace('**', '')!r}; write `*`, or `**/` before it"
            )
        if char == "*":
            pieces.append("")
        elif char == "?":
            pieces[-1] += "[^/]"
        elif char == "[":
            end = _class_end(component, position)
            body = component[position + 1 : end - 1]
            negated = body[0] in "!^"
            members = re.sub(r"([\\\[\]^&~|])", r"\\\1", body[negated:])
            # What re would take for a set difference one day, and warns of.
            members = re.sub(r"(?<=.)--", r"-\\-", members)
            pieces[-1] += f"(?!/)[{'^' if negated else ''}{members}]"
        else:
            pieces[-1] += re.escape(char)
        position = end
    return _with_stars(*pieces)


def _with_stars(first: str, *others: str) -> str:
    """Pieces of a component with anything between them.

    Where a piece fits first leaves the most for the others, so all places but that of the last,
    which has to end the component, are final; to try them all takes exponential time.
    """
    if not others:
        return first
    *middle, last = others
    return first + "".join(f"(?>[^/]*?{piece})" for piece in middle) + f"[^/]*{last}"


def _segments(glob: str) -> Iterator[tuple[bool, list[str]]]:
    """The runs of components between `**`s, each with whether a `**` comes before it."""
    after_stars, run = False, list[str]()
    for component in glob.split("/"):
        if component == "**":
            if run:
                yield after_stars, run
            after_stars, run = True, []
        else:
            run.append(component)
    yield after_stars, run


def _glob_regex(glob: str, pattern: str, whole: bool) -> str:
    out: list[str] = []
    segments = list(_segments(glob))
    # The first place where a run fits leaves the most for what follows. So where what follows is
    # free to be anything, that place is final: an atomic group, or deep trees take cubic time.
    # Only the last run of a whole match is not free, as it has to end where the path ends.
    last = len(segments) - 1 if whole else -1
    for i, (after_stars, run) in enumerate(segments):
        if not run:  # `**` at the end: everything below, and the node itself
            out.append("(?:/.*)?" if whole and out else ".*" if whole else "")
            continue
        text = "/".join(_component_regex(component, pattern) for component in run)
        slash = "/" if out else ""
        if after_stars:
            skip = f"{slash}(?:[^/]*/)*?{text}(?=/|\\Z)"
            out.append(f"(?:{skip})" if i == last else f"(?>{skip})")
        else:
            out.append(f"{slash}{text}(?=/|\\Z)")
    return "".join(out)


def compile_glob(pattern: str, *, whole: bool = False) -> re.Pattern[str]:
    """A regex for `.match` on path text: `pattern` names the leaf or a node above it.

    Args:
      pattern: The glob.
      whole: Match only the very node that the pattern names, nothing below.

    Returns:
      The compiled regex.

    Raises:
      ValueError: On unbalanced brackets or braces, or `**` inside a component.
    """
    globs = dict.fromkeys(expand_braces(pattern))
    end = r"\Z" if whole else ""
    text = "|".join(_glob_regex(glob, pattern, whole) + end for glob in globs)
    try:
        return re.compile(f"(?:{text})", re.DOTALL)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r}: {error.msg}") from error
