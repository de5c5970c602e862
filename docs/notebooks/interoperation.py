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
# # Where your params live
#
# After this notebook you can freeze and thaw in the framework that you use: plain dicts, Flax
# Linen, Flax NNX, Equinox or Haiku. You can store a run with Orbax. You can decide for each wrapper
# of Optax whether it belongs inside `freezable` or around it. And you can train tied params, and
# set params by hand. Each section needs only the first one, and its cells check what it says.

# %%
import logging
import tempfile
from pathlib import Path

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from flax.training.train_state import TrainState

import freeze_optax as fo
from freeze_optax import linen as flinen
from freeze_optax import nnx as fnnx

X = jax.random.normal(jax.random.key(0), (32, 4))
Y = jnp.sin(X[:, :1] + X[:, 1:2])


def error(prediction):
    return ((prediction - Y) ** 2).mean()


# %% [markdown]
# ## Plain dicts
#
# This section has the whole pattern in one place: gradient, update and thaw. The state says what is
# frozen, and all three follow it.

# %%
kernels = [0.5 * jax.random.normal(jax.random.key(i), (4, n)) for i, n in ((1, 4), (2, 1))]
PARAMS = {
    "encoder": {"kernel": kernels[0], "bias": jnp.zeros(4)},
    "head": {"kernel": kernels[1], "bias": jnp.zeros(1)},
}


def loss_fn(params):
    hidden = jnp.tanh(X @ params["encoder"]["kernel"] + params["encoder"]["bias"])
    return error(hidden @ params["head"]["kernel"] + params["head"]["bias"])


def train(tx, params, state, steps=1):
    @jax.jit
    def step(params, state):
        grads = fo.grad(loss_fn, frozen=state)(params)
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


# %%
def moved(before, after):
    """The paths of the leaves that are not what they were."""
    named = zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True)
    pairs = [(jax.tree_util.keystr(k, simple=True, separator="/"), a, b) for (k, a), b in named]
    return [path for path, a, b in pairs if not np.array_equal(a, b)]


tx = fo.freezable(optax.adam(0.01), frozen="encoder")
params, state = train(tx, PARAMS, tx.init(PARAMS), steps=5)
fo.testing.assert_frozen(PARAMS, params, "encoder")
print("with the encoder frozen:", moved(PARAMS, params))

state = fo.thaw(state, params, "encoder/bias")
further, state = train(tx, params, state)
print("after a thaw:           ", moved(params, further))
assert moved(params, further) == ["encoder/bias", "head/bias", "head/kernel"]

# %% [markdown]
# ## Flax Linen: `TrainState`
#
# `TrainState` and `apply_gradients` stay as they are. The `TrainState` itself is the spec that says
# what is frozen. An edit of it gives a new `TrainState`.


# %%
class Mlp(nn.Module):
    """An encoder with a norm, and a head."""

    @nn.compact
    def __call__(self, x):
        """Predicts."""
        x = nn.LayerNorm(name="norm")(nn.Dense(4, name="encoder")(x))
        return nn.Dense(1, name="head")(nn.tanh(x))


@jax.jit
def linen_step(state):
    loss = lambda params: error(state.apply_fn({"params": params}, X))  # noqa: E731
    return state.apply_gradients(grads=fo.grad(loss, frozen=state)(state.params))


module = Mlp()
linen_params = module.init(jax.random.key(0), X)["params"]
tx = fo.freezable(optax.adam(0.01), frozen=["encoder", "norm"])
start = TrainState.create(apply_fn=module.apply, params=linen_params, tx=tx)
after = linen_step(start)
assert moved(start.params, after.params) == ["head/bias", "head/kernel"]

# %% [markdown]
# Linen keeps params apart from modules. To select by the type of a module, make a table with
# `linen.modules`: it has the module of each path. Nothing is computed for it.

# %%
table = flinen.modules(module, X)
norms = fo.of_type(nn.LayerNorm, modules=table)
thawed = fo.thaw(after, after.params, norms)
assert isinstance(thawed, TrainState)
print(moved(after.params, linen_step(thawed).params))
assert fo.mask(thawed, after.params)["norm"] == {"bias": False, "scale": False}

