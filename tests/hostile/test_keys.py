"""Keys of any kind and any characters, through everything that names a leaf."""

import contextlib
import dataclasses
import enum
import io
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict

import freeze_optax as fo

pytestmark = pytest.mark.usefixtures("standard_promotion")

STRINGS = [
    *("/", "//", "/a", "a/", "a//b", "b/c", ".", "..", "./x", "a.b", "~", "#", "\\", "$", "%s"),
    *(
        "*",
        "**",
        "***",
        "?",
        "[",
        "]",
        "[]",
        "[!]",
        "[a]",
        "[a-",
        "{",
        "}",
        "{}",
        "{a,b}",
        "{0..3}",
    ),
    *(",", "!", "^", "-", "|", "&", "+", "(", ")", "(?i)a", "'", '"', "`", "'\"`"),
    *(" ", "  ", " x", "x ", "\n", "\r\n", "\t", "\0", "\x1b[31m", "\x07", "\x7f", "\u2028"),
    *(
        "é",
        "e\u0301",
        "\u05d0\u05d1",
        "\u202eabc",
        "\u200b",
        "\ufeff",
        "😀",
        "👩\u200d🔬",
        "\U0001d518",
        "日本",
    ),
    *("\ud800", "ß", "SS", "İ", "٣", "²", "½", "0", "00", "0x1", "-1", "+1", "1e3", "inf", "nan"),
    *("value", "MaskedNode", "__class__", "inner", "ages", "plan", "mu", "nu", "count", "trace"),
    *("None", "True", "x" * 3000, "a1b2c3", "A", "a"),
]


class Color(enum.Enum):
    RED = 1


class Rank(enum.IntEnum):
    FIRST = 41


@dataclasses.dataclass(frozen=True)
class Site:
    name: str
    number: int


OTHERS = [
    *(0, -1, 10**30, 1.5, -0.5, float("inf"), b"bytes", ("a", 1), ("a/b",), (), 2j),
    *(frozenset({1}), Color.RED, Rank.FIRST, Site("x/y", 3), np.str_("text"), range(3)),
]
with contextlib.suppress(TypeError):  # old versions of jax know no key None
    OTHERS.append(jax.tree_util.DictKey(None).key)


def leaf(i: int) -> jax.Array:
    return jnp.full(2, i, jnp.float32)


# Keys that don't compare can't be sorted: jax takes those of an OrderedDict as they come.
TREES = {
    "strings": {key: leaf(i) for i, key in enumerate(STRINGS)},
    "others": OrderedDict((key, leaf(i)) for i, key in enumerate(OTHERS)),
}
CASES = [(tree, key) for tree, params in TREES.items() for key in params]


def literal(path: str) -> str:
    return re.sub(r"[*?\[\]{}]", r"[\g<0>]", path)


def at(params: Any, wanted: Callable[[str], bool]) -> Any:
    return type(params)((key, wanted(str(key))) for key in params)


@pytest.mark.parametrize(("tree", "key"), CASES, ids=lambda value: ascii(value)[:30])
def test_a_key_is_named_by_its_very_characters_and_by_nothing_else(tree, key):
    params = TREES[tree]
    path = str(key)
    exactly = at(params, lambda other: other == path)
    below = at(params, lambda other: f"{other}/".startswith(f"{path}/"))
    assert fo.mask(literal(path), params) == below
    assert fo.mask(fo.layers(literal(path))[0], params) == below
    assert fo.mask(fo.regex(re.escape(path)), params) == exactly
    assert fo.mask(fo.where(lambda other, leaf: other == path), params) == exactly
    assert fo.mask(exactly, params) == exactly
    changed = fo.assign(params, {path: 7.0})
    assert {name: changed[name] is not params[name] for name in params} == exactly


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize(
    "spec", ["**", "**/**", fo.layers("**")[:], fo.regex(r"(?s:.*)")], ids=repr
)
def test_two_stars_leave_none_of_them_out(spec, tree):
    assert all(fo.mask(spec, TREES[tree]).values())


@pytest.mark.parametrize(("tree", "key"), CASES, ids=lambda value: ascii(value)[:30])
def test_an_error_names_it_in_quotes_on_one_line(tree, key):
    params = TREES[tree]
    mask = type(params)((other, 1 if other is key else True) for other in params)
    with pytest.raises(TypeError, match=re.escape(f"the mask at {str(key)!r} is int")) as caught:
        fo.mask(mask, params)
    assert str(caught.value).isprintable()
    with pytest.raises(ValueError, match=re.escape(f"the leaf {str(key)!r} is")) as caught:
        fo.assign(params, {str(key): jnp.ones(3)})
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("tree", TREES)
def test_a_pattern_in_vain_and_a_mask_that_lacks_them_are_errors_on_one_line(tree):
    for spec in ("no such key", {"no such key": True}):
        with pytest.raises(ValueError, match="no such key") as caught:
            fo.mask(spec, TREES[tree])
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("tree", TREES)
def test_a_report_of_changed_leaves_has_a_printable_line_for_each(tree):
    params = TREES[tree]
    changed = jax.tree.map(lambda x: x + 1, params)
    with pytest.raises(AssertionError, match="not bit-identical") as caught:
        fo.testing.assert_frozen(params, changed, True)
    lines = str(caught.value).split("\n")
    assert len(lines) == 1 + len(params)
    assert all(line.isprintable() for line in lines)


