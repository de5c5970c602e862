"""Selectors of modules on any tree of them, against a slow reading of the nodes above each leaf."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import freeze_optax as fo
from tests.support.random_trees import HOLE, assert_equal, is_hole
from tests.support.sampling import examples
from tests.support.slow_specs import OPERATORS, Case, Entries, Found, check, inverted, joined


class Cell(eqx.Module):
    weight: Any
    bias: Any
    inner: Any
    width: int = eqx.field(static=True, default=2)
    frozen_fields = ("bias",)


class Deep(Cell):
    gate: Any = None
    frozen_fields = ("inner",)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    weight: Any
    inner: Any


class Slip(eqx.Module):
    weight: Any
    frozen_fields = ("wieght",)


CLASSES = [Cell, Deep, Block, Slip]
FIELDS = ["weight", "bias", "inner", "gate", "width", "kernel"]
LEAVES = st.sampled_from([lambda: 1.5, lambda: np.ones(2, np.float32), lambda: 3]).map(
    lambda f: f()
)


@st.composite
def trees(draw: Any, depth: int = 3, least: int = 2) -> Any:
    """Modules in dicts, lists and tuples, and in each other."""
    if not depth or draw(st.integers(0, 9)) == 9:
        return draw(LEAVES)
    inner = trees(depth - 1, least=0)
    kinds = [Cell, Cell, Deep, Deep, Block, Block, Slip, dict, list, tuple]
    kind = draw(st.sampled_from(kinds[-3:] if least == 2 else kinds))
    if kind is dict:
        return draw(st.dictionaries(st.sampled_from("abc"), inner, min_size=least, max_size=3))
    if kind in (list, tuple):
        return kind(draw(st.lists(inner, min_size=least, max_size=3)))
    if kind is Slip:
        return Slip(draw(LEAVES))
    if kind is Block:
        return Block(draw(LEAVES), draw(inner))
    parts = draw(st.tuples(LEAVES, st.none() | LEAVES, st.none() | inner))
    return Deep(*parts, gate=draw(LEAVES)) if kind is Deep else Cell(*parts)


def is_module(node: Any) -> bool:
    return dataclasses.is_dataclass(node)


def fields_of(node: Any) -> list[str]:
    """The fields that may hold leaves."""
    return [field.name for field in dataclasses.fields(node) if not field.metadata.get("static")]


def below(node: Any) -> list[tuple[str, Any]] | None:
    if is_module(node):
        return [(name, getattr(node, name)) for name in fields_of(node)]
    if isinstance(node, dict):
        return sorted(node.items())
    if type(node) in (list, tuple):
        return [(str(i), value) for i, value in enumerate(node)]
    return [] if node is None else None


Chain = tuple[tuple[Any, str], ...]


def walk(node: Any, path: str = "", chain: Chain = ()) -> Iterator[tuple[str, Any, Chain]]:
    """Each leaf with its path, and the nodes above it, each with the key below it."""
    parts = below(node)
    if parts is None:
        yield path, node, chain
        return
    for key, value in parts:
        own = f"{path}/{key}" if path else key
        yield from walk(value, own, (*chain, (node, key)))


def modules_in(node: Any, path: str = "") -> dict[str, Any]:
    found = {path: node} if is_module(node) else {}
    for key, value in below(node) or []:
        found |= modules_in(value, f"{path}/{key}" if path else key)
    return found


def of_type(types: tuple[type, ...], fields: tuple[str, ...], tree: Any, entries: Entries) -> Found:
    own = [node for node in modules_in(tree).values() if isinstance(node, types)]
    errors = [
        f"no module is a {cls.__name__}"
        for cls in types
        if not any(isinstance(node, cls) for node in own)
    ]
    known = {name for node in own for name in fields_of(node)}
    errors += [f"no such module has a field {name!r}" for name in fields if name not in known]
    flags = [
        any(isinstance(node, types) and (not fields or key in fields) for node, key in chain)
        for _, _, chain in walk(tree)
    ]
    return flags, errors + ([] if any(flags) else ["selects no leaf"])


def by_module(answers: dict[type, Any], tree: Any, entries: Entries) -> Found:
    errors = [
        f"named the field {name!r} at {path!r}"
        for path, node in modules_in(tree).items()
        if isinstance(answers[type(node)], tuple)
        for name in answers[type(node)]
        if name not in fields_of(node)
    ]

    def is_told(node: Any, key: str) -> bool:
        answer = answers.get(type(node), False)
        return answer if isinstance(answer, bool) else key in answer

    return [any(is_told(node, key) for node, key in chain) for _, _, chain in walk(tree)], errors


DECLARED = {Cell: ("bias",), Deep: ("inner", "bias"), Block: (), Slip: ("wieght",)}


def declared(tree: Any, entries: Entries) -> Found:
    slips = any(isinstance(node, Slip) for node in modules_in(tree).values())
    flags = [
        any(key in DECLARED.get(type(node), ()) for node, key in chain)
        for _, _, chain in walk(tree)
    ]
    return flags, ["Slip.frozen_fields names 'wieght', but no module has it"] if slips else []


def with_modules(find: Any, tree: Any, entries: Entries) -> Found:
    flags, errors = find(tree, entries)
    return flags, errors if modules_in(tree) else ["looks for modules, but the tree"]


ANSWERS = st.booleans() | st.lists(st.sampled_from(FIELDS), max_size=2).map(tuple)


@st.composite
def atoms(draw: Any, tree: Any, table: Any) -> Case:
    kind = draw(st.sampled_from(["of_type", "by_module", "declared"]))
    if kind == "of_type":
        types = tuple(draw(st.lists(st.sampled_from(CLASSES), min_size=1, max_size=2)))
        fields = tuple(draw(st.lists(st.sampled_from(FIELDS), max_size=2)))
        selector = fo.of_type(*types, fields=fields, modules=table)
        find = functools.partial(of_type, types, fields)
    elif kind == "by_module":
        answers = {cls: draw(ANSWERS) for cls in CLASSES}
        selector = fo.by_module(lambda module, path: answers[type(module)], modules=table)
        find = functools.partial(by_module, answers)
    else:
        selector, find = fo.declared(table), declared
    return Case(selector, functools.partial(with_modules, find, tree))


@st.composite
def selectors(draw: Any, tree: Any, table: Any = None) -> Case:
    one = draw(atoms(tree, table))
    how = draw(st.integers(0, 3))
    if how == 2:
        return Case(~one.spec, functools.partial(inverted, one))
    if how < 2:
        return one
    other, (operator, rule) = draw(atoms(tree, table)), draw(st.sampled_from(OPERATORS))
    return Case(operator(one.spec, other.spec), functools.partial(joined, rule, one, other))


def rebuilt(node: Any, values: Iterator[Any]) -> Any:
    parts = below(node)
    if parts is None:
        return next(values)
    others = [rebuilt(value, values) for _, value in parts]
    if is_module(node):
        return type(node)(**dict(zip([key for key, _ in parts], others, strict=True)))
    if isinstance(node, dict):
        return dict(zip(sorted(node), others, strict=True))
    return None if node is None else type(node)(others)


def marked(tree: Any, flags: list[bool]) -> Any:
    pairs = zip(walk(tree), flags, strict=True)
    return rebuilt(tree, iter([HOLE if is_hole(leaf) else flag for (_, leaf, _), flag in pairs]))


def frozen(tree: Any, flags: list[bool]) -> list[bool]:
    pairs = zip(walk(tree), flags, strict=True)
    return [flag or isinstance(leaf, int) for (_, leaf, _), flag in pairs]


def as_params(node: Any) -> Any:
    """The same leaves at the same paths, in dicts that know nothing of modules."""
    parts = below(node)
    return node if parts is None else {key: as_params(value) for key, value in parts} or None


RANDOM = examples(150)


@RANDOM
@given(trees(), st.data())
def test_selectors_of_modules_mark_what_a_slow_reading_of_the_nodes_above_marks(tree, data):
    case: Case = data.draw(selectors(tree))
    check(case, tree, lambda: case.spec(tree), lambda flags: marked(tree, flags))
    check(
        case,
        tree,
        lambda: fo.mask(case.spec, tree),
        lambda flags: marked(tree, frozen(tree, flags)),
    )


@RANDOM
@given(trees(), st.data())
def test_abstract_modules_and_modules_of_holes_are_read_alike(tree, data):
    case: Case = data.draw(selectors(tree))
    abstract = jax.eval_shape(lambda: tree)
    check(case, tree, lambda: case.spec(abstract), lambda flags: marked(tree, flags))
    picked = data.draw(st.lists(st.booleans(), min_size=1, max_size=9))
    leaves = [leaf for _, leaf, _ in walk(tree)]
    values = [HOLE if picked[i % len(picked)] else leaf for i, leaf in enumerate(leaves)]
    holed = rebuilt(tree, iter(values))
    check(case, tree, lambda: case.spec(holed), lambda flags: marked(holed, flags))


@RANDOM
@given(trees(), st.data())
def test_a_table_of_modules_serves_as_the_modules_themselves_do(tree, data):
    case: Case = data.draw(selectors(tree, modules_in(tree)))
    params = as_params(tree)
    flags_of = {}

    def expected(flags: list[bool]) -> Any:
        flags_of.update(zip((path for path, _, _ in walk(tree)), flags, strict=True))
        return rebuilt(params, (flags_of[path] for path, _, _ in walk(params)))

    check(case, tree, lambda: case.spec(params), expected)


@RANDOM
@given(trees())
def test_a_function_is_asked_once_about_each_module_and_about_nothing_else(tree):
    asked = []
    modules = modules_in(tree)
    if modules:
        selector = fo.by_module(lambda module, path: bool(asked.append((path, module))))
        assert_equal(selector(tree), marked(tree, [False] * len(list(walk(tree)))))
    assert len(asked) == len(modules)
    assert all(modules[path] is module for path, module in asked)
