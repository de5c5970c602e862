import typing

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from hypothesis import given
from hypothesis import strategies as st

import freeze_optax as fo
from freeze_optax._tree.leaves import Leaves
from tests.support.sampling import examples

HOLE = optax.MaskedNode()


class Pair(typing.NamedTuple):
    kernel: typing.Any
    bias: typing.Any


class Block(eqx.Module):
    kernel: typing.Any
    bias: typing.Any
    width: int = eqx.field(static=True, default=2)


def _is_hole(x):
    return isinstance(x, optax.MaskedNode)


def _flatten(tree):
    return jax.tree.flatten(tree, is_leaf=_is_hole)


def _assert_very_same(tree, expected):
    """The same structure and the very same leaves; one hole is as good as another."""
    values, treedef = _flatten(tree)
    others, other_treedef = _flatten(expected)
    assert treedef == other_treedef
    for a, b in zip(values, others, strict=True):
        assert a is b or (_is_hole(a) and _is_hole(b))


# Each with its flags written out, leaf by leaf in flattening order.
TREES = {
    "dict": ({"a": 1.0, "b": {"c": jnp.ones(2), "d": 2.0}}, "b/c", [False, True, False]),
    "list": ([1.0, [2.0, 3.0]], "1", [False, True, True]),
    "tuple": ((1.0, (2.0,)), "0", [True, False]),
    "namedtuple": (Pair(1.0, {"x": 2.0}), "bias", [False, True]),
    "equinox": (Block(jnp.ones((2, 2)), None), "kernel", [True]),
    "frozendict": (FrozenDict({"a": {"b": 1.0}, "c": 2.0}), "a", [True, False]),
    "nnx": (
        nnx.State({"a": nnx.Param(jnp.ones(2)), "b": nnx.Param(jnp.ones(3))}),
        "a",
        [True, False],
    ),
    "none nodes": ({"a": None, "b": 1.0, "c": (None, 2.0)}, "b", [True, False]),
    "empty nodes": ({"a": {}, "b": 1.0, "c": []}, "b", [True]),
    "bare leaf": (1.0, True, [True]),
    "no leaf": ({}, fo.everything, []),
    "untrainable": (
        {"f": len, "i": 3, "k": jax.random.key(0), "n": np.ones(2), "s": "x", "w": 1.0},
        fo.nothing,
        [True, True, True, False, True, False],
    ),
}


@pytest.mark.parametrize(("tree", "spec", "flags"), TREES.values(), ids=TREES)
def test_partition_gives_each_leaf_to_one_side_and_a_hole_to_the_other(tree, spec, flags):
    trainable, rest = fo.partition(tree, spec)
    values, treedef = jax.tree.flatten(tree)
    both = list(zip(values, flags, strict=True))
    _assert_very_same(trainable, treedef.unflatten([HOLE if f else x for x, f in both]))
    _assert_very_same(rest, treedef.unflatten([x if f else HOLE for x, f in both]))


@pytest.mark.parametrize(("tree", "spec", "flags"), TREES.values(), ids=TREES)
def test_merge_gives_back_the_very_leaves_that_partition_split(tree, spec, flags):
    _assert_very_same(fo.merge(*fo.partition(tree, spec)), tree)


LEAVES = st.one_of(
    st.floats(allow_nan=True),
    st.integers(),
    st.text(max_size=3),
    st.builds(lambda n: np.zeros(n, np.float32), st.integers(0, 3)),
    st.builds(lambda n: np.zeros(n, np.int8), st.integers(0, 3)),
    st.builds(object),
)
KEYS = st.text("ab/.'[", max_size=3)
RANDOM_TREES = st.recursive(
    LEAVES | st.none(),
    lambda nodes: st.one_of(
        st.dictionaries(KEYS, nodes, max_size=4),
        st.lists(nodes, max_size=4),
        st.lists(nodes, max_size=4).map(tuple),
        st.builds(Pair, nodes, nodes),
    ),
    max_leaves=12,
)


def _floats(x):
    return isinstance(x, float) or (isinstance(x, np.ndarray) and x.dtype == np.float32)


@examples(150)
@given(RANDOM_TREES, st.data())
def test_any_tree_is_split_as_its_mask_says_and_merged_again(tree, data):
    values, treedef = jax.tree.flatten(tree)
    flags = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    trainable, rest = fo.partition(tree, treedef.unflatten(flags))
    stays = [flag or not _floats(x) for flag, x in zip(flags, values, strict=True)]
    both = list(zip(values, stays, strict=True))
    _assert_very_same(trainable, treedef.unflatten([HOLE if f else x for x, f in both]))
    _assert_very_same(rest, treedef.unflatten([x if f else HOLE for x, f in both]))
    _assert_very_same(fo.merge(trainable, rest), tree)


def test_a_hole_on_both_sides_stays_a_hole():
    trainable, rest = fo.partition({"a": HOLE, "b": 1.0, "c": 2.0}, "b")
    _assert_very_same(fo.merge(trainable, rest), {"a": HOLE, "b": 1.0, "c": 2.0})


def test_the_two_parts_are_plain_optax_trees_without_leaves_at_holes():
    trainable, rest = fo.partition({"a": 1.0, "b": 2.0, "c": 3}, "a")
    assert (jax.tree.leaves(trainable), jax.tree.leaves(rest)) == ([2.0], [1.0, 3])


