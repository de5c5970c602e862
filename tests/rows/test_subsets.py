"""Flags and subsets of any kind, against bools for each element in NumPy."""

import functools
import pickle

import jax
import numpy as np
import optax
import pytest

import freeze_optax as fo
from freeze_optax._rows.elements import Elements
from freeze_optax._rows.flags import (
    combine_flags,
    flag_along,
    flag_and,
    flag_from_mask,
    flag_from_vector,
    flag_minus,
    flag_not,
    flag_or,
    flag_union,
    flag_within,
    flags_to_masks,
)
from freeze_optax._rows.rows import Rows
from freeze_optax._rows.subset import Subset

SHAPES = [(5,), (1,), (3, 4), (1, 4), (4, 1), (2, 3, 2), (2, 1, 3), (2, 2, 2, 2), (3, 1, 2, 2)]


def draw_mask(rng, shape):
    """A bool for each element: alike along some of the axes, so that all kinds of flags occur."""
    varying = rng.random(len(shape)) < 0.6
    mask = rng.random([n if v else 1 for n, v in zip(shape, varying, strict=True)]) < 0.5
    return np.broadcast_to(mask, shape).copy()


def masks(seed, count):
    """For each shape some masks, all and nothing among them."""
    rng = np.random.default_rng(seed)
    for shape in SHAPES:
        firsts = [np.indices(shape)[axis] == 0 for axis in range(len(shape))]
        drawn = [draw_mask(rng, shape) for _ in range(count)]
        yield shape, [np.ones(shape, bool), np.zeros(shape, bool), *firsts, *drawn]


