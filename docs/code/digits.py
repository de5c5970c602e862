"""Handwritten digits, five at a time, and a small network that tells them apart."""

import flax.linen as nn
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


class Classifier(nn.Module):
    """Two convolutions, a dense layer, and a linear head for five digits."""

    @nn.compact
    def __call__(self, x):
        """Turns images into logits."""
        x = nn.relu(nn.Conv(16, (3, 3), name="conv_0")(x))
        x = nn.relu(nn.Conv(32, (3, 3), 2, name="conv_1")(x))
        x = nn.relu(nn.Dense(64, name="dense")(x.reshape(len(x), -1)))
        return nn.Dense(5, name="head")(x)


def loss_fn(params, images, labels):
    logits = Classifier().apply({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def five_digits(first):
    """Gives images and labels of five digits, to train on and to test on."""
    images, digits = load_digits(return_X_y=True)
    chosen = (first <= digits) & (digits < first + 5)
    images = images[chosen].reshape(-1, 8, 8, 1).astype(np.float32) / 16
    labels = (digits[chosen] - first).astype(np.int32)
    split = train_test_split(images, labels, test_size=0.4, stratify=labels, random_state=0)
    return split[::2], split[1::2]


def batches(data, steps):
    """Draws batches of 32 examples."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.integers(len(data[0]), size=32)
        yield [x[rows] for x in data]
