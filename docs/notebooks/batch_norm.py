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
# # The three meanings of "freezing BatchNorm"
#
# After this notebook you can say which of three things you mean by "freezing BatchNorm". You can do
# each of them alone, in Flax Linen and in NNX. And you can fine-tune on a frozen backbone that is
# the same function before and after, bit for bit.
#
# - **(a) The affine params**, `scale` and `bias`, are params like any others. The optimizer changes
#   them. To keep them, freeze them: `fo.of_type(BatchNorm)`, or a path.
# - **(b) The running statistics**, `mean` and `var`, belong to no optimizer. The forward pass
#   changes them, if it runs in training mode. To keep them, hold them: `fo.hold(new, old, where)`.
# - **(c) The mode** decides which statistics normalise an input. In training mode these are the
#   statistics of its own batch, in inference mode the running ones. The mode is a flag of the
#   forward pass: `use_running_average=True`, or `eval()` in NNX.
#
# The three are independent, with one exception: in inference mode nothing updates the statistics,
# so (c) gives (b).

# %%
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import freeze_optax as fo
from freeze_optax import linen as flinen
from freeze_optax import nnx as fnnx

# %% [markdown]
# The data are scikit-learn's handwritten digits. A network learns 0 to 4. Then its backbone is
# reused for 5 to 9 in a fainter pen: these images have 0.3 of their contrast. Each batch depends on
# its step alone.


# %%
def five_digits(first, contrast=1.0):
    images, digits = load_digits(return_X_y=True)
    chosen = (first <= digits) & (digits < first + 5)
    images = contrast * images[chosen].reshape(-1, 8, 8, 1).astype(np.float32) / 16
    labels = (digits[chosen] - first).astype(np.int32)
    split = train_test_split(images, labels, test_size=0.4, stratify=labels, random_state=0)
    return split[::2], split[1::2]


def batches(data, steps, size=64):
    for step in range(steps):
        rows = np.random.default_rng(step).integers(len(data[0]), size=size)
        yield [x[rows] for x in data]


