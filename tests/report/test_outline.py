"""The rows of a summary: which subtrees there are, how repeated ones fold, and what they sum."""

import collections
import json
import math
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import freeze_optax as fo
from tests.support.sampling import examples

PROPERTY = examples(60)


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def layer(size: int = 2) -> dict[str, Any]:
    return {"b": array(size), "w": array(size, size)}


def paths(params: Any, frozen: Any = fo.nothing, depth: int | None = None) -> list[str]:
    return [row.path for row in fo.summary(params, frozen, depth=depth).rows]


def table(params: Any, frozen: Any = fo.nothing, depth: int | None = None) -> list[tuple[Any, ...]]:
    rows = fo.summary(params, frozen, depth=depth).rows
    return [(row.path, row.status, row.trainable, row.frozen) for row in rows]


def beside(nodes: dict[str, Any]) -> dict[str, Any]:
    """Nodes that are not the only one of their level, so that they stay closed."""
    return {**nodes, "zz": array(99)}


FOLDED = {
    "consecutive": ([f"layer_{i}" for i in range(12)], ["layer_{0..11}"]),
    "a pair": (["l4", "l5"], ["l{4..5}"]),
    "one": (["l4"], ["l4"]),
    "from nine to ten": (["l8", "l9", "l10", "l11"], ["l{8..11}"]),
    "a gap": (["l0", "l1", "l2", "l3", "l7"], ["l{{0..3},7}"]),
    "gaps": (["l0", "l2", "l3", "l9"], ["l{0,{2..3},9}"]),
    "every other": (["l1", "l3", "l5"], ["l{1,3,5}"]),
    "leading zeros": ([f"l{i:02d}" for i in range(12)], ["l{00..11}"]),
    "numbers alone": ([str(i) for i in range(11)], ["{0..10}"]),
    "after a dot": (["h.0.x", "h.1.x"], ["h.{0..1}.x"]),
    "two numbers": (["a1_0", "a1_1", "a2_0", "a2_1"], ["a1_{0..1}", "a2_{0..1}"]),
    "other stems": (["a0", "a1", "b0", "b1"], ["a{0..1}", "b{0..1}"]),
    "no numbers": (["a", "b", "c"], ["a", "b", "c"]),
    "half a stem": (["a", "a0", "a1"], ["a", "a{0..1}"]),
}


@pytest.mark.parametrize(("names", "rows"), FOLDED.values(), ids=FOLDED)
def test_repeated_nodes_become_one_row(names, rows):
    params = beside({name: layer() for name in names})
    assert paths(params) == [*rows, "zz"]
    inside = {"net": params, "tail": array(1)}
    assert paths(inside, "net/zz") == ["net", *(f"net/{row}" for row in rows), "net/zz", "tail"]


WIDTHS = ["l0", "l00", "l1", "l01", "l010", "l9", "l10", "l007"]


def test_numbers_of_several_widths_are_all_there_once():
    rows = paths(beside({name: layer() for name in WIDTHS}))
    chosen = fo.path(*rows[:-1])(dict.fromkeys([*WIDTHS, "l2", "l8", "l02", "l"], 0.0))
    assert sorted(name for name, flag in chosen.items() if flag) == sorted(WIDTHS)


def test_a_folded_row_is_the_sum_of_what_it_stands_for():
    params = {"enc": {f"l{i}": layer(3) for i in range(5)}, "head": layer(2)}
    tx = optax.adam(0.1)
    assert table(params, "enc/l*/w") == [
        ("enc", "partial", 15, 45),
        ("enc/l{0..4}", "partial", 15, 45),
        ("enc/l{0..4}/b", "trainable", 15, 0),
        ("enc/l{0..4}/w", "frozen", 0, 45),
        ("head", "trainable", 6, 0),
    ]
    rows = {row.path: row for row in fo.summary(params, "enc/l*/w", tx).rows}
    assert (rows["enc/l{0..4}/b"].state_bytes, rows["enc/l{0..4}/b"].saved_bytes) == (120, 0)
    assert (rows["enc/l{0..4}/w"].state_bytes, rows["enc/l{0..4}/w"].saved_bytes) == (0, 360)
    assert (rows["enc/l{0..4}"].trainable_bytes, rows["enc/l{0..4}"].frozen_bytes) == (60, 180)


DIFFERENT = {
    "shape": ({"w": array(2, 3)}, {"w": array(3, 2)}),
    "dtype": ({"w": array(2)}, {"w": jax.ShapeDtypeStruct((2,), jnp.int32)}),
    "width of dtype": ({"w": array(2)}, {"w": jax.ShapeDtypeStruct((2,), jnp.bfloat16)}),
    "names": ({"w": array(2)}, {"v": array(2)}),
    "depth": ({"w": array(2)}, {"w": {"w": array(2)}}),
    "more": ({"w": array(2)}, {"w": array(2), "b": array(0)}),
    "kind": ({"w": 1.0}, {"w": array()}),
    "swapped": ({"a": array(2), "b": array(3)}, {"a": array(3), "b": array(2)}),
}


