import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from freeze_optax._rows import flags as flags_file
from freeze_optax._rows.rows import Rows
from freeze_optax._rows.take_put import (
    put,
    put_among_zeros,
    take,
    take_bitwise,
    with_live_subset,
)
from tests.support.sampling import cases

COUNT = 20


def _rows_at(*indices):
    mask = np.zeros(COUNT, bool)
    mask[list(indices)] = True
    return mask


# Each with its runs, the first row and the one after the last.
IN_RUNS = {
    "first": (_rows_at(0, 1), [(0, 2)]),
    "middle": (_rows_at(5, 6, 7), [(5, 8)]),
    "last": (_rows_at(18, 19), [(18, 20)]),
    "one": (_rows_at(3), [(3, 4)]),
    "all but the first": (_rows_at(*range(1, 20)), [(1, 20)]),
    "ends": (_rows_at(0, 18, 19), [(0, 1), (18, 20)]),
    "three runs": (_rows_at(1, 2, 4, 5, 10), [(1, 3), (4, 6), (10, 11)]),
}
# More runs than are worth a slice each.
SCATTERED = {"every other": _rows_at(*range(1, 20, 2))}
MASKS = {name: mask for name, (mask, _) in IN_RUNS.items()} | SCATTERED
COMPILED = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
# One run, some, and many: each compiles anew, and what differs between the others is a number.
FEW = ("all but the first", "ends", "every other")
ANY_ROWS = pytest.mark.parametrize("mask", cases(MASKS, FEW))


def _assert_same_bits(x, expected):
    x, expected = np.asarray(x), np.asarray(expected)
    assert (x.dtype, x.shape) == (expected.dtype, expected.shape)
    assert x.tobytes() == expected.tobytes()


def _bits_of(dtype, seed):
    """Elements of any bits that the dtype has, but for NaNs, which have a test of their own."""
    dtype, rng = np.dtype(dtype), np.random.default_rng(seed)
    if dtype.kind == "b":
        return rng.integers(0, 2, (COUNT, 40)).astype(bool)
    x = np.frombuffer(rng.bytes(COUNT * 40 * dtype.itemsize), dtype).reshape(COUNT, 40).copy()
    if dtype.kind == "c":
        x.flat[:4] = [complex(-0.0, -0.0), complex(0, -0.0), complex(np.nan, 1), 1e-42j]
    elif dtype.kind != "i":
        with np.errstate(invalid="ignore"):
            x = np.where(np.isnan(x), np.asarray(1, dtype), x)
        tiny = np.asarray(jnp.finfo(dtype).smallest_subnormal, dtype)
        x.flat[:4] = np.asarray([-0.0, 0.0, 1.0, tiny], dtype)
    return x


def _nans(integer, dtype, first, last):
    bits = np.linspace(first, last, 2 * COUNT).astype(integer).reshape(COUNT, 2)
    return bits.view(dtype)


# A NaN that signals is one whose topmost bit of the fraction is not set.
NANS = {
    "float32 quiet": _nans(np.uint32, np.float32, 0x7FC00001, 0x7FFFFFFF),
    "float32 signalling": _nans(np.uint32, np.float32, 0x7F800001, 0x7FBFFFFF),
    "float16 quiet": _nans(np.uint16, np.float16, 0x7E01, 0x7FFF),
    "float16 signalling": _nans(np.uint16, np.float16, 0x7C01, 0x7DFF),
    "bfloat16 quiet": _nans(np.uint16, jnp.bfloat16, 0x7FC1, 0x7FFF),
    "bfloat16 signalling": _nans(np.uint16, jnp.bfloat16, 0x7F81, 0x7FBF),
    "float8_e5m2 quiet": _nans(np.uint8, jnp.float8_e5m2, 0x7E, 0x7F),
    "float8_e5m2 signalling": _nans(np.uint8, jnp.float8_e5m2, 0x7D, 0x7D),
}
DTYPES = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64"]
VALUES = {name: (_bits_of(name, 0), _bits_of(name, 1)) for name in [*DTYPES, "int8", "bool"]}
FEW_DTYPES = ("float32", "bfloat16", "float8_e5m2", "complex64", "bool")
EVERY_DTYPE = pytest.mark.parametrize(("x", "y"), cases(VALUES, FEW_DTYPES))
# Each compiles for each dtype, so not all of them.
FEW_ROWS = pytest.mark.parametrize("name", cases({x: x for x in ("middle", *FEW[1:])}, FEW))


