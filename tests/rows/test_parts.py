import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from freeze_optax._rows.parts import Parts, PartTable, is_hole_or_parts, join_parts, put_live
from freeze_optax._rows.rows import Rows
from freeze_optax._tree.leaves import Leaves

HOLE = optax.MaskedNode()


def _rows(*indices, of=6):
    mask = np.zeros(of, bool)
    mask[list(indices)] = True
    return Rows(mask)


def _array(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


FIRST, MIDDLE, LAST = _rows(0, 1), _rows(2, 3), _rows(4, 5)
EVEN, ODD = _rows(0, 2, 4), _rows(1, 3, 5)
X = _array(6, 2)

SETS = {
    "in order": (FIRST, MIDDLE),
    "in reverse": (LAST, FIRST),
    "three": (MIDDLE, LAST, FIRST),
    "interleaved": (EVEN, ODD),
    "a block between others": (_rows(2, 3), _rows(1, 4)),
    "one": (EVEN,),
}


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("rows", SETS.values(), ids=SETS)
def test_join_puts_the_rows_that_there_are_in_order(rows, compiled, convert):
    wrap = jax.jit if compiled else lambda f: f
    parts = Parts([convert(X[r.mask]) for r in rows], rows)
    expected = X[np.logical_or.reduce([r.mask for r in rows])]
    joined = np.asarray(wrap(join_parts)(parts))
    assert (joined.dtype, joined.tolist()) == (expected.dtype, expected.tolist())


def test_join_passes_over_holes_and_leaves_alone_what_is_one_array():
    first = X[FIRST.mask]
    assert join_parts(Parts([HOLE, first], (LAST, FIRST))) is first
    assert join_parts(first) is first
    assert join_parts(HOLE) is HOLE
    joined = join_parts(Parts([X[LAST.mask], HOLE, first], (LAST, MIDDLE, FIRST)))
    assert np.asarray(joined).tolist() == X[[0, 1, 4, 5]].tolist()


def test_join_of_blocks_is_a_concatenation():
    parts = Parts([jnp.asarray(X[LAST.mask]), jnp.asarray(X[FIRST.mask])], (LAST, FIRST))
    assert [e.primitive.name for e in jax.make_jaxpr(join_parts)(parts).eqns] == ["concatenate"]


def test_join_keeps_the_dtype_of_numpy_arrays_that_jax_has_not():
    x = np.linspace(0.1, 0.9, 6)
    joined = join_parts(Parts([x[LAST.mask], x[:4]], (LAST, ~LAST)))
    assert (joined.dtype, joined.tolist()) == (x.dtype, x.tolist())


def test_parts_are_a_node_whose_arrays_are_leaves_and_whose_rows_are_static():
    parts = Parts(["a", "b"], (FIRST, LAST))
    leaves, treedef = jax.tree.flatten(parts)
    assert leaves == ["a", "b"]
    assert treedef == jax.tree.structure(Parts([1, 2], (_rows(0, 1), _rows(4, 5))))
    assert treedef != jax.tree.structure(Parts([1, 2], (FIRST, MIDDLE)))
    assert hash(treedef) == hash(jax.tree.structure(Parts([1, 2], (FIRST, LAST))))
    back = jax.tree.unflatten(treedef, [3, 4])
    assert (type(back), back.values, back.subsets) == (Parts, (3, 4), (FIRST, LAST))
    assert Leaves({"w": parts}).paths == ("w", "w")
    assert repr(parts) == "Parts(2 of 6 rows: 'a', 2 of 6 rows: 'b')"


def test_parts_stand_for_one_leaf_as_a_hole_does():
    parts = Parts([1.0], (FIRST,))
    assert [is_hole_or_parts(x) for x in (parts, HOLE, X, None, {"a": parts})] == [True, True] + [
        False
    ] * 3


def test_nothing_is_cut_where_no_leaf_is_frozen_in_part():
    assert PartTable.from_flags([True, False]) is None
    assert PartTable.from_flags([]) is None


def test_a_cut_has_the_rows_that_train_of_a_leaf_frozen_in_part_and_others_whole():
    cut = PartTable.from_flags([True, FIRST, False, ODD])
    assert cut.parts == ((0, None), (1, ~FIRST), (2, None), (3, EVEN))
    assert cut.by_leaf == [[0], [1], [2], [3]]


CUT = PartTable([(0, None), (1, FIRST), (1, LAST), (2, None), (3, EVEN)])
TREE = {"a": _array(3), "b": X, "c": _array(1), "d": X[:, 0]}


def test_the_parts_of_a_leaf_stand_together():
    assert CUT.by_leaf == [[0], [1, 2], [3], [4]]


def test_cuts_are_compared_and_hashed_by_value():
    same = PartTable(
        [(0, None), (1, _rows(0, 1)), (1, _rows(4, 5)), (2, None), (3, _rows(0, 2, 4))]
    )
    assert hash(CUT) == hash(same)
    assert same == CUT
    assert PartTable([(0, FIRST)]) != PartTable([(0, LAST)])
    assert PartTable([(0, FIRST)]) != PartTable([(0, None)])
    assert PartTable([(0, FIRST)]) != ((0, FIRST),)


@pytest.mark.parametrize(
    ("frozen", "mask"),
    [
        ([False] * 5, (False, MIDDLE, False, ODD)),
        ([True] * 5, (True, True, True, True)),
        ([False, True, False, False, True], (False, ~LAST, False, True)),
        ([True, False, True, True, False], (True, ~FIRST, True, ODD)),
    ],
)
def test_the_mask_has_the_rows_of_frozen_parts_and_those_of_none(frozen, mask):
    assert CUT.mask(frozen) == mask


def test_a_leaf_whose_parts_are_all_its_rows_is_frozen_whole_or_not_at_all():
    cut = PartTable([(0, EVEN), (0, ODD)])
    assert [cut.mask(f) for f in ([False] * 2, [True] * 2, [True, False])] == [
        (False,),
        (True,),
        (EVEN,),
    ]


def _assert_same(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    leaves = [np.asarray(x).tolist() for x in jax.tree.leaves(tree)]
    assert leaves == [np.asarray(x).tolist() for x in jax.tree.leaves(expected)]


def test_split_has_the_parts_that_live_in_place_of_the_leaves():
    split = CUT.split(Leaves(TREE), [False] * 5)
    parts = Parts([X[:2], X[4:]], (FIRST, LAST))
    _assert_same(split, {"a": TREE["a"], "b": parts, "c": TREE["c"], "d": X[[0, 2, 4], 0]})
    assert split["a"] is TREE["a"]


def test_split_has_holes_in_place_of_frozen_parts():
    split = CUT.split(Leaves(TREE), [True, False, True, False, True])
    parts = Parts([X[:2], HOLE], (FIRST, LAST))
    _assert_same(split, {"a": HOLE, "b": parts, "c": TREE["c"], "d": HOLE})
    split = CUT.split(Leaves(TREE), [False, True, True, False, False])
    parts = Parts([HOLE, HOLE], (FIRST, LAST))
    _assert_same(split, {"a": TREE["a"], "b": parts, "c": TREE["c"], "d": X[[0, 2, 4], 0]})


@pytest.mark.parametrize(
    ("frozen", "live", "parts"),
    [
        ([False] * 2, [0, 1, 4, 5], [X[:2], X[4:]]),
        ([True, False], [4, 5], [HOLE, X[4:]]),
        ([False, True], [0, 1], [X[:2], HOLE]),
    ],
)
def test_split_takes_the_rows_that_train_alone_too(frozen, live, parts):
    tree = Leaves([X[live]])
    _assert_same(
        PartTable([(0, FIRST), (0, LAST)]).split(tree, frozen), [Parts(parts, (FIRST, LAST))]
    )


def test_split_keeps_holes_of_the_tree():
    split = CUT.split(Leaves({**TREE, "b": HOLE, "d": HOLE}), [False] * 5)
    parts = Parts([HOLE, HOLE], (FIRST, LAST))
    _assert_same(split, {"a": TREE["a"], "b": parts, "c": TREE["c"], "d": HOLE})


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (_array(5, 2), r"'w/b' is of shape \(5, 2\).* all 6 rows or the 4 that train"),
        (_array(2, 2), r"'w/b' is of shape \(2, 2\).* all 6 rows or the 4 that train"),
        (np.float32(1), r"'w/b' is of shape \(\).* all 6 rows or the 4 that train"),
        (1.0, r"'w/b' is of shape \(\).* all 6 rows or the 4 that train"),
    ],
)
def test_split_names_a_leaf_with_other_rows_and_its_shape(leaf, message):
    with pytest.raises(ValueError, match=message):
        PartTable([(0, FIRST), (0, LAST)]).split(Leaves({"w": {"b": leaf}}), [False, False])


def test_restore_gathers_the_values_of_each_leaf():
    a, parts, c, d = CUT.group_by_leaf(["a", "first", "last", "c", "even"])
    assert (a, c, d) == ("a", "c", "even")
    assert (parts.values, parts.subsets) == (("first", "last"), (FIRST, LAST))


def test_restore_is_the_inverse_of_split():
    split = CUT.split(Leaves(TREE), [False] * 5)
    values = jax.tree.leaves(split)
    again = CUT.group_by_leaf(values)
    assert jax.tree.structure(again) == jax.tree.structure(list(split.values()))
    assert all(a is b for a, b in zip(jax.tree.leaves(again), values, strict=True))


def test_fill_sets_the_rows_that_train_in_a_whole_leaf_or_gives_them_alone():
    live, whole = ~MIDDLE, -X
    rows = X[live.mask]
    parts = Parts([X[4:], X[:2]], (LAST, FIRST))
    expected = whole.copy()
    expected[[0, 1, 4, 5]] = X[[0, 1, 4, 5]]
    for value in (rows, parts):
        assert np.asarray(put_live(whole, live, value)).tolist() == expected.tolist()
        assert np.asarray(put_live(rows, live, value)).tolist() == rows.tolist()
