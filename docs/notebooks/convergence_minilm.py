# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fine-tuning that freezes what has converged
#
# After this notebook you can let a training run decide when each layer of a pretrained transformer
# is frozen. You can say what that saves in operations and in time, compilations included, and what
# it costs in accuracy, against layers that are fixed beforehand, layers that are chosen by their
# weights, and fine-tuning everything.
#
# The model, its weights and the task are those of [the notebook on MiniLM](minilm.py): from which
# package of Python's standard library is a docstring? This cell runs the four sections of that
# notebook that define them.

# %%
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import freeze_optax as fo

source = Path("minilm.py").read_text(encoding="utf-8")
sections = re.split(r"^# %% \[markdown\]\n# ##? (.*)\n", source, flags=re.MULTILINE)
sections = dict(zip(sections[1::2], sections[2::2], strict=True))
minilm = {"__name__": "__main__"}
for name in ("Fine-tuning a pretrained transformer", "BERT in Flax", "Its weights", "The task"):
    exec(sections[name], minilm)
WIDTH, MODEL, pretrained = (minilm[x] for x in ("WIDTH", "MODEL", "pretrained"))
SHORT, TRAIN, TEST = (minilm[x] for x in ("SHORT", "TRAIN", "TEST"))
STEPS, EVERY, BATCH, SEEDS = (4, 2, 8, 1) if SHORT else (160, 16, 16, 5)
CLASSES = len(minilm["PACKAGES"])

# %% [markdown]
# ## Four ways to fine-tune
#
# The head is new, so it trains in all four:
#
# - **everything** trains;
# - **fixed**: the embeddings and the first four of six layers are frozen;
# - **most signal**: of each kind of matrix in the layers a quarter trains, that with the best
#   signal-to-noise ratio of its singular values, as in Spectrum;
# - **convergence**: all train at first. Every 16 steps a policy decides. It freezes the embeddings
#   and the layers in order, as long as the gradient of a layer, relative to its weights, is in the
#   lower three quarters of those that still train.

# %%
GROUPS = ["embeddings", *(f"encoder/layer_{i}" for i in range(6))]
POLICY = fo.Convergence(GROUPS, quantile=0.75, patience=EVERY, every=EVERY)
signal = fo.weight_scores(pretrained, frozen=["embeddings", "head"])
MOST_SIGNAL = fo.top_leaves(signal, 0.25, within="kind")