@COMPILED
@FEW_ROWS
@EVERY_DTYPE
def test_take_gives_these_rows_bit_for_bit(x, y, name, wrap):
    mask = MASKS[name]
    rows = Rows(mask)
    _assert_same_bits(wrap(lambda x: take(x, rows))(jnp.asarray(x)), x[mask])
    _assert_same_bits(take(x, rows), x[mask])


@COMPILED
@FEW_ROWS
@EVERY_DTYPE
def test_put_sets_these_rows_and_keeps_every_bit_of_the_others(x, y, name, wrap):
    mask = MASKS[name]
    rows, expected = Rows(mask), np.where(mask[:, None], y, x)
    new = wrap(lambda x, values: put(x, rows, values))(jnp.asarray(x), jnp.asarray(y[mask]))
    _assert_same_bits(new, expected)


@COMPILED
@pytest.mark.parametrize("x", cases(NANS, [x for x in NANS if "16" not in x or "bf" in x]))
def test_take_and_put_keep_the_payload_of_every_nan(x, wrap):
    for mask in (MASKS["middle"], MASKS["ends"], MASKS["every other"]):
        rows, array = Rows(mask), jnp.asarray(x)
        _assert_same_bits(wrap(lambda x, rows=rows: take_bitwise(x, rows))(array), x[mask])
        zeros = jnp.zeros((rows.count, 2), x.dtype)
        new = wrap(lambda x, zeros, rows=rows: put(x, rows, zeros))(array, zeros)
        _assert_same_bits(new, np.where(mask[:, None], np.zeros_like(x), x))


@COMPILED
def test_rows_without_elements_are_taken_and_put(wrap):
    for mask in MASKS.values():
        rows, x = Rows(mask), jnp.ones((COUNT, 3, 0))
        values = wrap(lambda x, rows=rows: take(x, rows))(x)
        assert values.shape == (rows.count, 3, 0)
        assert wrap(lambda x, v, rows=rows: put(x, rows, v))(x, values).shape == x.shape
        assert (
            wrap(lambda x, v, rows=rows: with_live_subset(x, v, rows))(x, values).shape == x.shape
        )


@EVERY_DTYPE
def test_put_of_numpy_arrays_is_numpy_and_leaves_its_argument_alone(x, y):
    mask = MASKS["every other"]
    before = x.copy()
    new = put(x, Rows(mask), y[mask])
    assert isinstance(new, np.ndarray)
    _assert_same_bits(new, np.where(mask[:, None], y, before))
    _assert_same_bits(x, before)


@COMPILED
@FEW_ROWS
@pytest.mark.parametrize("dtype", cases({x: x for x in DTYPES}, FEW_DTYPES))
def test_among_sets_every_other_row_to_the_fill(dtype, name, wrap):
    x, mask = _bits_of(dtype, 0), MASKS[name]
    for fill in (0.0, -0.0):
        new = wrap(lambda values, fill=fill: put_among_zeros(values, Rows(mask), fill))(
            jnp.asarray(x[mask])
        )
        other = np.full_like(x, complex(fill, fill) if x.dtype.kind == "c" else fill)
        _assert_same_bits(new, np.where(mask[:, None], x, other))


@ANY_ROWS
def test_prng_keys_have_rows_too(mask):
    old, new = (jax.random.split(jax.random.key(seed), COUNT) for seed in (0, 1))
    a, b = (np.asarray(jax.random.key_data(keys)) for keys in (old, new))
    rows = Rows(mask)
    _assert_same_bits(jax.random.key_data(take(new, rows)), b[mask])
    keys = put(old, rows, take(new, rows))
    _assert_same_bits(jax.random.key_data(keys), np.where(mask[:, None], b, a))


