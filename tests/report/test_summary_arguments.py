"""What `summary` takes for its arguments, and what it makes of odd ones."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo

SGD = optax.sgd(0.1, momentum=0.9)


def tree(*shape: Any) -> dict[str, Any]:
    return {"a": {"x": jax.ShapeDtypeStruct(shape, jnp.float32)}, "b": jnp.ones(2)}


@pytest.mark.parametrize("frozen", ["a", "b", fo.rows("a", slice(0, 2))])
def test_shapes_of_numpy_integers_say_the_same_as_those_of_python_and_go_through_json(frozen):
    summary = fo.summary(tree(np.int64(3), np.uint8(4)), frozen, SGD)
    assert json.dumps(summary.to_dict()) == json.dumps(
        fo.summary(tree(3, 4), frozen, SGD).to_dict()
    )


@pytest.mark.parametrize(
    "integer", [np.int64, np.uint8, jnp.asarray], ids=["int64", "uint8", "jax"]
)
def test_a_depth_is_any_integer(integer):
    for depth in range(3):
        rows = fo.summary(tree(3), depth=integer(depth)).rows
        assert rows == fo.summary(tree(3), depth=depth).rows
        assert len(rows) == (0, 2, 3)[depth]


@pytest.mark.parametrize("depth", [True, np.True_, 1.0, np.float32(1), "1", [1]], ids=repr)
def test_a_depth_that_is_no_integer_is_a_type_error(depth):
    with pytest.raises(TypeError, match="depth is a number of levels, an int, not "):
        fo.summary(tree(3), depth=depth)


def test_an_index_beyond_the_layers_is_an_index_error():
    with pytest.raises(IndexError, match=r"layers\('\*'\)\[2\] is out of range: '\*' names 2"):
        fo.summary(tree(3), fo.layers("*")[2], SGD)
