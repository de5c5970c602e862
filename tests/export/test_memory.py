"""Imported states are in the memory that the export names, or else in that of their params."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from tests.support.memories import (
    DEVICE,
    HOST,
    PLACES,
    assert_same_bits,
    kinds,
    make_params,
    on_host,
)

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_export_in_host_memory_is_imported_there(dtype, place):
    params = jax.tree.map(lambda x: x.astype(dtype), make_params(place))
    tx = fo.freezable(optax.chain(optax.add_noise(0.1, 0.5, 0), optax.adam(0.1)), "a")
    state = tx.init(params)
    state = on_host(fo.thaw(state, params, "a"))
    imported = fo.import_state(tx, params, fo.export_state(state))
    assert_same_bits(imported, state)
    # NumPy has no dtype of 16-bit brains: their bits are stored, in a new array.
    if dtype == jnp.float32:
        assert jax.tree.leaves(kinds(imported)) == jax.tree.leaves(kinds(state))
    moved = fo.import_state(tx, params, fo.export_state(state), frozen=["b"])
    assert_same_bits(moved, fo.freeze(fo.thaw(tx.init(params), params, "a"), params, "b"))


@pytest.mark.parametrize("place", PLACES)
def test_an_export_of_numpy_is_imported_beside_its_params(place):
    params = make_params(place)
    hosted = {**params, "a": on_host(params["a"])}
    tx = fo.freezable(optax.adam(0.1), "c")
    stored: Any = jax.tree.map(np.asarray, fo.export_state(tx.init(params)))
    imported = fo.import_state(tx, hosted, stored)
    assert_same_bits(imported, tx.init(params))
    mu = optax.tree_utils.tree_get(imported, "mu")
    assert kinds(mu) == {"a": HOST, "b": DEVICE, "c": optax.MaskedNode()}
    assert mu["a"].sharding == hosted["a"].sharding


@pytest.mark.parametrize("place", PLACES)
def test_factors_of_an_imported_state_are_in_device_memory_and_are_thawed(place):
    params = make_params(place)
    tx = fo.freezable(optax.chain(optax.sgd(0.1, momentum=0.9), fo.rates({}, 0.5)))
    state = fo.freeze(tx.init(params), params, "a", keep_state=True)
    placed = fo.place(params, state)
    imported = fo.import_state(tx, placed, fo.export_state(fo.place_state(state)))
    factors = optax.tree_utils.tree_get(imported, "factors")
    assert kinds(factors) == dict.fromkeys("abc", DEVICE)
    assert kinds(optax.tree_utils.tree_get(imported, "trace"))["a"] == HOST
    assert_same_bits(fo.thaw(imported, params, "a"), fo.thaw(state, params, "a"))
