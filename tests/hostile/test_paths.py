"""Paths that several leaves go by, and paths with components that are empty."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict

import freeze_optax as fo

pytestmark = pytest.mark.usefixtures("standard_promotion")

PARAMS = {"a/b": jnp.ones(2), "a": {"b": jnp.ones(3)}, "c": jnp.ones(4)}
INNER, OUTER = (
    {"a/b": False, "a": {"b": True}, "c": False},
    {"a/b": True, "a": {"b": False}, "c": False},
)


def backwards(tree: Any) -> Any:
    """The same in an OrderedDict, the last first."""
    return OrderedDict((key, tree[key]) for key in sorted(tree, reverse=True))


def optimizer(frozen: Any) -> optax.GradientTransformationExtraArgs:
    return fo.freezable(optax.sgd(0.5, momentum=0.9), frozen)


def trace_of(state: Any) -> Any:
    return optax.tree_utils.tree_get(state, "trace")


def shapes(tree: Any) -> list[Any]:
    flat = [tree["a"]["b"], tree["a/b"], tree["c"]]
    return [getattr(x, "shape", None) for x in flat]


def flags(mask: Any) -> list[Any]:
    return [mask["a"]["b"], mask["a/b"], mask["c"]]


def test_a_pattern_selects_every_leaf_of_the_path():
    assert fo.mask("a/b", PARAMS) == {"a/b": True, "a": {"b": True}, "c": False}
    assert fo.mask("a", PARAMS) == fo.mask("a/b", PARAMS)
    assert fo.mask(fo.regex("a/b"), PARAMS) == fo.mask("a/b", PARAMS)
    assert fo.mask(fo.layers("a/*")[0], PARAMS) == fo.mask("a/b", PARAMS)
    assert fo.mask({"a": True, "c": False}, PARAMS) == fo.mask("a/b", PARAMS)


@pytest.mark.parametrize("mask", [INNER, OUTER])
def test_a_mask_like_the_params_tells_them_apart_all_the_way(mask):
    tx = optimizer(mask)
    state = tx.init(PARAMS)
    assert fo.mask(state, PARAMS) == mask
    assert fo.labels(state, PARAMS)["a/b"] == ("frozen" if mask["a/b"] else "trainable")
    updates, state = tx.update(PARAMS, state, PARAMS)
    moved = fo.apply_updates(PARAMS, updates, state)
    for key, flag in (("a/b", mask["a/b"]), ("a", mask["a"]["b"])):
        new, old = (tree[key] if key == "a/b" else tree[key]["b"] for tree in (moved, PARAMS))
        assert (new is old) is flag
    back = fo.import_state(tx, PARAMS, fo.export_state(state))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert shapes(trace_of(back)) == shapes(trace_of(state))
    thawed = fo.thaw(state, PARAMS, "a/b")
    assert shapes(trace_of(thawed)) == [(3,), (2,), (4,)]
    assert shapes(trace_of(fo.release(state, PARAMS))) == [(3,), (2,), (4,)]
    assert fo.mask(fo.set_frozen(thawed, PARAMS, mask), PARAMS) == mask
    trainable, rest = fo.partition(PARAMS, mask)
    assert fo.merge(trainable, rest)["a"]["b"] is PARAMS["a"]["b"]


def state_of(mask: Any) -> Any:
    return optimizer(mask).init(PARAMS)


def labels_of(mask: Any) -> Any:
    return jax.tree.map(lambda flag: "cold" if flag else "hot", mask)


def not_(mask: Any) -> Any:
    return jax.tree.map(lambda flag: not flag, mask)


def imported(mask: Any, params: Any) -> Any:
    return fo.import_state(optimizer(fo.nothing), params, fo.export_state(state_of(mask)))


def loss(tree: Any) -> Any:
    return tree["a"]["b"].sum() + tree["a/b"].sum() + tree["c"].sum()


# What is asked with one of the trees in another container; of the mask, or of what it leaves.
FLAGS = {
    "a mask": lambda mask, other: fo.mask(other(mask), PARAMS),
    "of other params": lambda mask, other: fo.mask(mask, other(PARAMS)),
    "labels": lambda mask, other: fo.mask(fo.labelled(other(labels_of(mask)), "cold"), PARAMS),
    "a state": lambda mask, other: fo.mask(state_of(mask), other(PARAMS)),
    "freeze": lambda mask, other: fo.mask(
        fo.freeze(state_of(fo.nothing), other(PARAMS), other(mask)), PARAMS
    ),
    "thaw": lambda mask, other: fo.mask(
        fo.thaw(state_of("a"), other(PARAMS), other(not_(mask))), PARAMS
    ),
    "set_frozen": lambda mask, other: fo.mask(
        fo.set_frozen(state_of(fo.nothing), other(PARAMS), other(mask)), PARAMS
    ),
    "import_state": lambda mask, other: fo.mask(imported(mask, other(PARAMS)), PARAMS),
    "grad": lambda mask, other: jax.tree.map(
        lambda x: not x.any(), fo.grad(loss, state_of(mask))(other(PARAMS))
    ),
}
SHAPES = {
    "thaw": lambda mask, other: fo.thaw(state_of(mask), other(PARAMS), "a/b"),
    "set_frozen": lambda mask, other: fo.set_frozen(state_of(mask), other(PARAMS), fo.nothing),
    "release": lambda mask, other: fo.release(state_of(mask), other(PARAMS)),
}
COUNTS = {
    "summary": lambda mask, other: fo.summary(other(PARAMS), state_of(mask)).trainable,
    "its bytes": lambda mask, other: fo.summary(other(PARAMS), state_of(mask)).state_bytes // 4,
}


def right_or_named(call: Callable[[], Any], expected: Any) -> None:
    """Whether it gives what is right, or refuses to guess with an error that names the path."""
    try:
        found = call()
    except ValueError as error:
        is_named = "a/b" in str(error) or "another order" in str(error)
        found = expected if is_named else error
    assert found == expected


MASKS = pytest.mark.parametrize("mask", [INNER, OUTER], ids=["inner", "outer"])
OTHER = pytest.mark.parametrize("other", [FrozenDict, OrderedDict, backwards])


@MASKS
@OTHER
@pytest.mark.parametrize("name", FLAGS)
def test_in_another_container_no_leaf_is_taken_for_another_of_its_path(name, other, mask):
    right_or_named(lambda: flags(FLAGS[name](mask, other)), flags(mask))


@MASKS
@OTHER
@pytest.mark.parametrize("name", SHAPES)
def test_in_another_container_no_leaf_gets_the_moments_of_another_of_its_path(name, other, mask):
    right_or_named(lambda: shapes(trace_of(SHAPES[name](mask, other))), [(3,), (2,), (4,)])


@MASKS
@OTHER
@pytest.mark.parametrize("name", COUNTS)
def test_in_another_container_no_leaf_is_counted_as_another_of_its_path(name, other, mask):
    right_or_named(lambda: COUNTS[name](mask, other), 6 if mask is INNER else 7)


@pytest.mark.parametrize("key", [1, True, 1.5, b"x", ("a", 1)])
def test_a_key_and_its_text_side_by_side_are_two_leaves_of_one_path(key):
    params = OrderedDict([(key, jnp.ones(2)), (str(key), jnp.ones(3))])
    assert list(fo.mask(fo.everything - fo.regex("x|.*"), params).values()) == [False, False]
    state = optimizer(OrderedDict([(key, True), (str(key), False)])).init(params)
    assert list(fo.mask(state, params).values()) == [True, False]
    assert [getattr(x, "shape", None) for x in trace_of(state).values()] == [None, (3,)]
    thawed = fo.thaw(state, params, True)
    assert [x.shape for x in trace_of(thawed).values()] == [(2,), (3,)]


def test_what_needs_one_leaf_for_a_path_names_it():
    with pytest.raises(ValueError, match="which of 2 leaves at 'a/b' is meant"):
        fo.assign(PARAMS, {"c": 0.0, "a/b": 0.0})
    with pytest.raises(ValueError, match="which of 2 leaves at 'a/b' is meant"):
        fo.tie(optax.sgd(0.1), ("c", "a/b")).init(PARAMS)
    shared = {"a/b": PARAMS["c"], "a": {"b": PARAMS["c"]}}
    groups = fo.tied_paths(shared)
    assert groups == [("a/b", "a/b")]
    with pytest.raises(ValueError, match=r"'a/b' is in the groups of fo\.tie more than once"):
        fo.tie(optax.sgd(0.1), *groups)
    with pytest.raises(ValueError, match=r"'a/b' would be frozen and 'a/b' trained"):
        fo.freezable(optax.sgd(0.1), {"a/b": True, "a": {"b": False}}).init(shared)


# Components that are empty are quoted, as the path of the root is empty too.

EMPTY = {"": jnp.ones(2), "a": jnp.ones(3)}
BELOW = {"": {"": jnp.ones(2), "w": jnp.ones(2)}, "a": jnp.ones(3)}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("''", {"": True, "a": False}),
        ("a", {"": False, "a": True}),
        ("*", {"": True, "a": True}),
        (fo.regex("''"), {"": True, "a": False}),
        (fo.layers("''")[:], {"": True, "a": False}),
        (fo.layers("*")[0], {"": True, "a": False}),
        (fo.layers("*")[-1], {"": False, "a": True}),
        ({"": True, "a": False}, {"": True, "a": False}),
        (OrderedDict([("", True), ("a", False)]), {"": True, "a": False}),
        (OrderedDict([("a", True), ("", False)]), {"": False, "a": True}),
        (fo.labelled(OrderedDict([("", "x"), ("a", "y")]), "x"), {"": True, "a": False}),
    ],
    ids=repr,
)
def test_an_empty_key_is_a_key_like_any_other(spec, expected):
    assert fo.mask(spec, EMPTY) == expected


@pytest.mark.parametrize(
    ("spec", "selected"),
    [
        ("''", ["", "w"]),
        ("''/''", [""]),
        ("''/w", ["w"]),
        ("*/*", ["", "w"]),
        ("*/w", ["w"]),
        (fo.layers("*")[0], ["", "w"]),
        (fo.layers("*/*")[0], [""]),
        ({"": True, "a": False}, ["", "w"]),
    ],
    ids=repr,
)
def test_a_node_at_an_empty_key_is_a_node_like_any_other(spec, selected):
    mask = fo.mask(spec, BELOW)
    assert mask == {"": {name: name in selected for name in ("", "w")}, "a": False}


@pytest.mark.parametrize("params", [EMPTY, BELOW], ids=["a leaf", "a node"])
@pytest.mark.parametrize("container", [dict, OrderedDict])
def test_a_mask_for_an_empty_key_alone_lacks_the_other_keys(params, container):
    with pytest.raises(ValueError, match="nothing for 'a' of the tree"):
        fo.mask(container({"": True}), params)


@pytest.mark.parametrize(
    "spec",
    [
        fo.of_type(eqx.nn.LayerNorm),
        fo.of_type(eqx.nn.LayerNorm, fields=("weight", "bias")),
        fo.by_module(lambda module, path: True),
        fo.by_module(lambda module, path: ("weight", "bias")),
    ],
    ids=repr,
)
def test_a_module_at_an_empty_key_is_not_the_whole_tree(spec):
    params = {"": eqx.nn.LayerNorm(2), "a": jnp.ones(3)}
    mask = fo.mask(spec, params)
    assert (mask[""].weight, mask[""].bias, mask["a"]) == (True, True, False)


def test_leaves_at_empty_keys_train_and_come_back():
    tx, bare = optimizer(fo.path("''/w", "a")), optax.sgd(0.5, momentum=0.9)
    updates, state = tx.update(BELOW, tx.init(BELOW), BELOW)
    expected, _ = bare.update(BELOW[""][""], bare.init(BELOW[""][""]), BELOW[""][""])
    np.testing.assert_array_equal(updates[""][""], expected)
    np.testing.assert_array_equal(updates[""]["w"], jnp.zeros(2))
    back = fo.import_state(tx, BELOW, fo.export_state(state))
    assert fo.mask(back, BELOW) == fo.mask(state, BELOW)
    assert fo.assign(BELOW, {"''/''": 7.0, "''/w": 8.0})[""]["w"].tolist() == [8.0, 8.0]
    assert {row.path for row in fo.summary(BELOW, depth=2).rows} == {"''", "''/''", "''/w", "a"}


ONE, TWO = FrozenDict({"a": {"b": 1.0}}), FrozenDict({"a": {"b": 1.0}, "a/b": 2.0})


@pytest.mark.parametrize(
    ("mask", "tree"),
    [
        ({"a": {"b": True}, "a/b": False}, TWO),
        ({"a": {"b": True}}, TWO),
        ({"a": {"b": True}, "a/b": False}, ONE),
    ],
    ids=["in both", "in the params", "in the mask"],
)
def test_a_mask_of_other_containers_cannot_tell_them_apart(mask, tree):
    with pytest.raises(
        ValueError, match=r"two leaves have the path 'a/b', .* with the mask, whose"
    ):
        fo.mask(mask, tree)
