"""Rows of sparse matrices: an array of theirs has an entry, and no row, for each index."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import sparse

import freeze_optax as fo

EYE = jnp.eye(3)
MATRICES = [sparse.BCOO, sparse.BCSR, sparse.COO, sparse.CSR, sparse.CSC]


@pytest.mark.parametrize("cls", MATRICES)
@pytest.mark.parametrize("spec", ["w", "w/*", fo.everything, ["b", "w/0"]], ids=repr)
def test_rows_of_a_sparse_matrix_are_an_error_with_its_path(cls, spec):
    params = {"w": cls.fromdense(EYE), "b": jnp.ones(3)}
    for tree in (params, jax.eval_shape(lambda: params)):
        with pytest.raises(ValueError, match=f"'w' is a sparse matrix, a {cls.__name__}, .*dense"):
            fo.mask(fo.rows(spec, [2]), tree)
    with pytest.raises(ValueError, match="'' is a sparse matrix"):
        fo.mask(fo.rows(fo.everything, [2]), params["w"])


@pytest.mark.parametrize("cls", MATRICES)
def test_rows_beside_a_sparse_matrix_and_all_of_it_are_frozen(cls):
    params = {"w": cls.fromdense(EYE), "b": jnp.ones(3)}
    mask = fo.mask([fo.rows("b", [0]), "w"], params)
    assert mask["b"].tolist() == [True, False, False]
    assert all(jax.tree.leaves(mask["w"]))
    values, *indices = jax.tree.leaves(fo.mask(fo.rows("b", [0]), params)["w"])
    assert (values, set(indices)) == (False, {True})


@pytest.mark.usefixtures("standard_promotion")
def test_rows_of_a_batched_matrix_are_those_of_the_whole_matrix():
    dense = jnp.arange(1.0, 13).reshape(3, 2, 2)
    params = {"w": sparse.BCOO.fromdense(dense, n_batch=1)}
    tx = fo.freezable(optax.adam(0.1), fo.rows("w", [0, 2]))
    state = tx.init(params)
    grads = fo.grad(lambda params: (params["w"].todense() ** 2).sum(), state)(params)
    updates, state = tx.update(grads, state, params)
    after = fo.apply_updates(params, updates, state)["w"].todense()

    bare = optax.adam(0.1)
    updates, _ = bare.update(2 * dense[1], bare.init(dense[1]), dense[1])
    np.testing.assert_array_equal(after, dense.at[1].add(updates))


@pytest.mark.parametrize("part", ["rows", "elements"])
def test_numpy_doubles_of_which_a_part_trains_are_updated_as_jax_reads_them(part):
    params = {"a": np.ones((3, 2)), "b": np.ones(2)}
    mask = np.array([[True, True], [False, False], [False, False]])
    spec = fo.rows("a", [0]) if part == "rows" else fo.elements("a", mask)
    tx = fo.freezable(optax.sgd(0.25), spec)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["a"].dtype == jnp.float32
    np.testing.assert_array_equal(updates["a"], np.where(mask, -0.0, -0.25))
    after = fo.apply_updates(params, updates, frozen=spec)
    np.testing.assert_array_equal(after["a"], np.where(mask, 1.0, 0.75))