# %% [markdown]
# ## Flax NNX: `nnx.Optimizer`
#
# Give the optimizer all params (`wrt=nnx.Param`), and give the transformation what is frozen. Then
# you can freeze and thaw in place, and select by the type of a module.


# %%
class Net(nnx.Module):
    """An encoder with a norm, and a head."""

    def __init__(self, rngs):
        self.encoder = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        """Predicts."""
        return self.head(jnp.tanh(self.norm(self.encoder(x))))


@nnx.jit
def nnx_step(model, optimizer):
    loss, grads = fnnx.value_and_grad(lambda model: error(model(X)), frozen=optimizer)(model)
    optimizer.update(model, grads)
    return loss


def nnx_params(model):
    return jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


# %%
model = Net(nnx.Rngs(0))
tx = fo.freezable(optax.adam(0.01), frozen="{encoder,norm}")
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

before = nnx_params(model)
nnx_step(model, optimizer)
assert moved(before, nnx_params(model)) == ["head/bias", "head/kernel"]

fnnx.thaw(optimizer, model, fo.of_type(nnx.LayerNorm))
fnnx.freeze(optimizer, model, "head/bias", keep_state=True)
before = nnx_params(model)
nnx_step(model, optimizer)
print(moved(before, nnx_params(model)))
assert moved(before, nnx_params(model)) == ["head/kernel", "norm/bias", "norm/scale"]

# %% [markdown]
# If you will never thaw anything, a plain optimizer and a filter are enough. `nnx.wrt` resolves a
# spec against the model and gives the filter of what *trains*. Use it for the optimizer and for the
# gradient.

# %%
model = Net(nnx.Rngs(0))
trainable = fnnx.wrt(model, fo.path("encoder") | fo.of_type(nnx.LayerNorm))
optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=trainable)


@nnx.jit
def plain_step(model, optimizer):
    argument = nnx.DiffState(0, trainable)
    grads = nnx.grad(lambda model: error(model(X)), argnums=argument)(model)
    optimizer.update(model, grads)


before = nnx_params(model)
plain_step(model, optimizer)
assert moved(before, nnx_params(model)) == ["head/bias", "head/kernel"]

# %% [markdown]
# ## Equinox
#
# Pass whole modules, with their activation functions: no `eqx.partition`, no `eqx.combine`, no
# `eqx.is_array`. Only the jit is Equinox's, because the jit of JAX takes no functions for
# arguments.

# %%
model = eqx.nn.MLP(4, 1, width_size=4, depth=2, key=jax.random.key(0))


@eqx.filter_jit
def eqx_step(tx, model, state):
    grads = fo.grad(lambda model: error(jax.vmap(model)(X)), frozen=state)(model)
    updates, state = tx.update(grads, state, model)
    return fo.apply_updates(model, updates, frozen=state), state


def eqx_moved(before, after):
    return moved(eqx.filter(before, eqx.is_array), eqx.filter(after, eqx.is_array))


biases = fo.of_type(eqx.nn.Linear, fields=("bias",))
tx = fo.freezable(optax.adam(0.01), frozen=biases | "layers/0")
new, state = eqx_step(tx, model, tx.init(model))
print(eqx_moved(model, new))
assert eqx_moved(model, new) == ["layers/1/weight", "layers/2/weight"]

# %% [markdown]
# ## Haiku
#
# Write Haiku's names as they are. A slash in a name separates components, as every slash does.

# %%
network = hk.without_apply_rng(
    hk.transform(lambda x: hk.Linear(1, name="head")(jnp.tanh(hk.nets.MLP([4, 4])(x))))
)
hk_params = network.init(jax.random.key(0), X)
tx = fo.freezable(optax.adam(0.01), frozen="mlp/~/linear_*")
state = tx.init(hk_params)

grads = fo.grad(lambda params: error(network.apply(params, X)), frozen=state)(hk_params)
updates, state = tx.update(grads, state, hk_params)
new = fo.apply_updates(hk_params, updates, frozen=state)
print(list(hk_params), "->", moved(hk_params, new))
assert moved(hk_params, new) == ["head/b", "head/w"]

# %% [markdown]
# ## Orbax
#
# The *plan* of a state is which leaves are frozen in it. You can store the state as it is, if the
# code that restores it makes the same plan. Or store the export of the state, which contains the
# plan. Here the encoder was thawed after five steps, so `tx.init` does not give the plan of the
# state.

