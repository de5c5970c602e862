"""Trains LoRA adapters on a Flax Linen transformer that qwix has quantized to four bits (QLoRA).

The transformer reads images of digits row by row. It is pretrained in float32 on upright digits and
then quantized. On this base adapters learn digits that lie on their side. Values and scales of a
quantized kernel are frozen as a unit.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax.traverse_util import flatten_dict, unflatten_dict
from sklearn.datasets import load_digits
from tqdm import tqdm

import freeze_optax as fo

WIDTH, HEADS, BATCH, TESTED, PRETRAINING, FINE_TUNING = 64, 4, 64, 400, 300, 300
ADAM = optax.adamw(3e-3)
PROVIDER = qwix.LoraProvider(
    module_path="block_.*", rank=4, alpha=4.0, weight_qtype="nf4", tile_size=32
)


class Block(nn.Module):
    """Attention and an MLP."""

    @nn.compact
    def __call__(self, x):
        """Adds the attention between the rows, and the MLP of each."""
        project = functools.partial(nn.Dense, use_bias=False)
        y = nn.LayerNorm(name="norm_attention")(x)
        split = (*y.shape[:2], HEADS, WIDTH // HEADS)
        qkv = (project(WIDTH, name=name)(y).reshape(split) for name in ("query", "key", "value"))
        y = jax.nn.dot_product_attention(*qkv).reshape(x.shape)
        x = x + project(WIDTH, name="out")(y)
        y = project(4 * WIDTH, name="up")(nn.LayerNorm(name="norm_mlp")(x))
        return x + project(WIDTH, name="down")(nn.gelu(y))


class Transformer(nn.Module):
    """Two blocks over the eight rows of an image."""

    @nn.compact
    def __call__(self, images):
        """Turns images into the logits of ten digits."""
        x = nn.Dense(WIDTH, name="embed")(images)
        x = x + self.param("positions", nn.initializers.normal(0.02), x.shape[1:])
        for i in range(2):
            x = Block(name=f"block_{i}")(x)
        return nn.Dense(10, name="head")(nn.LayerNorm(name="norm")(x.mean(1)))


def loss_fn(params, model, images, labels):
    logits = model.apply({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def step(model, tx, params, opt_state, batch):
    grads = fo.grad(loss_fn, frozen=opt_state)(params, model, *batch)
    updates, opt_state = tx.update(grads, opt_state, params)
    return fo.apply_updates(params, updates, frozen=opt_state), opt_state


@functools.partial(jax.jit, static_argnums=0)
def step_by_hand(model, adapters, opt_state, rest, batch):
    """The reference: optax on a dict of the adapters alone, and no `freeze_optax`."""

    def loss_of_adapters(adapters):
        return loss_fn(unflatten_dict({**rest, **adapters}), model, *batch)

    updates, opt_state = ADAM.update(jax.grad(loss_of_adapters)(adapters), opt_state, adapters)
    return optax.apply_updates(adapters, updates), opt_state


def accuracy(model, params, images, labels):
    logits = jax.jit(model.apply)({"params": params}, images[:TESTED])
    return float((logits.argmax(-1) == labels[:TESTED]).mean())


def batches(images, labels, steps, title):
    rng = np.random.default_rng(0)
    for _ in tqdm(range(steps), title):
        rows = rng.integers(TESTED, len(images), BATCH)
        yield images[rows], labels[rows]


if __name__ == "__main__":
    digits = load_digits()
    labels, upright = digits.target, digits.images.astype(np.float32) / 16
    turned = np.ascontiguousarray(np.rot90(upright, axes=(1, 2)))

    model, tx = Transformer(), fo.freezable(ADAM)
    base = model.init(jax.random.key(0), upright[:1])["params"]
    opt_state = tx.init(base)
    for batch in batches(upright, labels, PRETRAINING, "pretraining"):
        base, opt_state = step(model, tx, base, opt_state, batch)

    qlora = qwix.apply_lora_to_model(model, PROVIDER)
    params = qlora.init(jax.random.key(1), upright[:1])["params"]
    quantized = qwix.quantize_params(base, params)
    params = unflatten_dict({**flatten_dict(params), **flatten_dict(quantized)})
    on_upright = accuracy(model, base, upright, labels), accuracy(qlora, params, upright, labels)
    before = accuracy(qlora, params, turned, labels)
    float_bytes = fo.summary(base).trainable_bytes

    # All but the adapters. A list of what the base has would miss a bias in another model.
    tx = fo.freezable(ADAM, frozen=~fo.path("**/*_lora_*"))
    opt_state = tx.init(params)
    # A copy for the reference, as the step donates the params.
    rest = flatten_dict(jax.tree.map(jnp.copy, params))
    adapters = {path: rest.pop(path) for path in list(rest) if "_lora_" in path[-1]}
    by_hand = ADAM.init(adapters)
    for batch in batches(turned, labels, FINE_TUNING, "fine-tuning"):
        params, opt_state = step(qlora, tx, params, opt_state, batch)
        adapters, by_hand = step_by_hand(qlora, adapters, by_hand, rest, batch)
    # `rest` is the base as it was, so this compares each bit of the values and scales too.
    fo.testing.assert_frozen(unflatten_dict({**rest, **adapters}), params, fo.everything)

    summary = fo.summary(params, opt_state, depth=1)
    print(summary)
    print(f"base: {float_bytes:,} bytes in float32, {summary.frozen_bytes:,} bytes quantized")
    print("accuracy on upright digits: {:.1%}, of the quantized base {:.1%}".format(*on_upright))
    after = accuracy(qlora, params, turned, labels)
    print(f"on turned ones: {before:.1%}, with adapters {after:.1%}")
    assert summary.state_bytes == sum(x.nbytes for x in jax.tree.leaves(by_hand))
    assert summary.frozen_bytes < float_bytes / 3
    assert after > before + 0.5