@pytest.mark.parametrize(("one", "other"), DIFFERENT.values(), ids=DIFFERENT)
def test_nodes_that_differ_in_anything_below_stay_apart(one, other):
    assert paths(beside({"l0": one, "l1": other})) == ["l0", "l1", "zz"]
    assert paths(beside({"l0": one, "l1": other, "l2": one})) == ["l{0,2}", "l1", "zz"]
    assert paths(beside({"l0": one, "l1": one})) == ["l{0..1}", "zz"]


def test_nodes_that_differ_in_what_is_frozen_stay_apart():
    params = beside({f"l{i}": layer() for i in range(8)})
    expected = [
        ("l{{0..2},5}", "frozen", 0, 24),
        ("l3", "partial", 4, 2),
        ("l3/b", "frozen", 0, 2),
        ("l3/w", "trainable", 4, 0),
        ("l{4,{6..7}}", "trainable", 18, 0),
        ("zz", "trainable", 99, 0),
    ]
    assert table(params, ("l{0,1,2,5}", "l3/b")) == expected


def test_alternating_kinds_are_a_row_each():
    params = beside({f"l{i}": layer(2 + i % 2) for i in range(7)})
    assert table(params) == [
        ("l{0,2,4,6}", "trainable", 24, 0),
        ("l{1,3,5}", "trainable", 36, 0),
        ("zz", "trainable", 99, 0),
    ]


def test_what_is_repeated_inside_what_is_repeated_folds_too():
    block = {f"b{j}": layer() for j in range(3)}
    params = beside({f"stage{i}": block for i in range(4)})
    assert table(params, "stage*/b2/w") == [
        ("stage{0..3}", "partial", 56, 16),
        ("stage{0..3}/b{0..1}", "trainable", 48, 0),
        ("stage{0..3}/b2", "partial", 8, 16),
        ("stage{0..3}/b2/b", "trainable", 8, 0),
        ("stage{0..3}/b2/w", "frozen", 0, 16),
        ("zz", "trainable", 99, 0),
    ]


def test_a_subtree_is_opened_where_a_part_of_it_trains_and_nowhere_else():
    params = {"a": {"x": layer(), "y": layer()}, "b": {"x": layer(), "y": layer()}}
    assert paths(params) == ["a", "b"]
    assert paths(params, "a") == ["a", "b"]
    assert paths(params, "a/x") == ["a", "a/x", "a/y", "b"]
    assert paths(params, "a/x/b") == ["a", "a/x", "a/x/b", "a/x/w", "a/y", "b"]


def test_the_only_node_of_a_level_is_opened():
    params = {"params": {"model": {"a": layer(), "b": layer(3)}}}
    assert paths(params) == ["params", "params/model", "params/model/a", "params/model/b"]


def test_natural_order_puts_two_before_ten():
    names = [f"l{i}" for i in (0, 1, 2, 3, 9, 10, 11, 20, 100)]
    params = {name: layer(i + 1) for i, name in enumerate(sorted(names))}
    assert paths(params) == names
    assert paths(params, depth=1) == names
    assert paths([array(i + 1) for i in range(12)], depth=1) == [str(i) for i in range(12)]


def test_natural_order_holds_for_every_number_of_a_name():
    names = [f"block_{i}_conv_{j}" for i in (1, 2, 10) for j in (1, 2, 10)]
    assert paths({name: layer() for name in names}, depth=1) == names


def test_other_names_stay_in_the_order_of_the_tree():
    net = collections.OrderedDict(stem=array(2), body=array(3))
    assert paths(net) == paths(net, depth=1) == ["stem", "body"]


# Depth.


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 4, 50])
def test_with_a_depth_every_node_down_to_it_has_its_row_unfolded(depth):
    blocks = {f"l{i}": {"a": layer(), "c": array(1)} for i in range(3)}
    params = {"enc": blocks, "head": layer()}
    every = ["enc", *(f"enc/l{i}" for i in range(3)), "head", "head/b", "head/w"]
    every += [f"enc/l{i}/{x}" for i in range(3) for x in ("a", "c", "a/b", "a/w")]
    expected = [path for path in sorted(every) if path.count("/") < depth]
    assert paths(params, depth=depth) == expected
    assert paths(params, True, depth=depth) == expected


@pytest.mark.parametrize("depth", [True, False, 1.0, "1", [1]])
def test_a_depth_that_is_no_int_is_an_error(depth):
    with pytest.raises((TypeError, ValueError), match=f"depth .*{re.escape(repr(depth))}"):
        fo.summary({"a": array(2)}, depth=depth)


