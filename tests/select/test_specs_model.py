"""Any spec on any tree, against a slow reading of paths and leaves."""

from typing import Any

import equinox as eqx
import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import freeze_optax as fo
from tests.support.random_trees import (
    COUNTED,
    HOLE,
    OTHERS,
    TRAINABLE,
    assert_equal,
    frozen,
    is_hole,
    leaves,
    rebuilt,
    trees,
    walk,
)
from tests.support.sampling import examples
from tests.support.slow_globs import STAR, STARS, Range, joined, letters
from tests.support.slow_specs import INDICES, Case, check, layers, path, selectors, specs

TREES = trees(leaves(TRAINABLE, COUNTED, OTHERS, [lambda: HOLE]))
NUMBERS = trees(leaves(TRAINABLE, COUNTED))
RANDOM = examples(120)


def marked(tree: Any, values: list[Any]) -> Any:
    """The tree with a value for each leaf; its holes stay."""
    pairs = zip(walk(tree), values, strict=True)
    return rebuilt(tree, iter([HOLE if is_hole(leaf) else value for (_, leaf), value in pairs]))


def words(tree: Any, flags: list[bool]) -> Any:
    return marked(tree, ["frozen" if flag else "trainable" for flag in frozen(tree, flags)])


@RANDOM
@given(TREES, st.data())
def test_any_selector_marks_what_a_slow_reading_of_the_paths_marks(tree, data):
    case: Case = data.draw(selectors(tree))
    check(case, tree, lambda: case.spec(tree), lambda flags: marked(tree, flags))


@RANDOM
@given(TREES, st.data())
def test_any_spec_comes_to_the_mask_of_a_slow_reading_and_to_whatever_cannot_be_trained(tree, data):
    case: Case = data.draw(specs(tree))
    check(case, tree, lambda: fo.mask(case.spec, tree), lambda f: marked(tree, frozen(tree, f)))


@RANDOM
@given(TREES, st.data())
def test_labels_say_in_words_what_a_slow_reading_says_in_flags(tree, data):
    case: Case = data.draw(specs(tree))
    check(case, tree, lambda: fo.labels(case.spec, tree), lambda flags: words(tree, flags))
    if isinstance(case.spec, fo.Selector):
        check(case, tree, lambda: case.spec.labels(tree), lambda flags: words(tree, flags))


@RANDOM
@given(NUMBERS, st.data())
def test_an_abstract_tree_comes_to_what_its_arrays_come_to(tree, data):
    case: Case = data.draw(specs(tree))
    abstract = jax.eval_shape(lambda: tree)
    check(case, tree, lambda: fo.mask(case.spec, abstract), lambda f: marked(tree, frozen(tree, f)))
    if isinstance(case.spec, fo.Selector):
        check(case, tree, lambda: case.spec(abstract), lambda flags: marked(tree, flags))


STEMS = st.sampled_from(["layer_", "layer_1x", "b", "a\nb", ""])
NUMBERED = st.builds(lambda stem, number: f"{stem}{number}", STEMS, st.integers(0, 12))
NODES = st.sampled_from([1.5, {"w": 1.5}, {"w": 3}, [len, "text"], {"f": len, "w": HOLE}, None])
STACKS = st.lists(NUMBERED, unique=True, min_size=2, max_size=7).flatmap(
    lambda names: st.fixed_dictionaries(dict.fromkeys(names, NODES))
)
RANKED = st.sampled_from(
    [
        [letters("x"), [STAR]],
        [letters("x"), [*letters("layer_"), STAR]],
        [letters("x"), [*letters("b"), Range("2", "11")]],
        [STARS, [STAR, *letters("1"), STAR]],
        [letters("x"), STARS],
    ]
).map(joined)


@RANDOM
@given(STACKS, RANKED, INDICES)
def test_layers_count_the_nodes_with_numbers_in_them_as_people_do(stack, glob, index):
    tree = {"x": stack, "y1": 0.5}
    case = layers(glob, index)
    check(case, tree, lambda: case.spec(tree), lambda flags: marked(tree, flags))


FEW = trees(leaves(TRAINABLE[:1]), st.sampled_from(["a", "b", "a\n"]), depth=4)
DEEP = st.lists(
    st.sampled_from([STARS, STARS, letters("a"), letters("b"), (STAR,), (STAR, *letters("a"))]),
    min_size=2,
    max_size=5,
).map(joined)


@RANDOM
@given(FEW, DEEP, INDICES)
def test_double_stars_reach_what_a_matcher_that_tries_everything_reaches(tree, glob, index):
    for case in (path(glob), layers(glob, index)):
        check(case, tree, lambda case=case: case.spec(tree), lambda flags: marked(tree, flags))


@RANDOM
@given(TREES)
def test_a_predicate_is_asked_once_about_each_leaf_with_its_path(tree):
    asked = []
    fo.where(lambda path, leaf: not asked.append((path, leaf)))(tree)
    expected = [(path, leaf) for path, leaf in walk(tree) if not is_hole(leaf)]
    assert [path for path, _ in asked] == [path for path, _ in expected]
    assert all(a is b for (_, a), (_, b) in zip(asked, expected, strict=True))


def spread(prefix: Any, tree: Any) -> Any:
    """What jax makes of a prefix: its value at each leaf below."""
    return jax.tree.map(lambda flag, node: jax.tree.map(lambda _: flag, node), prefix, tree)


NORM = eqx.nn.LayerNorm(2, use_weight=False, use_bias=False)
PREFIXES = {
    "nodes without leaves below one": (
        {"norm": {"bias": None, "scale": {}}, "w": 1.0},
        {"norm": {"bias": False, "scale": False}, "w": True},
    ),
    "a module without leaves": (
        {"norm": NORM, "w": 1.0},
        {"norm": jax.tree.map(lambda _: False, NORM, is_leaf=lambda x: x is None), "w": True},
    ),
    "a path of two nodes": (
        {"a": {"b": {"c": 1.0}, "d": 2.0}, "a/b": {"e": 3.0}},
        {"a": True, "a/b": False},
    ),
    "a path of a node and a leaf": (
        {"mlp": {"w": 1.0, "b": 2.0}, "mlp/w": {"b": 3.0}},
        {"mlp": {"w": False, "b": False}, "mlp/w": True},
    ),
}


@pytest.mark.parametrize(("tree", "prefix"), PREFIXES.values(), ids=PREFIXES)
def test_what_is_a_prefix_for_jax_is_one_here_and_means_the_same(tree, prefix):
    expected = spread(prefix, tree)
    assert_equal(fo.mask(prefix, tree), expected)
    labels = jax.tree.map(lambda flag: "cold" if flag else "hot", prefix)
    assert_equal(fo.labelled(labels, "cold")(tree), expected)
