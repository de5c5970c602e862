"""Imports onto params that have other shapes than at the export."""

import jax.numpy as jnp
import optax
import pytest

import freeze_optax as fo

PARAMS = {"head": jnp.ones(2), "table": jnp.ones((5, 2))}
ADAM = optax.adam(0.1)


@pytest.mark.parametrize(
    ("leaf", "shown"),
    [
        (jnp.ones((7, 2)), r"float32\[7, 2\]"),
        (jnp.ones((3, 2)), r"float32\[3, 2\]"),
        (jnp.ones(()), r"float32\[\]"),
        (1.0, "a float"),
    ],
)
def test_other_numbers_of_rows_are_shown_with_the_path_and_the_remedy(leaf, shown):
    tx = fo.freezable(ADAM, fo.rows("table", [0, 1]))
    exported = fo.export_state(tx.init(PARAMS))
    message = f"other params: 'table' has 5 rows in it, and is {shown} in the params; pass the "
    with pytest.raises(ValueError, match=message):
        fo.import_state(tx, {**PARAMS, "table": leaf}, exported)


@pytest.mark.parametrize("spec", [fo.nothing, fo.rows("table", [0])])
def test_other_shapes_of_statistics_are_shown_with_the_remedy(spec):
    tx = fo.freezable(ADAM, spec)
    exported = fo.export_state(tx.init(PARAMS))
    with pytest.raises(ValueError, match=r"'inner/0/mu/table' is \(\[., 2\], .*only shapes differ"):
        fo.import_state(tx, {**PARAMS, "table": jnp.ones((5, 3))}, exported)
