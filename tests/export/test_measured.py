"""Norms of `measured` through checkpoints: all as it was, every bit."""

import io
import pickle
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import freeze_optax as fo
import freeze_optax.linen
from tests.support.measuring import ADAM, PARAMS, TX, Run, assert_close
from tests.support.memories import assert_same_bits

pytestmark = pytest.mark.usefixtures("standard_promotion")


def trained() -> Any:
    """A state with cohorts, a leaf in parts and a parked one."""
    run = Run(fo.freezable(fo.measured(ADAM), fo.rows("a", [0, 1]))).train(2)
    run.state = fo.thaw(run.state, PARAMS, fo.rows("a", [0]))
    run.train(1)
    return fo.freeze(run.state, PARAMS, "b/c", keep_state=True)


def through_orbax(exported: Any, folder: Any) -> Any:
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(folder / "exported", exported)
    checkpointer.wait_until_finished()
    return checkpointer.restore(folder / "exported")


def through_numpy(exported: Any, _: Any) -> Any:
    file = io.BytesIO()
    np.savez(file, **flax.traverse_util.flatten_dict(exported, sep="//"))
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        return flax.traverse_util.unflatten_dict(dict(arrays), sep="//")


@pytest.mark.parametrize("through", [through_orbax, through_numpy])
def test_an_export_comes_back_with_every_norm(through, tmp_path):
    state = trained()
    restored = fo.import_state(TX, PARAMS, through(fo.export_state(state), tmp_path))
    assert_same_bits(restored, state)
    assert_close(fo.scores(restored), fo.scores(state))
    moved = fo.import_state(TX, PARAMS, fo.export_state(state), frozen="a")
    assert_same_bits(moved, fo.set_frozen(state, PARAMS, "a"))
    steps = [Run(state=one).train(1).state for one in (state, restored)]
    assert_same_bits(*steps)


def test_a_checkpoint_from_before_names_what_it_lacks():
    for source, target in ((fo.freezable(ADAM), TX), (TX, fo.freezable(ADAM))):
        exported = fo.export_state(source.init(PARAMS))
        with pytest.raises(ValueError, match="norms/a"):
            fo.import_state(target, PARAMS, exported)


def test_pickle_and_flax_serialization_bring_back_every_bit():
    for state in (trained(), fo.measured(ADAM, by=lambda _: "all").init(PARAMS)):
        assert_same_bits(pickle.loads(pickle.dumps(state)), state)
        target = jax.tree.map(jnp.zeros_like, state)
        data = flax.serialization.to_bytes(state)
        assert_same_bits(flax.serialization.from_bytes(target, data), state)
    scores = fo.scores(trained())
    assert repr(pickle.loads(pickle.dumps(scores))) == repr(scores)