def loss_of(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


OLD, OLD_TEST = five_digits(0)
NEW, NEW_TEST = five_digits(5, contrast=0.3)

# %% [markdown]
# ## Linen
#
# The backbone has two BatchNorms, and the head has one. Backbone and head each have an argument for
# their own mode.


# %%
class Backbone(nn.Module):
    """Two convolutions, each with its BatchNorm."""

    @nn.compact
    def __call__(self, x, train):
        """Turns images into features."""
        for i, size in enumerate((8, 16)):
            x = nn.Conv(size, (3, 3), 1 + i, use_bias=False, name=f"conv_{i}")(x)
            x = nn.relu(nn.BatchNorm(not train, momentum=0.9, name=f"norm_{i}")(x))
        return x.reshape(len(x), -1)


# %%
class Head(nn.Module):
    """Turns features into logits."""

    @nn.compact
    def __call__(self, x, train):
        """Turns features into logits."""
        x = nn.BatchNorm(not train, momentum=0.9, name="norm")(nn.Dense(32, name="dense")(x))
        return nn.Dense(5, name="logits")(nn.relu(x))


class Classifier(nn.Module):
    """A backbone and a head."""

    def setup(self):
        """Makes the two."""
        self.backbone, self.head = Backbone(), Head()

    def __call__(self, x, train=False, train_backbone=False):
        """Turns images into logits."""
        return self.head(self.backbone(x, train_backbone), train)

    def features(self, x, train_backbone=False):
        """Turns images into features."""
        return self.backbone(x, train_backbone)


# %% [markdown]
# The params hold (a), `scale` and `bias`. A collection of its own holds (b), `mean` and `var`. The
# optimizer gets the params only, so it can neither change nor protect a statistic.

# %%
MODEL = Classifier()
variables = jax.jit(MODEL.init)(jax.random.key(0), OLD[0][:1])
for name, collection in variables.items():
    print(name)
    for path, leaf in jax.tree.leaves_with_path(collection):
        if "norm" in jax.tree_util.keystr(path):
            print("  ", jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape)

# %% [markdown]
# One training step serves all runs below. It has a switch for each of the three. The optimizer
# state says what is frozen (a). The mode of the backbone (c) is an argument. With
# `mutable="batch_stats"`, the model returns its new statistics, and `fo.hold` puts the old ones
# back where they are held (b). `fo.hold` only chooses between leaves, so it could also be inside
# the jitted step.

# %%
TX = fo.freezable(optax.adam(3e-3))


@functools.partial(jax.jit, static_argnames="train_backbone")
def step(params, stats, opt_state, batch, train_backbone):
    images, labels = batch

    def loss_fn(params):
        both = {"params": params, "batch_stats": stats}
        logits, moved = MODEL.apply(both, images, True, train_backbone, mutable="batch_stats")
        return loss_of(logits, labels), moved["batch_stats"]

    (_, new), grads = fo.value_and_grad(loss_fn, opt_state, has_aux=True)(params)
    updates, opt_state = TX.update(grads, opt_state, params)
    return fo.apply_updates(params, updates, frozen=opt_state), new, opt_state


def train(variables, batches, frozen=fo.nothing, *, held=fo.nothing, train_backbone=True):
    params, stats = variables
    opt_state = fo.freeze(TX.init(params), params, frozen)
    for batch in batches:
        params, new, opt_state = step(params, stats, opt_state, batch, train_backbone)
        stats = fo.hold(new, stats, held)
    return params, stats


# %%
@functools.partial(jax.jit, static_argnames="train_backbone")
def features(params, stats, images, train_backbone=False):
    both = {"params": params, "batch_stats": stats}
    method = MODEL.features
    return MODEL.apply(both, images, train_backbone, method=method, mutable="batch_stats")[0]


@jax.jit
def accuracy(params, stats, images, labels):
    logits = MODEL.apply({"params": params, "batch_stats": stats}, images)
    return (logits.argmax(-1) == labels).mean()


# %%
params, stats = train((variables["params"], variables["batch_stats"]), batches(OLD, 150))
print(f"test accuracy on 0 to 4: {accuracy(params, stats, *OLD_TEST):.1%}")
assert accuracy(params, stats, *OLD_TEST) > 0.97

# %% [markdown]
# ### What changes
#
# You can select the leaves of a BatchNorm by path, or by type. By type needs the table of modules
# that `linen.modules` makes from the model, but no naming convention. Linen keeps params and
# statistics under the same paths. So one selector freezes the params and holds the statistics.

# %%
TABLE = flinen.modules(MODEL, OLD[0][:1])
NORMS = fo.path("backbone") & fo.of_type(nn.BatchNorm, modules=TABLE)
for collection in (params, stats):
    assert fo.mask(NORMS, collection) == fo.mask("backbone/norm_*", collection)
    print(fo.mask(NORMS, collection)["backbone"])

# %% [markdown]
# The table below has all eight combinations, with three steps each. It measures what changed, and
# which statistics normalise. If the features of an image depend on the other images of its batch,
# the statistics of the batch normalise. If not, the running ones do.


# %%
def moved(before, after, where):
    try:
        fo.testing.assert_frozen(before, after, where)
    except AssertionError:
        return True
    return False


def show(rows):
    head = ("scale, bias", "mean, var", "mode", "scale, bias", "mean, var", "normalised with")
    print("{:13}{:11}{:11}| {:13}{:11}{}".format(*head))
    print("-" * 35 + "+" + "-" * 41)
    for frozen, held, inference, affine, statistics, of_batch in rows:
        asked = ("frozen" if frozen else "-", "held" if held else "-")
        mode = "inference" if inference else "training"
        got = ["moved" if x else "stayed" for x in (affine, statistics)]
        which = "the batch's" if of_batch else "the running"
        print("{:13}{:11}{:11}| {:13}{:11}{}".format(*asked, mode, *got, which))


def depends_on_batch(features):
    first, second = NEW[0][:8], NEW[0][[0, *range(50, 57)]]
    return not np.allclose(features(first)[0], features(second)[0], atol=1e-3)


# %%
rows = []
for frozen, held, inference in itertools.product((False, True), repeat=3):
    switches = {"held": NORMS if held else fo.nothing, "train_backbone": not inference}
    new = train((params, stats), batches(NEW, 3), NORMS if frozen else fo.nothing, **switches)
    forward = functools.partial(features, *new, train_backbone=not inference)
    seen = moved(params, new[0], NORMS), moved(stats, new[1], NORMS)
    seen = *seen, depends_on_batch(forward)
    rows.append((frozen, held, inference, *seen))
    assert seen == (not frozen, not (held or inference), not inference)
    assert moved(stats, new[1], "head"), "held was the backbone; the head moves on"
show(rows)

# %% [markdown]
# Each switch acts on its own column:
#
# - Frozen `scale` and `bias` do not stop the statistics.
# - Held statistics do not stop the batch from normalising in training.
# - Inference mode stops both, and leaves `scale` and `bias` trainable.
#
# ### A frozen backbone whose function changes
#
# The usual way to reuse a backbone is to freeze all its params and train a new head. Every param of
# the backbone stays, bit for bit. But its statistics follow the new data, so it becomes another
# function.


# %%
fresh = jax.jit(MODEL.init)(jax.random.key(1), OLD[0][:1])
start = {**params, "head": fresh["params"]["head"]}
start_stats = {**stats, "head": fresh["batch_stats"]["head"]}
STEPS = 100


def compare(before, after):
    """Says in words how far apart two arrays are."""
    before, after = np.asarray(before), np.asarray(after)
    change = np.linalg.norm(after - before) / np.linalg.norm(before)
    same = before.tobytes() == after.tobytes()
    return "bit-identical" if same else f"changed by {change:.0%}"


def report(new_params, new_stats):
    """Prints what became of the backbone, and returns that in words."""
    states = (params, stats), (new_params, new_stats)
    old_task = {**new_params, "head": params["head"]}, {**new_stats, "head": stats["head"]}
    verdict = compare(*(features(*x, OLD_TEST[0]) for x in states))
    print(f"features of 0 to 4: {verdict}")
    print(f"accuracy with the old head on 0 to 4: {accuracy(*old_task, *OLD_TEST):.1%}")
    print(f"accuracy with the new head on 5 to 9: {accuracy(new_params, new_stats, *NEW_TEST):.1%}")
    return verdict


# %%
drifted = train((start, start_stats), batches(NEW, STEPS), "backbone")
fo.testing.assert_frozen(start, drifted[0], "backbone")
assert report(*drifted) != "bit-identical"
assert accuracy(*drifted, *NEW_TEST) > 0.95

# %% [markdown]
# The accuracy of the new head does not show this, because that head was trained along with the
# statistics. Everything else that uses the backbone gets worse: the old head, features that were
# computed and stored before, a second model that shares the backbone. How much worse depends on how
# different the new data are. These are the same digits at full contrast:

# %%
mild = train((start, start_stats), batches(five_digits(5)[0], STEPS), "backbone")
verdict = compare(*(features(*x, OLD_TEST[0]) for x in ((params, stats), mild)))
print(f"features of 0 to 4: {verdict}")
assert verdict != "bit-identical"

# %% [markdown]
# ### What to do
#
# Freeze the params of the backbone, and run it in inference mode. Then nothing in it changes, and
# its features have the same bits before and after. The head stays in training mode, with statistics
# of its own.

# %%
kept = train((start, start_stats), batches(NEW, STEPS), "backbone", train_backbone=False)
fo.testing.assert_frozen(start, kept[0], "backbone")
fo.testing.assert_frozen(start_stats, kept[1], "backbone")
assert report(*kept) == "bit-identical"
assert moved(start_stats, kept[1], "head")

# %% [markdown]
# If a part of a model cannot run in inference mode, hold its statistics. That keeps the function
# too: in inference, the backbone is the same, bit for bit. But in training it normalises with the
# batch. So the head learns from other features than it gets later, and the accuracy on the new
# digits is lower.

# %%
held = train((start, start_stats), batches(NEW, STEPS), "backbone", held="backbone")
fo.testing.assert_frozen(start_stats, held[1], "backbone")
assert report(*held) == "bit-identical"
assert accuracy(*held, *NEW_TEST) < accuracy(*kept, *NEW_TEST)

modes = (features(start, start_stats, NEW[0][:64], x) for x in (False, True))
print(f"features of a batch of 5 to 9, from inference to training mode: {compare(*modes)}")

# %% [markdown]
# ## NNX
#
# This is the same network. Statistics are variables of the type `nnx.BatchStat`, and params are
# `nnx.Param`. `wrt=nnx.Param` gives the optimizer the params only. The mode is an attribute of each
# BatchNorm. `train()` and `eval()` set it on a module and on all modules in it.


# %%
class NnxBackbone(nnx.Module):
    """Two convolutions, each with its BatchNorm."""

    def __init__(self, rngs):
        norm = functools.partial(nnx.BatchNorm, momentum=0.9, rngs=rngs)
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), use_bias=False, rngs=rngs)
        self.conv_0, self.norm_0 = conv(1, 8), norm(8)
        self.conv_1, self.norm_1 = conv(8, 16, strides=2), norm(16)

    def __call__(self, x):
        """Turns images into features."""
        x = nnx.relu(self.norm_0(self.conv_0(x)))
        return nnx.relu(self.norm_1(self.conv_1(x))).reshape(len(x), -1)


