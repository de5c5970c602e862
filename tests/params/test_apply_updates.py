import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import freeze_optax as fo

HOLE = optax.MaskedNode()
FLOAT0 = np.zeros((), jax.dtypes.float0)


def _bits(tree):
    return jax.tree.map(lambda x: (str(x.dtype), x.shape, np.asarray(x).tobytes()), tree)


def _assert_very_same(tree, expected):
    values, treedef = jax.tree.flatten(tree)
    assert treedef == jax.tree.structure(expected)
    assert [id(x) for x in values] == [id(x) for x in jax.tree.leaves(expected)]


def _random(dtype, shape, seed):
    numbers = np.random.default_rng(seed).normal(size=(*shape, 2)).astype(np.float32)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jnp.asarray(numbers.view(np.complex64).reshape(shape))
    return jnp.asarray(numbers[..., 0].astype(dtype))


DTYPES = [
    np.float32,
    np.float16,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
    np.complex64,
]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_trainable_leaves_become_bitwise_what_optax_makes_of_them(compiled):
    wrap = jax.jit if compiled else lambda f: f
    params = {np.dtype(d).name: _random(d, (3, 5), i) for i, d in enumerate(DTYPES)}
    updates = {np.dtype(d).name: _random(d, (3, 5), 50 + i) for i, d in enumerate(DTYPES)}
    expected = wrap(optax.apply_updates)(params, updates)
    assert _bits(wrap(fo.apply_updates)(params, updates)) == _bits(expected)

    # With a neighbour frozen, they are the same still.
    expected |= {"float16": params["float16"]}
    ours = wrap(functools.partial(fo.apply_updates, frozen="float16"))(params, updates)
    assert _bits(ours) == _bits(expected)


@pytest.mark.parametrize(
    ("param", "update"),
    [
        (2.0, jnp.asarray(0.5)),
        (2.0, 0.5),
        (np.float32(2.0), jnp.asarray(0.5)),
        (np.ones(3, np.float16), np.full(3, 0.5, np.float16)),
        (np.ones(3, np.float32), jnp.full(3, 0.5)),
        (jnp.ones(3, jnp.bfloat16), 0.5),
        (1 + 2j, jnp.asarray(0.5j)),
        (jnp.ones((2, 3)), jnp.ones(3)),
    ],
    ids=[
        "python float",
        "python floats",
        "numpy scalar",
        "numpy",
        "numpy and jax",
        "weak update",
        "python complex",
        "broadcast",
    ],
)
def test_python_and_numpy_numbers_become_what_optax_makes_of_them(param, update):
    expected = optax.apply_updates({"w": param}, {"w": update})
    assert _bits(fo.apply_updates({"w": param}, {"w": update})) == _bits(expected)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", DTYPES[:-1], ids=lambda d: np.dtype(d).name)
def test_the_dtype_of_the_param_is_kept_whatever_that_of_the_update(dtype, compiled):
    param, update = jnp.ones(3, dtype), jnp.full(3, 2.0, jnp.float32)
    with jax.numpy_dtype_promotion("standard"):
        apply = jax.jit(fo.apply_updates) if compiled else fo.apply_updates
        if np.dtype(dtype).itemsize == 1:
            update = update.astype(dtype)  # jax promotes no float8, not even so
        new = apply({"w": param}, {"w": update})
    assert _bits(new) == _bits({"w": jnp.full(3, 3.0, dtype)})


PARAMS = {"a": jnp.ones(2), "b": {"c": np.ones(2, np.float32), "d": 4.0}, "e": jnp.ones(1)}
LOUD = {"a": jnp.full(2, jnp.nan), "b": {"c": np.ones(2, np.float32), "d": 1.0}, "e": jnp.ones(1)}


