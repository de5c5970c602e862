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
# # Gradual unfreezing
#
# After this notebook you can thaw a pretrained network layer group by layer group, from the top
# down, as ULMFiT does ([Howard and Ruder, 2018](https://arxiv.org/abs/1801.06146)). You can write
# the phases as data. You can interrupt and resume the run at any step without changing one bit of
# it. And you can say what is lost when the optimizer is started anew at each thaw, and what is not.
#
# The task: a small convolutional network learns the digits 0 to 4 of scikit-learn's handwritten
# digits. Then it gets a new head and learns 5 to 9.

# %%
import functools
import tempfile
from pathlib import Path

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import freeze_optax as fo

# %% [markdown]
# ## A pretrained network
#
# It has four layer groups. From the bottom, these are `conv_0`, `conv_1`, `dense` and `head`.


# %%
class Classifier(nn.Module):
    """Two convolutions, a dense layer and a linear head for five digits."""

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


@jax.jit
def init(key):
    return Classifier().init(key, jnp.zeros((1, 8, 8, 1)))["params"]


@jax.jit
def evaluate(params, images, labels):
    logits = Classifier().apply({"params": params}, images)
    return loss_fn(params, images, labels), (logits.argmax(-1) == labels).mean()


# %% [markdown]
# A batch depends on the seed and the step alone. So a resumed run gets the same batches as a run
# that was not interrupted.


# %%
def five_digits(first):
    images, digits = load_digits(return_X_y=True)
    chosen = (first <= digits) & (digits < first + 5)
    images = images[chosen].reshape(-1, 8, 8, 1).astype(np.float32) / 16
    labels = (digits[chosen] - first).astype(np.int32)
    split = train_test_split(images, labels, test_size=0.4, stratify=labels, random_state=0)
    return split[::2], split[1::2]


def batch(data, seed, step):
    rows = np.random.default_rng((seed, step)).integers(len(data[0]), size=32)
    return [x[rows] for x in data]


# %% [markdown]
# The training step is written once. `opt_state` carries what is frozen, its *plan*. So the step
# needs no change when layers thaw: `jax.jit` traces it again when the plan changes, and only then.
# The counter shows this, because Python code in a jitted function runs only while the function is
# traced. The step also returns the size of the update of each layer group (root mean square), for
# later.

# %%
LR = 1e-3


def make_step(tx):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, images, labels):
        step.traces += 1
        loss, grads = fo.value_and_grad(loss_fn, frozen=opt_state)(params, images, labels)
        updates, opt_state = tx.update(grads, opt_state, params)
        sizes = {name: rms(group) for name, group in updates.items()}
        return fo.apply_updates(params, updates, frozen=opt_state), opt_state, loss, sizes

    step.traces = 0
    return step


def rms(tree):
    return optax.tree.norm(tree) / sum(x.size for x in jax.tree.leaves(tree)) ** 0.5


# %%
data, _ = five_digits(0)
tx = fo.freezable(optax.adam(LR))
params = init(jax.random.key(0))
opt_state, step = tx.init(params), make_step(tx)
for i in range(200):
    params, opt_state, loss, _ = step(params, opt_state, *batch(data, 0, i))
pretrained = params
print(f"pretraining on 0 to 4: loss {loss:.3f} after 200 steps, {step.traces} trace")

# %% [markdown]
# ## The phases
#
# `fo.Phases` says from each step on what is frozen. Here this is first all but the head, then one
# group less every 100 steps. `validate` resolves all phases now. So a typo in the last phase is an
# error now, and not at step 300.

# %%
phases = fo.Phases({0: "{conv_0,conv_1,dense}", 100: "conv_{0,1}", 200: "conv_0", 300: fo.nothing})
phases.validate(pretrained)

try:
    fo.Phases({0: "conv_{0,1}", 300: "covn_0"}).validate(pretrained)
except ValueError as error:
    print(error)

# %% [markdown]
# ## The run
#
# `set_frozen` runs before every step. Within a phase it returns the state itself. Where a phase
# begins, the leaves that train already keep their moments and counts, and the thawed leaves get
# fresh ones.

# %%
STEPS = 400
data, test = five_digits(5)


def start(seed):
    head = init(jax.random.key(100 + seed))["head"]
    # A copy, because a step is donated its arguments and several runs have one start.
    return jax.tree.map(jnp.copy, {**pretrained, "head": head})


def fine_tune(step, run, steps, seed=0, watch=range(STEPS)):
    (params, opt_state), history = run, {}
    for i in steps:
        opt_state = fo.set_frozen(opt_state, params, phases.at(i))
        params, opt_state, _, sizes = step(params, opt_state, *batch(data, seed, i))
        if i in watch:
            history[i] = {"sizes": sizes, **scores(params), **costs(params, opt_state)}
    return (params, opt_state), history


def scores(params):
    return dict(zip(("loss", "accuracy"), evaluate(params, *test), strict=True))


def costs(params, opt_state):
    trainable, _ = fo.partition(params, opt_state)
    count = sum(x.size for x in jax.tree.leaves(trainable))
    return {"count": count, "bytes": sum(x.nbytes for x in jax.tree.leaves(opt_state))}