@pytest.mark.parametrize("shape", [(COUNT,), (COUNT, 2), (COUNT, 2, 3), (COUNT, 0)])
@ANY_ROWS
def test_any_rank_has_rows(mask, shape):
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    y, rows = x + np.float32(100), Rows(mask)
    expected = x.copy()
    expected[mask] = y[mask]
    _assert_same_bits(take(jnp.asarray(x), rows), x[mask])
    _assert_same_bits(put(jnp.asarray(x), rows, jnp.asarray(y[mask])), expected)
    expected = np.zeros(shape, np.float32)
    expected[mask] = y[mask]
    _assert_same_bits(put_among_zeros(jnp.asarray(y[mask]), rows, 0.0), expected)


@ANY_ROWS
def test_the_rows_of_an_abstract_array_are_abstract(mask):
    x = jax.ShapeDtypeStruct((COUNT, 3), jnp.bfloat16)
    expected = jax.ShapeDtypeStruct((int(mask.sum()), 3), jnp.bfloat16)
    assert take(x, Rows(mask)) == expected


def _primitives(fun, *args):
    def walk(jaxpr):
        for equation in jaxpr.eqns:
            yield equation.primitive.name
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from walk(inner)

    return list(walk(jax.make_jaxpr(fun)(*args).jaxpr))


def _touches(names):
    return any("gather" in name or "scatter" in name for name in names)


@pytest.mark.parametrize(("mask", "runs"), IN_RUNS.values(), ids=IN_RUNS)
def test_rows_in_runs_are_sliced_and_never_gathered_or_scattered(mask, runs):
    rows, x = Rows(mask), jnp.ones((COUNT, 2))
    part = jnp.ones((rows.count, 2))
    taken = _primitives(lambda x: take(x, rows), x)
    assert taken.count("slice") == len(runs)
    set_ = _primitives(lambda x, part: put(x, rows, part), x, part)
    assert set_.count("dynamic_update_slice") == len(runs)
    filled = _primitives(lambda part: put_among_zeros(part, rows, 0.0), part)
    assert "concatenate" in filled
    moved = _primitives(jax.grad(lambda part: with_live_subset(x, part, rows).sum()), part)
    assert not any(map(_touches, (taken, set_, filled, moved)))


@pytest.mark.parametrize("mask", SCATTERED.values(), ids=SCATTERED)
def test_rows_in_many_runs_are_gathered_and_scattered_in_one_piece(mask):
    rows, x = Rows(mask), jnp.ones((COUNT, 2))
    part = jnp.ones((rows.count, 2))
    assert _primitives(lambda x: take(x, rows), x).count("gather") == 1
    assert _primitives(lambda x, part: put(x, rows, part), x, part).count("scatter") == 1


@pytest.mark.parametrize(("mask", "runs"), IN_RUNS.values(), ids=IN_RUNS)
def test_runs_are_where_adjacent_rows_begin_and_end(mask, runs):
    assert Rows(mask).runs == runs


@ANY_ROWS
def test_rows_know_their_indices_their_number_and_their_complement(mask):
    rows = Rows(mask)
    assert rows.indices.tolist() == [i for i, flag in enumerate(mask) if flag]
    assert rows.count == sum(mask.tolist())
    assert (~rows).mask.tolist() == [not flag for flag in mask]
    assert ~~rows == rows
    assert repr(rows) == f"{sum(mask.tolist())} of 20 rows"


def test_rows_are_compared_and_hashed_by_value():
    for (i, a), (j, b) in itertools.product(enumerate(MASKS.values()), repeat=2):
        assert (Rows(a) == Rows(b.copy())) is (i == j)
    assert hash(Rows(MASKS["ends"])) == hash(Rows(MASKS["ends"].copy()))
    assert Rows(np.asarray([True, False])) != Rows(np.asarray([True, False, False]))
    assert Rows(MASKS["ends"]) != MASKS["ends"].tolist()
    assert pickle.loads(pickle.dumps(Rows(MASKS["ends"]))) == Rows(MASKS["ends"])


