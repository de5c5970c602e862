"""Fine-tunes a network on handwritten digits in three ways, and shows what each one costs.

A small convolutional network learns the digits 0 to 4. Then it gets a new head and learns 5 to 9:
with everything trained, with its backbone frozen by optax alone, and frozen by `freeze_optax`.
"""

import argparse
import functools
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import freeze_optax as fo


class Backbone(nn.Module):
    """Four convolutions."""

    @nn.compact
    def __call__(self, x):
        """Turns images into feature vectors."""
        for features, stride in [(32, 1), (64, 2), (128, 1), (128, 2)]:
            x = nn.relu(nn.Conv(features, (3, 3), stride)(x))
        return x.reshape(len(x), -1)


class Classifier(nn.Module):
    """A backbone and a linear head."""

    @nn.compact
    def __call__(self, images):
        """Turns images into the logits of five digits."""
        return nn.Dense(5, name="head")(Backbone(name="backbone")(images))


def loss_fn(params, images, labels):
    logits = Classifier().apply({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def accuracy(params, images, labels):
    logits = Classifier().apply({"params": params}, images)
    return (logits.argmax(-1) == labels).mean()


def plain_step(tx):
    """Makes the training step that everyone writes."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, images, labels):
        loss, grads = jax.value_and_grad(loss_fn)(params, images, labels)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


def freezing_step(tx):
    """Makes the same step, except that the optimizer state tells it what is frozen."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, images, labels):
        loss, grads = fo.value_and_grad(loss_fn, frozen=opt_state)(params, images, labels)
        updates, opt_state = tx.update(grads, opt_state, params)
        return fo.apply_updates(params, updates, frozen=opt_state), opt_state, loss

    return step


class Run:
    """One way to train: its compiled step, its params and accuracies so far, and its costs."""

    def __init__(self, name, make_step, tx, params, batch):
        self.name, self.seconds, self.curve = name, [], []
        # A copy, because the step donates its arguments and all runs have the same start.
        self.params = jax.tree.map(jnp.copy, params)
        self.opt_state = tx.init(self.params)
        self.step = make_step(tx).lower(self.params, self.opt_state, *batch).compile()

    def advance(self, batch):
        """Takes one step, and measures its time."""
        begin = time.perf_counter()
        out = jax.block_until_ready(self.step(self.params, self.opt_state, *batch))
        self.seconds.append(time.perf_counter() - begin)
        self.params, self.opt_state, _ = out

    def costs(self):
        """Gives what a step costs, by name; its time in ms."""
        analysis = self.step.cost_analysis()
        return {
            "optimizer state": sum(x.nbytes for x in jax.tree.leaves(self.opt_state)),
            "FLOPs": analysis["flops"],
            "bytes accessed": analysis["bytes accessed"],
            "step time": 1e3 * np.median(self.seconds),
        }


def three_ways(params, batch):
    """Sets up the runs to compare, all from the same params."""
    clip, adamw = optax.clip_by_global_norm(1.0), optax.adamw(1e-3)
    labels = {"backbone": "frozen", "head": "trainable"}
    parts = optax.partition({"frozen": optax.set_to_zero(), "trainable": adamw}, labels)
    # With the clip before the partition, the norm counts the gradients of the backbone, so they
    # have to be computed. With the clip inside, XLA would remove them as dead code.
    partition = optax.chain(clip, parts)
    freezable = fo.freezable(optax.chain(clip, adamw), frozen="backbone")
    return [
        Run("full training", plain_step, optax.chain(clip, adamw), params, batch),
        Run("optax.partition", plain_step, partition, params, batch),
        Run("freeze_optax", freezing_step, freezable, params, batch),
    ]


def five_digits(first):
    """Gives images and labels of five digits: a pair to train on, and a pair to test on."""
    images, digits = load_digits(return_X_y=True)
    chosen = (first <= digits) & (digits < first + 5)
    images = images[chosen].reshape(-1, 8, 8, 1).astype(np.float32) / 16
    labels = (digits[chosen] - first).astype(np.int32)
    split = train_test_split(images, labels, test_size=0.4, stratify=labels, random_state=0)
    return split[::2], split[1::2]


def batches(images, labels, steps, title):
    """Draws batches of 64 at random, behind a progress bar."""
    rng = np.random.default_rng(0)
    for _ in tqdm(range(steps), title, disable=None):
        rows = rng.integers(len(images), size=64)
        yield jax.device_put((images[rows], labels[rows]))


def backbone_bits(params):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(params["backbone"])]


def tabulate(runs, start):
    """Makes the table of the accuracies that the runs reached, and of their costs."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    for title in ("test\naccuracy", "optimizer\nstate", "\nFLOPs", "bytes\naccessed", "step\ntime"):
        table.add_column(title, justify="right")
    table.add_column("\nbackbone")
    for run in runs:
        state, flops, moved, ms = run.costs().values()
        costs = [decimal(state), f"{flops / 1e6:.0f} M", decimal(int(moved)), f"{ms:.1f} ms"]
        kept = backbone_bits(run.params) == backbone_bits(start)
        reached, fate = f"{run.curve[-1][1]:.1%}", "bit-identical" if kept else "changed"
        table.add_row(run.name, reached, *costs, fate)
    return table


def draw(runs, shares):
    """Draws the accuracy of each run over its steps, and its costs as shares of the first one's."""
    figure = Figure(figsize=(8, 3.6), dpi=200, layout="constrained")
    left, right = figure.subplots(1, 2)
    # Colours that the colour-blind can tell apart. One line is wide, to show behind another.
    styles = [("tab:blue", 2), ("orange", 5), ("black", 1.5)]
    for i, (run, (colour, width)) in enumerate(zip(runs, styles, strict=True)):
        steps, accuracies = np.transpose(run.curve)
        left.plot(steps, 100 * accuracies, color=colour, linewidth=width, label=run.name)
        places = np.arange(len(shares[i])) + 0.27 * (i - 1)
        bars = right.barh(places, [100 * x for x in shares[i].values()], 0.24, color=colour)
        right.bar_label(bars, fmt="%.0f", padding=3)
    left.set(title="Test accuracy, %", xlabel="step of fine-tuning")
    right.set(title="Cost of a step, % of full training", xlim=(0, 112))
    right.set_yticks(range(len(shares[0])), shares[0])
    right.invert_yaxis()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(runs), frameon=False)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build"), help="folder for digits.png")
    parser.add_argument("--steps", type=int, default=300, help="steps of fine-tuning")
    args = parser.parse_args()

    train, _ = five_digits(0)
    old, new = (Classifier().init(jax.random.key(i), train[0])["params"] for i in range(2))
    first = [x[:64] for x in train]
    pretraining = Run("pretraining", plain_step, optax.adamw(1e-3), old, first)
    for batch in batches(*train, 200, "pretraining on 0 to 4"):
        pretraining.advance(batch)

    train, test = five_digits(5)
    start = {"backbone": pretraining.params["backbone"], "head": new["head"]}
    runs = three_ways(start, first)
    for i, batch in enumerate(batches(*train, args.steps, "fine-tuning on 5 to 9"), 1):
        # In turns: if something else slows the machine, it slows all runs.
        for run in runs:
            run.advance(batch)
            if i % 10 == 0 or i == args.steps:
                run.curve.append((i, accuracy(run.params, *test)))

    console = Console()
    console.print("What freeze_optax froze:\n")
    console.print(fo.summary(runs[-1].params, runs[-1].opt_state))
    console.print("\nAccuracy and costs of each way:")
    console.print(tabulate(runs, start))
    fo.testing.assert_frozen(start, runs[-1].params, "backbone")
    count = len(backbone_bits(start))
    print(f"assert_frozen: all {count} leaves of the backbone are bit-identical.")
    whole = runs[0].costs()
    shares = [{name: cost / whole[name] for name, cost in run.costs().items()} for run in runs]
    for run, share in zip(runs[1:], shares[1:], strict=True):
        parts = ", ".join(f"{name} {x:.0%}" for name, x in share.items())
        print(f"{run.name}, of full training: {parts}.")
    args.out.mkdir(parents=True, exist_ok=True)
    draw(runs, shares).savefig(args.out / "digits.png")
    print(f"The figure is {args.out / 'digits.png'}.")


if __name__ == "__main__":
    main()