def adamw():
    schedule = optax.warmup_cosine_decay_schedule(0, 4e-4, STEPS // 6, STEPS)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))


WAYS = {
    "everything": fo.freezable(adamw()),
    "fixed": fo.freezable(adamw(), fo.layers("encoder/layer_*")[:-2] | "embeddings"),
    "most signal": fo.freezable(adamw(), ~(MOST_SIGNAL | "head")),
    "convergence": fo.freezable(fo.measured(adamw())),
}
for name, tx in WAYS.items():
    mask = fo.mask(tx.init(pretrained), pretrained)
    sizes = [x.size for x in jax.tree.leaves(fo.partition(pretrained, mask)[0])]
    print(f"{name:12}{sum(sizes):11,} parameters in {len(sizes):3} leaves train at first")

# %% [markdown]
# All have the same rate, which was not tuned for any of them.
#
# ## A run
#
# A run counts the seconds of all that it does: steps, decisions, edits and compilations. The
# operations are what XLA counts for the compiled step, times the steps.


# %%
def loss_fn(params, tokens, labels):
    logits = MODEL.apply({"params": params}, tokens)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Run:
    """A way of fine-tuning, from one seed."""

    def __init__(self, tx, seed):
        self.tx, self.rng, self.program = tx, np.random.default_rng(seed), None
        kernel = jax.random.normal(jax.random.key(seed), (WIDTH, CLASSES)) / WIDTH**0.5
        head = {"kernel": kernel, "bias": jnp.zeros(CLASSES)}
        self.params = jax.tree.map(jnp.array, {**pretrained, "head": head})  # a copy
        self.state = tx.init(self.params)
        self.seconds = self.compiling = self.flops = self.compilations = 0
        self.frozen = []

    def compile(self, *batch):
        """Compiles the step for what is frozen now."""

        def step(params, state, *batch):
            grads = fo.grad(loss_fn, frozen=state)(params, *batch)
            updates, state = self.tx.update(grads, state, params)
            return fo.apply_updates(params, updates, frozen=state), state

        begin = time.perf_counter()
        jitted = jax.jit(step, donate_argnums=(0, 1))
        self.program = jitted.lower(self.params, self.state, *batch).compile()
        self.compiling += time.perf_counter() - begin
        self.compilations += 1


# %%
def step(run, i, policy=None):
    rows = run.rng.integers(len(TRAIN[1]), size=BATCH)
    batch = TRAIN[0][rows], TRAIN[1][rows]
    begin = time.perf_counter()
    if policy is not None:
        decision = policy.at(i, run.state, run.params)
        if decision.changed:
            run.state = fo.set_frozen(run.state, run.params, decision)
            run.program = None
    if run.program is None:
        run.compile(*batch)
    run.params, run.state = jax.block_until_ready(run.program(run.params, run.state, *batch))
    run.seconds += time.perf_counter() - begin
    run.flops += run.program.cost_analysis()["flops"]
    mask = fo.mask(run.state, run.params)
    groups = [mask["embeddings"], *mask["encoder"].values()]
    run.frozen.append([np.mean(jax.tree.leaves(group)) for group in groups])


@jax.jit
def answers(params, tokens):
    def answer(x):
        return MODEL.apply({"params": params}, x[None]).argmax()

    return jax.lax.map(answer, tokens, batch_size=64)


# %% [markdown]
# ## The runs
#
# Each seed has another head and other batches. All four ways take each step in turn, on the same
# batch. So if something else slows the machine, it slows all of them.

# %%
runs = {name: [] for name in WAYS}
for seed in range(SEEDS):
    of_seed = {name: Run(tx, seed) for name, tx in WAYS.items()}
    for i in range(STEPS):
        for name, run in of_seed.items():
            step(run, i, POLICY if name == "convergence" else None)
    for name, run in of_seed.items():
        run.accuracy = float((answers(run.params, TEST[0]) == TEST[1]).mean())
        run.params = run.state = run.program = None
        runs[name].append(run)

# %% [markdown]
# ## Results
#
# Accuracies are means over the seeds, with one standard error. Times and operations are relative to
# those of training everything from the same seed.

# %%
print(" " * 12, "       test     FLOPs    time  of it to  compilations", sep="")
print(" " * 12, "   accuracy                     compile", sep="")
results = {}
for name, of_way in runs.items():
    accuracies = np.array([run.accuracy for run in of_way])
    pairs = list(zip(of_way, runs["everything"], strict=True))
    results[name] = x = {
        "accuracy": accuracies.mean(),
        "error": accuracies.std(ddof=1) / SEEDS**0.5 if SEEDS > 1 else 0.0,
        "flops": np.mean([run.flops / full.flops for run, full in pairs]),
        "time": np.mean([run.seconds / full.seconds for run, full in pairs]),
        "compiling": np.mean([run.compiling / full.seconds for run, full in pairs]),
        "compilations": np.mean([run.compilations for run in of_way]),
    }
    print(f"{name:12}{x['accuracy']:7.1%} ±{x['error']:4.1%}{x['flops']:8.2f}", end="")
    print(f"{x['time']:8.2f}{x['compiling']:10.2f}{x['compilations']:14.1f}")

# %%
figure, rows = plt.subplots(4, figsize=(8, 5), sharex=True, layout="constrained")
for axes, (name, of_way) in zip(rows, runs.items(), strict=True):
    share = np.mean([run.frozen for run in of_way], axis=0).T
    image = axes.imshow(share, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="none")
    axes.set_yticks(range(7), ["embeddings", *map(str, range(6))], fontsize=7)
    axes.set_title(name, fontsize=9, loc="left")
rows[-1].set_xlabel("step")
figure.colorbar(image, ax=rows, label="frozen leaves, mean over the seeds")
plt.show()

# %%
everything, fixed, most_signal, convergence = results.values()
assert POLICY.most_changes(STEPS) >= convergence["compilations"] - 1
assert all(x["compilations"] == 1 for x in (everything, fixed, most_signal))
if not SHORT:
    assert convergence["flops"] < 0.7
    assert convergence["time"] < 0.8
    assert all(x["accuracy"] > 0.7 for x in results.values())

# %% [markdown]
# What this shows, and what it does not:
#
# - The policy freezes the embeddings and four layers at its first decision, and a fifth at its
#   second, from all five seeds. Then one layer and the head are left, and the last group is never
#   below a quantile of itself.
# - It takes half of the operations and 0.64 of the time of training everything. A quarter of the
#   time of the latter goes into three compilations. In a run of thousands of steps they would not
#   count.
# - It costs 0.8 points of accuracy: one and a half times the standard error of the difference. So
#   this rule froze a little too much.
# - Who knows which layers to freeze does better: the four layers and the embeddings, fixed from the
#   first step, are better than everything here, and the fastest. A policy is for when you do not
#   know.
# - It is one small task and one rate. Two other numbers were tried for one seed, with the same
#   quantile: `gradient_change / gradient`, with which embeddings and one layer were frozen after
#   two thirds of the run, and `update / norm`, with which the embeddings were frozen and no layer.
#   With a quantile of 0.5 the relative gradient froze the embeddings and four layers, in three
#   decisions.
#
# The figures are of a machine with two cores that did other work too. This repeats them:
# `python docs/notebooks/store.py --write convergence_minilm`.