# %%
class NnxClassifier(nnx.Module):
    """A backbone and a head."""

    def __init__(self, rngs):
        self.backbone = NnxBackbone(rngs)
        self.head = nnx.Sequential(
            nnx.Linear(256, 32, rngs=rngs),
            nnx.BatchNorm(32, momentum=0.9, rngs=rngs),
            nnx.relu,
            nnx.Linear(32, 5, rngs=rngs),
        )

    def __call__(self, x):
        """Turns images into logits."""
        return self.head(self.backbone(x))


# %% [markdown]
# The forward pass writes the new statistics into the model. To hold some, keep the old ones and
# write them back. `nnx.state` gives the very variables that the forward pass writes to. So make a
# copy to keep their present values.


# %%
def statistics(model):
    return jax.tree.map(jnp.copy, nnx.state(model, nnx.BatchStat))


@nnx.jit
def nnx_step(model, optimizer, images, labels):
    loss = lambda model: loss_of(model(images), labels)  # noqa: E731
    optimizer.update(model, fnnx.grad(loss, frozen=optimizer)(model))


def train_nnx(model, batches, frozen=fo.nothing, *, held=fo.nothing, train_backbone=True):
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    fnnx.freeze(optimizer, model, frozen)
    model.train()
    if not train_backbone:
        model.backbone.eval()
    for batch in batches:
        old = statistics(model)
        nnx_step(model, optimizer, *batch)
        nnx.update(model, fo.hold(nnx.state(model, nnx.BatchStat), old, held))
    return model


