"""Splitting, holding, updating and differentiating any tree, against trees split by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import given
from hypothesis import strategies as st

import freeze_optax as fo
from tests.support.random_trees import (
    COUNTED,
    HOLE,
    OTHERS,
    TRAINABLE,
    assert_bitwise,
    assert_very_same,
    frozen,
    is_hole,
    leaves,
    pairs,
    rebuilt,
    trains,
    trees,
    walk,
)
from tests.support.sampling import examples
from tests.support.slow_specs import Case, check, specs

TREES = trees(leaves(TRAINABLE, COUNTED, OTHERS, [lambda: HOLE]))
ARRAYS = trees(leaves([make for make in TRAINABLE if hasattr(make(), "shape")], COUNTED[2:]))


def values_of(tree: Any) -> list[Any]:
    return [leaf for _, leaf in walk(tree)]


def split(tree: Any, flags: list[bool]) -> tuple[Any, Any]:
    """What trains and the rest, by hand."""
    both = list(zip(values_of(tree), frozen(tree, flags), strict=True))
    trainable = rebuilt(tree, iter([HOLE if still else leaf for leaf, still in both]))
    return trainable, rebuilt(tree, iter([leaf if still else HOLE for leaf, still in both]))


@examples(100)
@given(TREES, st.data())
def test_each_leaf_is_on_one_side_with_a_hole_on_the_other_and_merged_into_the_very_tree(
    tree, data
):
    case: Case = data.draw(specs(tree))

    def compare(parts: Any, expected: Any) -> None:
        assert_very_same(parts, expected)
        assert_very_same(fo.merge(*parts), tree)

    check(case, tree, lambda: fo.partition(tree, case.spec), lambda f: split(tree, f), compare)


@examples(100)
@given(TREES, st.data())
def test_hold_takes_the_very_leaves_of_old_that_the_spec_selects_and_no_other(new, data):
    case: Case = data.draw(specs(new))
    before = [HOLE if is_hole(leaf) else object() for leaf in values_of(new)]
    old = rebuilt(new, iter(before))

    def expected(flags: list[bool]) -> Any:
        triples = zip(values_of(new), before, flags, strict=True)
        return rebuilt(new, iter([b if flag else a for a, b, flag in triples]))

    check(case, new, lambda: fo.hold(new, old, case.spec), expected, assert_very_same)


def moved(leaf: Any) -> Any:
    """An update that a trainable leaf may get."""
    return np.asarray(leaf) * np.asarray(0.5).astype(np.asarray(leaf).dtype)


RUBBISH = [HOLE, None, np.float32("nan"), object(), np.ones(99, np.int8)]


@examples(100)
@given(TREES, st.data())
def test_updates_move_what_trains_as_optax_does_and_return_the_very_rest(tree, data):
    case: Case = data.draw(specs(tree))
    flags, _ = case.find(list(walk(tree)))
    still = frozen(tree, flags)
    updates = [
        data.draw(st.sampled_from(RUBBISH if flag else [*[moved(leaf)] * 3, HOLE, None]))
        for leaf, flag in zip(values_of(tree), still, strict=True)
    ]

    def expected(flags: list[bool]) -> Any:
        triples = zip(values_of(tree), updates, still, strict=True)
        new = [
            leaf if flag or update is None or is_hole(update) else optax.apply_updates(leaf, update)
            for leaf, update, flag in triples
        ]
        return rebuilt(tree, iter(new))

    def compare(new: Any, expected: Any) -> None:
        both = zip(pairs(new, expected), pairs(tree, expected), strict=True)
        for (leaf, wanted), (old, _) in both:
            assert leaf is wanted or (wanted is not old and assert_bitwise(leaf, wanted) is None)

    given_updates = rebuilt(tree, iter(updates))
    apply = lambda: fo.apply_updates(tree, given_updates, frozen=case.spec)  # noqa: E731
    check(case, tree, apply, expected, compare)


def number(leaf: Any) -> jax.Array:
    """A float32 that depends on a leaf of any kind."""
    if isinstance(leaf, str) or callable(leaf) or is_hole(leaf) or type(leaf) is object:
        return jnp.float32(0.5)
    if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.uniform(leaf)
    return jnp.sum(jnp.sin(jnp.real(jnp.asarray(leaf)).astype(jnp.float32)))


def loss(tree: Any) -> jax.Array:
    """Every two neighbors are multiplied, so that a gradient depends on what is frozen too."""
    numbers = [number(leaf) for leaf in values_of(tree)]
    products = [a * b for a, b in zip(numbers, [jnp.float32(2), *numbers], strict=False)]
    return sum(products, jnp.float32(0))


def by_hand(tree: Any, flags: list[bool], holes: bool) -> tuple[Any, Any]:
    """The value, and the gradient with zeros or holes at what is frozen."""
    still, values = frozen(tree, flags), values_of(tree)
    live = [leaf for leaf, flag in zip(values, still, strict=True) if not flag]

    def of_live(live: list[Any]) -> Any:
        rest = iter(live)
        both = zip(values, still, strict=True)
        return loss(rebuilt(tree, iter([leaf if flag else next(rest) for leaf, flag in both])))

    value, grads = jax.value_and_grad(of_live)(live) if live else (loss(tree), [])
    moving = iter(grads)
    both = zip(values, still, strict=True)
    gradient = [
        next(moving) if not flag else HOLE if holes or is_hole(leaf) else zeros(leaf)
        for leaf, flag in both
    ]
    return value, rebuilt(tree, iter(gradient))


def zeros(leaf: Any) -> np.ndarray:
    dtype = str(getattr(leaf, "dtype", type(leaf).__name__))
    has_numbers = trains(leaf) or dtype.startswith(("int", "uint", "bool"))
    shape = np.shape(leaf) if hasattr(leaf, "dtype") else ()
    return np.zeros(shape, jnp.asarray(leaf).dtype if has_numbers else np.float32)


@examples(40)
@given(TREES, st.data(), st.booleans())
def test_gradients_are_those_of_a_function_split_by_hand(tree, data, holes):
    case: Case = data.draw(specs(tree))
    seen = []

    def recorded(tree: Any) -> Any:
        seen.append(tree)
        return loss(tree), len(seen)

    def resolve() -> Any:
        grad = fo.value_and_grad(recorded, frozen=case.spec, has_aux=True, holes=holes)
        (value, aux), grads = grad(tree)
        assert aux == 1
        return value, grads

    def compare(got: Any, expected: Any) -> None:
        assert_bitwise(got, expected)
        flags, _ = case.find(list(walk(tree)))
        assert_very_same(split(seen[0], flags)[1], split(tree, flags)[1])

    check(case, tree, resolve, lambda flags: by_hand(tree, flags, holes), compare)


@examples(40)
@given(TREES, st.data())
def test_gradients_of_the_trainable_part_are_those_with_holes(tree, data):
    case: Case = data.draw(specs(tree))

    def resolve() -> Any:
        trainable, rest = fo.partition(tree, case.spec)
        return jax.value_and_grad(lambda part: loss(fo.merge(part, rest)))(trainable)

    def compare(got: Any, expected: Any) -> None:
        assert_bitwise(got, expected)
        assert_bitwise(fo.grad(loss, frozen=case.spec, holes=True)(tree), expected[1])

    check(case, tree, resolve, lambda flags: by_hand(tree, flags, True), compare)


@examples(10)
@given(ARRAYS, st.data(), st.booleans())
def test_gradients_under_jit_are_those_of_a_jitted_function_split_by_hand(tree, data, holes):
    case: Case = data.draw(specs(tree))
    grad = jax.jit(fo.value_and_grad(loss, frozen=case.spec, holes=holes))
    check(
        case,
        tree,
        lambda: grad(tree),
        lambda flags: jax.jit(lambda tree: by_hand(tree, flags, holes))(tree),
        assert_bitwise,
    )