# %%
tx = fo.freezable(optax.adam(LR), frozen=phases.at(0))
step = make_step(tx)
params = start(0)
(final, _), kept = fine_tune(step, (params, tx.init(params)), range(STEPS))

print(f"{len(phases.starts)} phases, {step.traces} traces in {STEPS} steps")
for begin in phases.starts:
    count, size = kept[begin]["count"], kept[begin]["bytes"]
    print(f"from step {begin:3}: {count:6,} params train, optimizer state {size:7,} bytes")
print(f"test accuracy at the end: {kept[STEPS - 1]['accuracy']:.1%}")
assert step.traces == len(phases.starts)

# %% [markdown]
# Loss and accuracy are those of the test set. The loss of the first phase stays high, because a new
# head alone cannot do better on features that were made for other digits.

# %%
BLUE, ORANGE = "#0072B2", "#E69F00"
THAWS = {100: "dense", 200: "conv_1", 300: "conv_0"}
plt.rcParams.update({"figure.dpi": 100, "font.size": 10, "axes.spines.top": False})
plt.rcParams.update({"axes.spines.right": False, "figure.constrained_layout.use": True})


def mark_thaws(figure, panels):
    for axes in panels:
        for begin in THAWS:
            axes.axvline(begin, color="0.6", linestyle=":", linewidth=1.2)
    for begin, name in THAWS.items():
        panels[0].text(
            begin + 3, 1.0, f"{name} thaws", va="top", transform=panels[0].get_xaxis_transform()
        )
    panels[-1].set(xlabel="step", xlim=(0, STEPS))
    figure.align_ylabels(panels)


# %%
figure, panels = plt.subplots(3, sharex=True, figsize=(8, 6))
panels[0].plot([x["loss"] for x in kept.values()], color=BLUE)
panels[0].set(ylabel="test loss", yscale="log")
for axes, key in zip(panels[1:], ("count", "bytes"), strict=True):
    axes.plot([x[key] / 1e3 for x in kept.values()], color=BLUE, drawstyle="steps-post")
    for begin in phases.starts:
        axes.text(begin + 3, kept[begin][key] / 1e3, f"{kept[begin][key]:,}", va="bottom")
panels[1].set(ylabel="trainable params,\nthousands", ylim=(0, 50))
panels[2].set(ylabel="optimizer state,\nkB", ylim=(0, 400))
mark_thaws(figure, panels)
plt.show()

# %% [markdown]
# ## Interrupted and resumed
#
# The run is stopped in the middle of the third phase. Three groups train there, and they have taken
# 250, 150 and 50 steps. `export_state` turns the state into a nested dict of arrays. Any
# checkpointer can store that; here it is flax's msgpack.

# %%
STOP = 250
folder = tempfile.TemporaryDirectory()
checkpoint = Path(folder.name) / "checkpoint.msgpack"

params = start(0)
(params, opt_state), _ = fine_tune(step, (params, tx.init(params)), range(STOP))
stored = {"step": STOP, "params": params, "opt_state": fo.export_state(opt_state)}
checkpoint.write_bytes(flax.serialization.msgpack_serialize(stored))
del params, opt_state, stored
print(f"{checkpoint.name}: {checkpoint.stat().st_size:,} bytes")

# %% [markdown]
# The resumed run has only the file and the code: the transformation and the step are made anew.
# `import_state` needs no template of what was frozen at step 250, because the file contains it.

# %%
restored = flax.serialization.msgpack_restore(checkpoint.read_bytes())
params = jax.tree.map(jnp.asarray, restored["params"])
new_tx = fo.freezable(optax.adam(LR), frozen=phases.at(0))
opt_state = fo.import_state(new_tx, params, restored["opt_state"])
new_step = make_step(new_tx)
(resumed, _), _ = fine_tune(new_step, (params, opt_state), range(restored["step"], STEPS))
folder.cleanup()

same = jax.tree.map(np.array_equal, resumed, final)
print(f"{sum(jax.tree.leaves(same))} of {len(jax.tree.leaves(same))} leaves are bitwise equal")
print(f"{new_step.traces} traces, for the two phases that were left")
assert all(jax.tree.leaves(same))

# %% [markdown]
# ## Against starting the optimizer anew
#
# Without an edit of the state, a new set of trainable layers needs a new `optax.partition`, and
# `init` again at each thaw. This loses the moments of the layers that were training. Batches, start
# and learning rate are the same as above.


# %%
@functools.cache
def remade(begin):
    labels = fo.labels(phases.at(begin), pretrained)
    parts = {"trainable": optax.adam(LR), "frozen": optax.set_to_zero()}
    tx = optax.partition(parts, labels)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, images, labels):
        loss, grads = jax.value_and_grad(loss_fn)(params, images, labels)
        updates, opt_state = tx.update(grads, opt_state, params)
        sizes = {name: rms(group) for name, group in updates.items()}
        return optax.apply_updates(params, updates), opt_state, loss, sizes

    return tx, step