def test_rows_do_not_change_with_the_vector_they_were_made_of():
    mask = MASKS["ends"].copy()
    rows = Rows(mask)
    mask[:] = True
    assert rows.mask.tolist() == MASKS["ends"].tolist()
    with pytest.raises(ValueError, match="read-only"):
        rows.mask[0] = False


VECTORS = [np.asarray(bits, bool) for bits in itertools.product([False, True], repeat=3)]


def _flag(vector):
    """The flag that stands for a vector of three bools, written out."""
    return bool(vector[0]) if len(set(vector.tolist())) == 1 else Rows(vector)


def _is(flag, vector):
    if len(set(vector.tolist())) == 1:
        return flag is bool(vector[0])
    return isinstance(flag, Rows) and flag.mask.tolist() == vector.tolist()


@pytest.mark.parametrize("vector", VECTORS, ids=str)
def test_a_vector_of_one_value_is_a_bool_and_any_other_are_rows(vector):
    assert _is(flags_file.flag_from_vector(vector), vector)
    assert _is(flags_file.flag_not(_flag(vector)), ~vector)


def test_of_no_rows_none_are_selected():
    assert flags_file.flag_from_vector(np.zeros(0, bool)) is False


@pytest.mark.parametrize(
    ("function", "reference"),
    [
        (flags_file.flag_or, np.logical_or),
        (flags_file.flag_and, np.logical_and),
        (flags_file.flag_minus, lambda a, b: a & ~b),
    ],
    ids=["either", "both", "minus"],
)
def test_the_algebra_of_flags_is_that_of_their_vectors(function, reference):
    for a, b in itertools.product(VECTORS, repeat=2):
        assert _is(function(_flag(a), _flag(b)), reference(a, b)), (a, b)


def test_the_union_of_flags_is_that_of_their_vectors():
    assert flags_file.flag_union([]) is False
    for vectors in itertools.product(VECTORS, repeat=3):
        assert _is(flags_file.flag_union(map(_flag, vectors)), np.logical_or.reduce(vectors))


def test_a_public_flag_is_a_bool_or_a_copy_of_the_vector():
    rows = Rows(MASKS["ends"])
    flags = flags_file.flags_to_masks([True, False, rows], [np.ones(COUNT)] * 3)
    *plain, public = flags
    assert plain == [True, False]
    assert (type(public), public.dtype, public.shape) == (np.ndarray, bool, (COUNT,))
    public[:] = True
    assert rows.mask.tolist() == MASKS["ends"].tolist()


X = jnp.asarray(np.random.default_rng(0).normal(size=(COUNT, 3)), jnp.float32)
V = jnp.asarray(np.random.default_rng(1).normal(size=(COUNT, 3)), jnp.float32)


def _energy(x):
    return (jnp.sin(x) * x[::-1]).sum() + jnp.square(x.sum(axis=1)).sum()


def _pair(mask):
    """Functions of the rows alone: by `whole`, and as it is by definition."""
    rows = Rows(mask)
    index = np.flatnonzero(mask)
    return (
        lambda part: _energy(with_live_subset(X, part, rows)),
        lambda part: _energy(X.at[index].set(part)),
        X[index],
    )


def _assert_close(tree, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), tree, expected
    )


def test_whole_is_the_very_array():
    rows = Rows(MASKS["ends"])
    np.testing.assert_array_equal(with_live_subset(X, take(X, rows), rows), X)
    x = _bits_of("float32", 3)
    _assert_same_bits(jax.jit(lambda x: with_live_subset(x, take(x, rows), rows))(x), x)
    part = take(X, rows)
    made = _primitives(lambda x: with_live_subset(x, part, rows), X)
    assert {"dynamic_update_slice", "scatter", "concatenate", "copy"}.isdisjoint(made)


@COMPILED
@ANY_ROWS
def test_whole_has_the_derivatives_of_put(mask, wrap):
    ours, reference, part = _pair(mask)
    direction = V[np.flatnonzero(mask)]
    expected = jax.jit(jax.value_and_grad(reference))(part)
    _assert_close(wrap(jax.value_and_grad(ours))(part), expected)
    expected = jax.jit(lambda p, v: jax.jvp(reference, (p,), (v,)))(part, direction)
    _assert_close(wrap(lambda p, v: jax.jvp(ours, (p,), (v,)))(part, direction), expected)


