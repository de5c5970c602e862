"""`hold` of a part of a leaf: both trees have the leaf in one shape and dtype."""

import jax.numpy as jnp
import numpy as np
import pytest

import freeze_optax as fo

LEAF = jnp.arange(12.0).reshape(4, 3)
PARTS = {"rows": fo.rows("m", [0]), "elements": fo.elements("m", np.eye(4, 3, dtype=bool))}
OTHERS = {
    "fewer columns": (jnp.zeros((4, 2)), r"float32\[4, 3\] in `new` and float32\[4, 2\] in `old`"),
    "more rows": (jnp.zeros((5, 3)), r"float32\[5, 3\] in `old`"),
    "one column": (jnp.zeros((4, 1)), r"float32\[4, 1\] in `old`"),
    "one axis": (jnp.zeros(4), r"float32\[4\] in `old`"),
    "bfloat16": (jnp.zeros((4, 3), jnp.bfloat16), r"bfloat16\[4, 3\] in `old`"),
    "complex": (jnp.zeros((4, 3), jnp.complex64), r"complex64\[4, 3\] in `old`"),
    "NumPy's doubles": (np.zeros((4, 3)), r"float64\[4, 3\] in `old`"),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("other", OTHERS)
def test_another_shape_or_dtype_is_an_error_with_both(other, part):
    old, message = OTHERS[other]
    with pytest.raises(ValueError, match=f"'m' is .*{message}; to keep a part of a leaf"):
        fo.hold({"m": LEAF}, {"m": old}, PARTS[part])


def test_a_whole_leaf_may_be_of_another_shape():
    old = jnp.zeros(2)
    assert fo.hold({"m": LEAF}, {"m": old}, "m")["m"] is old


def test_an_array_of_numpy_beside_one_of_jax_is_fine():
    old = np.full((4, 3), 7.0, np.float32)
    held = fo.hold({"m": LEAF}, {"m": old}, PARTS["rows"])["m"]
    np.testing.assert_array_equal(held, np.concatenate([old[:1], np.asarray(LEAF)[1:]]))