def test_a_negative_depth_is_an_error():
    with pytest.raises(ValueError, match=r"depth .* 0 or more, not -1"):
        fo.summary({"a": array(2)}, depth=-1)


def test_leaves_without_parameters_have_a_row_where_a_depth_asks_for_every_node():
    params = {"a": array(2), "act": jnp.tanh, "empty": array(0, 3)}
    assert paths(params) == ["a"]
    assert paths(params, depth=1) == ["a", "act", "empty"]


# Names.


def test_a_slash_in_a_key_separates_components():
    params = {"net/~/linear_0": layer(), "net/~/linear_1": layer(), "out": layer(3)}
    assert table(params, "net/~/linear_1") == [
        ("net", "partial", 6, 6),
        ("net/~", "partial", 6, 6),
        ("net/~/linear_0", "trainable", 6, 0),
        ("net/~/linear_1", "frozen", 0, 6),
        ("out", "trainable", 12, 0),
    ]
    assert paths(params, depth=2) == ["net", "net/~", "out", "out/b", "out/w"]
    assert paths(params, "out/w")[-4] == "net"


def test_a_node_may_be_a_leaf_and_have_others_below():
    params = {"a": array(3), "a/b": array(2), "c": array(1)}
    for depth in (None, 2):
        assert table(params, "a/b", depth)[:2] == [("a", "partial", 3, 2), ("a/b", "frozen", 0, 2)]
    assert fo.summary(params, "a/b").total == 6


def test_two_leaves_of_one_path_have_one_row_of_both():
    params = {"a": {"b": array(3)}, "a/b": array(2), "c": array(1)}
    expected = [("a", "trainable", 5, 0), ("a/b", "trainable", 5, 0), ("c", "trainable", 1, 0)]
    assert table(params, depth=2) == expected


def test_an_empty_key_has_a_row_like_any_other():
    params = {"": array(3), "b": array(2)}
    rows = fo.summary(params, depth=1).rows
    assert [(row.path, row.total) for row in rows] == [("''", 3), ("b", 2)]


SPECIAL = ["layer[{}]", "a{{{}}}", "*{}", "?{}", "**{}", "[x]{}", "{{{}", "]{}", "a,{}"]
SPECIAL += ["{{a,b}}{}", "l{}]", "l{}{{", "l-{}..9", "\\{}", "a b{}", "é{}", "l٣_{}", "{}²"]


@pytest.mark.parametrize("stem", SPECIAL)
def test_special_characters_in_repeated_names_lose_no_node_and_add_none(stem):
    names = [stem.format(i) for i in range(3)]
    others = ["x0", "xx1", "layer0", "layer1", "ab", "a0", "a1", "b0", "zz9", "x"]
    params = {**{name: array(2) for name in names}, **{x: array(5, 7) for x in others}}
    rows = fo.summary(params).rows
    assert sum(row.total for row in rows) == 3 * 2 + 10 * 35
    for row in rows:
        if row.path not in params:  # a glob
            mask = fo.path(row.path)(params)
            assert sum(math.prod(params[k].shape) for k, flag in mask.items() if flag) == row.total
    inside = {"m": {name: array(2) for name in names}, "n": array(3)}
    assert fo.summary(inside, depth=2).rows[0].total == 6
    assert [r.path for r in fo.summary(inside, depth=2).rows][1:-1] == [f"m/{x}" for x in names]


@pytest.mark.parametrize("parent", ["m[x]", "a{1}", "*", "m?", "{x", "m]"])
def test_the_glob_of_a_folded_row_stands_below_a_special_parent_too(parent):
    params = {parent: {"c": array(7), "l0": array(2), "l1": array(2)}, "mx": {"l0": array(9)}}
    frozen = {parent: {"c": True, "l0": False, "l1": False}, "mx": False}
    rows = [row for row in fo.summary(params, frozen).rows if "l{0..1}" in row.path]
    assert [row.total for row in rows] == [4]
    assert fo.path(rows[0].path)(params) == {
        parent: {"c": False, "l0": True, "l1": True},
        "mx": {"l0": False},
    }


# Trees of every form.

NAMES = st.sampled_from(
    [f"l{i}" for i in (0, 1, 2, 3, 9, 10, 11)]
    + [f"l{i:02d}" for i in (0, 1, 9)]
    + ["b_1_c", "b_2_c", "w", "b", "7", "8", "x1y2", "x1y3", "x.1"]
)
LEAVES = st.sampled_from([(2,), (3,), (2, 2), ()]).map(lambda shape: array(*shape))
TREES = st.recursive(
    LEAVES, lambda children: st.dictionaries(NAMES, children, min_size=1, max_size=7), max_leaves=25
)