# %%
# Orbax warns of what it chooses by default.
logging.getLogger("absl").setLevel(logging.ERROR)
folder = tempfile.TemporaryDirectory()


def save_and_restore(name, tree, target=None):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder.name) / name, tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(Path(folder.name) / name, target)


tx = fo.freezable(optax.adam(0.01), frozen="encoder")
params, state = train(tx, PARAMS, tx.init(PARAMS), steps=5)
state = fo.thaw(state, params, "encoder")
params, state = train(tx, params, state, steps=2)
expected, _ = train(tx, params, state)

# %%
target = jax.eval_shape(lambda: fo.thaw(tx.init(params), params, "encoder"))
restored = save_and_restore("as_it_is", state, target)
fo.testing.assert_frozen(expected, train(tx, params, restored)[0], fo.everything)

exported = save_and_restore("export", fo.export_state(state))
imported = fo.import_state(tx, params, exported)
fo.testing.assert_frozen(expected, train(tx, params, imported)[0], fo.everything)

moved_on = fo.import_state(tx, params, exported, frozen="head")
assert moved(params, train(tx, params, moved_on)[0]) == ["encoder/bias", "encoder/kernel"]
folder.cleanup()
print("both go on bitwise as the run that was not interrupted")

# %% [markdown]
# ## Optax wrappers: inside or around?
#
# First the rule, then the cases one by one. Inside `freezable`, a transformation sees the trainable
# leaves alone, and keeps state for no others. So a wrapper that reads gradients or params, or keeps
# anything of their shape, belongs inside. If in doubt, put everything inside. Around `freezable`, a
# wrapper sees every leaf, and `freezable` promises nothing about what the wrapper does before or
# after.
#
# **A chain.** A clip in front of `freezable` counts the gradients at frozen leaves. They are zeros
# if `fo.grad` made them, but not if `jax.grad` did. Decay behind `freezable` changes frozen leaves,
# unless you tell `fo.apply_updates` what is frozen.

# %%
grads = jax.grad(loss_fn)(PARAMS)
clip = optax.clip_by_global_norm(1e-3)


def norm_of_head(tx):
    return float(optax.tree.norm(tx.update(grads, tx.init(PARAMS), PARAMS)[0]["head"]))


inside = norm_of_head(fo.freezable(optax.chain(clip, optax.sgd(1.0)), "encoder"))
around = norm_of_head(optax.chain(clip, fo.freezable(optax.sgd(1.0), "encoder")))
print(f"update of the head, clipped to 0.001: inside {inside:.6f}, around {around:.6f}")
assert np.isclose(inside, 1e-3)
assert around < inside

# %%
late = optax.chain(fo.freezable(optax.sgd(1.0), "encoder"), optax.add_decayed_weights(-0.1))
updates, state = late.update(grads, late.init(PARAMS), PARAMS)
print(moved(PARAMS, optax.apply_updates(PARAMS, updates)))
print(moved(PARAMS, fo.apply_updates(PARAMS, updates, frozen=state)))
assert "encoder/kernel" in moved(PARAMS, optax.apply_updates(PARAMS, updates))
fo.testing.assert_frozen(PARAMS, fo.apply_updates(PARAMS, updates, frozen=state), "encoder")

# %% [markdown]
# **`masked`.** Use it inside, to decay kernels only, for example. Optax takes a selector for a
# mask. Where `True` means "apply" in Optax, invert the selector with `~`. Around `freezable`,
# `masked` passes the raw gradients of what it leaves out through as updates, as it does around any
# optimizer.

# %%
decay = optax.add_decayed_weights(0.1, mask=~fo.path("**/bias"))
tx = fo.freezable(optax.chain(decay, optax.sgd(0.1)), "encoder")
params, state = train(tx, PARAMS, tx.init(PARAMS))
assert moved(PARAMS, params) == ["head/bias", "head/kernel"]

around = optax.masked(fo.freezable(optax.sgd(0.1), "encoder"), ~fo.path("head/bias"))
updates, _ = around.update(grads, around.init(PARAMS), PARAMS)
assert np.array_equal(updates["head"]["bias"], grads["head"]["bias"])

