"""Random specs, each with what a slow and obvious reading makes of it on the leaves of a tree."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax
import pytest
from flax.core import FrozenDict
from hypothesis import strategies as st

import freeze_optax as fo
from tests.support.random_trees import (
    assert_equal,
    children,
    container_like,
    frozen,
    is_hole,
    learned,
    walk,
)
from tests.support.slow_globs import Parts, globs, matcher, written

Entries = Sequence[tuple[str, Any]]
Found = tuple[list[bool], list[str]]
"""A flag for each leaf, and messages of which one has to be raised, if there are any."""


class Case(NamedTuple):
    """A spec, and what it comes to on the leaves of its tree, each with its path."""

    spec: Any
    find: Callable[[Entries], Found]


def nodes_above(path: str) -> list[tuple[str, ...]]:
    """The components of a path, and of each node above it but the root."""
    parts = tuple(path.split("/"))
    return [parts[:i] for i in range(1, len(parts) + 1)]


def either(columns: Sequence[Sequence[bool]], count: int) -> list[bool]:
    return [any(column[i] for column in columns) for i in range(count)]


def _find_path(own: Sequence[Parts], entries: Entries) -> Found:
    columns = [[any(map(matcher(glob), nodes_above(p))) for p, _ in entries] for glob in own]
    texts = [written(glob) for glob, column in zip(own, columns, strict=True) if not any(column)]
    return either(columns, len(entries)), [f"pattern {text!r} selects no leaf" for text in texts]


def _find_regex(own: Sequence[str], entries: Entries) -> Found:
    columns = [[bool(re.fullmatch(regex, path)) for path, _ in entries] for regex in own]
    texts = [regex for regex, column in zip(own, columns, strict=True) if not any(column)]
    return either(columns, len(entries)), [f"regex {text!r} selects no leaf" for text in texts]


def _naturally(a: str, b: str) -> int:
    """Compares as people do who count: numbers by value, and before any letter."""
    while a and b:
        x, y = (re.match("[0-9]*", text).group() for text in (a, b))
        if x and y and int(x) != int(y):
            return int(x) - int(y)
        if bool(x) != bool(y):
            return -1 if x else 1
        if not x and a[0] != b[0]:
            return -1 if a[0] < b[0] else 1
        a, b = a[len(x) or 1 :], b[len(y) or 1 :]
    return len(a) - len(b)


def _find_layers(glob: Parts, index: int | slice | None, entries: Entries) -> Found:
    nodes = {node for path, leaf in entries if learned(leaf) for node in nodes_above(path)}
    matched = {"/".join(node): node for node in nodes if matcher(glob)(node)}
    ranked = [matched[text] for text in sorted(matched, key=functools.cmp_to_key(_naturally))]
    if not ranked:
        return [False] * len(entries), [f"layers({written(glob)!r}) names no node"]
    if isinstance(index, int) and index not in range(-len(ranked), len(ranked)):
        message = f"layers({written(glob)!r})[{index}] is out of range"
        return [False] * len(entries), [message]
    chosen = [ranked[index]] if isinstance(index, int) else ranked[index or slice(None)]
    return [any(node in chosen for node in nodes_above(path)) for path, _ in entries], []


def path(*own: Parts) -> Case:
    """`fo.path` of globs."""
    return Case(fo.path(*map(written, own)), functools.partial(_find_path, own))


def layers(glob: Parts, index: int | slice | None) -> Case:
    """`fo.layers` of a glob, indexed unless the index is None."""
    spec = fo.layers(written(glob))
    find = functools.partial(_find_layers, glob, index)
    return Case(spec if index is None else spec[index], find)


def has_rank_one(path: str, leaf: Any) -> bool:
    return getattr(leaf, "ndim", 0) == 1


def has_even_path(path: str, leaf: Any) -> bool:
    return len(path) % 2 == 0


def known(flags: list[bool]) -> Callable[[Entries], Found]:
    return lambda entries: (flags, [])


@st.composite
def prefixes(draw: Any, tree: Any, values: st.SearchStrategy[Any]) -> tuple[Any, list[Any]]:
    """A prefix of a tree, maybe in other containers, and what it has for each leaf."""
    below = children(tree)
    if below is None or draw(st.integers(0, 3)) == 0:
        value = draw(values)
        return value, [value] * len(list(walk(tree)))
    parts = [draw(prefixes(node, values)) for _, node in below]
    nodes, given = [node for node, _ in parts], [value for _, own in parts for value in own]
    container = container_like if draw(st.booleans()) else _other_container
    return container(tree, nodes), given


def _other_container(node: Any, values: list[Any]) -> Any:
    if isinstance(node, dict):
        # Integer keys have the same paths as their texts.
        return FrozenDict({str(k): v for k, v in zip(sorted(node), values, strict=True)})
    if isinstance(node, FrozenDict):
        return dict(zip(sorted(node), values, strict=True))
    if type(node) is list:
        return tuple(values)
    return None if node is None else {str(i): value for i, value in enumerate(values)}


LABELS = st.sampled_from(["hot", "cold", 3])
WANTED = st.lists(st.sampled_from(["hot", "cold", 3, "none"]), min_size=1, max_size=2).map(tuple)
ENDS = st.none() | st.integers(-3, 3)
INDICES = st.one_of(
    st.none(),
    st.integers(-4, 4),
    st.builds(slice, ENDS, ENDS, st.sampled_from([None, None, -2, -1, 2])),
)


def by_rank(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: "hot" if has_rank_one("", leaf) else "cold", tree)


@st.composite
def _labelled(draw: Any, tree: Any) -> Case:
    wanted, leaves = draw(WANTED), [leaf for _, leaf in walk(tree)]
    if draw(st.booleans()):
        labels, given = draw(prefixes(tree, LABELS))
        hidden = False
    else:
        labels = by_rank
        given = [None if is_hole(x) else "hot" if has_rank_one("", x) else "cold" for x in leaves]
        hidden = any(map(is_hole, leaves))
    absent = [name for name in wanted if name not in given and not hidden]
    found = [label in wanted for label in given]
    return Case(
        fo.labelled(labels, *wanted),
        lambda entries: (found, [f"label {name!r} is at no leaf" for name in absent]),
    )


@st.composite
def _selectors(draw: Any, tree: Any) -> Case:
    paths = [path for path, _ in walk(tree)]
    kind = draw(st.sampled_from(["path", "path", "regex", "layers", "where", "labelled", "all"]))
    if kind == "path":
        return path(*draw(st.lists(globs(paths), min_size=1, max_size=2)))
    if kind == "regex":
        own = draw(st.lists(_regexes(paths), min_size=1, max_size=2))
        return Case(fo.regex(*own), functools.partial(_find_regex, own))
    if kind == "layers":
        return layers(draw(globs(paths)), draw(INDICES))
    if kind == "where":
        ask = draw(st.sampled_from([has_rank_one, has_even_path]))
        return Case(fo.where(ask), known([not is_hole(x) and ask(p, x) for p, x in walk(tree)]))
    if kind == "labelled":
        return draw(_labelled(tree))
    answer = draw(st.booleans())
    return Case(fo.everything if answer else fo.nothing, known([answer] * len(paths)))


@st.composite
def _regexes(draw: Any, paths: list[str]) -> str:
    text = draw(st.sampled_from([*paths, "none"]))
    i, j = sorted(draw(st.tuples(*[st.integers(0, len(text))] * 2)))
    middle = draw(st.sampled_from([".*", r"[^/]+", r"(?:\d|_)*", re.escape(text[i:j])]))
    return re.escape(text[:i]) + middle + re.escape(text[j:])


OPERATORS: list[tuple[Any, Any]] = [
    (lambda a, b: a | b, lambda a, b: a or b),
    (lambda a, b: a & b, lambda a, b: a and b),
    (lambda a, b: a - b, lambda a, b: a and not b),
]


@st.composite
def selectors(draw: Any, tree: Any, depth: int = 3) -> Case:
    """A selector, or several joined by `|`, `&`, `-` and `~`."""
    if not depth or draw(st.integers(0, 2)) == 0:
        return draw(_selectors(tree))
    one = draw(selectors(tree, depth - 1))
    if draw(st.integers(0, 3)) == 0:
        return Case(~one.spec, functools.partial(inverted, one))
    other = draw(st.one_of(strings(tree), selectors(tree, depth - 1)))
    left, right = draw(st.permutations([one, other]))
    operator, rule = draw(st.sampled_from(OPERATORS))
    return Case(operator(left.spec, right.spec), functools.partial(joined, rule, left, right))


def inverted(one: Case, entries: Entries) -> Found:
    flags, errors = one.find(entries)
    return [not flag for flag in flags], errors


def joined(rule: Any, left: Case, right: Case, entries: Entries) -> Found:
    (first, errors), (second, more) = left.find(entries), right.find(entries)
    return [rule(a, b) for a, b in zip(first, second, strict=True)], errors + more


def strings(tree: Any) -> st.SearchStrategy[Case]:
    """A glob as a plain string."""
    own = globs([path for path, _ in walk(tree)])
    return own.map(lambda glob: Case(written(glob), functools.partial(_find_path, [glob])))


@st.composite
def _masks(draw: Any, tree: Any) -> Case:
    mask, flags = draw(prefixes(tree, st.booleans()))
    return Case((lambda tree: mask) if draw(st.booleans()) else mask, known(flags))


@st.composite
def _elsewhere(draw: Any, tree: Any) -> Any:
    """The same leaves at the same paths, maybe in other containers."""
    below = children(tree)
    if below is None:
        return tree
    nodes = [draw(_elsewhere(node)) for _, node in below]
    return (container_like if draw(st.booleans()) else _other_container)(tree, nodes)


@st.composite
def _states(draw: Any, tree: Any) -> Case:
    paths = [path for path, _ in walk(tree)]
    still = draw(st.sets(st.sampled_from(paths))) if paths else set()
    flags = frozen(tree, [path in still for path in paths])
    if all(flags):  # of which freezable would warn
        return Case(True, known(flags))
    params = draw(_elsewhere(tree))
    selector = fo.where(lambda path, leaf: path in still)
    state = fo.freezable(optax.identity(), selector).init(params)
    around = draw(st.sampled_from([lambda s: s, lambda s: (optax.EmptyState(), s), _in_a_dict]))
    return Case(around(state), known(flags))


def _in_a_dict(state: Any) -> dict[str, Any]:
    return {"opt": state, "step": 3}


@st.composite
def _unions(draw: Any, tree: Any, depth: int) -> Case:
    parts = draw(st.lists(specs(tree, depth - 1), max_size=2))
    # A selector among them tells a list of specs from a mask of params that are a list.
    parts.insert(draw(st.integers(0, len(parts))), draw(selectors(tree, 1) | strings(tree)))

    def find(entries: Entries) -> Found:
        found = [part.find(entries) for part in parts]
        errors = [error for _, own in found for error in own]
        return either([flags for flags, _ in found], len(entries)), errors

    kind = draw(st.sampled_from([list, tuple]))
    return Case(kind(part.spec for part in parts), find)


@st.composite
def _bools(draw: Any, tree: Any) -> Case:
    answer = draw(st.booleans())
    return Case(answer, known([answer] * len(list(walk(tree)))))


def specs(tree: Any, depth: int = 2) -> st.SearchStrategy[Case]:
    """Any spec for a tree."""
    kinds = [selectors(tree), strings(tree), _bools(tree), _masks(tree), _states(tree)]
    return st.one_of(*kinds, _unions(tree, depth)) if depth else st.one_of(*kinds)


def check(
    case: Case,
    tree: Any,
    resolve: Callable[[], Any],
    expected: Callable[[list[bool]], Any],
    compare: Callable[[Any, Any], None] = assert_equal,
) -> None:
    """Asserts that what `resolve` makes of a spec is what is expected of the slow reading's flags.

    Where that reading has an error, `resolve` has to raise it.
    """
    flags, errors = case.find(list(walk(tree)))
    if errors:
        with pytest.raises((ValueError, IndexError), match="|".join(map(re.escape, errors))):
            resolve()
    else:
        compare(resolve(), expected(flags))
