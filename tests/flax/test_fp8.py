"""Flax's fp8 layers, whose scales are overwritten with their gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT as OWG
from flax.training.train_state import TrainState

import freeze_optax as fo
from freeze_optax._tree import overwritten

pytestmark = pytest.mark.usefixtures("standard_promotion")


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        dot = functools.partial(nn.Fp8DotGeneralOp, amax_history_length=3)
        return nn.Dense(2, name="head", dot_general_cls=dot)(
            nn.Dense(2, name="enc", dot_general_cls=dot)(x)
        )


NET, X = Net(), jnp.asarray([[0.5, -2.0], [3.0, 0.25]])


def loss(variables):
    return (NET.apply(variables, X) ** 2).mean()


@functools.cache
def variables():
    """The variables after a step of plain training, so that no scale is what `init` made."""
    state = TrainState.create(
        apply_fn=None, params=NET.init(jax.random.key(0), X), tx=optax.sgd(0.1)
    )
    for _ in range(2):
        state = state.apply_gradients(grads=jax.grad(loss)(state.params))
    return state.params


def with_enc(tree, params=None, scales=None):
    """A tree with other values in the encoder: what a frozen one is expected to have."""
    new = {name: dict(tree[name]) for name in tree}
    new["params"]["enc"] = tree["params"]["enc"] if params is None else params
    new[OWG]["enc"] = tree[OWG]["enc"] if scales is None else scales
    return new


def zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def train_state(frozen, inner=None, make=fo.freezable):
    tx = make(inner or optax.adam(0.1), frozen)
    return TrainState.create(apply_fn=None, params=variables(), tx=tx)


def test_the_name_of_the_collection_is_that_of_flax():
    assert overwritten.OVERWRITE_WITH_GRADIENT == OWG


def test_the_gradient_of_a_frozen_scale_is_its_value_and_of_others_the_next_value():
    plain, now = jax.grad(loss)(variables()), variables()
    assert not np.array_equal(*jax.tree.leaves([plain[OWG]["enc"], now[OWG]["enc"]])[::6][:2])
    kept = with_enc(plain, zeros(now["params"]["enc"]), now[OWG]["enc"])
    moving = with_enc(plain, zeros(now["params"]["enc"]))
    state = train_state("**/enc")
    for frozen, expected in (
        ("**/enc", kept),
        (state, moving),
        (state.opt_state, moving),
        ([state.opt_state, f"{OWG}/enc"], kept),
        (fo.nothing, plain),
        (fo.everything, {"params": zeros(now["params"]), OWG: now[OWG]}),
    ):
        value, grads = fo.value_and_grad(loss, frozen)(now)
        assert value == loss(now)
        assert_same(grads, expected)
    assert_same(jax.jit(fo.grad(loss, fo.everything))(now), expected)


def test_holes_and_rows_leave_scales_whole():
    now, plain = variables(), jax.grad(loss)(variables())
    grads = fo.grad(loss, "**/enc", holes=True)(now)
    assert_same(grads[OWG], with_enc(plain, scales=now[OWG]["enc"])[OWG])
    assert not jax.tree.leaves(grads["params"]["enc"])
    history = f"{OWG}/enc/Fp8DotGeneralOp_0/input_amax_history"
    grads = fo.grad(loss, fo.rows(history, [0]))(now)
    (old,), (new,), (got,) = (
        [tree[OWG]["enc"]["Fp8DotGeneralOp_0"]["input_amax_history"]]
        for tree in (now, plain, grads)
    )
    assert not np.array_equal(old, new)
    np.testing.assert_array_equal(got, np.concatenate([old[:1], new[1:]]))


def test_a_kept_scale_has_a_buffer_of_its_own_so_that_both_can_be_donated():
    now = jax.tree.map(jnp.copy, variables())
    grads = fo.grad(loss, fo.everything)(now)
    assert fo.tied_paths({"now": now[OWG], "grads": grads[OWG]}) == []


def test_a_frozen_encoder_keeps_its_params_and_scales_through_a_train_state():
    state = train_state("**/enc")
    head, adam = variables()["params"]["head"], optax.adam(0.1)
    expected, adam_state = variables(), adam.init(head)
    for _ in range(2):
        state = state.apply_gradients(grads=fo.grad(loss, "**/enc")(state.params))
        plain = jax.grad(loss)(expected)
        updates, adam_state = adam.update(plain["params"]["head"], adam_state)
        head = optax.apply_updates(head, updates)
        expected = {
            "params": {"enc": expected["params"]["enc"], "head": head},
            OWG: {"enc": expected[OWG]["enc"], "head": plain[OWG]["head"]},
        }
    assert_same(state.params, expected)


def test_a_schedule_follows_its_phases_on_all_variables():
    phases = fo.Phases({0: "enc", 1: fo.nothing})
    state = train_state(phases, make=fo.scheduled)
    plain = jax.grad(loss)(variables())
    grads = fo.grad(loss, state.opt_state)(variables())
    for a, b in zip(
        jax.tree.leaves(grads),
        jax.tree.leaves(with_enc(plain, zeros(plain["params"]["enc"]))),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)  # lax.switch compiles


def test_edits_reports_and_exports_take_all_variables_as_the_params_alone():
    now, params = variables(), variables()["params"]
    state = train_state("**/enc").opt_state
    tx = fo.freezable(optax.adam(0.1))
    thawed = fo.thaw(state, params, "enc/kernel")
    assert_same(fo.thaw(state, now, "params/enc/kernel"), thawed)
    assert_same(fo.freeze(thawed, now, "**/head"), fo.freeze(thawed, params, "head"))
    assert_same(fo.set_frozen(state, now, fo.nothing), fo.set_frozen(state, params, fo.nothing))
    plain = fo.release(thawed, params)
    assert_same(fo.release(thawed, now), plain)
    assert_same(fo.adopt(tx, plain, now), fo.adopt(tx, plain, params))
    exported = fo.export_state(thawed)
    assert_same(fo.import_state(tx, now, exported), thawed)
    moved = fo.import_state(tx, now, exported, frozen="params/enc")
    assert_same(moved, fo.import_state(tx, params, exported, frozen="enc"))
    assert fo.mask(state, now) == {"params": fo.mask(state, params), OWG: fo.mask(False, now[OWG])}
    whole, part = fo.summary(now, state), fo.summary(params, state)
    for name in ("state_bytes", "saved_bytes", "frozen", "frozen_bytes"):
        assert getattr(whole, name) == getattr(part, name)
    by_spec = fo.summary(now, "params/enc", optax.adam(0.1))
    assert by_spec.to_dict() == whole.to_dict()


def test_an_update_with_all_variables_says_what_to_write():
    state, grads = train_state("**/enc"), jax.grad(loss)(variables())
    match = r"the gradient is of all variables, .* write tx\.update\(grads\['params'\], state"
    with pytest.raises(ValueError, match=match):
        state.tx.update(grads, state.opt_state, variables())


def test_variables_of_other_params_are_an_error_that_names_them():
    state = train_state("**/enc").opt_state
    other = {"params": {"other": jnp.ones(2)}, OWG: variables()[OWG]}
    with pytest.raises(ValueError, match="different params: only in the tree: 'other'; only in"):
        fo.mask(state, other)