# %% [markdown]
# **`partition`.** Use it inside: then there is one state, one spec over all groups, and one call to
# edit it. Around two `freezable`s, there are two states, and you have to say which one to edit.

# %%
groups = {"slow": optax.adam(0.001), "fast": optax.adam(0.01)}
labels = {"encoder": "slow", "head": "fast"}
tx = fo.freezable(optax.partition(groups, labels), "encoder/kernel")
state = fo.thaw(tx.init(PARAMS), PARAMS, "encoder/kernel")
assert len(moved(PARAMS, train(tx, PARAMS, state)[0])) == 4

apart = {"slow": fo.freezable(groups["slow"], "**/kernel"), "fast": fo.freezable(groups["fast"])}
try:
    fo.thaw(optax.partition(apart, labels).init(PARAMS), PARAMS, "encoder/kernel")
except ValueError as problem:
    print(problem)
else:
    raise AssertionError

# %% [markdown]
# **`inject_hyperparams`.** Use it inside or around. In both cases you set the learning rate in the
# state, and it stays set through an edit.


# %%
def frozen_adam(learning_rate):
    return fo.freezable(optax.adam(learning_rate), "encoder")


inside = fo.freezable(optax.inject_hyperparams(optax.adam)(learning_rate=0.01), "encoder")
around = optax.inject_hyperparams(frozen_adam)(learning_rate=0.01)
for tx in (inside, around):
    state = optax.tree_utils.tree_set(tx.init(PARAMS), learning_rate=0.0)
    state = fo.thaw(state, PARAMS, "encoder/bias")
    assert moved(PARAMS, train(tx, PARAMS, state)[0]) == []
    state = optax.tree_utils.tree_set(state, learning_rate=0.01)
    expected = ["encoder/bias", "head/bias", "head/kernel"]
    assert moved(PARAMS, train(tx, PARAMS, state)[0]) == expected

# %% [markdown]
# **`apply_if_finite`.** Use it inside: then a NaN in the gradient of a frozen leaf has no effect.
# Around `freezable`, such a NaN skips the step.

# %%
spoilt = fo.assign(grads, {"encoder/bias": jnp.nan})


def skipped(tx):
    _, state = tx.update(spoilt, tx.init(PARAMS), PARAMS)
    return int(optax.tree_utils.tree_get(state, "total_notfinite"))


assert skipped(fo.freezable(optax.apply_if_finite(optax.adam(0.01), 3), "encoder")) == 0
assert skipped(optax.apply_if_finite(fo.freezable(optax.adam(0.01), "encoder"), 3)) == 1

# %% [markdown]
# **`MultiSteps`.** Inside, it accumulates the gradients of trainable leaves alone, which saves
# memory. Around, it accumulates those of frozen leaves too. Thaw at the end of a cycle in both
# cases. Inside, a thawed leaf starts a cycle of its own. Around, its first average counts zeros for
# the steps before the thaw. Here the cycle has four steps, and the thaw comes in the middle of the
# second one.

# %%
inside = fo.freezable(optax.MultiSteps(optax.adam(0.01), 4).gradient_transformation(), "encoder")
around = optax.MultiSteps(fo.freezable(optax.adam(0.01), "encoder"), 4).gradient_transformation()


def steps_that_move(tx):
    params, state = train(tx, PARAMS, tx.init(PARAMS), steps=6)
    print(sum(x.nbytes for x in jax.tree.leaves(state)), "bytes of state")
    state, steps = fo.thaw(state, params, "encoder/bias"), {"encoder/bias": [], "head/bias": []}
    for i in range(7, 15):
        new, state = train(tx, params, state)
        for path in steps.keys() & moved(params, new):
            steps[path].append(i)
        params = new
    return steps


for name, tx in (("inside", inside), ("around", around)):
    print(name, end=": ")
    print("  thawed after step 6, updated at", steps_that_move(tx))

# %% [markdown]
# **`lookahead`.** Use it inside, with its two copies of the params. Both copies of a frozen leaf
# stay.

# %%
tx = fo.freezable(optax.lookahead(optax.sgd(0.1), sync_period=2, slow_step_size=0.5), "encoder")
both = optax.LookaheadParams.init_synced(PARAMS)
state = tx.init(both)
for _ in range(4):
    updates, state = tx.update(fo.grad(loss_fn, frozen=state)(both.fast), state, both)
    both = fo.apply_updates(both, updates)
