"""Moves of rows along any axis and of elements, bit for bit, against NumPy on full masks.

The moves of a dtype are one program under jit, as each compiles.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from freeze_optax._rows.flags import flag_from_mask
from freeze_optax._rows.rows import Rows
from freeze_optax._rows.take_put import (
    join,
    put,
    put_among_zeros,
    take,
    take_bitwise,
    take_within,
    with_live_subset,
)
from tests.support.sampling import cases

SHAPE = (3, 20, 2)


def _rows(axis, indices):
    mask = np.zeros(SHAPE, bool)
    np.moveaxis(mask, axis, 0)[list(indices)] = True
    return mask


def _elements(seed, share=0.4):
    return np.random.default_rng(seed).random(SHAPE) < share


MASKS = {
    "leading axis": _rows(0, [0, 2]),
    "a run": _rows(1, range(3, 9)),
    "ends": _rows(1, [0, 18, 19]),
    "scattered": _rows(1, range(1, 20, 2)),  # too many runs to slice
    "last axis": _rows(2, [1]),
    "elements": _elements(0),
    "one element": np.arange(120).reshape(SHAPE) == 57,
    "all but one": np.arange(120).reshape(SHAPE) != 57,
    "two axes": _rows(0, [1]) & _rows(1, [0, 4, 5]),
}
SUBSETS = {name: flag_from_mask(mask) for name, mask in MASKS.items()}

_HALF = _elements(1, 0.5)
# Masks that share no element, each with a mask of its own kind where it matters.
JOINS = {
    "rows of axis 1": [_rows(1, [0, 5, 6]), _rows(1, [1, 7])],
    "scattered rows": [_rows(1, range(0, 20, 2)), _rows(1, range(1, 17, 4))],
    "all rows of axis 2": [_rows(2, [1]), _rows(2, [0])],
    "elements": [_HALF & _elements(2), ~_HALF & _elements(3)],
    "rows and elements": [_rows(1, [2, 3]), _elements(4) & ~_rows(1, [2, 3])],
    "rows of two axes, but for what they share": [_rows(0, [1]), _rows(2, [0]) & ~_rows(0, [1])],
    "elements that make rows": [_rows(1, [4, 9]) & _HALF, _rows(1, [4, 9]) & ~_HALF],
    "elements that make a leaf": [_HALF, ~_HALF & _elements(5), ~_HALF & ~_elements(5)],
}
WITHIN = {
    "rows in rows": (_rows(1, [3, 7]), _rows(1, range(3, 9))),
    "rows in elements": (_rows(1, [3]), _elements(0) | _rows(1, [3])),
    "elements in rows": (_rows(1, range(3, 9)) & _HALF, _rows(1, range(3, 9))),
    "a block in rows": (_rows(1, range(3, 9)) & _rows(0, [0, 2]), _rows(1, range(3, 9))),
    "elements in elements": (_HALF & _elements(6), _HALF),
    "elements in a leaf": (_HALF, None),
    "rows in a leaf": (_rows(2, [1]), None),
    "all of it": (_HALF, _HALF),
}


def _bits_of(dtype, seed, nans):
    """Elements of any bits that the dtype has."""
    dtype, rng = np.dtype(dtype), np.random.default_rng(seed)
    if dtype.kind == "b":
        return rng.integers(0, 2, SHAPE).astype(bool)
    x = np.frombuffer(rng.bytes(np.prod(SHAPE) * dtype.itemsize), dtype).reshape(SHAPE).copy()
    if dtype.kind == "i":
        return x
    if dtype.kind == "c":
        x.flat[::7] = complex(-0.0, 1e-42)
        x.flat[::5] = complex(0.0, -0.0)
        x.flat[3] = complex(np.nan, 1)
        return x
    tiny = np.asarray(jnp.finfo(dtype).smallest_subnormal, dtype)
    x.flat[::7], x.flat[::5], x.flat[::11] = np.asarray([-0.0, 0.0, tiny], dtype)[:, None]
    is_nan = np.isnan(x.astype(np.float32) if dtype.itemsize < 4 else x)
    if not nans:
        return np.where(is_nan, np.asarray(1, dtype), x)
    if dtype == np.float32:
        payloads = np.linspace(0x7F800001, 0x7FFFFFFF, 40).astype(np.uint32)
        x.flat[2::3] = payloads.view(np.float32)
    elif dtype == jnp.bfloat16:
        x.flat[2::3] = np.linspace(0x7F81, 0x7FFF, 40).astype(np.uint16).view(jnp.bfloat16)
    elif dtype == np.float16:  # XLA keeps the payload of quiet ones alone
        x.flat[2::3] = np.linspace(0x7E01, 0x7FFF, 40).astype(np.uint16).view(np.float16)
    return x


def _assert_same_bits(made, expected):
    assert made.keys() == expected.keys()
    for name, x in made.items():
        y = np.asarray(expected[name])
        assert (np.asarray(x).dtype, np.shape(x)) == (y.dtype, y.shape), name
        assert np.asarray(x).tobytes() == y.tobytes(), name


def _compact(x, mask):
    """What a mask selects of an array, with the axes that it is not cut along."""
    subset = flag_from_mask(mask)
    if isinstance(subset, bool):
        return x
    return np.compress(subset.mask, x, subset.axis) if isinstance(subset, Rows) else x[mask]


def _taken(x):
    return {name: take(x, subset) for name, subset in SUBSETS.items()}


def _taken_bitwise(x):
    return {name: take_bitwise(x, subset) for name, subset in SUBSETS.items()}


def _set(x, y):
    return {name: put(x, SUBSETS[name], values) for name, values in y.items()}


def _joined(parts):
    return {
        name: join([flag_from_mask(mask) for mask in JOINS[name]], arrays)
        for name, arrays in parts.items()
    }


def _taken_within(outer):
    return {
        name: take_within(
            outer[name], flag_from_mask(mask), None if of is None else flag_from_mask(of)
        )
        for name, (mask, of) in WITHIN.items()
    }


DTYPES = ["float32", "float16", "bfloat16", "float8_e5m2", "float8_e4m3fn", "complex64"]
FEW = ("float32", "bfloat16")
EVERY_DTYPE = pytest.mark.parametrize(
    "dtype", cases({x: x for x in [*DTYPES, "int8", "bool"]}, FEW)
)
# Eager moves compile one by one.
_WRAPPED = {f"{x}, jit": (x, jax.jit) for x in [*DTYPES, "int8", "bool"]}
_WRAPPED |= {f"{x}, eager": (x, lambda f: f) for x in [*DTYPES, "int8", "bool"]}
EVERY_WRAPPED_DTYPE = pytest.mark.parametrize(
    ("dtype", "wrap"), cases(_WRAPPED, [*(f"{x}, jit" for x in FEW), "bfloat16, eager"])
)


def _moved(dtype, nans):
    """The arguments of the moves, and by NumPy what they give."""
    x, y = _bits_of(dtype, 0, nans), _bits_of(dtype, 1, nans)
    values = {name: _compact(y, mask) for name, mask in MASKS.items()}
    taken = {name: _compact(x, mask) for name, mask in MASKS.items()}
    parts = {name: [_compact(x, mask) for mask in masks] for name, masks in JOINS.items()}
    return (
        (x, values, parts),
        taken,
        {name: np.where(mask, y, x) for name, mask in MASKS.items()},
        {name: _compact(x, np.logical_or.reduce(masks)) for name, masks in JOINS.items()},
    )


@EVERY_WRAPPED_DTYPE
def test_every_bit_of_what_is_frozen_stays_as_it_is_moved(dtype, wrap):
    arguments, taken, new, joined = _moved(dtype, nans=True)

    def move(x, values, parts):
        return _taken_bitwise(x), _set(x, values), _joined(parts)

    made = wrap(move)(*jax.tree.map(jnp.asarray, arguments))
    for own, expected in zip(made, (taken, new, joined), strict=True):
        _assert_same_bits(own, expected)


@EVERY_DTYPE
def test_numpy_arrays_are_moved_as_numpy_arrays_and_stay_as_they_are(dtype):
    (x, values, parts), taken, new, joined = _moved(dtype, nans=True)
    before = x.copy()
    made = (_taken(x), _taken_bitwise(x), _set(x, values), _joined(parts))
    for own, expected in zip(made, (taken, taken, new, joined), strict=True):
        assert all(isinstance(array, np.ndarray) for array in own.values())
        _assert_same_bits(own, expected)
    assert x.tobytes() == before.tobytes()
    outer = {name: x if of is None else _compact(x, of) for name, (_, of) in WITHIN.items()}
    within = {name: _compact(x, mask) for name, (mask, _) in WITHIN.items()}
    _assert_same_bits(_taken_within(outer), within)
    half = {name: [jnp.asarray(first), *more] for name, (first, *more) in parts.items()}
    _assert_same_bits(_joined(half), joined)


@EVERY_WRAPPED_DTYPE
def test_what_trains_is_taken_and_set_among_zeros_of_either_sign(dtype, wrap):
    (x, _, _), taken, _, _ = _moved(dtype, nans=False)
    fills = {"0.0": 0.0, "-0.0": -0.0} if x.dtype.kind in "fcV" else {"0.0": 0.0}
    within = {name: _compact(x, mask) for name, (mask, _) in WITHIN.items()}
    outer = {name: x if of is None else _compact(x, of) for name, (_, of) in WITHIN.items()}

    def move(x, values, outer):
        filled = {
            f"{name} {text}": put_among_zeros(values[name], subset, fill)
            for name, subset in SUBSETS.items()
            for text, fill in fills.items()
        }
        return _taken(x), filled, _taken_within(outer)

    expected = {}
    for name, mask in MASKS.items():
        for text, fill in fills.items():
            zeros = np.full_like(x, complex(fill, fill) if x.dtype.kind == "c" else fill)
            expected[f"{name} {text}"] = np.where(mask, x, zeros)
    arguments = jax.tree.map(jnp.asarray, (x, taken, outer))
    for own, right in zip(wrap(move)(*arguments), (taken, expected, within), strict=True):
        _assert_same_bits(own, right)


def test_abstract_arrays_have_abstract_subsets():
    x = jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16)
    full = np.zeros(SHAPE)
    for name, subset in SUBSETS.items():
        expected = jax.ShapeDtypeStruct(_compact(full, MASKS[name]).shape, jnp.bfloat16)
        assert take(x, subset) == take_bitwise(x, subset) == expected
        assert put(x, subset, expected) == x
    for mask, of in WITHIN.values():
        outer = jax.ShapeDtypeStruct(
            SHAPE if of is None else _compact(full, of).shape, jnp.bfloat16
        )
        inner = take_within(outer, flag_from_mask(mask), None if of is None else flag_from_mask(of))
        assert inner.shape == _compact(full, mask).shape


def test_prng_keys_are_moved_too():
    old, new = (jax.random.split(jax.random.key(seed), SHAPE) for seed in (0, 1))
    a, b = (np.asarray(jax.random.key_data(keys)) for keys in (old, new))
    for name in ("a run", "scattered", "last axis", "elements"):
        subset, mask = SUBSETS[name], MASKS[name]
        values = take(new, subset)
        expected = np.stack([_compact(b[..., i], mask) for i in range(2)], -1)
        np.testing.assert_array_equal(jax.random.key_data(values), expected)
        keys = jax.random.key_data(put(old, subset, values))
        np.testing.assert_array_equal(keys, np.where(mask[..., None], b, a))


def _energy(x):
    return (jnp.sin(x) * x[::-1]).sum() + jnp.square(x.sum(axis=1)).sum()


def test_the_whole_leaf_has_the_derivatives_of_what_trains():
    rng = np.random.default_rng(7)
    x, v = (jnp.asarray(rng.normal(size=SHAPE), jnp.float32) for _ in range(2))
    live = {name: take(x, subset) for name, subset in SUBSETS.items()}
    directions = {name: take(v, subset) for name, subset in SUBSETS.items()}

    def ours(live):
        wholes = [with_live_subset(x, live[name], subset) for name, subset in SUBSETS.items()]
        return sum(map(_energy, wholes), jnp.zeros(()))

    by_element = jax.grad(_energy)(x)
    gradient, tangent = jax.jit(
        lambda live: (jax.grad(ours)(live), jax.jvp(jax.grad(ours), (live,), (directions,))[1])
    )(live)
    for name, mask in MASKS.items():
        np.testing.assert_allclose(gradient[name], _compact(by_element, mask), 1e-5, 1e-5)
        second = jax.jvp(jax.grad(_energy), (x,), (jnp.where(mask, v, 0.0),))[1]
        np.testing.assert_allclose(tangent[name], _compact(second, mask), 1e-5, 1e-5)


def test_subsets_are_moved_below_an_axis_of_examples():
    rng = np.random.default_rng(8)
    x = rng.normal(size=(2, *SHAPE)).astype(np.float32)
    made = jax.vmap(lambda x: (_taken(x), _set(-x, _taken(x))))(x)
    taken = {name: np.stack([_compact(one, mask) for one in x]) for name, mask in MASKS.items()}
    _assert_same_bits(made[0], taken)
    _assert_same_bits(made[1], {name: np.where(mask, x, -x) for name, mask in MASKS.items()})
