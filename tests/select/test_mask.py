"""Masks and labels: what a spec comes to on a tree."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

import freeze_optax as fo
from freeze_optax._select import selector as selector_file
from freeze_optax._tree.holes import HOLE
from tests.support.sampling import cases

MIXED = {
    "body": {"count": jnp.zeros((), jnp.int32), "w": jnp.ones(2)},
    "head": [2.0, 3, np.ones(2, bool), jnp.ones(2, jnp.bfloat16)],
    "key": jax.random.key(0),
    "name": "model",
    "relu": jax.nn.relu,
    "w": 1j,
}
UNTRAINABLE = {
    "body": {"count": True, "w": False},
    "head": [False, True, True, False],
    "key": True,
    "name": True,
    "relu": True,
    "w": False,
}


@pytest.mark.parametrize(
    ("spec", "changed"),
    [
        (fo.nothing, {}),
        (False, {}),
        (lambda tree: False, {}),
        ([], {}),
        (jax.tree.map(lambda _: False, UNTRAINABLE), {}),
        ("key", {}),
        ("w", {"w": True}),
        ("body", {"body": {"count": True, "w": True}}),
        (~fo.path("key", "**/count", "name", "head", "w"), {"body": {"count": True, "w": True}}),
        (fo.everything, jax.tree.map(lambda _: True, UNTRAINABLE)),
    ],
    ids=lambda value: re.sub(r" at 0x\w+", "", str(value)),
)
def test_leaves_that_cannot_be_trained_are_frozen_whatever_the_spec_says(spec, changed):
    expected = {**UNTRAINABLE, **changed}
    assert fo.mask(spec, MIXED) == expected
    words = jax.tree.map(lambda flag: "frozen" if flag else "trainable", expected)
    assert fo.labels(spec, MIXED) == words


def test_a_selector_alone_gives_the_raw_mask_and_resolved_labels():
    nothing = jax.tree.map(lambda _: False, UNTRAINABLE)
    assert fo.nothing(MIXED) == nothing
    assert fo.path("w")(MIXED) == {**nothing, "w": True}
    words = jax.tree.map(lambda flag: "frozen" if flag else "trainable", UNTRAINABLE)
    assert fo.nothing.labels(MIXED) == words
    assert fo.path("w").labels(MIXED) == {**words, "w": "frozen"}


def test_masks_and_labels_are_python_bools_and_strings():
    assert {type(flag) for flag in jax.tree.leaves(fo.mask({"a": np.True_}, {"a": 1.0}))} == {bool}
    assert {type(label) for label in jax.tree.leaves(fo.labels(True, {"a": 1.0}))} == {str}


LINEAR = eqx.nn.Linear(2, 2, key=jax.random.key(0))


@pytest.mark.parametrize(
    "tree",
    [
        {"a": 1.0, "b": {}},
        FrozenDict({"a": (1.0, [2.0])}),
        [1.0, None, (), {"x": HOLE}],
        optax.EmptyState(),
        LINEAR,
        nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0))),
        {},
        None,
        1.0,
        HOLE,
    ],
    ids=lambda tree: type(tree).__name__,
)
def test_masks_and_labels_keep_the_structure_holes_and_none_included(tree):
    for spec in (True, False):
        assert jax.tree.structure(fo.mask(spec, tree)) == jax.tree.structure(tree)
        assert jax.tree.structure(fo.labels(spec, tree)) == jax.tree.structure(tree)


def test_an_equinox_module_gives_a_module_of_flags():
    mask = fo.mask("weight", LINEAR)
    assert isinstance(mask, eqx.nn.Linear)
    assert (mask.weight, mask.bias) == (True, False)


def test_holes_stay_whatever_the_spec_says():
    assert fo.mask(True, {"a": HOLE, "b": 1.0}) == {"a": HOLE, "b": True}
    assert fo.mask(False, {"a": HOLE, "b": 1.0}) == {"a": HOLE, "b": False}
    assert fo.labels("a", {"a": HOLE, "b": 1.0}) == {"a": HOLE, "b": "trainable"}


def test_an_abstract_tree_gives_the_same_mask():
    arrays = {name: MIXED[name] for name in ("body", "key")}
    assert fo.mask("body/w", jax.eval_shape(lambda: arrays)) == {
        "body": {"count": True, "w": True},
        "key": True,
    }


def test_masks_of_traced_params_are_settled_while_tracing():
    @jax.jit
    def frozen_sum(params):
        mask = fo.mask("a", params)
        return sum(x for x, flag in zip(params.values(), mask.values(), strict=True) if flag)

    assert frozen_sum({"a": 1.0, "b": 2.0}) == 1.0


@pytest.mark.parametrize("function", [fo.mask, fo.labels])
@pytest.mark.parametrize(
    ("spec", "error", "match"),
    [
        ("c", ValueError, "pattern 'c' selects no leaf; the tree has 'a', 'b'"),
        ({"a": True}, ValueError, "nothing for 'b' of the tree"),
        ({"a": True, "b": 1}, TypeError, "the mask at 'b' is int, not a bool"),
        (lambda tree: {"a": True, "b": "hot"}, TypeError, "the mask at 'b' is str, not a bool"),
        (lambda tree: "a", TypeError, "is str, not a bool"),
    ],
)
def test_a_spec_that_does_not_fit_is_an_error(function, spec, error, match):
    with pytest.raises(error, match=match):
        function(spec, {"a": 1.0, "b": 2.0})


class Big:
    """A hundred blocks of layers, each with ten leaves."""

    patterns = tuple(f"block_{i}/layer_*/w{i % 10}" for i in range(0, 100, 5))

    def __init__(self, layers):
        self.layers = layers

    def build(self, leaf):
        """With `leaf(block, weight)` at each path."""
        return {
            f"block_{i}": {
                f"layer_{j}": {f"w{k}": leaf(i, k) for k in range(10)} for j in range(self.layers)
            }
            for i in range(100)
        }


@pytest.fixture
def flattened(monkeypatch):
    calls = []
    original = jax.tree_util.tree_flatten_with_path

    def count(tree, *args, **kwargs):
        calls.append(type(tree))
        return original(tree, *args, **kwargs)

    monkeypatch.setattr(jax.tree_util, "tree_flatten_with_path", count)
    return calls


@pytest.mark.parametrize("layers", cases({"1,000": 1, "100,000": 100}, ["1,000"]))
def test_twenty_patterns_over_many_paths_read_the_paths_once(flattened, layers):
    big = Big(layers=layers)
    params = big.build(lambda block, weight: 1.0)
    expected = big.build(lambda block, weight: block % 5 == 0 and weight == block % 10)
    assert len(jax.tree.leaves(params)) == 1_000 * layers
    assert len(big.patterns) == 20
    assert fo.mask(list(big.patterns), params) == expected
    assert flattened == [dict]


def test_composed_selectors_share_the_paths(flattened):
    params = {"a": {"x": 1.0, "y": 2.0}, "b": {"x": 3.0, "y": 4.0}}
    spec = [
        fo.path("a") - "**/x",
        fo.regex("b/x") & ~fo.layers("*")[0],
        fo.where(lambda p, _: False),
    ]
    assert fo.mask(spec, params) == {"a": {"x": False, "y": True}, "b": {"x": True, "y": False}}
    assert flattened == [dict]


def test_a_bool_needs_no_paths(flattened):
    fo.mask(True, MIXED)
    assert flattened == []


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_each_pattern_is_matched_once_against_each_path(monkeypatch, layers):
    calls = []
    original = selector_file.compile_glob

    class Counted:
        def __init__(self, pattern):
            self.regex = original(pattern)

        def match(self, path):
            calls.append(path)
            return self.regex.match(path)

    monkeypatch.setattr(selector_file, "compile_glob", Counted)
    big = Big(layers)
    params = big.build(lambda block, weight: 1.0)
    expected = big.build(lambda block, weight: block % 5 == 0 and weight == block % 10)
    assert fo.path(*big.patterns)(params) == expected
    assert len(calls) == 20 * 100 * layers * 10
