"""Fine-tuning of the digit classifier: pretraining, batches, training."""

import jax
import numpy as np
import optax
from digits import Classifier, five_digits, loss_fn

import freeze_optax as fo

LAYERS = ["conv_0", "conv_1", "dense", "head"]  # from the lowest to the highest


def make_train(tx):
    """Makes a function that trains with `tx`, a `freezable`, and returns the losses too."""

    @jax.jit
    def step(params, opt_state, batch):
        loss, grads = fo.value_and_grad(loss_fn, frozen=opt_state)(params, *batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return fo.apply_updates(params, updates, frozen=opt_state), opt_state, loss

    def train(params, opt_state, batches):
        losses = []
        for batch in batches:
            params, opt_state, loss = step(params, opt_state, batch)
            losses.append(loss)
        return params, opt_state, np.array(losses)

    return train


def draw(data, steps, size, seed=0):
    """Draws batches of images and labels."""
    rows = np.random.default_rng(seed).integers(len(data[0]), size=(steps, size))
    return [[x[chosen] for x in data] for chosen in rows]


@jax.jit
def fresh_params(seed=0):
    return Classifier().init(jax.random.key(seed), np.zeros((1, 8, 8, 1), np.float32))["params"]


def pretrained_params():
    """Trains all layers on the digits 0 to 4, for 400 steps."""
    tx, params = fo.freezable(optax.adam(1e-3)), fresh_params()
    return make_train(tx)(params, tx.init(params), draw(five_digits(0)[0], 400, size=32))[0]


@jax.jit
def accuracy(params, data):
    images, labels = data
    return (Classifier().apply({"params": params}, images).argmax(-1) == labels).mean()
