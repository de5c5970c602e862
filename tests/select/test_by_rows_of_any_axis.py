import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import sparse

import freeze_optax as fo

SHAPES = {"bias": (3,), "cube": (2, 4, 3), "kernel": (5, 3)}
TREE = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}


def _full(mask):
    """The mask of each leaf of `TREE`, with a bool for each element."""

    def full(name):
        x, shape = mask[name], SHAPES[name]
        x = x.reshape(-1, *[1] * (len(shape) - 1)) if np.ndim(x) == 1 else x
        return np.broadcast_to(x, shape)

    return {name: full(name) for name in SHAPES}


def _at(name, axis, indices):
    mask = np.zeros(SHAPES[name], bool)
    np.moveaxis(mask, axis, 0)[indices] = True
    return mask


ROWS = [slice(0, 2), slice(None, None, 2), [1], [-1, 0], [True, False, True], np.array([2])]


@pytest.mark.parametrize("rows", ROWS, ids=repr)
def test_rows_of_the_last_axis_are_those_of_each_leaf_whatever_its_rank(rows):
    mask = fo.rows("**", rows, axis=-1)(TREE)
    for name, full in _full(mask).items():
        np.testing.assert_array_equal(full, _at(name, -1, rows))
    assert {name: np.shape(x) for name, x in mask.items()} == {
        "bias": (3,),
        "cube": (1, 1, 3),
        "kernel": (1, 3),
    }


@pytest.mark.parametrize("name", SHAPES)
def test_an_axis_is_counted_from_either_end(name):
    rank = len(SHAPES[name])
    for axis in range(rank):
        masks = [fo.rows(name, [0], axis=a)(TREE) for a in (axis, axis - rank, np.int64(axis))]
        for mask in masks:
            full = _full(mask)
            np.testing.assert_array_equal(full.pop(name), _at(name, axis, [0]))
            assert not any(x.any() for x in full.values())


def test_the_rows_of_an_inner_axis_are_read_back_from_the_mask():
    for axis in (1, 2, -1, -2):
        mask = fo.rows("cube", [0, 1], axis=axis)(TREE)
        again = fo.mask(mask, TREE)
        np.testing.assert_array_equal(again["cube"], mask["cube"])
        assert fo.mask(jax.tree.map(jnp.asarray, mask), TREE)["cube"].shape == mask["cube"].shape
    assert fo.rows("cube", slice(None), axis=1)(TREE)["cube"] is True
    assert fo.rows("cube", [], axis=1)(TREE)["cube"] is False


@pytest.mark.parametrize(
    ("spec", "axis", "message"),
    [
        ("kernel", 2, r"the leaf 'kernel' is of shape \(5, 3\), so it has no axis 2"),
        ("kernel", -3, r"the leaf 'kernel' is of shape \(5, 3\), so it has no axis -3"),
        ("**", 1, r"the leaf 'bias' is of shape \(3,\), so it has no axis 1"),
        ("scale", -1, r"the leaf 'scale' is a scalar, of shape \(\), and has no rows"),
    ],
)
def test_an_axis_that_a_leaf_has_not_is_an_error_with_its_path(spec, axis, message):
    with pytest.raises(ValueError, match=message):
        fo.rows(spec, [0], axis=axis)({**TREE, "scale": jnp.zeros(())})


def test_rows_beyond_the_length_of_the_axis_are_an_error_that_says_the_axis():
    with pytest.raises(ValueError, match=r"rows\(.*axis=1\): the leaf 'kernel' .* row 4 is out"):
        fo.rows("kernel", [4], axis=1)(TREE)
    with pytest.raises(
        ValueError, match=r"axis=-1\): .*'kernel' is of shape \(5, 3\), so 5 is out"
    ):
        fo.rows("kernel", slice(0, 5), axis=-1)(TREE)
    with pytest.raises(
        ValueError, match=r"'kernel' is of shape \(5, 3\), so it takes 3 bools, not"
    ):
        fo.rows("kernel", [True] * 5, axis=1)(TREE)


@pytest.mark.parametrize("axis", [True, 1.0, "1", None, (0, 1), np.bool_(1)], ids=repr)
def test_an_axis_that_is_no_integer_is_an_error_at_once(axis):
    with pytest.raises(TypeError, match="the axis of rows is an integer, not"):
        fo.rows("kernel", [0], axis=axis)


def test_a_traced_axis_is_an_error_at_once():
    with pytest.raises(TypeError, match="the axis of rows is an integer, not"):
        jax.jit(lambda axis: fo.rows("kernel", [0], axis=axis)(TREE))(1)


def test_a_sparse_matrix_has_no_rows_along_an_inner_axis():
    matrix = sparse.BCOO.fromdense(jnp.eye(3))
    with pytest.raises(ValueError, match="'w' is a sparse matrix"):
        fo.rows("w", [0], axis=1)({"w": matrix})
    batched = sparse.BCOO.fromdense(jnp.ones((2, 3, 3)), n_batch=1)
    assert fo.rows("w", [0])({"w": batched})
    with pytest.raises(ValueError, match="'w' is a sparse matrix"):
        fo.rows("w", [0], axis=1)({"w": batched})


def test_each_leaf_is_cut_along_the_axis_of_its_own_spec():
    mask = fo.mask([fo.rows("cube", [1], axis=1), fo.rows("kernel", [0]), "bias"], TREE)
    full = _full(mask)
    np.testing.assert_array_equal(full["cube"], _at("cube", 1, [1]))
    np.testing.assert_array_equal(full["kernel"], _at("kernel", 0, [0]))
    assert full["bias"].all()


def test_the_repr_shows_the_axis():
    assert repr(fo.rows("w", [0])) == "rows(path('w'), 1 indices)"
    assert repr(fo.rows("w", slice(0, 2), axis=1)) == "rows(path('w'), slice(0, 2), axis=1)"
    assert repr(fo.rows("w", [0], axis=-1)) == "rows(path('w'), 1 indices, axis=-1)"
