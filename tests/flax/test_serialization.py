"""States in `flax.serialization`: their arrays and their plan, as bytes and back."""

import functools
import importlib

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import serialization
from flax.training import checkpoints
from flax.training.train_state import TrainState

import freeze_optax as fo
from freeze_optax import linen

pytestmark = pytest.mark.usefixtures("standard_promotion")

INNER = optax.chain(
    optax.add_noise(0.01, 0.55, key=jax.random.key(7)),
    optax.adam(optax.cosine_decay_schedule(0.1, 20)),
)


def params():
    return {
        "encoder": {"kernel": jnp.ones((4, 2)), "a/b": jnp.ones(2, jnp.bfloat16)},
        "head": {
            "kernel": nn.Partitioned(jnp.ones((2, 2)), names=("x", "y")),
            "scale": jnp.ones(()),
        },
    }


def train_state(tx):
    return TrainState.create(apply_fn=None, params=params(), tx=tx)


@jax.jit
def step(state):
    grads = jax.tree.map(lambda x: jnp.full_like(x, 0.3), state.params)
    return state.apply_gradients(grads=grads)


def edited(state, edit, *args, **kwargs):
    return state.replace(opt_state=edit(state.opt_state, state.params, *args, **kwargs))


def with_cohorts():
    tx = optax.MultiSteps(fo.freezable(INNER, "encoder"), 1).gradient_transformation()
    state = step(edited(step(train_state(tx)), fo.thaw, "encoder/kernel"))
    state = edited(state, fo.freeze, fo.rows("encoder/kernel", [0, 3]), keep_state=True)
    return step(edited(state, fo.freeze, "head/scale", keep_state=True))


def with_phases():
    phases = fo.Phases({0: "encoder", 1: fo.rows("encoder/kernel", [1]), 4: fo.nothing})
    return step(train_state(optax.chain(optax.clip(1.0), fo.scheduled(INNER, phases))))


STATES = {
    "one cohort": lambda: step(train_state(fo.freezable(INNER, "head"))),
    "cohorts, parked leaves, rows": with_cohorts,
    "phases": with_phases,
}


def plain(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        first, second = (np.asarray(plain(jnp.asarray(x))) for x in (a, b))
        assert (first.dtype, first.shape) == (second.dtype, second.shape)
        assert first.tobytes() == second.tobytes()


@pytest.fixture(scope="module", params=STATES.values(), ids=STATES)
def state(request):
    with jax.numpy_dtype_promotion("standard"):
        return request.param()


def test_bytes_restore_the_state_bit_for_bit_onto_the_same_plan(state):
    assert len(jax.tree.leaves(state)) > 8
    data = serialization.to_bytes(state)
    abstract = jax.eval_shape(lambda: state)
    for target in (state, abstract):
        assert_same(serialization.from_bytes(target, data), state)


def test_a_state_dict_of_the_state_alone_goes_into_import_state_with_its_plan(state):
    states = jax.tree.leaves(state, is_leaf=lambda x: type(x).__name__ == "FreezeState")
    (freeze_state,) = (x for x in states if type(x).__name__ == "FreezeState")
    saved = serialization.to_state_dict(freeze_state)
    restored = serialization.msgpack_restore(serialization.msgpack_serialize(saved))
    if not freeze_state.plan.schedule:
        tx = fo.freezable(INNER)
        assert_same(fo.import_state(tx, state.params, restored), freeze_state)


@pytest.mark.parametrize("orbax", [False, True])
def test_checkpoints_of_flax_keep_the_state(state, orbax, tmp_path, monkeypatch):
    previous = flax.config.flax_use_orbax_checkpointing
    flax.config.update("flax_use_orbax_checkpointing", orbax)
    try:
        checkpoints.save_checkpoint(tmp_path, state, 1)
        assert_same(checkpoints.restore_checkpoint(tmp_path, state), state)
    finally:
        flax.config.update("flax_use_orbax_checkpointing", previous)


@functools.cache
def saved_and_target():
    saved = with_cohorts().opt_state.inner_opt_state
    return serialization.to_state_dict(saved), saved


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (
            lambda state: fo.thaw(state, params(), "encoder/a/b"),
            "'encoder/a/b' is frozen in the saved state, and trains in cohort . in the target",
        ),
        (
            lambda state: fo.freeze(state, params(), fo.rows("encoder/kernel", [1])),
            "'encoder/kernel' .* in the rows 1, 2 in cohort .* in the saved state, and",
        ),
        (
            lambda state: fo.thaw(state, params(), "head/scale"),
            "'head/scale' is parked in cohort . in the saved state, and trains in cohort . in the",
        ),
        (
            lambda _: fo.freezable(INNER).init(params()),
            "with fo.set_frozen, fo.freeze and fo.thaw; or read .* fo.import_state",
        ),
        (
            lambda _: fo.freezable(INNER).init({"other": jnp.ones(2)}),
            "of other params: only in the saved state: .*; only in the target: 'other'",
        ),
        (
            lambda _: (
                fo.scheduled(INNER, fo.Phases({0: "head", 9: "encoder"})).init(params()).state
            ),
            r"follows no phases, the target phases from steps \[0, 9\]; make the target",
        ),
    ],
)
def test_restoring_onto_another_plan_names_what_differs_and_what_to_write(edit, match):
    saved, state = saved_and_target()
    with pytest.raises(ValueError, match=match):
        serialization.from_state_dict(edit(state), saved)


def test_arrays_of_another_transformation_or_shape_are_an_error_that_names_them():
    saved = serialization.to_state_dict(fo.freezable(optax.adam(0.1)).init({"w": jnp.ones(2)}))
    for tx, size, match in (
        (optax.adam(0.1), 3, r"'inner/0/mu/w' is \(\[2\], 'float32'\), not \(\[3\], 'float32'\)"),
        (optax.sgd(0.1, momentum=0.9), 2, "only in the state to be: 'inner/0/trace/w'"),
    ):
        with pytest.raises(ValueError, match=match):
            serialization.from_state_dict(fo.freezable(tx).init({"w": jnp.ones(size)}), saved)


def test_the_saved_state_of_a_plain_optimizer_names_adopt():
    saved = serialization.to_state_dict(optax.adam(0.1).init(params()))
    target = fo.freezable(optax.adam(0.1)).init(params())
    with pytest.raises(ValueError, match=r"it has '0', '1', not .*fo\.adopt\(freezable, state"):
        serialization.from_state_dict(target, saved)


def test_a_second_import_of_the_module_registers_again():
    importlib.reload(linen)
    assert serialization.is_serializable(fo.FreezeState)