def reversed_dict(items: Iterable[tuple[Any, Any]]) -> Any:
    return OrderedDict(reversed(list(items)))


@pytest.mark.parametrize(
    ("tree", "container"),
    [
        ("strings", FrozenDict),
        ("strings", OrderedDict),
        ("strings", reversed_dict),
        ("others", reversed_dict),  # flax sorts keys, and these don't compare
    ],
)
def test_a_mask_in_another_container_fits_by_path(tree, container):
    params = TREES[tree]
    wanted = {key: i % 3 == 0 for i, key in enumerate(params)}
    assert fo.mask(container(wanted.items()), params) == type(params)(wanted)


@pytest.mark.parametrize("tree", TREES)
def test_they_train_and_are_edited_as_by_the_bare_optimizer_on_a_list(tree):
    params = TREES[tree]
    keys = list(params)
    frozen, late = keys[::3], keys[1::3]
    mask = type(params)((key, key in frozen) for key in keys)
    tx, bare = fo.freezable(optax.adam(0.1), mask), optax.adam(0.1)
    rest = [params[key] for key in keys if key not in frozen]
    expected, after = bare.update(rest, bare.init(rest), rest)
    updates, state = tx.update(params, tx.init(params), params)
    moved = [updates[key] for key in keys if key not in frozen]
    assert all(map(np.array_equal, moved, expected))
    applied = fo.apply_updates(params, updates, state)
    assert all(applied[key] is params[key] for key in frozen)
    # What was frozen starts afresh; what goes on does so beside it, in a cohort of its own.
    state = fo.thaw(fo.freeze(state, params, [literal(str(key)) for key in late]), params, mask)
    updates, _ = tx.update(params, state, params)
    first = [params[key] for key in frozen]
    fresh, _ = bare.update(first, bare.init(first), first)
    assert all(map(np.array_equal, [updates[key] for key in frozen], fresh))
    second, _ = bare.update(rest, after, rest)
    going = [key for key in keys if key not in frozen]
    both = zip(going, second, strict=True)
    assert all(np.array_equal(updates[key], x) for key, x in both if key not in late)
    assert jax.tree.structure(fo.release(state, params)) == jax.tree.structure(bare.init(params))


@pytest.mark.parametrize("tree", TREES)
def test_they_survive_an_export_through_a_file(tree):
    params = TREES[tree]
    tx = fo.freezable(optax.adam(0.1), fo.layers("*")[::2])
    _, state = tx.update(params, tx.init(params), params)
    state = fo.thaw(state, params, True)
    exported, file = fo.export_state(state), io.BytesIO()
    np.savez(file, about=exported["about"], **exported["leaves"])
    file.seek(0)
    stored = dict(np.load(file))
    back = fo.import_state(tx, params, {"about": stored.pop("about"), "leaves": stored})
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for new, old in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("depth", [None, 1, 3])
def test_a_summary_shows_them_without_control_characters(tree, depth):
    params = TREES[tree]
    summary = fo.summary(params, fo.layers("*")[::2], optax.adam(0.1), depth=depth)
    assert (summary.total, len(summary.rows) > 3) == (2 * len(params), True)
    for text in (str(summary), summary.to_markdown()):
        assert all(line.isprintable() for line in text.split("\n"))
    told = json.loads(json.dumps(summary.to_dict()))
    assert [row["path"] for row in told["rows"]] == [row.path for row in summary.rows]
    assert summary.headline in summary._repr_html_()


def test_they_are_tied_by_their_paths():
    shared = jnp.ones(2)
    params = {**TREES["strings"], "\n": shared, "**": shared, "\ud800": shared}
    groups = fo.tied_paths(params)
    assert list(map(set, groups)) == [{"\n", "**", "\ud800"}]
    tx = fo.tie(optax.sgd(0.5), *groups)
    updates, _ = tx.update(params, tx.init(params), params)
    assert all(updates[key].tolist() == [-1.5, -1.5] for key in groups[0])


# A number of more digits than Python makes an int of.


@pytest.mark.parametrize("name", ["9" * 5000, "layer_" + "9" * 5000, "9" * 5000 + "_2"])
def test_a_number_of_thousands_of_digits_is_a_name_like_any_other(name):
    params = {name: jnp.ones(2), "a": jnp.ones(3)}
    assert fo.mask(fo.layers("*")[:], params) == {name: True, "a": True}
    summary = fo.summary(params, name)
    assert {row.path for row in summary.rows} == {name, "a"}
    assert str(summary).endswith("\ntrainable: 3 of 5 parameters (60.00%)")


# Keys that jax can't sort.


@pytest.mark.parametrize("params", [{1: jnp.ones(2), "1": jnp.ones(2)}, {None: 1.0, "a": 2.0}])
@pytest.mark.parametrize(
    "ask",
    [
        jax.tree.leaves,
        lambda tree: fo.mask(True, tree),
        lambda tree: fo.mask(tree, {"a": 1.0}),
        lambda tree: fo.freezable(optax.sgd(0.1)).init(tree),
        lambda tree: fo.partition(tree, True),
        fo.grad(lambda tree: 0.0, True),
        lambda tree: fo.assign(tree, {"1": 0.0}),
        fo.tied_paths,
        fo.summary,
    ],
)
def test_keys_that_do_not_compare_are_the_error_of_jax(params, ask):
    with pytest.raises(ValueError, match="Comparator raised exception while sorting"):
        ask(params)
