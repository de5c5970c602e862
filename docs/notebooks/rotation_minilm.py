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
# # Fine-tuning a few layers at a time
#
# After this notebook you can stack the layers of a pretrained transformer and train some of them at
# a time, in one compiled program. You can say what that costs in accuracy, optimizer state, memory
# and time, against fine-tuning everything, low-rank adapters, and the head alone.
#
# The model, its weights and the task are those of [the notebook on MiniLM](minilm.py): from which
# package of Python's standard library is a docstring? This cell runs the four sections of that
# notebook that define them.

# %%
import functools
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import freeze_optax as fo

source = Path("minilm.py").read_text(encoding="utf-8")
sections = re.split(r"^# %% \[markdown\]\n# ##? (.*)\n", source, flags=re.MULTILINE)
sections = dict(zip(sections[1::2], sections[2::2], strict=True))
minilm = {"__name__": "__main__"}
for name in ("Fine-tuning a pretrained transformer", "BERT in Flax", "Its weights", "The task"):
    exec(sections[name], minilm)
WIDTH, HEADS, MODEL, pretrained = (minilm[x] for x in ("WIDTH", "HEADS", "MODEL", "pretrained"))
Layer, Embeddings = minilm["Layer"], minilm["Embeddings"]
SHORT, TRAIN, TEST = (minilm[x] for x in ("SHORT", "TRAIN", "TEST"))
STEPS, EVERY, BATCH = (2, 1, 4) if SHORT else (60, 5, 16)

# %% [markdown]
# ## The layers in one stack
#
# `encoder` holds six layers of the same shapes. `stack_layers` makes one node of them, whose arrays
# have the layers along a new axis. The model then loops over it, with `fo.scan` and one layer of
# Flax. `jax.checkpoint` keeps what goes into a layer, and computes the rest again.

# %%
stacked = fo.stack_layers(pretrained, "encoder/layer_*")
fo.testing.assert_frozen(
    pretrained, fo.unstack_layers(stacked, "encoder", to="encoder/layer_{0..5}"), True
)


def logits(params, tokens):
    real = tokens != 0

    def block(x, layer):
        return Layer().apply({"params": layer}, x, real[:, None, None, :]), None

    x = Embeddings().apply({"params": params["embeddings"]}, tokens)
    x, _ = fo.scan(jax.checkpoint(block), x, params["encoder"])
    x = x.mean(axis=1, where=real[:, :, None])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


by_flax = jax.jit(MODEL.apply)({"params": pretrained}, TEST[0][:8])
apart = jnp.abs(jax.jit(logits)(stacked, TEST[0][:8]) - by_flax).max()
print(f"apart from the model of Flax by at most {apart:.1e}")
assert apart < 1e-4

# %% [markdown]
# ## Five ways to fine-tune
#
# The head is new, so it trains in all five:
#
# - **everything** trains;
# - **head**: nothing else trains;
# - **low-rank adapters**: each query and value kernel gets the product of two small matrices, as in
#   LoRA;
# - **2 of 6 at random**: two layers train for five steps, then two others (LISA). The embeddings
#   train all the time;
# - **1 of 6 in order**: one layer trains for five steps, from the last one down, then from the last
#   one again (BAdam). The embeddings are frozen.

# %%
RANK = 6