@pytest.mark.parametrize(
    ("updates", "frozen"),
    [
        (LOUD, fo.everything),
        (LOUD, ["a", "b", "e"]),
        (LOUD, {"a": True, "b": True, "e": True}),
        ({"a": None, "b": {"c": None, "d": None}, "e": None}, fo.nothing),
        ({"a": HOLE, "b": {"c": HOLE, "d": HOLE}, "e": HOLE}, fo.nothing),
        ({"a": None, "b": {"c": HOLE, "d": 3.0}, "e": jnp.ones(1)}, ["b/d", "e"]),
        ({"a": FLOAT0, "b": {"c": "no update", "d": len}, "e": jnp.ones(7)}, True),
    ],
    ids=["everything", "patterns", "mask", "None", "holes", "all kinds", "whatever"],
)
def test_frozen_leaves_and_those_without_an_update_are_the_very_same_objects(updates, frozen):
    _assert_very_same(fo.apply_updates(PARAMS, updates, frozen), PARAMS)


def test_one_tree_of_each_kind_of_leaf():
    updates = {"a": jnp.full(2, jnp.nan), "b": {"c": HOLE, "d": None}, "e": jnp.full(1, 0.5)}
    new = fo.apply_updates(PARAMS, updates, "a")
    _assert_very_same(new | {"e": PARAMS["e"]}, PARAMS)
    assert _bits(new["e"]) == _bits(jnp.full(1, 1.5))


def test_holes_and_none_nodes_in_the_params_stay():
    params = {"a": HOLE, "b": None, "c": jnp.ones(2)}
    new = fo.apply_updates(params, {"a": HOLE, "b": None, "c": jnp.ones(2)})
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert _bits(new) == _bits({"a": HOLE, "b": None, "c": jnp.full(2, 2.0)})


UNTRAINABLE = {
    "bool": jnp.asarray([True, False]),
    "class": jnp.float32,
    "float0": np.zeros(2, jax.dtypes.float0),
    "function": len,
    "int": jnp.arange(3),
    "int4": jnp.arange(3, dtype=jnp.int4),
    "key": jax.random.key(0),
    "python": 3,
    "string": "text",
    "strings": np.array(["a", "b"]),
}


@pytest.mark.parametrize(
    "update",
    [
        lambda x: np.zeros(np.shape(x) if hasattr(x, "dtype") else (), jax.dtypes.float0),
        lambda x: jnp.zeros(3),
        lambda x: x,
    ],
    ids=["float0", "numbers", "itself"],
)
def test_leaves_that_cannot_be_trained_are_returned_as_they_are(update):
    new = fo.apply_updates(UNTRAINABLE, {name: update(x) for name, x in UNTRAINABLE.items()})
    _assert_very_same(new, UNTRAINABLE)


def _odd_numbers():
    """Subnormals, zeros of either sign, infinities, NaNs quiet and signalling, in each dtype."""
    single = [0x80000000, 1, 0x80000001, 0x807FFFFF, 0x7F800001, 0xFFBFFFFF, 0x7FC00001, 0xFF800000]
    half = np.concatenate([np.arange(0x7C00, 0x8400), np.arange(0xFC00, 0x10000), np.arange(9)])
    return {
        "bfloat16": (np.asarray(single, np.uint32) >> 16).astype(np.uint16).view(jnp.bfloat16),
        "complex64": np.asarray(single, np.uint32).view(np.complex64),
        "float16": half.astype(np.uint16).view(np.float16),
        "float32": np.asarray(single, np.uint32).view(np.float32),
        "float8_e4m3fn": np.arange(256).astype(np.uint8).view(jnp.float8_e4m3fn),
        "float8_e5m2": np.arange(256).astype(np.uint8).view(jnp.float8_e5m2),
    }


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("zeros", [0.0, -0.0, jnp.nan], ids=["zero", "negative zero", "nan"])
def test_a_frozen_leaf_keeps_every_bit(compiled, zeros):
    numbers = _odd_numbers()
    params = jax.tree.map(jnp.asarray, numbers)
    updates = jax.tree.map(lambda x: jnp.full_like(x, zeros), params)
    apply = functools.partial(fo.apply_updates, frozen=True)
    apply = jax.jit(apply) if compiled else apply
    assert _bits(apply(params, updates)) == _bits(numbers)