for copy in both:
    assert moved(PARAMS, copy) == ["head/bias", "head/kernel"]

# %% [markdown]
# **`schedule_free`.** Use it inside. Optax's function for the params to evaluate reads its own
# state. So give it the inner state, with the trainable part of the params.

# %%
tx = fo.freezable(optax.contrib.schedule_free_sgd(0.1), "encoder")
params, state = train(tx, PARAMS, tx.init(PARAMS), steps=5)
trainable, rest = fo.partition(params, state)
evaluated = fo.merge(optax.contrib.schedule_free_eval_params(state.inner, trainable), rest)
fo.testing.assert_frozen(PARAMS, evaluated, "encoder")
assert moved(params, evaluated) == ["head/bias", "head/kernel"]

# %% [markdown]
# **A moving average of the params** is in no optimizer. Average the trainable part alone. That
# costs less. And `0.9 * p + 0.1 * p` does not always have the bits of a frozen `p`.

# %%
tx = fo.freezable(optax.adam(0.01), "encoder")
params, state = PARAMS, tx.init(PARAMS)
whole, (average, rest) = params, fo.partition(params, state)
for _ in range(5):
    params, state = train(tx, params, state)
    trainable, _ = fo.partition(params, state)
    average = optax.incremental_update(trainable, average, step_size=0.1)
    whole = optax.incremental_update(params, whole, step_size=0.1)

averaged = fo.merge(average, rest)
fo.testing.assert_frozen(PARAMS, averaged, "encoder")
print("averaged as a whole, this moved:", moved(averaged, whole))
assert "encoder/kernel" in moved(PARAMS, whole)

# %% [markdown]
# ## Tied params
#
# Tied params start as one array, and should stay equal. JAX keeps no aliases, so they become
# different at the first step. `fo.tied_paths` finds them. `fo.tie` sums their gradients, and gives
# them one state and one update.

# %%
table = jax.random.normal(jax.random.key(3), (4, 4))
tied = {"embed": table, "mix": jnp.eye(4), "unembed": table}
print(fo.tied_paths(tied))


def tied_loss(params):
    return ((X @ params["embed"] @ params["mix"] @ params["unembed"].T - X) ** 2).mean()


def embeddings_after(tx, steps=3):
    params, state = tied, tx.init(tied)
    for _ in range(steps):
        updates, state = tx.update(fo.grad(tied_loss, frozen=state)(params), state, params)
        params = fo.apply_updates(params, updates, frozen=state)
    return np.asarray(params["embed"]), np.asarray(params["unembed"])


apart = embeddings_after(fo.freezable(optax.adam(0.01), "mix"))
together = embeddings_after(fo.freezable(fo.tie(optax.adam(0.01), *fo.tied_paths(tied)), "mix"))
assert not np.array_equal(*apart)
assert np.array_equal(*together)

# %% [markdown]
# To freeze one of them and train the other is an error, with or without `tie`.

# %%
try:
    fo.freezable(optax.adam(0.01), "embed").init(tied)
except ValueError as problem:
    print(problem)
else:
    raise AssertionError

# %% [markdown]
# ## Params set by hand
#
# `fo.assign` sets leaves by their exact path, to a pretrained array for example. Dtype and sharding
# stay those of the leaf. Numbers broadcast. The other leaves are the very same objects. A path that
# does not exist is an error, and then nothing is set.

# %%
loaded = {"encoder/kernel": np.eye(4, dtype=np.float16), "encoder/bias": 0.1}
new = fo.assign(PARAMS, loaded)
assert new["encoder"]["kernel"].dtype == jnp.float32
assert moved(PARAMS, new) == ["encoder/bias", "encoder/kernel"]
assert new["head"]["kernel"] is PARAMS["head"]["kernel"]

tx = fo.freezable(optax.adam(0.01), frozen=list(loaded))
assert moved(new, train(tx, new, tx.init(new))[0]) == ["head/bias", "head/kernel"]
try:
    fo.assign(PARAMS, {"encoder/kernl": 0.0})
except ValueError as problem:
    print(problem)
else:
    raise AssertionError
