"""FlowJAX: normalizing flows, with its own training loop and its own mark for what is fixed."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import freeze_optax as fo
from tests.support.bare_steps import DECAYING_ADAM, assert_same_bits, bare_steps, steps_with

pytest.importorskip("flowjax", reason="make lane-ecosystem installs it")

import paramax
from flowjax.distributions import Normal, Transformed
from flowjax.flows import masked_autoregressive_flow
from flowjax.train import fit_to_data

pytestmark = pytest.mark.usefixtures("standard_promotion")

X = 2.0 * jax.random.normal(jax.random.key(1), (40, 2)) + 1.0


def new_flow():
    base = Normal(jnp.zeros(2), jnp.ones(2))
    shape = {"base_dist": base, "flow_layers": 2, "nn_width": 4, "nn_depth": 1}
    return masked_autoregressive_flow(jax.random.key(0), **shape)


def loss_of(flow):
    return -paramax.unwrap(flow).log_prob(X).mean()


def trained(flow, spec):
    return steps_with(spec, loss_of, flow, eqx.filter_jit)


@pytest.mark.parametrize("spec", ["base_dist", fo.of_type(Normal)], ids=["path", "type"])
def test_a_base_distribution_is_held_and_the_rest_trains_as_by_hand(spec):
    flow = new_flow()
    entries = jax.tree.leaves_with_path(eqx.filter(flow, eqx.is_inexact_array))
    floats = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in entries}
    live = {path for path in floats if not path.startswith("base_dist")}
    assert_same_bits(trained(flow, spec), bare_steps(loss_of, flow, live.__contains__))


def test_what_it_marks_as_fixed_is_a_type_to_select():
    flow = eqx.tree_at(lambda x: x.base_dist, new_flow(), replace_fn=paramax.non_trainable)
    fixed = fo.of_type(paramax.NonTrainable)
    after = trained(flow, fixed)
    fo.testing.assert_frozen(flow, after, "base_dist")
    # Its gradient is zero by itself, but weight decay would move it.
    moved = trained(flow, fo.nothing).base_dist.bijection.scale.args[0].tree
    assert (moved != flow.base_dist.bijection.scale.args[0].tree).all()


def test_its_training_loop_takes_a_freezable_optimizer():
    flow, held = new_flow(), fo.path("base_dist")
    tx = fo.freezable(DECAYING_ADAM, held)
    options = {"max_epochs": 2, "batch_size": 20, "show_progress": False}
    after, losses = fit_to_data(jax.random.key(2), flow, X, optimizer=tx, **options)
    fo.testing.assert_frozen(flow, after, held)
    assert losses["train"][1] < losses["train"][0]
    assert isinstance(after, Transformed)