def fine_tune_anew(params, seed=0, watch=range(STEPS)):
    history = {}
    for i in range(STEPS):
        if i in phases.starts:
            tx, step = remade(i)
            opt_state = tx.init(params)
        params, opt_state, _, sizes = step(params, opt_state, *batch(data, seed, i))
        if i in watch:
            history[i] = {"sizes": sizes, **scores(params)}
    return history


# %%
anew = fine_tune_anew(start(0))

figure, panels = plt.subplots(2, sharex=True, figsize=(8, 5))
for history, colour, label in ((anew, ORANGE, "started anew"), (kept, BLUE, "state kept")):
    panels[0].plot([x["loss"] for x in history.values()], color=colour, label=label)
    panels[1].plot([x["sizes"]["head"] / LR for x in history.values()], color=colour)
panels[0].set(ylabel="test loss", yscale="log")
panels[0].legend(loc="lower left", frameon=False)
panels[1].set(ylabel="update of the head,\nrms / learning rate", ylim=(0, 1.05))
mark_thaws(figure, panels)
plt.show()

# %% [markdown]
# Now the same over five seeds, for heads and batches. The pretrained network is the same for all.
# The output has the means at the step before each thaw and at the thaw.

# %%
watch = {i for begin in THAWS for i in (begin - 1, begin)} | {STEPS - 1}
runs = {"state kept": [], "started anew": []}
for seed in range(5):
    params = start(seed)
    _, history = fine_tune(step, (params, tx.init(params)), range(STEPS), seed, watch)
    runs["state kept"].append(history)
    runs["started anew"].append(fine_tune_anew(start(seed), seed, watch))
print(f"{step.traces} traces of the step still: going back to an earlier plan hits the cache")
assert step.traces == len(phases.starts)


def over_seeds(label, i, *keys):
    values = [functools.reduce(dict.get, keys, history[i]) for history in runs[label]]
    return np.mean(values), np.std(values, ddof=1)


# %%
for begin, thawed in THAWS.items():
    print(f"step {begin}, {thawed} thaws")
    for label in runs:
        moved = [over_seeds(label, i, "sizes", "head")[0] / LR for i in (begin - 1, begin)]
        loss = [over_seeds(label, i, "loss")[0] for i in (begin - 1, begin)]
        first = over_seeds(label, begin, "sizes", thawed)[0] / LR
        print(f"  {label:12}: update / lr of head {moved[0]:.2f} -> {moved[1]:.2f},", end=" ")
        print(f"of {thawed} {first:.2f}; test loss {loss[0]:.3f} -> {loss[1]:.3f}")
print("at the end, mean ± standard deviation")
for label in runs:
    (accuracy, spread), loss = (over_seeds(label, STEPS - 1, x) for x in ("accuracy", "loss"))
    print(f"  {label:12}: test accuracy {accuracy:.1%} ± {spread:.1%},", end=" ")
    print(f"test loss {loss[0]:.3f} ± {loss[1]:.3f}")

# %% [markdown]
# What this shows, and what it does not:
#
# - From zero moments, Adam's first update is about one learning rate (lr) for every weight, however
#   small its gradient is. If Adam is started anew, the trained head gets such an update at each
#   thaw: 0.91 lr. If its state is kept, it goes on at 0.34, 0.09 and 0.05.
# - The test loss shows this at step 200. Started anew, it goes from 0.130 to 0.174 in one step.
#   With the state kept, it goes from 0.133 to 0.129. In the figure the difference is gone by about
#   step 240. At step 100 the jump is 0.023 of 1.13, and at step 300 it is within the noise. Just
#   before the next thaw the run that was started anew is no worse: 0.130 against 0.133, and 0.095
#   against 0.097.
# - The thawed layer itself takes a first update of 0.90 to 0.97 lr in both runs, because it is new
#   to the optimizer in both. A warm-up makes that update smaller. Keeping the state does not.
# - At the end there is no difference beyond the spread of the seeds, in accuracy or in loss. The
#   task is small and easy: the lost moments cost a jump in the loss, not the result.
# %% [markdown]
# ## Why a thawed leaf has its own count
#
# Adam's moments start at zero, so Adam divides them by `1 - beta ** count`. With the old count of
# the optimizer, this correction is wrong for fresh moments. The output is the first update of a
# thawed leaf, in units of the learning rate, after so many steps of the other leaves:


# %%
def with_shared_count(count):
    adam = optax.adam(LR)
    state = optax.tree_utils.tree_set(adam.init(jnp.ones(1)), count=jnp.int32(count))
    return adam.update(jnp.ones(1), state)[0]


def with_own_count(count):
    params = {"old": jnp.ones(1), "new": jnp.ones(1)}
    tx = fo.freezable(optax.adam(LR), frozen="new")
    state = jax.lax.fori_loop(
        0, count, lambda _, state: tx.update(params, state, params)[1], tx.init(params)
    )
    state = fo.thaw(state, params, "new")
    return tx.update(params, state, params)[0]["new"]


for count in (10, 100, 1000, 10000):
    shared, own = (-f(count)[0] / LR for f in (with_shared_count, with_own_count))
    print(f"{count:6} steps: shared count {shared:.2f}, own count {own:.2f}")