def _two_leaves():
    # The same shape, so that a compiler could hand either buffer to either leaf.
    return {"encoder": jnp.arange(64.0), "head": jnp.ones(64)}


def _pointers(params):
    return jax.tree.map(lambda x: x.unsafe_buffer_pointer(), params)


def _update(tx, params, state):
    grads = fo.grad(lambda p: (p["encoder"] * p["head"]).sum(), state)(params)
    return tx.update(grads, state, params)


@pytest.mark.parametrize("frozen", ["encoder", "head"])
def test_frozen_leaves_keep_their_buffers_in_a_jitted_step_that_donates(frozen):
    tx = fo.freezable(optax.sgd(0.1, momentum=0.9), frozen)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, new_state = _update(tx, params, state)
        return fo.apply_updates(params, updates, frozen=state), new_state

    params = _two_leaves()
    state, before, values = tx.init(params), _pointers(params), jax.tree.map(np.array, params)
    for _ in range(3):
        params, state = step(params, state)
    assert _pointers(params)[frozen] == before[frozen]
    assert [name for name in params if _bits(params[name]) == _bits(values[name])] == [frozen]


@pytest.mark.parametrize("frozen", ["encoder", "head"])
def test_frozen_leaves_keep_their_buffers_when_updates_are_applied_outside_jit(frozen):
    tx = fo.freezable(optax.sgd(0.1), frozen)
    params = _two_leaves()
    state = tx.init(params)
    updates, state = jax.jit(functools.partial(_update, tx))(params, state)
    new = fo.apply_updates(params, updates, frozen=state)
    before, after = _pointers(params), _pointers(new)
    assert [name for name in params if after[name] == before[name]] == [frozen]


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ({"a": 1.0}, r"only in the params: 'b/c'$"),
        ({"a": 1.0, "b": {"c": 1.0}, "z": 1.0}, r"only in the updates: 'z'$"),
        ({"a": 1.0, "b": {"d": 1.0}}, r"only in the updates: 'b/d'; only in the params: 'b/c'$"),
        ({"a": 1.0, "b": [1.0]}, r"only in the updates: 'b/0'; only in the params: 'b/c'$"),
        ({"a": 1.0, "b": 1.0}, r"only in the updates: 'b'; only in the params: 'b/c'$"),
        ({"a": [1.0, 2.0], "b": {"c": 1.0}}, r"'a'"),
        ({"a": [1.0], "b": {"c": 1.0}}, r"'a'"),
        ({"a": 1.0, "b": {"c": {"kernel": 1.0}}}, r"'b/c'"),
        ({"a": 1.0, "b": {"c": {}}}, r"'b/c'"),
        (1.0, r"the updates are of other params"),
    ],
    ids=[
        "leaf missing",
        "leaf more",
        "leaf renamed",
        "other container",
        "leaf for node",
        "node for leaf",
        "node of one leaf for leaf",
        "deep node for leaf",
        "empty node for leaf",
        "bare",
    ],
)
def test_updates_of_another_tree_are_an_error_that_names_the_paths(updates, message):
    with pytest.raises(ValueError, match=message):
        fo.apply_updates({"a": 1.0, "b": {"c": 2.0}}, updates)


def test_freezing_a_leaf_does_not_excuse_updates_of_another_tree():
    with pytest.raises(ValueError, match=r"only in the params: 'b'$"):
        fo.apply_updates({"a": 1.0, "b": 2.0}, {"a": 1.0}, "b")


def test_a_spec_that_does_not_fit_is_an_error_before_anything_is_added():
    with pytest.raises(ValueError, match=r"'encodr' selects no leaf; the tree has"):
        fo.apply_updates(PARAMS, LOUD, "encodr")


def test_an_update_of_other_rows_is_an_error_that_says_how_many_train():
    params, frozen = {"w": jnp.ones((4, 2))}, fo.rows("w", [0])
    message = (
        "the update of 'w' is of shape (2, 2), but the leaf is of shape (4, 2), and 3 of 4 rows "
        "train; give an update of all rows or of the rows that train"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fo.apply_updates(params, {"w": jnp.ones((2, 2))}, frozen)