def adapters(key):
    """Makes the two matrices of the adapters of six layers; their products are zero at first."""
    a = jax.random.normal(key, (6, WIDTH, RANK)) / WIDTH**0.5
    return {"a": a, "b": jnp.zeros((6, RANK, HEADS, WIDTH // HEADS))}


def merged(params):
    """Adds the adapters, if there are some, to their kernels."""
    body = {name: part for name, part in params.items() if name != "lora"}
    sums = {}
    for name, matrices in params.get("lora", {}).items():
        kernel = body["encoder"]["attention"][name]["kernel"]
        product = jnp.einsum("lir,lrhd->lihd", matrices["a"], matrices["b"])
        sums[f"encoder/attention/{name}/kernel"] = kernel + product
    return fo.assign(body, sums) if sums else body


def loss_fn(params, tokens, labels):
    values = logits(merged(params), tokens)
    return optax.softmax_cross_entropy_with_integer_labels(values, labels).mean()


keys = jax.random.split(jax.random.key(1), 2)
lora = {**stacked, "lora": dict(zip(("query", "value"), map(adapters, keys), strict=True))}

# %% [markdown]
# The rates of the first three ways are those that
# [the notebook on sparse fine-tuning](sparse_minilm.py) chose on texts that are not in the test.
# The rates of rotation are that of training everything. They were not tuned.


# %%
def adamw(rate):
    schedule = optax.warmup_cosine_decay_schedule(0, rate, STEPS // 6, STEPS)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))


head = fo.path("head")
key = jax.random.key(2)
rotating = functools.partial(fo.rotating, adamw(6e-4), "encoder", every=EVERY)
WAYS = {
    "everything": fo.freezable(adamw(6e-4)),
    "head": fo.freezable(adamw(3e-2), ~head),
    "low-rank adapters": fo.freezable(adamw(6e-3), ~(head | fo.path("lora"))),
    "2 of 6 at random": rotating(count=2, key=key),
    "1 of 6 in order": rotating(count=1, order="descending", frozen="embeddings"),
}

# %% [markdown]
# ## The runs
#
# The step is compiled once for each way, before the runs. A compiled program takes one structure of
# its arguments and no other. So the same program trains all layers that get their turn.


# %%
def step(tx, params, opt_state, tokens, labels):
    grads = fo.grad(loss_fn, frozen=opt_state)(params, tokens, labels)
    updates, opt_state = tx.update(grads, opt_state, params)
    return fo.apply_updates(params, updates, frozen=opt_state), opt_state


def batch(seed):
    rows = np.random.default_rng(seed).integers(len(TRAIN[1]), size=BATCH)
    return TRAIN[0][rows], TRAIN[1][rows]


runs, programs, seconds = {}, {}, {name: [] for name in WAYS}
for name, tx in WAYS.items():
    params = jax.tree.map(jnp.array, lora if "adapters" in name else stacked)  # a copy
    runs[name] = params, tx.init(params)
    jitted = jax.jit(functools.partial(step, tx), donate_argnums=(0, 1))
    programs[name] = jitted.lower(*runs[name], *batch(0)).compile()

# %% [markdown]
# All five take each step in turn, on the same batch. So if something else slows the machine, it
# slows all of them.

# %%
turns = {name: [] for name in list(WAYS)[3:]}
for i in range(STEPS):
    for name, program in programs.items():
        if name in turns and i % EVERY == 0:
            turns[name].append(runs[name][1].rows.tolist())
        begin = time.perf_counter()
        runs[name] = jax.block_until_ready(program(*runs[name], *batch(i)))
        seconds[name].append(time.perf_counter() - begin)

for name, rows in turns.items():
    print(f"{name}:", *rows)

# %% [markdown]
# ## Results
#
# The memory is what XLA plans for the compiled step: arguments, results and temporaries, and those
# that share a place are counted once. The time is the median of ratios: the time of each step,
# divided by the time of the step of the first run just before. The margin of the accuracy is one
# standard error for a test of this size.


# %%
@jax.jit
def answers(params, tokens):
    return jax.lax.map(lambda x: logits(params, x[None])[0].argmax(), tokens, batch_size=64)


def peak(program):
    plan = program.memory_analysis()
    return (
        plan.argument_size_in_bytes + plan.output_size_in_bytes
        - plan.alias_size_in_bytes + plan.temp_size_in_bytes
    )  # fmt: skip


results = {}
for name, (params, opt_state) in runs.items():
    results[name] = {
        "accuracy": float((answers(merged(params), TEST[0]) == TEST[1]).mean()),
        "state": fo.summary(params, opt_state).state_bytes,
        "memory": peak(programs[name]),
        "time": np.median(np.divide(seconds[name], seconds["everything"])),
    }

# %%
print(" " * 18, "    test  optimizer      peak   step", sep="")
print(" " * 18, "accuracy      state    memory   time", sep="")
for name, x in results.items():
    margin = (x["accuracy"] * (1 - x["accuracy"]) / len(TEST[1])) ** 0.5
    print(f"{name:18}{x['accuracy']:4.0%} ±{margin:2.0%}{x['state'] / 1e6:8.1f} MB", end="")
    print(f"{x['memory'] / 1e6:7.0f} MB{x['time']:7.2f}")

# %%
everything, *_, at_random, in_order = results.values()
assert at_random["state"] < 0.8 * everything["state"]
assert in_order["state"] < 0.1 * everything["state"]
assert in_order["memory"] < at_random["memory"] < everything["memory"]
fo.testing.assert_frozen(stacked, runs["1 of 6 in order"][0], "embeddings")
if not SHORT:
    assert all(x["accuracy"] > 0.5 for x in results.values())

# %% [markdown]
# What this shows, and what it does not:
#
# - Each way is one program. The twelve turns of two layers have eight different pairs. With
#   `set_frozen` they would be eight programs.
# - Two layers of six at random reach the accuracy of training everything. It is one task, one seed
#   and a short run, and the others are within two or three margins: it ranks none of the five.
# - The state of two layers is a third of that of six. That of the embeddings is 95 MB of the
#   123.8 MB, since more than half of the parameters of this small model are embeddings. They are a
#   smaller share of a large model.
# - One layer in order, embeddings frozen, needs as much memory as adapters, and three quarters of
#   their time: the backward pass stops at the layer that trains.
#
# The figures are of a machine with two cores that did other work too. This repeats them:
# `python docs/notebooks/store.py --write rotation_minilm`.
