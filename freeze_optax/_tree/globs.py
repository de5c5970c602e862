"""Glob patterns over key paths: expands their braces and compiles them to regexes."""

import itertools
import re
from collections.abc import Iterator

MOST_ALTERNATIVES = 10_000
"""The largest number of globs without braces that a pattern may stand for."""

MOST_DIGITS = 100
"""The largest number of digits in a bound of a range."""

_MOST_NESTED = 200
"""The largest depth of nested braces."""


def expand_braces(pattern: str, depth: int = 0) -> list[str]:
    """Returns the globs without braces that `pattern` stands for; expands `{a,b}` and `{0..9}`.

    Args:
      pattern: The glob.
      depth: How many braces `pattern` is nested in.

    Raises:
      ValueError: On unbalanced brackets or braces, or if a limit is exceeded.
    """
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
    """Returns the position after the character class that begins at `start`."""
    # As in fnmatch, a `]` directly after `[`, `[!` or `[^` is a member of the class.
    first = start + 1 + (pattern[start + 1 : start + 2] in ("!", "^"))
    end = pattern.find("]", first + 1)
    if end < 0 or "/" in pattern[start:end]:
        raise ValueError(f"pattern {pattern!r}: `[` without `]`; write [[] for the character")
    return end + 1


def _brace_end(pattern: str, start: int) -> int:
    """Returns the position after the brace that closes the one at `start`."""
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
    """Returns the alternatives between two braces, from a range or from a list with commas."""
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if numbers:
        first, last = numbers.groups()
        longest = max(len(first), len(last))
        if longest > MOST_DIGITS or abs(int(last) - int(first)) >= MOST_ALTERNATIVES:
            raise ValueError(f"`{{{inside}}}` is too long a range; use `*` or fo.regex")
        low, high = int(first), int(last)
        # As in a shell, a leading zero sets the width: {08..11} is 08 09 10 11.
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
    """Returns the regex of one component of a glob; `pattern` is for errors."""
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
            # A future version of re may read `--` as a set difference, and re warns of it already.
            members = re.sub(r"(?<=.)--", r"-\\-", members)
            pieces[-1] += f"(?!/)[{'^' if negated else ''}{members}]"
        else:
            pieces[-1] += re.escape(char)
        position = end
    return _with_stars(*pieces)


def _with_stars(first: str, *others: str) -> str:
    """Returns a regex of the pieces of a component, with any characters between the pieces.

    The first place where a piece fits leaves the most text for the other pieces. So that place is
    final (an atomic group), except for the last piece, which has to end the component. A search
    through all places would take exponential time.
    """
    if not others:
        return first
    *middle, last = others
    return first + "".join(f"(?>[^/]*?{piece})" for piece in middle) + f"[^/]*{last}"


def _segments(glob: str) -> Iterator[tuple[bool, list[str]]]:
    """Yields the runs of components between `**`s, each after whether a `**` comes before it."""
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
    """Returns the regex of a glob without braces; `pattern` and `whole` as for `compile_glob`."""
    out: list[str] = []
    segments = list(_segments(glob))
    # The first place where a run fits leaves the most text for the runs after it. So that place is
    # final: without an atomic group, deep trees would take cubic time. Only for the last run of a
    # whole match the place is not final, because that run has to end where the path ends.
    last = len(segments) - 1 if whole else -1
    for i, (after_stars, run) in enumerate(segments):
        if not run:  # `**` at the end matches the node itself and everything below it
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
    """Compiles a glob to a regex for `.match` on the path text of a leaf.

    Args:
      pattern: The glob. It names the leaf, or a node above the leaf.
      whole: Whether the path has to be the node that the pattern names, not a path below it.

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


def with_slashes(pattern: str) -> str:
    """Returns a glob with slashes for its dots, but not for those of a range such as `{0..9}`."""
    return re.sub(r"(?<!\.)\.(?!\.)", "/", pattern)
