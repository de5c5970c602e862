"""Random states with random pasts, stored and read again, against those that were never stored."""

import io
from collections.abc import Callable
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import freeze_optax as fo
from tests.support.random_trees import (
    KEY,
    KEYS,
    assert_bitwise,
    assert_very_same,
    leaves,
    rebuilt,
    trains,
    trees,
    walk,
)
from tests.support.sampling import cases, examples

SHAPES = [(), (3,), (3, 2), (0, 2)]
FLOATS = [lambda shape=shape: jnp.full(shape, 0.5, jnp.float32) for shape in SHAPES]
FLOATS += [lambda: jnp.full((3, 2), 0.5, jnp.bfloat16)]
STILL = [lambda: jnp.arange(3), lambda: jnp.array(True), lambda: KEY]
# The names of optax and of a state, and what has a meaning in JSON, in NumPy's archives, and in
# paths.
NAMES = ["mu", "nu", "count", "inner", "ages", "0", "", ".", "..", "a.npy", '"', "\\", "\n", "日本"]
HOSTILE = st.one_of(KEYS, st.sampled_from(NAMES))


def is_matrix(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, tree)


def by_rank(tree: Any) -> Any:
    return jax.tree.map(lambda x: "a" if x.ndim > 1 else "b", tree)


def accumulated() -> optax.GradientTransformation:
    return optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation()


def scheduled() -> optax.GradientTransformation:
    rate = optax.linear_schedule(0.1, 0.01, 5)
    return optax.inject_hyperparams(optax.adam)(learning_rate=rate)


def noisy() -> optax.GradientTransformation:
    return optax.chain(optax.add_noise(0.01, 0.55, key=jax.random.key(7)), optax.lion(0.01))


INNERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": lambda: optax.adam(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "clip and adamw": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)),
    "MultiSteps": accumulated,
    "inject_hyperparams": scheduled,
    "masked": lambda: optax.masked(optax.adam(0.1), is_matrix),
    "partition": lambda: optax.partition(
        {"a": optax.adam(0.1), "b": optax.sgd(0.1, momentum=0.9)}, by_rank
    ),
    "noise and lion": noisy,
    "stateless": lambda: optax.sgd(0.1),
}


def around(tx: optax.GradientTransformation, is_nested: bool) -> optax.GradientTransformation:
    schedule = optax.linear_schedule(1.0, 0.5, 5)
    return optax.chain(optax.scale_by_schedule(schedule), tx) if is_nested else tx


def grads_at(tree: Any, step: int) -> Any:
    values = [
        jnp.sin(leaf * (step + 1)) + jnp.asarray(0.1, leaf.dtype) if trains(leaf) else None
        for _, leaf in walk(tree)
    ]
    return rebuilt(tree, iter(values))


def mask_of(tree: Any, seed: int, by_rows: bool) -> Any:
    """A mask of random bools, by rows of random vectors where a leaf has rows."""
    rng = np.random.default_rng(seed)

    def flag(leaf: Any) -> Any:
        rows = leaf.shape[:1] if by_rows and trains(leaf) and leaf.size else ()
        return rng.random(rows) < 0.5 if rows else bool(rng.random() < 0.5)

    return rebuilt(tree, iter([flag(leaf) for _, leaf in walk(tree)]))


SEEDS = st.integers(0, 2**32 - 1)
VERBS = st.sampled_from(["freeze", "thaw", "set_frozen"])
EDITS = st.tuples(VERBS, SEEDS, st.booleans(), st.booleans())


def follow(tx: Any, tree: Any, state: Any, edits: list[Any]) -> tuple[Any, Any]:
    """Params and state after edits, with a step after each."""
    for verb, seed, by_rows, keep_state in edits:
        options = {} if verb == "thaw" else {"keep_state": keep_state}
        state = getattr(fo, verb)(state, tree, mask_of(tree, seed, by_rows), **options)
        updates, state = tx.update(grads_at(tree, seed % 7), state, tree)
        tree = fo.apply_updates(tree, updates, frozen=state)
    return tree, state


def train(tx: optax.GradientTransformation, tree: Any, steps: int) -> tuple[Any, Any]:
    """Params and state after some steps with everything trainable."""
    state = tx.init(tree)
    for step in range(steps):
        updates, state = tx.update(grads_at(tree, step), state, tree)
        tree = optax.apply_updates(tree, updates)
    return tree, state


def through_msgpack(exported: Any) -> Any:
    return flax.serialization.msgpack_restore(flax.serialization.msgpack_serialize(exported))


