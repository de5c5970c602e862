"""Trains LoRA adapters of a transformer in Flax NNX, thaws its norms in place, and stores both.

The transformer reads images of digits row by row. It is pretrained on upright digits. Then it
learns digits that lie on their side, with a frozen base: first by adapters alone, then by the norms
too. What was trained goes to a file of its own, and from there into a fresh base.
"""

import tempfile
from pathlib import Path

import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from tqdm import tqdm

import freeze_optax as fo
from freeze_optax import nnx as fnnx

WIDTH, HEADS, RANK, BATCH, TESTED = 64, 4, 4, 64, 400
PRETRAINING, ADAPTERS_ALONE, WITH_NORMS = 300, 120, 120
NORMS, TX = fo.of_type(nnx.LayerNorm), optax.adamw(3e-3)


class Block(nnx.Module):
    """Attention and an MLP, with an adapter at each projection."""

    def __init__(self, rngs):
        def projection(inputs, outputs):
            return nnx.LoRALinear(inputs, outputs, lora_rank=RANK, rngs=rngs)

        self.query, self.key, self.value, self.out = (projection(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = projection(WIDTH, 4 * WIDTH), projection(4 * WIDTH, WIDTH)
        self.norm_attention, self.norm_mlp = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        """Adds the attention between the rows, and the MLP of each."""
        y = self.norm_attention(x)
        split = (*y.shape[:2], HEADS, WIDTH // HEADS)
        query, key, value = (f(y).reshape(split) for f in (self.query, self.key, self.value))
        x = x + self.out(nnx.dot_product_attention(query, key, value).reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm_mlp(x))))


class Transformer(nnx.Module):
    """Two blocks over the eight rows of an image."""

    def __init__(self, rngs):
        self.embed = nnx.Linear(8, WIDTH, rngs=rngs)
        self.positions = nnx.Param(0.02 * rngs.params.normal((8, WIDTH)))
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, images):
        """Turns images into the logits of ten digits."""
        x = self.embed(images) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.mean(1)))


def loss_fn(model, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


@nnx.jit
def step(model, optimizer, batch):
    optimizer.update(model, fnnx.grad(loss_fn, frozen=optimizer)(model, *batch))


@nnx.jit
def step_by_nnx_alone(model, optimizers, batch):
    """The reference: an optimizer for each group of Variables, and no `freeze_optax`."""
    trainable = nnx.DiffState(0, nnx.Any(*(optimizer.wrt for optimizer in optimizers)))
    grads = nnx.grad(loss_fn, argnums=trainable)(model, *batch)
    for optimizer in optimizers:
        optimizer.update(model, nnx.state(grads, optimizer.wrt))


@nnx.jit
def logits(model, images):
    return model(images[:TESTED])


def accuracy(model, images, labels):
    return float((logits(model, images).argmax(-1) == labels[:TESTED]).mean())


def batches(images, labels, steps, title):
    rng = np.random.default_rng(0)
    for _ in tqdm(range(steps), title):
        rows = rng.integers(TESTED, len(images), BATCH)
        yield images[rows], labels[rows]


def save(file, model, frozen):
    """Stores the variables that are not frozen, under their paths; returns the size in bytes."""
    variables = nnx.to_flat_state(nnx.state(model, fnnx.wrt(model, frozen)))
    np.savez(file, **{"/".join(map(str, path)): np.asarray(x[...]) for path, x in variables})
    return file.stat().st_size


if __name__ == "__main__":
    digits = load_digits()
    labels, upright = digits.target, digits.images.astype(np.float32) / 16
    turned = np.ascontiguousarray(np.rot90(upright, axes=(1, 2)))

    # Until they train, the adapters add zero.
    model = Transformer(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, fo.freezable(TX, nnx.LoRAParam), wrt=nnx.Param)
    for batch in batches(upright, labels, PRETRAINING, "pretraining"):
        step(model, optimizer, batch)
    base, reference = nnx.clone(model), nnx.clone(model)

    optimizer = nnx.Optimizer(model, fo.freezable(TX, nnx.Not(nnx.LoRAParam)), wrt=nnx.Param)
    optimizers = [nnx.Optimizer(reference, TX, wrt=nnx.LoRAParam)]
    for batch in batches(turned, labels, ADAPTERS_ALONE, "adapters alone"):
        step(model, optimizer, batch)
        step_by_nnx_alone(reference, optimizers, batch)
    fo.testing.assert_frozen(base, model, ~fo.of_type(nnx.LoRAParam))
    stages = [base, nnx.clone(model), model]

    # The adapters keep their moments. The norms begin like variables of a new optimizer.
    fnnx.thaw(optimizer, model, NORMS)
    optimizers.append(nnx.Optimizer(reference, TX, wrt=lambda path, _: "norm" in str(path)))
    for batch in batches(turned, labels, WITH_NORMS, "adapters and norms"):
        step(model, optimizer, batch)
        step_by_nnx_alone(reference, optimizers, batch)
    fo.testing.assert_frozen(base, model, ~(fo.of_type(nnx.LoRAParam) | NORMS))
    fo.testing.assert_frozen(reference, model, fo.everything)

    fresh = Transformer(nnx.Rngs(1))
    with tempfile.TemporaryDirectory() as folder:
        base_file, trained_file = Path(folder, "base.npz"), Path(folder, "trained.npz")
        base_bytes = save(base_file, base, nnx.LoRAParam)
        trained_bytes = save(trained_file, model, optimizer)
        for file in (base_file, trained_file):
            with np.load(file) as arrays:
                nnx.update(fresh, fo.assign(nnx.state(fresh, nnx.Param), dict(arrays)))
    fo.testing.assert_frozen(logits(model, turned), logits(fresh, turned), fo.everything)

    print(fo.summary(nnx.state(model, nnx.Param), optimizer, depth=1))
    print(f"file of the base: {base_bytes:,} bytes; of what was trained: {trained_bytes:,} bytes")
    print(f"accuracy of the base on upright digits: {accuracy(base, upright, labels):.1%}")
    before, between, after = (accuracy(x, turned, labels) for x in stages)
    print(f"on turned ones: {before:.1%}, with adapters {between:.1%}, with norms too {after:.1%}")
    assert trained_bytes < base_bytes / 5
    assert after > before + 0.5
