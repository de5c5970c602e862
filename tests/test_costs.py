"""Costs nothing: XLA's own analysis of the compiled step, against code split by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import freeze_optax as fo

pytestmark = pytest.mark.usefixtures("standard_promotion")

DEPTH, WIDTH = 6, 64
CLIP = optax.clip_by_global_norm(1.0)
ADAMW = optax.adamw(1e-3)


def layered() -> Any:
    keys = jax.random.split(jax.random.key(0), DEPTH)
    return {
        f"layer_{i}": {
            "kernel": jax.random.normal(key, (WIDTH, WIDTH)) * jnp.float32(0.1),
            "bias": jnp.zeros(WIDTH),
        }
        for i, key in enumerate(keys)
    }


def layered_loss(params, batch):
    x = batch
    for i in range(DEPTH):
        x = jnp.tanh(x @ params[f"layer_{i}"]["kernel"] + params[f"layer_{i}"]["bias"])
    return (x**2).mean()


def stacked() -> Any:
    blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layered().values())
    return {"blocks": blocks, "adapter": jax.tree.map(jnp.zeros_like, blocks), "head": layered()}


def stacked_loss(params, batch):
    def block(x, layer):
        blocks, adapter = layer
        x = x @ blocks["kernel"] + (x @ adapter["kernel"]) + blocks["bias"] + adapter["bias"]
        return jnp.tanh(x), None

    x, _ = jax.lax.scan(block, batch, (params["blocks"], params["adapter"]))
    return layered_loss(params["head"], x)


BIASES_ONLY = ~fo.path("**/bias")
CASES = {
    "prefix frozen": (layered, layered_loss, "layer_{0..4}", None, ADAMW, False),
    "suffix frozen": (layered, layered_loss, "layer_{1..5}", None, ADAMW, False),
    "only biases trained": (layered, layered_loss, BIASES_ONLY, None, ADAMW, False),
    "clip inside": (layered, layered_loss, "layer_{0..4}", None, optax.chain(CLIP, ADAMW), False),
    "clip outside": (layered, layered_loss, "layer_{0..4}", CLIP, ADAMW, False),
    "norm logged": (layered, layered_loss, "layer_{0..4}", None, ADAMW, True),
    "scan-stacked blocks": (stacked, stacked_loss, ("blocks", "head"), None, ADAMW, True),
    "stack trained": (stacked, stacked_loss, ("adapter", "head"), None, ADAMW, False),
}


def norm(tree: Any) -> jax.Array:
    # optax.global_norm became optax.tree.norm; this reads all the gradients in any version.
    return jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree)))


def analysis(step, *args, donate) -> dict[str, float]:
    compiled = jax.jit(step, donate_argnums=(0, 1) if donate else ()).lower(*args).compile()
    costs, memory = compiled.cost_analysis(), compiled.memory_analysis()
    costs = costs[0] if isinstance(costs, list) else costs
    return {
        "flops": costs["flops"],
        "bytes accessed": costs["bytes accessed"],
        "temporary bytes": memory.temp_size_in_bytes,
        "output bytes": memory.output_size_in_bytes,
    }


@pytest.mark.parametrize("donate", [False, True], ids=["kept", "donated"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_costs_what_code_split_by_hand_costs(case, donate):
    make, loss, frozen, before, inner, log_norm = CASES[case]
    params, batch = make(), jnp.ones((32, WIDTH))
    first = [before] if before else []

    tx = optax.chain(*first, fo.freezable(inner, frozen))

    def step(params, state, batch):
        value, grads = fo.value_and_grad(loss, frozen=state)(params, batch)
        updates, state = tx.update(grads, state, params)
        logged = norm(grads) if log_norm else value
        return fo.apply_updates(params, updates, frozen=state), state, value, logged

    # By hand: two flat lists, an optimizer that never hears of the second. It takes and returns
    # the frozen leaves too, as the drop-in step does.
    flags = jax.tree.leaves(fo.mask(frozen, params))
    leaves, treedef = jax.tree.flatten(params)
    trainable = [x for x, flag in zip(leaves, flags, strict=True) if not flag]
    rest = [x for x, flag in zip(leaves, flags, strict=True) if flag]
    hand = optax.chain(*first, inner)

    def hand_step(both, state, batch):
        trainable, rest = both

        def of_trainable(trainable):
            moving, still = iter(trainable), iter(rest)
            merged = treedef.unflatten([next(still) if flag else next(moving) for flag in flags])
            return loss(merged, batch)

        value, grads = jax.value_and_grad(of_trainable)(trainable)
        updates, state = hand.update(grads, state, trainable)
        logged = norm(grads) if log_norm else value
        return (optax.apply_updates(trainable, updates), rest), state, value, logged

    ours = analysis(step, params, tx.init(params), batch, donate=donate)
    limit = analysis(hand_step, (trainable, rest), hand.init(trainable), batch, donate=donate)
    over = {k: (ours[k], limit[k]) for k in limit if ours[k] > 1.02 * limit[k]}
    assert not over


def test_a_peer_costs_more_once_something_else_reads_the_gradients():
    # So the gate above can fail. Where nothing reads them, XLA removes the peer's needless
    # backward pass as well.
    params, batch = layered(), jnp.ones((32, WIDTH))
    frozen = "layer_{0..4}"
    tx = optax.partition(
        {"trainable": ADAMW, "frozen": optax.set_to_zero()}, fo.labels(frozen, params)
    )

    def peer_step(params, state, batch):
        value, grads = jax.value_and_grad(layered_loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value, norm(grads)

    ours = fo.freezable(ADAMW, frozen)

    def step(params, state, batch):
        value, grads = fo.value_and_grad(layered_loss, frozen=state)(params, batch)
        updates, state = ours.update(grads, state, params)
        new = fo.apply_updates(params, updates, frozen=state)
        return new, state, value, norm(grads)

    peer = analysis(peer_step, params, tx.init(params), batch, donate=True)
    own = analysis(step, params, ours.init(params), batch, donate=True)
    assert peer["flops"] > 1.5 * own["flops"]
    assert peer["bytes accessed"] > 1.5 * own["bytes accessed"]


def pointers(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.unsafe_buffer_pointer(), tree)


@pytest.mark.parametrize("where", ["donated", "applied outside jit"])
def test_frozen_leaves_keep_their_very_buffers(where):
    params, batch = layered(), jnp.ones((32, WIDTH))
    tx = fo.freezable(ADAMW, "layer_{0..4}")
    state = tx.init(params)
    before = pointers({k: v for k, v in params.items() if k != "layer_5"})

    def updates_of(params, state):
        grads = fo.grad(layered_loss, frozen=state, holes=True)(params, batch)
        return tx.update(grads, state, params)

    def whole(params, state):
        updates, state = updates_of(params, state)
        return fo.apply_updates(params, updates, frozen=state), state

    for _ in range(2):
        if where == "donated":
            params, state = jax.jit(whole, donate_argnums=(0, 1))(params, state)
        else:
            updates, state = jax.jit(updates_of)(params, state)
            params = fo.apply_updates(params, updates, frozen=state)
    assert pointers({k: v for k, v in params.items() if k != "layer_5"}) == before


def test_updates_can_be_donated_though_zeros_are_shared_under_the_trace():
    params = layered()
    tx = fo.freezable(optax.sgd(0.1), "layer_{0..4}")
    state = tx.init(params)
    for update in (tx.update, jax.jit(tx.update)):
        updates, _ = update(params, state, params)
        apply = jax.jit(lambda u, p: fo.apply_updates(p, u), donate_argnums=0)
        new = apply(updates, params)
        fo.testing.assert_frozen(params, new, "layer_{0..4}")


def test_holes_cost_no_output():
    params, batch = layered(), jnp.ones((32, WIDTH))
    grads = jax.jit(fo.grad(layered_loss, "layer_{0..4}", holes=True))
    memory = grads.lower(params, batch).compile().memory_analysis()
    trained = sum(x.nbytes for x in jax.tree.leaves(params["layer_5"]))
    # A tuple of outputs has a table of pointers on top.
    assert trained <= memory.output_size_in_bytes <= trained + 8 * len(jax.tree.leaves(params))