def bools_of(flag, shape):
    """What a flag selects, by its public attributes alone."""
    if isinstance(flag, bool):
        return np.full(shape, flag)
    if isinstance(flag, Rows):
        mask = np.zeros(shape, bool)
        np.moveaxis(mask, flag.axis, 0)[flag.mask] = True
        return mask
    assert flag.shape == shape
    bits = [flag.bits[i // 8] >> (7 - i % 8) & 1 for i in range(np.prod(shape))]
    return np.array(bits, bool).reshape(shape)


def kind_of(mask):
    """The kind of flag that a mask has: a bool, the axis of its rows, or elements."""
    if mask.all() or not mask.any():
        return bool
    for axis in range(mask.ndim):
        others = tuple(i for i in range(mask.ndim) if i != axis)
        if np.array_equal(mask.any(others), mask.all(others)):
            return axis
    return Elements


def assert_flag(flag, mask):
    """Whether a flag selects what a mask does, in the one form that it has."""
    np.testing.assert_array_equal(bools_of(flag, mask.shape), mask)
    kind = type(flag) if isinstance(flag, bool | Elements) else flag.axis
    assert kind == kind_of(mask)
    same = flag_from_mask(mask.copy())
    assert flag == same
    assert hash(flag) == hash(same)


def test_a_mask_has_one_flag_and_the_flag_selects_what_it_does():
    kinds = set()
    for shape, drawn in masks(0, 12):
        for mask in drawn:
            assert_flag(flag_from_mask(mask), mask)
            kinds.add(kind_of(mask))
            for other in drawn:
                equal = np.array_equal(mask, other)
                assert (flag_from_mask(mask) == flag_from_mask(other)) is equal, (shape, mask)
    assert kinds == {bool, 0, 1, 2, 3, Elements}


def test_the_algebra_of_flags_is_that_of_their_masks():
    for shape, drawn in masks(1, 8):
        flags = [flag_from_mask(mask) for mask in drawn]
        for a, x in zip(drawn, flags, strict=True):
            assert_flag(flag_not(x), ~a)
            for b, y in zip(drawn, flags, strict=True):
                assert_flag(flag_or(x, y, shape), a | b)
                assert_flag(flag_and(x, y, shape), a & b)
                assert_flag(flag_minus(x, y, shape), a & ~b)
        union = functools.reduce(np.logical_or, drawn[1:4])
        assert_flag(flag_union(flags[1:4], shape), union)
        assert flag_union([], shape) is False


def test_flags_of_many_leaves_combine_leaf_by_leaf():
    rng = np.random.default_rng(2)
    pairs = [(draw_mask(rng, shape), draw_mask(rng, shape)) for shape in SHAPES * 3]
    first, second = ([flag_from_mask(pair[i]) for pair in pairs] for i in (0, 1))
    leaves = [np.zeros(a.shape) for a, _ in pairs]
    for combine, of_masks in ((flag_or, np.logical_or), (flag_and, np.logical_and)):
        for flag, pair in zip(combine_flags(combine, first, second, leaves), pairs, strict=True):
            assert_flag(flag, of_masks(*pair))


def test_a_flag_within_another_is_that_of_the_compact_array():
    for shape, drawn in masks(3, 8):
        flags = [flag_from_mask(mask) for mask in drawn]
        outers = [(b, y) for b, y in zip(drawn, flags, strict=True) if isinstance(y, Subset)]
        for a, x in zip(drawn, flags, strict=True):
            if isinstance(x, Subset):
                assert flag_within(x, None, shape) == x
            for b, y in outers:
                inner = flag_from_mask(a & b)
                if isinstance(inner, Subset):
                    within = flag_within(inner, y, shape)
                    assert_flag(within, (a & b)[b].reshape(y.compact_shape(shape)))


def test_a_subset_knows_its_size_and_the_forms_of_its_arrays():
    for shape, drawn in masks(4, 8):
        for mask in drawn:
            flag = flag_from_mask(mask)
            if not isinstance(flag, Subset):
                continue
            size, values = int(mask.sum()), np.arange(mask.size).reshape(shape)[mask]
            rows = isinstance(flag, Rows)
            per_row = mask.size // shape[flag.axis] if rows else 1
            assert flag.count == size // per_row
            assert flag.elements_in(mask.size) == size
            compact = flag.compact_shape(shape)
            assert np.prod(compact) == values.size
            assert flag.compact_rank(len(shape)) == len(compact)
            assert flag.is_compact(compact)
            assert not flag.is_compact(shape)
            assert flag.fits(shape)
            assert not flag.fits(compact)
            assert not flag.fits(())
            assert not flag.is_compact(())
            full = flag.mask_of(shape)
            np.testing.assert_array_equal(full, mask)
            with pytest.raises(ValueError, match="read-only"):
                full[...] = True
            as_mask = flag.as_mask(len(shape))
            if rows and flag.axis == 0:
                assert as_mask.shape == shape[:1]
                as_mask = as_mask.reshape(-1, *[1] * (len(shape) - 1))
            elif rows:
                lengths = [n if axis == flag.axis else 1 for axis, n in enumerate(shape)]
                assert as_mask.shape == tuple(lengths)
            else:
                assert as_mask.shape == shape
            np.testing.assert_array_equal(np.broadcast_to(as_mask, shape), mask)


def test_the_indices_of_elements_are_in_the_order_of_the_leaf():
    mask = np.random.default_rng(5).random((3, 5, 2)) < 0.4
    elements = flag_from_mask(mask)
    np.testing.assert_array_equal(elements.indices, np.argwhere(mask))
    np.testing.assert_array_equal(elements.flat_indices(), np.flatnonzero(mask))
    assert elements.indices.dtype == np.int32
    assert elements.index_bytes == elements.indices.nbytes


def test_a_mask_is_read_as_what_it_was_written_from():
    for shape, drawn in masks(6, 8):
        tree = {f"{i:02}": np.zeros(shape, np.float32) for i in range(len(drawn))}
        flags = [flag_from_mask(mask) for mask in drawn]
        written = dict(zip(tree, flags_to_masks(flags, tree.values()), strict=True))
        read = fo.mask(written, tree)
        for own, mask, back in zip(written.values(), drawn, read.values(), strict=True):
            assert np.shape(own) == np.shape(back)
            np.testing.assert_array_equal(own, back)
            if isinstance(back, bool):
                np.testing.assert_array_equal(np.full(shape, back), mask)


def test_flag_along_an_axis_says_which_rows_are_selected_as_a_whole():
    for shape, drawn in masks(7, 6):
        for mask in drawn:
            for axis in range(len(shape)):
                others = tuple(i for i in range(len(shape)) if i != axis)
                along = flag_along(flag_from_mask(mask), axis, shape)
                np.testing.assert_array_equal(along, mask.all(others))


def test_rows_along_different_axes_need_the_shape_of_the_leaf():
    a, b = Rows(np.array([True, False])), Rows(np.array([True, False]), 1)
    with pytest.raises(ValueError, match="known shape"):
        flag_or(a, b)


@pytest.mark.parametrize("shape", [(2, 3, 0), (3, 0, 2)])
def test_a_leaf_without_elements_is_selected_as_a_whole_or_not_at_all(shape):
    params = {"v": np.ones(2, np.float32), "w": np.zeros(shape, np.float32)}
    inner = 1 if shape[1] else 2
    assert fo.rows("w", [0])(params)["w"] is False
    assert fo.rows("w", [0], axis=inner)(params)["w"] is False
    assert fo.rows("w", slice(None), axis=inner)(params)["w"] is True
    for mask in (np.arange(shape[0]) == 0, np.zeros(shape, bool)):
        assert fo.mask({"v": False, "w": mask}, params)["w"] is False
    # Edits along both axes leave nothing to part.
    state = fo.freezable(optax.trace(0.9), fo.rows("w", [0])).init(params)
    state = fo.freeze(state, params, fo.rows("w", [1], axis=inner))
    state = fo.thaw(state, params, fo.rows("w", [0]))
    assert fo.mask(state, params) == {"v": False, "w": False}


class _Former:
    """A subset as version 0.1.0 pickled it."""

    def __init__(self, mask):
        self.mask = mask

    def __reduce__(self):
        return Rows, (self.mask,)


def test_subsets_are_pickled_and_those_of_a_former_version_are_of_the_leading_axis():
    for _, drawn in masks(8, 4):
        for flag in map(flag_from_mask, drawn):
            back = pickle.loads(pickle.dumps(flag))
            assert back == flag
            assert hash(back) == hash(flag)
    mask = np.array([True, False, True])
    assert pickle.loads(pickle.dumps(_Former(mask))) == Rows(mask)
    assert pickle.loads(pickle.dumps(_Former(mask))) == flag_from_vector(mask)


def test_subsets_do_not_change_with_the_array_that_they_were_made_of():
    for mask in (np.array([[True, False], [True, True]]), np.array([[True, False]] * 2)):
        flag, before = flag_from_mask(mask), mask.copy()
        hash_before = hash(flag)
        mask[:] = True
        assert_flag(flag, before)
        assert hash(flag) == hash_before
        with pytest.raises(ValueError, match="read-only"):
            (flag.mask if isinstance(flag, Rows) else flag.bits)[:] = 1


def test_a_subset_reads_as_what_it_is():
    assert repr(Rows(np.array([True, False, True]))) == "2 of 3 rows"
    assert repr(Rows(np.array([True, False, True]), 2)) == "2 of 3 rows along axis 2"
    many = np.zeros((40, 50), bool)
    many.flat[:1234] = True
    many[0, 0] = False
    assert repr(flag_from_mask(many)) == "1,233 of 2,000 elements"
    assert Rows(np.array([True, False])) != Rows(np.array([True, False]), 1)
    assert flag_from_mask(many) != "1,233 of 2,000 elements"


def test_equal_plans_share_one_trace_whatever_they_were_made_of():
    mask, traces = np.array([[True, False, True]] * 2), []
    params = {"w": np.ones((2, 3), np.float32)}
    specs = [fo.rows("w", [0, 2], axis=1), {"w": mask}, fo.elements("w", mask), {"w": mask[:1]}]
    specs.append(fo.rows("w", [0], axis=-1) | fo.rows("w", [2], axis=1))
    jitted = jax.jit(traces.append)
    for spec in specs:
        jitted(fo.freezable(optax.sgd(0.1, 0.9), spec).init(params))
    assert len(traces) == 1