def leaf_paths(params: Any) -> dict[str, int]:
    """The elements of each leaf by its path, as anyone would write it down."""
    if not isinstance(params, dict):
        return {"": math.prod(params.shape)}
    return {
        f"{name}/{path}".rstrip("/"): count
        for name, child in params.items()
        for path, count in leaf_paths(child).items()
    }


def frozen_mask(params: Any, seed: int) -> dict[str, bool]:
    return {path: bool((zlib.crc32(path.encode()) >> seed) % 2) for path in leaf_paths(params)}


def select(params: Any, frozen: dict[str, bool]) -> fo.Selector:
    return fo.where(lambda path, leaf: frozen[path])


def sums(params: Any, frozen: dict[str, bool], chosen: set[str]) -> tuple[int, int]:
    sizes = leaf_paths(params)
    still = sum(sizes[path] for path in chosen if frozen[path])
    return sum(sizes[path] for path in chosen) - still, still


def chosen_by(pattern: str, params: Any) -> set[str]:
    flat = {path: array() for path in leaf_paths(params)}
    return {path for path, flag in fo.path(pattern)(flat).items() if flag}


@PROPERTY
@given(st.dictionaries(NAMES, TREES, min_size=1, max_size=7), st.integers(0, 4))
def test_the_path_of_a_row_selects_just_its_leaves(params, seed):
    frozen = frozen_mask(params, seed)
    summary = fo.summary(params, select(params, frozen))
    parts = []
    for row in summary.rows:
        chosen = chosen_by(row.path, params)
        assert sums(params, frozen, chosen) == (row.trainable, row.frozen), row
        statuses = {frozen[path] for path in chosen}
        expected = {True: "frozen", False: "trainable"}
        only = expected[statuses.pop()] if len(statuses) == 1 else "partial"
        assert row.status == only
        if not any(other.path.startswith(row.path + "/") for other in summary.rows):
            parts.append(chosen)
            assert row.status != "partial"
    # The lowest rows have each leaf once.
    assert sorted(path for part in parts for path in part) == sorted(leaf_paths(params))
    assert (summary.trainable, summary.frozen) == sums(params, frozen, set(frozen))


@PROPERTY
@given(st.dictionaries(NAMES, TREES, min_size=1, max_size=7), st.integers(0, 4), st.integers(0, 5))
def test_with_a_depth_the_rows_are_the_nodes_with_their_sums(params, seed, depth):
    frozen = frozen_mask(params, seed)
    nodes: dict[str, set[str]] = {}
    for path in leaf_paths(params):
        parts = path.split("/")
        for i in range(1, min(depth, len(parts)) + 1):
            nodes.setdefault("/".join(parts[:i]), set()).add(path)
    expected = {path: sums(params, frozen, below) for path, below in nodes.items()}
    rows = fo.summary(params, select(params, frozen), depth=depth).rows
    assert len(rows) == len(expected)
    assert {row.path: (row.trainable, row.frozen) for row in rows} == expected
    # Each before what is in it, and that next to it.
    order = [row.path for row in rows]
    for i, path in enumerate(order):
        below = [other for other in order if other.startswith(path + "/")]
        assert order[i + 1 : i + 1 + len(below)] == below


# Size.


@pytest.mark.parametrize("depth", [None, 10_000])
def test_a_tree_of_a_thousand_levels_has_its_rows(depth):
    path = "/".join(["n"] * 1000)
    summary = fo.summary({f"{path}/a": array(2), f"{path}/b": array(3)}, f"{path}/a", depth=depth)
    assert [row.path.count("/") for row in summary.rows] == [*range(1000), 1000, 1000]
    assert {(row.trainable, row.frozen) for row in summary.rows[:1000]} == {(3, 2)}
    assert json.loads(json.dumps(summary.to_dict()))["rows"][-1]["path"] == f"{path}/b"


def test_a_tree_of_twenty_thousand_leaves_folds():
    blocks = {f"m{i}": {f"k{j}": array(1 + i % 2, j + 1) for j in range(20)} for i in range(1000)}
    summary = fo.summary({"net": blocks, "head": array(3)}, "net/m{0..499}")
    assert [(row.path[:8], row.status, row.total) for row in summary.rows] == [
        ("head", "trainable", 3),
        ("net", "partial", 210 * 1500),
        ("net/m{0,", "frozen", 210 * 250),
        ("net/m{1,", "frozen", 210 * 500),
        ("net/m{50", "trainable", 210 * 250),
        ("net/m{50", "trainable", 210 * 500),
    ]


def test_repeated_leaves_are_a_row_for_as_many_as_a_glob_stands_for():
    params = beside({f"w{i}": array(2) for i in range(12_000)})
    rows = fo.summary(params).rows
    assert [(row.path, row.total) for row in rows[:2]] == [
        ("w{0..9999}", 20_000),
        ("w{10000..11999}", 4_000),
    ]