def through_numpy(exported: Any) -> Any:
    file = io.BytesIO()
    np.savez(file, **flax.traverse_util.flatten_dict(exported, sep="/"))
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        return flax.traverse_util.unflatten_dict(dict(arrays), sep="/")


def assert_plain(node: Any) -> None:
    if type(node) is dict:
        assert all(type(key) is str and key.isalnum() for key in node)
        for value in node.values():
            assert_plain(value)
    else:
        assert type(node) is np.ndarray or isinstance(node, jax.Array)
        assert node.dtype.isbuiltin == 1
        assert node.dtype.kind in "biufc"


@pytest.mark.parametrize("name", cases({x: x for x in INNERS}, set(INNERS) - {"noise and lion"}))
@examples(6)
@given(
    tree=trees(leaves(FLOATS, STILL), HOSTILE, depth=2),
    past=st.lists(EDITS, min_size=2, max_size=5),
    future=st.lists(EDITS, min_size=1, max_size=2),
    seed=SEEDS,
    is_nested=st.booleans(),
    through=st.sampled_from([through_msgpack, through_numpy]),
)
def test_a_state_comes_back_whole_and_its_run_goes_on_bitwise(
    name, tree, past, future, seed, is_nested, through
):
    assume(any(trains(leaf) for _, leaf in walk(tree)))  # else freezable would warn
    mask = mask_of(tree, seed, True)
    # Without compiling for each plan; optax mixes floats with integer counters.
    with jax.disable_jit(), jax.numpy_dtype_promotion("standard"):
        tx = around(fo.freezable(INNERS[name]()), is_nested)
        tree, state = follow(tx, tree, tx.init(tree), past)
        exported = fo.export_state(state)
        assert_plain(exported)
        stored = through(exported)

        again = around(fo.freezable(INNERS[name](), mask), is_nested)
        restored = fo.import_state(again, tree, stored)
        assert_bitwise(restored, state)
        moved = fo.import_state(again, tree, stored, frozen=mask)
        assert_bitwise(moved, fo.set_frozen(state, tree, mask))
        assert_bitwise(follow(again, tree, restored, future), follow(tx, tree, state, future))


@pytest.mark.parametrize("name", INNERS)
@examples(5)
@given(tree=trees(leaves(FLOATS), HOSTILE, depth=2), steps=st.integers(0, 3), seed=SEEDS)
def test_adopt_and_release_are_inverse_where_everything_trains(name, tree, steps, seed):
    assume(list(walk(tree)))  # else freezable would warn
    inner = INNERS[name]()
    adopting, whole = fo.freezable(inner, mask_of(tree, seed, True)), fo.freezable(INNERS[name]())
    with jax.disable_jit(), jax.numpy_dtype_promotion("standard"):
        trained, plain = train(inner, tree, steps)
        adopted = fo.adopt(adopting, plain, trained)
        assert_very_same(fo.release(adopted, trained), plain)

        again, state = train(whole, tree, steps)
        assert_bitwise((again, state), (trained, adopted))
        assert_very_same(fo.adopt(adopting, fo.release(state, again), again), state)


HALF = {"w": jnp.ones(2, jnp.bfloat16), "v": jnp.ones((3, 2), jnp.bfloat16)}
MIXED = {"w": jnp.ones(2, jnp.bfloat16), "v": jnp.ones(2)}


def widened(tx: Any) -> Any:
    grads = jax.tree.map(lambda x: x.astype(jnp.float32), HALF)
    return HALF, tx.update(grads, tx.init(HALF), HALF)[1]


def updated(tx: Any) -> Any:
    return MIXED, tx.update(MIXED, tx.init(MIXED), MIXED)[1]


def narrowed(tx: Any) -> Any:
    return MIXED, fo.freeze(tx.init(MIXED), MIXED, "v")


# Moments get the dtype of the gradients, and hyperparameters the widest of what trains.
DTYPES = {
    "gradients wider than params": (INNERS["adam"], widened),
    "hyperparams wider than params": (INNERS["inject_hyperparams"], updated),
    "hyperparams of params frozen since": (INNERS["inject_hyperparams"], narrowed),
}


@pytest.mark.parametrize(("make", "run"), DTYPES.values(), ids=DTYPES)
def test_a_state_of_other_dtypes_than_init_gives_comes_back_whole(make, run):
    with jax.numpy_dtype_promotion("standard"):
        tree, state = run(fo.freezable(make()))
        stored = through_numpy(fo.export_state(state))
        assert_bitwise(fo.import_state(fo.freezable(make()), tree, stored), state)
