"""Random rows of random leaves, joined at random, against a vector of bools for each leaf."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import freeze_optax as fo
from tests.support.random_trees import (
    HOLE,
    assert_bitwise,
    is_hole,
    leaves,
    pairs,
    rebuilt,
    trains,
    trees,
)
from tests.support.random_trees import walk as leaves_of
from tests.support.sampling import examples
from tests.support.slow_specs import Case, Entries, Found, selectors, specs

COUNTS = [0, 1, 2, 3, 4, 5, 9, 20]
SHAPES = [*[(n,) for n in COUNTS], *[(n, 2) for n in COUNTS], (3, 1, 2)]


def array(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape).astype(dtype)


FLOATS = [functools.partial(array, shape, np.float32) for shape in SHAPES]
STILL = [functools.partial(array, shape, np.int32) for shape in [(3,), (), (0,)]]
KEYS = jax.random.split(jax.random.key(0), 3)
SCALARS = [lambda: 0.5, lambda: array((), np.float32), lambda: "text", lambda: HOLE]
TREES = trees(leaves(FLOATS, FLOATS, STILL, [lambda: KEYS]))
MIXED = trees(leaves(FLOATS, STILL, SCALARS, SCALARS))


def vector(leaf: Any, flag: bool) -> np.ndarray:
    """A flag for each row of a leaf, or one for all of a leaf that has no rows."""
    count = getattr(leaf, "shape", ())[:1]
    return np.full(count if count != (0,) else (), flag)


def chosen(rows: Any, count: int) -> set[int] | None:
    """Which of so many rows are meant; None if they are not those of a leaf of so many."""
    if isinstance(rows, slice):
        ends = [end for end in (rows.start, rows.stop) if end is not None]
        return set(range(count)[rows]) if all(abs(end) <= count for end in ends) else None
    if len(rows) and isinstance(rows[0], bool | np.bool_):
        return {i for i in range(count) if rows[i]} if len(rows) == count else None
    own = [range(count)[i] for i in rows if -count <= i < count]
    return set(own) if len(own) == len(rows) else None


def rows_found(case: Case, rows: Any, entries: Entries) -> Found:
    selected, errors = case.find(entries)
    flags, errors = [], list(errors)
    for (path, leaf), flag in zip(entries, selected, strict=True):
        own, shape = vector(leaf, False), getattr(leaf, "shape", ())
        flags.append(own)
        if not np.any(flag) or is_hole(leaf) or (not shape and not trains(leaf)):
            continue
        if not shape:
            errors.append(f"the leaf {path!r} is a scalar, of shape ()")
        elif chosen(rows, shape[0]) is None:
            errors.append(f"the leaf {path!r} is of shape {shape}, so ")
        elif shape[0]:
            own[list(chosen(rows, shape[0]))] = True
            flags[-1] = own & flag
    return flags, errors


def in_vectors(case: Case, entries: Entries) -> Found:
    flags, errors = case.find(entries)
    return [vector(leaf, flag) for (_, leaf), flag in zip(entries, flags, strict=True)], errors


@st.composite
def forms(draw: Any, count: int) -> Any:
    """Rows of a leaf of so many, or seldom of more, in any form that is taken for rows."""
    count += draw(st.sampled_from([0] * 9 + [1]))
    ends = st.one_of(st.none(), *[st.integers(-count, count)] * 2)
    kind = draw(st.sampled_from([slice, slice, list, tuple, np.array, range, bool]))
    if kind is slice:
        return slice(draw(ends), draw(ends), draw(st.sampled_from([None, 1, 2, -1, -2, -3])))
    if kind is range:
        return range(count - 1, -1, -draw(st.integers(1, 3)))
    if kind is bool:
        flags = draw(st.lists(st.booleans(), min_size=count, max_size=count))
        return draw(st.sampled_from([list, np.array]))(flags) if flags else []
    return kind(draw(st.lists(st.integers(-count, count - 1), max_size=5)) if count else [])


def counts(tree: Any) -> list[int]:
    """How many rows the leaves have, the more the likelier."""
    own = [leaf.shape[0] for _, leaf in leaves_of(tree) if getattr(leaf, "shape", ())]
    return [n for n in own for _ in range(min(n, 5) + 1)] or [2]


@st.composite
def alike(draw: Any, tree: Any, count: int) -> Case:
    """Some of the leaves of so many rows."""
    flags = [
        getattr(leaf, "shape", ())[:1] == (count,) and draw(st.sampled_from([True, True, False]))
        for _, leaf in leaves_of(tree)
    ]
    return Case(rebuilt(tree, iter(flags)), lambda entries: (flags, []))


@st.composite
def atoms(draw: Any, tree: Any) -> Case:
    how = draw(st.integers(0, 9))
    if how > 8:
        case = draw(selectors(tree, 0))
        return Case(case.spec, functools.partial(in_vectors, case))
    count = draw(st.sampled_from(counts(tree)))
    case = draw(specs(tree) if how > 7 else alike(tree, count))
    rows = draw(forms(count))
    return Case(fo.rows(case.spec, rows), functools.partial(rows_found, case, rows))


OPERATORS: list[tuple[Any, Any]] = [
    (lambda a, b: a | b, np.logical_or),
    (lambda a, b: a & b, np.logical_and),
    (lambda a, b: a - b, lambda a, b: a & ~b),
]


@st.composite
def expressions(draw: Any, tree: Any, depth: int = 2) -> Case:
    """Rows, or several of these joined."""
    if not depth or draw(st.integers(0, 3)) == 3:
        return draw(atoms(tree))
    one = draw(expressions(tree, depth - 1))
    how = draw(st.integers(0, 5))
    if how == 0:
        return Case(~one.spec, functools.partial(inverted, one))
    if how == 5:
        rows = draw(forms(draw(st.sampled_from(counts(tree)))))
        return Case(fo.rows(one.spec, rows), functools.partial(rows_found, one, rows))
    other = draw(expressions(tree, depth - 1))
    operator, rule = draw(st.sampled_from(OPERATORS))
    return Case(operator(one.spec, other.spec), functools.partial(joined, rule, one, other))


def inverted(one: Case, entries: Entries) -> Found:
    flags, errors = one.find(entries)
    return [~flag for flag in flags], errors


def joined(rule: Any, left: Case, right: Case, entries: Entries) -> Found:
    (first, errors), (second, more) = left.find(entries), right.find(entries)
    return [rule(a, b) for a, b in zip(first, second, strict=True)], errors + more


def public(flag: np.ndarray) -> Any:
    return flag if flag.any() and not flag.all() else bool(flag.all())


def frozen(tree: Any, flags: list[np.ndarray]) -> list[np.ndarray]:
    both = zip(leaves_of(tree), flags, strict=True)
    return [flag if trains(leaf) else vector(leaf, True) for (_, leaf), flag in both]


def marked(tree: Any, flags: list[np.ndarray]) -> Any:
    both = zip(leaves_of(tree), flags, strict=True)
    return rebuilt(tree, iter([HOLE if is_hole(x) else public(flag) for (_, x), flag in both]))


def assert_masks(mask: Any, expected: Any) -> None:
    """Python bools, and NumPy vectors of bools."""
    for x, y in pairs(mask, expected):
        assert type(x) is type(y)
        assert x is y or (x.dtype, x.tolist()) == (np.dtype(bool), y.tolist())


def check(case: Case, tree: Any, compare: Callable[[list[np.ndarray]], Any]) -> None:
    """Calls `compare` with the vectors; where there are errors it has to raise one of them."""
    flags, errors = case.find(list(leaves_of(tree)))
    if errors:
        with pytest.raises((ValueError, IndexError), match="|".join(map(re.escape, errors))):
            compare([vector(leaf, False) for _, leaf in leaves_of(tree)])
    else:
        compare(flags)


@examples(150)
@given(st.one_of(TREES, MIXED), st.data())
def test_rows_joined_at_random_are_those_of_the_vectors(tree, data):
    case: Case = data.draw(expressions(tree))
    check(case, tree, lambda flags: assert_masks(case.spec(tree), marked(tree, flags)))
    check(
        case,
        tree,
        lambda flags: assert_masks(fo.mask(case.spec, tree), marked(tree, frozen(tree, flags))),
    )


@examples(100)
@given(TREES, st.data())
def test_abstract_leaves_have_the_rows_of_their_arrays(tree, data):
    case: Case = data.draw(expressions(tree))
    abstract = jax.eval_shape(lambda: tree)
    check(case, tree, lambda flags: assert_masks(case.spec(abstract), marked(tree, flags)))


@examples(100)
@given(TREES, st.data())
def test_a_mask_or_a_state_of_rows_is_a_spec_of_the_same_rows(tree, data):
    case: Case = data.draw(expressions(tree))

    def compare(flags: list[np.ndarray]) -> None:
        expected = marked(tree, frozen(tree, flags))
        assert_masks(fo.mask(case.spec(tree), tree), expected)
        if not all(flag.all() for flag in frozen(tree, flags)):
            state = fo.freezable(optax.identity(), case.spec).init(tree)
            assert_masks(fo.mask(state, tree), expected)

    check(case, tree, compare)


@examples(100)
@given(st.one_of(TREES, MIXED), st.data())
def test_labels_are_for_leaves_that_are_frozen_whole_or_not_at_all(tree, data):
    case: Case = data.draw(expressions(tree))

    def compare(flags: list[np.ndarray]) -> None:
        still = frozen(tree, flags)
        triples = zip(leaves_of(tree), still, strict=True)
        parts = [path for (path, x), flag in triples if not is_hole(x) and flag.any() != flag.all()]
        if parts:
            with pytest.raises(ValueError, match=re.escape(f"{parts[0]!r} is frozen in part")):
                fo.labels(case.spec, tree)
        both = zip(leaves_of(tree), still, strict=True)
        words = [
            HOLE if is_hole(x) else "frozen" if flag.all() else "trainable" for (_, x), flag in both
        ]
        if not parts:
            assert fo.labels(case.spec, tree) == rebuilt(tree, iter(words))

    check(case, tree, compare)


@examples(100)
@given(TREES, st.data())
def test_partition_merge_and_hold_move_the_rows_that_the_vectors_name(tree, data):
    case: Case = data.draw(expressions(tree))
    values = [leaf for _, leaf in leaves_of(tree)]
    new = rebuilt(tree, iter([x + x if trains(x) else x for x in values]))

    def compare(flags: list[np.ndarray]) -> None:
        still = frozen(tree, flags)
        live = [
            HOLE if flag.all() else leaf if not flag.any() else leaf[~flag]
            for leaf, flag in zip(values, still, strict=True)
        ]
        trainable, rest = fo.partition(tree, case.spec)
        assert_bitwise(trainable, rebuilt(tree, iter(live)))
        assert_bitwise(fo.merge(trainable, rest), tree)
        held = [
            where_rows(flag, old, now)
            for old, (_, now), flag in zip(values, leaves_of(new), flags, strict=True)
        ]
        assert_bitwise(fo.hold(new, tree, case.spec), rebuilt(tree, iter(held)))

    check(case, tree, compare)


def where_rows(flag: np.ndarray, old: Any, new: Any) -> Any:
    if flag.all() or not flag.any() or not isinstance(old, np.ndarray):
        return old if flag.any() else new
    both = zip(flag, old, new, strict=True)
    return np.stack([before if own else after for own, before, after in both])
