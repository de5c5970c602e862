"""safetensors: a checkpoint is one flat dict, with dots in its names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freeze_optax as fo
from tests.support.bare_steps import assert_same_bits, bare_steps, steps_with

numpy_files = pytest.importorskip("safetensors.numpy", reason="it comes with the extra `cli`")

pytestmark = pytest.mark.usefixtures("standard_promotion")

BASE = {
    "encoder.layers.0.weight": np.linspace(-1.0, 1.0, 12, dtype=np.float32).reshape(3, 4),
    "encoder.layers.0.bias": np.array([-0.0, 1e-40, 1.0, np.inf], np.float32),
    "head.weight": np.ones((4, 2), np.float32),
}
ENCODER = fo.dotted("encoder")


def loss_of(params):
    x = jnp.ones(3) @ params["encoder.layers.0.weight"]
    return ((x @ params["head.weight"] - 1.0) ** 2).sum()


def trained(params):
    return steps_with(ENCODER, loss_of, params)


def test_a_file_trains_as_by_hand_and_its_frozen_part_is_stored_again_to_the_bit(tmp_path):
    numpy_files.save_file(BASE, tmp_path / "base.safetensors")
    params = jax.tree.map(jnp.asarray, numpy_files.load_file(tmp_path / "base.safetensors"))
    after = trained(params)
    assert_same_bits(after, bare_steps(loss_of, params, lambda path: path.startswith("head")))
    numpy_files.save_file(jax.device_get(after), tmp_path / "after.safetensors")
    stored = numpy_files.load_file(tmp_path / "after.safetensors")
    for name in ("encoder.layers.0.weight", "encoder.layers.0.bias"):
        assert stored[name].tobytes() == BASE[name].tobytes()


def test_the_part_that_trains_is_stored_alone_and_laid_over_the_base(tmp_path):
    after = trained(jax.tree.map(jnp.asarray, BASE))
    trainable, _ = fo.partition(jax.device_get(after), ENCODER)
    flat = {name: x for name, x in trainable.items() if isinstance(x, np.ndarray)}
    assert list(flat) == ["head.weight"]
    numpy_files.save_file(flat, tmp_path / "head.safetensors")
    loaded = BASE | numpy_files.load_file(tmp_path / "head.safetensors")
    assert_same_bits(jax.tree.map(jnp.asarray, loaded), after)