def test_partition_and_merge_work_on_abstract_trees_and_under_jit():
    params = {"a": jnp.arange(3.0), "b": jnp.ones(2), "n": jnp.arange(2)}

    @jax.jit
    def double_trainable(params):
        trainable, rest = fo.partition(params, "a")
        return fo.merge(jax.tree.map(lambda x: x * 2, trainable), rest)

    expected = {"a": [0.0, 1.0, 2.0], "b": [2.0, 2.0], "n": [0, 1]}
    assert jax.tree.map(lambda x: x.tolist(), double_trainable(params)) == expected

    abstract = jax.eval_shape(lambda: params)
    _assert_very_same(fo.merge(*fo.partition(abstract, "a")), abstract)


@pytest.mark.parametrize(
    ("trainable", "rest", "message"),
    [
        ({"a": 1.0}, {"b": 1.0}, r"only in `trainable`: 'a'; only in `rest`: 'b'"),
        ({"a": {"b": 1.0}}, {"a": {"b": HOLE, "c": 1.0}}, r"trees: only in `rest`: 'a/c'"),
        ({"a": [1.0]}, {"a": (HOLE,)}, r"different trees: the same paths, in other containers"),
        ({"a": {"b": 1.0}, "c": HOLE}, {"a": {"b": 2.0}, "c": 3.0}, r"both .* leaf at 'a/b';"),
        ({"a": 1.0, "b": 2.0}, {"a": 3, "b": "x"}, r"both parts have a leaf at 'a', 'b'"),
    ],
)
def test_merge_names_the_paths_where_the_parts_do_not_fit(trainable, rest, message):
    with pytest.raises(ValueError, match=message):
        fo.merge(trainable, rest)


def test_merge_of_parts_that_fit_makes_no_path_text(monkeypatch):
    def paths(_):
        raise AssertionError("paths were looked at")

    trainable, rest = fo.partition({"a": jnp.ones(2), "b": jnp.ones(2)}, "a")
    monkeypatch.setattr(Leaves, "paths", property(paths))
    assert set(fo.merge(trainable, rest)) == {"a", "b"}


def test_partition_with_a_spec_that_selects_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"'encodr' selects no leaf; nearest: 'encoder'"):
        fo.partition({"encoder": 1.0}, "encodr")


OLD = {"bn": {"mean": jnp.zeros(2), "steps": jnp.asarray(1)}, "key": "old", "scale": 1.0}
NEW = {"bn": {"mean": jnp.ones(2), "steps": jnp.asarray(2)}, "key": "new", "scale": 2.0}


@pytest.mark.parametrize(
    ("where", "held"),
    [
        (fo.nothing, [False, False, False, False]),
        (fo.everything, [True, True, True, True]),
        ("bn/mean", [True, False, False, False]),
        ("bn", [True, True, False, False]),
        (["key", "bn/steps"], [False, True, True, False]),
        ({"bn": False, "key": True, "scale": False}, [False, False, True, False]),
        (lambda tree: jax.tree.map(lambda x: isinstance(x, float), tree), [False] * 3 + [True]),
    ],
    ids=["nothing", "everything", "leaf", "subtree", "union", "prefix mask", "function"],
)
def test_hold_takes_just_what_the_spec_selects_from_old_integers_too(where, held):
    old, treedef = jax.tree.flatten(OLD)
    new = jax.tree.leaves(NEW)
    triples = zip(old, new, held, strict=True)
    expected = treedef.unflatten([o if flag else n for o, n, flag in triples])
    _assert_very_same(fo.hold(NEW, OLD, where), expected)


def test_hold_keeps_batch_statistics_inside_a_jitted_step():
    @jax.jit
    def step(stats):
        moved = jax.tree.map(lambda x: x + jnp.ones_like(x), stats)
        return fo.hold(moved, stats, "bn/mean")

    new = step({"bn": OLD["bn"]})
    assert jax.tree.map(lambda x: x.tolist(), new) == {"bn": {"mean": [0.0, 0.0], "steps": 2}}


@pytest.mark.parametrize(
    ("new", "old", "where", "message"),
    [
        ({"a": 1.0}, {"b": 1.0}, "a", r"only in `new`: 'a'; only in `old`: 'b'"),
        ({"a": 1.0, "b": 2.0}, {"a": 1.0}, "a", r"different trees: only in `new`: 'b'"),
        ({"a": [1.0]}, {"a": (1.0,)}, "a", r"different trees: the same paths"),
        ({"a": 1.0}, {"a": 2.0}, "b", r"pattern 'b' selects no leaf"),
        ({"a": 1.0}, {"a": 2.0}, {"b": True}, r"the mask does not fit .* nothing for 'a'"),
    ],
)
def test_hold_names_what_does_not_fit(new, old, where, message):
    with pytest.raises(ValueError, match=message):
        fo.hold(new, old, where)


class Norm(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))


def test_holding_live_variables_is_an_error_that_says_to_keep_a_copy():
    model = Norm()
    old = nnx.state(model, nnx.BatchStat)
    kept = jax.tree.map(jnp.copy, old)
    model.norm(jnp.ones((3, 2)))
    new = nnx.state(model, nnx.BatchStat)
    with pytest.raises(ValueError, match=r"same Variables.*keep a copy"):
        fo.hold(new, old, True)
    assert fo.hold(new, old, fo.nothing)["norm"]["mean"] is not None
    nnx.update(model, fo.hold(new, kept, "norm/mean"))
    np.testing.assert_array_equal(model.norm.mean[...], np.zeros(2))
    np.testing.assert_allclose(model.norm.var[...], np.full(2, 0.99), rtol=1e-6)