@FEW_ROWS
def test_whole_has_the_second_derivatives_of_put(name):
    ours, reference, part = _pair(MASKS[name])
    expected = jax.jit(jax.hessian(reference))(part)
    _assert_close(jax.jit(jax.hessian(ours))(part), expected)
    _assert_close(jax.jit(jax.jacrev(jax.jacrev(ours)))(part), expected)
    _assert_close(jax.jit(jax.jacfwd(jax.jacfwd(ours)))(part), expected)


@ANY_ROWS
def test_whole_has_the_derivatives_of_put_under_vmap_remat_and_scan(mask):
    _, reference, part = _pair(mask)
    rows, index = Rows(mask), np.flatnonzero(mask)
    expected = jax.grad(reference)(part)
    _assert_close(jax.grad(jax.checkpoint(_pair(mask)[0]))(part), expected)

    def scanned(part):
        body = lambda total, _: (total + _energy(with_live_subset(X, part, rows)), None)  # noqa: E731
        return jax.lax.scan(body, jnp.zeros(()), None, length=2)[0]

    _assert_close(jax.grad(scanned)(part), 2 * expected)
    both = jnp.stack([X, 2 * X])
    batched = jax.vmap(jax.grad(lambda part, x: _energy(with_live_subset(x, part, rows))))(
        both[:, index], both
    )
    each = [jax.grad(lambda part, x=x: _energy(x.at[index].set(part)))(x[index]) for x in both]
    _assert_close(batched, jnp.stack(each))


@ANY_ROWS
def test_the_derivative_of_whole_in_the_array_is_none_at_its_rows(mask):
    rows, part = Rows(mask), X[np.flatnonzero(mask)]
    by_whole = jax.grad(lambda x: _energy(with_live_subset(x, part, rows)))(X)
    by_put = jax.grad(lambda x: _energy(x.at[np.flatnonzero(mask)].set(part)))(X)
    _assert_close(by_whole, by_put)
    np.testing.assert_array_equal(by_whole[mask], 0.0)
    # Through both, as where what is around differentiates too, it is that of the array.
    total = jax.grad(lambda x: _energy(with_live_subset(x, take(x, rows), rows)))(X)
    _assert_close(total, jax.grad(_energy)(X))


@ANY_ROWS
def test_complex_rows_are_differentiated_as_put(mask):
    x, index = X.astype(jnp.complex64) * (1 + 2j), np.flatnonzero(mask)
    ours = jax.grad(lambda part: jnp.abs(with_live_subset(x, part, Rows(mask)) ** 2).sum())
    reference = jax.grad(lambda part: jnp.abs(x.at[index].set(part) ** 2).sum())
    _assert_close(ours(x[index]), reference(x[index]))


@pytest.mark.parametrize("dtype", cases(dict(zip(DTYPES, DTYPES, strict=True)), FEW_DTYPES))
def test_whole_goes_back_in_every_dtype(dtype):
    x = jnp.arange(6.0).reshape(6, 1).astype(dtype)
    rows = Rows(np.array([0, 1, 1, 0, 0, 1], bool))

    def total(part):
        return jnp.real(with_live_subset(x, part, rows).astype("complex64") ** 2).sum()

    expected = (2 * np.asarray(x).astype("complex64"))[[1, 2, 5]]
    np.testing.assert_array_equal(jax.grad(total)(take(x, rows)).astype("complex64"), expected)


def test_a_scalar_has_no_rows_to_fit():
    rows = flags_file.flag_from_vector(np.array([True, False]))
    assert not rows.fits(())
    assert not rows.is_compact(())


def test_a_leaf_without_rows_fits_none():
    rows = flags_file.flag_from_vector(np.array([True, False, False]))
    fitting = [n for n in range(6) if rows.fits((n, 2))]
    assert fitting == [3]
    assert [n for n in range(6) if (~rows).is_compact((n, 2))] == [2]