# %% [markdown]
# The order matters. `model.train()` sets every BatchNorm in the model to training mode. To keep the
# backbone in inference mode, call `model.backbone.eval()` after it, and again after each evaluation
# that ends with `model.train()`.


# %%
@nnx.jit
def nnx_features(model, images):
    return model.backbone(images)


@nnx.jit
def nnx_accuracy(model, images, labels):
    return (model(images).argmax(-1) == labels).mean()


pretrained = train_nnx(NnxClassifier(nnx.Rngs(0)), batches(OLD, 150))
pretrained.eval()
print(f"test accuracy on 0 to 4: {nnx_accuracy(pretrained, *OLD_TEST):.1%}")
assert nnx_accuracy(pretrained, *OLD_TEST) > 0.97

# %% [markdown]
# ### What changes
#
# The functions of `freeze_optax.nnx` get the model, so `fo.of_type` reads the types from it. The
# table is the same as that of Linen.

# %%
nnx_rows = []
for frozen, held, inference in itertools.product((False, True), repeat=3):
    affine = fo.path("backbone") & fo.of_type(nnx.BatchNorm)
    switches = {"held": "backbone" if held else fo.nothing, "train_backbone": not inference}
    frozen_spec = affine if frozen else fo.nothing
    new = train_nnx(nnx.clone(pretrained), batches(NEW, 3), frozen_spec, **switches)
    both = [nnx.state(model, nnx.Param) for model in (pretrained, new)]
    stats_of_both = [statistics(model) for model in (pretrained, new)]
    seen = moved(*both, "backbone/norm_*"), moved(*stats_of_both, "backbone")
    seen = *seen, depends_on_batch(functools.partial(nnx_features, new))
    nnx_rows.append((frozen, held, inference, *seen))
    assert moved(*stats_of_both, "head")
show(nnx_rows)
assert nnx_rows == rows

# %% [markdown]
# ### The three ways to reuse the backbone
#
# These are the three ways again: with the params frozen and nothing else, with the backbone also in
# inference mode, and with its statistics held.


# %%
def reuse(**switches):
    model = nnx.clone(pretrained)
    model.head = NnxClassifier(nnx.Rngs(1)).head
    train_nnx(model, batches(NEW, STEPS), "backbone", **switches).eval()
    both = [nnx.state(x.backbone, nnx.Param) for x in (pretrained, model)]
    fo.testing.assert_frozen(*both, fo.everything)
    verdict = compare(*(nnx_features(x, OLD_TEST[0]) for x in (pretrained, model)))
    return verdict, nnx_accuracy(model, *NEW_TEST)


ways = {
    "params frozen": {},
    "params frozen, inference mode": {"train_backbone": False},
    "params frozen, statistics held": {"held": "backbone"},
}
for name, switches in ways.items():
    verdict, score = reuse(**switches)
    print(f"{name}:\n  features of 0 to 4: {verdict}; accuracy on 5 to 9: {score:.1%}")
    assert (verdict == "bit-identical") == bool(switches)

# %% [markdown]
# In short:
#
# - "The backbone is frozen" is a statement about params, and an optimizer can promise no more. For
#   a backbone with BatchNorm, add inference mode.
# - Hold statistics where inference mode is not possible. Or hold them where batches should
#   normalise in training, but the running statistics should stay.
# - Held statistics describe the layers below them as they were. If those layers train, the
#   statistics no longer fit. So freeze what is below a BatchNorm whose statistics stay.
# - To freeze `scale` and `bias` alone keeps neither the statistics nor the mode. It is useful where
#   the statistics should follow the new data and the affine map should not.
