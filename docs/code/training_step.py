"""A jitted training step for the small model, which counts how often it is traced."""

import functools

import jax
from small_model import loss_fn

import freeze_optax as fo


def make_step(tx):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, batch):
        step.traces += 1  # this line runs while jit traces the function, and only then
        loss, grads = fo.value_and_grad(loss_fn, frozen=opt_state)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = fo.apply_updates(params, updates, frozen=opt_state)
        return params, opt_state, loss

    step.traces = 0
    return step
