"""What the manual of Lux and the design of Optimisers.jl freeze, as users of JAX write it."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import freeze_optax as fo
from freeze_optax import linen
from freeze_optax import nnx as fnnx

pytestmark = pytest.mark.usefixtures("standard_promotion")


def paths(tree: Any) -> list[str]:
    """The paths of what is true in a mask, read by jax alone."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(k, simple=True, separator="/") for k, flag in found if flag]


def assert_close(actual: Any, expected: Any, rtol: float = 1e-5) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    compare = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=1e-6)
    jax.tree.map(compare, actual, expected)


# Lux: Chain(Dense(3 => 4), Chain(Dense(4 => 4), Dropout, BatchNorm(4)), Dense(4 => 1))


def chain(train: bool) -> nn.Sequential:
    inner = [nn.Dense(4), nn.Dropout(0.5, deterministic=not train), nn.BatchNorm(not train)]
    return nn.Sequential([nn.Dense(4), nn.Sequential(inner), nn.Dense(1)])


BATCH = jax.random.normal(jax.random.key(0), (8, 3))
CHAIN = jax.tree.map(np.asarray, jax.jit(chain(False).init)(jax.random.key(1), BATCH))
DENSE = fo.of_type(nn.Dense, modules=linen.modules(chain(False), BATCH))

FIRST = ["layers_0/bias", "layers_0/kernel"]
INNER = ["layers_1/layers_0/bias", "layers_1/layers_0/kernel"]
NORM = ["layers_1/layers_2/bias", "layers_1/layers_2/scale"]
LAST = ["layers_2/bias", "layers_2/kernel"]


def predict(params: Any) -> jax.Array:
    variables = {**CHAIN, "params": params}
    rngs = {"dropout": jax.random.key(2)}
    return chain(True).apply(variables, BATCH, rngs=rngs, mutable="batch_stats")[0]


def loss_of_chain(params: Any) -> tuple[jax.Array, jax.Array]:
    y = predict(params)
    return ((y - BATCH.sum(1, keepdims=True)) ** 2).mean(), y


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [
        pytest.param(DENSE, FIRST + INNER + LAST, id="all Dense by type"),
        pytest.param("layers_2", LAST, id="a layer by name"),
        pytest.param("layers_0/kernel", FIRST[1:], id="its weight only"),
        pytest.param("layers_1/layers_2/scale", NORM[1:], id="a nested field"),
        pytest.param(fo.layers("layers_*")[0:2], FIRST + INNER + NORM, id="a slice"),
        pytest.param(fo.layers("layers_*")[1:], INNER + NORM + LAST, id="an open slice"),
        pytest.param(fo.layers("layers_*")[-1], LAST, id="the last"),
        pytest.param(fo.layers("layers_1/layers_*")[:1], INNER, id="a slice of the inner chain"),
        # Dropout has no params and so no rank: 1 is not it, as in Lux, but what comes next.
        pytest.param(fo.layers("layers_1/layers_*")[1], NORM, id="after Dropout"),
        pytest.param(
            fo.of_type(nn.Dense, fields=["bias"], modules=linen.modules(chain(False), BATCH))
            | fo.path("layers_1/layers_2"),
            [FIRST[0], INNER[0], *NORM, LAST[0]],
            id="the biases of all Dense, and BatchNorm",
        ),
    ],
)
def test_lux_freezes_a_part_of_a_chain_forward_unchanged_and_only_the_rest_trains(frozen, expected):
    params = jax.tree.map(jnp.asarray, CHAIN["params"])
    assert paths(fo.mask(frozen, params)) == expected
    tx = fo.freezable(optax.sgd(0.5), frozen)
    state = tx.init(params)
    (_, y), grads = fo.value_and_grad(loss_of_chain, frozen=state, has_aux=True)(params)
    updates, state = tx.update(grads, state, params)
    new = fo.apply_updates(params, updates, frozen=state)

    assert np.asarray(y).tobytes() == np.asarray(predict(params)).tobytes()
    all_grads = jax.grad(loss_of_chain, has_aux=True)(params)[0]
    stepped = jax.tree.map(lambda p, g: np.asarray(p) - 0.5 * np.asarray(g), params, all_grads)
    assert_close(
        new,
        jax.tree_util.tree_map_with_path(
            lambda path, old, moved: (
                old if jax.tree_util.keystr(path, simple=True, separator="/") in expected else moved
            ),
            params,
            stepped,
        ),
    )
    changed = jax.tree.map(lambda old, leaf: leaf is not old, params, new)
    trained = [path for path in FIRST + INNER + NORM + LAST if path not in expected]
    assert paths(changed) == trained
    moved = jax.tree.map(lambda old, leaf: (np.asarray(old) != leaf).any(), params, new)
    assert paths(moved) == trained


def nnx_chain() -> nnx.Sequential:
    rngs = nnx.Rngs(0)
    inner = (nnx.Linear(4, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))
    ends = (nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs))
    return nnx.Sequential(ends[0], nnx.Sequential(*inner), ends[1])


def test_lux_freezes_all_dense_by_type_in_an_nnx_model_too():
    model, twin = nnx_chain(), nnx_chain()
    table = fnnx.modules(model)
    tx = fo.freezable(optax.sgd(0.5), fo.of_type(nnx.Linear, modules=table))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def loss(model):
        y = model(BATCH)
        return ((y - BATCH.sum(1, keepdims=True)) ** 2).mean(), y

    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    (_, y), grads = fnnx.value_and_grad(loss, frozen=optimizer, has_aux=True)(model)
    optimizer.update(model, grads)
    # The twin draws the same Dropout mask.
    all_grads, expected = nnx.grad(loss, has_aux=True)(twin)
    assert np.asarray(y).tobytes() == np.asarray(expected).tobytes()

    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    by_hand = jax.tree.map(lambda x: x, before)
    norm, grad = by_hand["layers"][1]["layers"][2], all_grads["layers"][1]["layers"][2]
    for name in ("bias", "scale"):
        assert (grad[name][...] != 0).all()
        norm[name] = norm[name] - 0.5 * grad[name][...]
    assert_close(after, by_hand)
    for number in (0, 2):
        for name in ("bias", "kernel"):
            old, new = (tree["layers"][number][name] for tree in (before, after))
            np.testing.assert_array_equal(old, new)


def equinox_chain() -> eqx.nn.Sequential:
    keys = jax.random.split(jax.random.key(0))
    ends = (eqx.nn.Linear(3, 4, key=keys[0]), eqx.nn.Linear(4, 1, key=keys[1]))
    return eqx.nn.Sequential([ends[0], eqx.nn.Lambda(jnp.tanh), eqx.nn.Dropout(0.5), ends[1]])


def test_lux_an_activation_among_the_layers_of_an_equinox_chain_has_no_rank():
    model = equinox_chain()
    trainable, _ = fo.partition(model, fo.layers("layers/*")[:-1])
    last = model.layers[3]
    found = jax.tree.leaves(trainable)
    assert [id(leaf) for leaf in found] == [id(last.weight), id(last.bias)]
    # The second is Dropout, whose rate is a float, and not the activation before it.
    trainable, _ = fo.partition(model, ~fo.layers("layers/*")[1])
    assert jax.tree.leaves(trainable) == [0.5]


def test_lux_the_rate_of_an_equinox_dropout_is_a_float_that_decays_unless_frozen_by_type():
    model = equinox_chain()

    def rate_after_a_step(frozen):
        tx = fo.freezable(optax.adamw(0.1, weight_decay=0.5), frozen)
        state = tx.init(model)
        loss = lambda model: model(BATCH[0], key=jax.random.key(1)).sum()  # noqa: E731
        updates, state = tx.update(fo.grad(loss, frozen=state)(model), state, model)
        return fo.apply_updates(model, updates, frozen=state).layers[2].p

    # Its gradient is 0, so there is only the decay: 0.5 * (1 - 0.1 * 0.5).
    np.testing.assert_allclose(rate_after_a_step(fo.nothing), 0.475, rtol=1e-6)
    assert rate_after_a_step(fo.of_type(eqx.nn.Dropout)) is model.layers[2].p


# Optimisers.jl: how to say what is frozen


class Coder(eqx.Module):
    enc: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    dec: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.enc, self.dec = (eqx.nn.Linear(2, 2, key=k) for k in keys)
        self.norm = eqx.nn.LayerNorm(2)

    def __call__(self, x):
        return self.dec(self.norm(jnp.tanh(self.enc(x))))


class Pair(eqx.Module):
    left: Coder
    right: Coder
    enc: jax.Array

    def __init__(self, key):
        self.left, self.right = (Coder(k) for k in jax.random.split(key))
        self.enc = jnp.array([0.5, -0.5])

    def __call__(self, x):
        return self.left(x) + self.right(x) * self.enc


def by_kind(module: Any, path: str) -> bool | tuple[str, ...]:
    if isinstance(module, eqx.nn.LayerNorm):
        return True
    if isinstance(module, eqx.nn.Linear) and path.endswith("enc"):
        return ("weight",)
    return False


ADDRESSES = [
    pytest.param("left/enc", ["left/enc/weight", "left/enc/bias"], id="by address"),
    pytest.param(["left/norm/bias", "enc"], ["left/norm/bias", "enc"], id="by two addresses"),
    pytest.param(
        "**/enc",
        ["left/enc/weight", "left/enc/bias", "right/enc/weight", "right/enc/bias", "enc"],
        id="by field name anywhere",
    ),
    pytest.param(
        fo.of_type(eqx.nn.LayerNorm),
        [f"{side}/norm/{name}" for side in ("left", "right") for name in ("weight", "bias")],
        id="by type",
    ),
    pytest.param(
        fo.by_module(by_kind),
        [
            f"{side}/{name}"
            for side in ("left", "right")
            for name in ("enc/weight", "norm/weight", "norm/bias")
        ],
        id="by a function that gives fields",
    ),
]


@pytest.mark.parametrize(("frozen", "expected"), ADDRESSES)
def test_optimisers_jl_freezes_by_address_name_type_or_function(frozen, expected):
    model = Pair(jax.random.key(0))
    assert paths(fo.mask(frozen, model)) == expected
    x = jnp.array([[1.0, 2.0], [0.5, -0.25], [-1.0, 0.75]])

    def loss(model):
        return (jax.vmap(model)(x) ** 2).mean()

    # Set up unfrozen and frozen afterwards, as `Optimisers.setup` and `freeze!` do.
    tx = fo.freezable(optax.sgd(0.5))
    state = fo.freeze(tx.init(model), model, frozen)
    updates, state = tx.update(fo.grad(loss, frozen=state)(model), state, model)
    new = fo.apply_updates(model, updates, frozen=state)
    stepped = jax.tree.map(lambda p, g: p - 0.5 * g, model, jax.grad(loss)(model))
    held = jax.tree.map(lambda a, b: a is b, model, new)
    assert paths(held) == expected
    assert_close(new, jax.tree.map(lambda f, old, s: old if f else s, held, model, stepped))


def test_optimisers_jl_a_function_that_names_no_field_is_told_the_fields():
    frozen = fo.by_module(lambda module, _: ("kernel",) if hasattr(module, "in_features") else ())
    with pytest.raises(ValueError, match=r"'kernel' at 'left/enc', but this Linear has .*'weight'"):
        fo.freezable(optax.sgd(0.5), frozen).init(Pair(jax.random.key(0)))


class Reader(eqx.Module):
    """A language model of one layer that reads and writes with one table."""

    embed: eqx.nn.Embedding
    head: eqx.nn.Linear
    middle: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(5, 3, key=keys[0])
        self.middle = eqx.nn.Linear(3, 3, key=keys[1])
        head = eqx.nn.Linear(3, 5, key=keys[2])
        self.head = eqx.tree_at(lambda head: head.weight, head, self.embed.weight)

    def __call__(self, token):
        return self.head(jnp.tanh(self.middle(self.embed(token))))


ALIASES = ("embed/weight", "head/weight")


def loss_of_reader(model: Reader) -> jax.Array:
    tokens, following = jnp.array([0, 3, 1, 3]), jnp.array([3, 1, 4, 2])
    logits = jax.vmap(model)(tokens)
    return optax.softmax_cross_entropy_with_integer_labels(logits, following).mean()


def trained_reader(tx: Any, model: Reader, state: Any, steps: int) -> tuple[Reader, Any]:
    @eqx.filter_jit
    def step(model, state):
        grads = fo.grad(loss_of_reader, frozen=state)(model)
        updates, state = tx.update(grads, state, model)
        return fo.apply_updates(model, updates, frozen=state), state

    for _ in range(steps):
        model, state = step(model, state)
    return model, state


def replace_both(model: Reader, table: jax.Array) -> Reader:
    return eqx.tree_at(lambda m: (m.embed.weight, m.head.weight), model, (table, table))


def test_optimisers_jl_ties_freeze_together():
    model = Reader(jax.random.key(0))
    assert fo.tied_paths(model) == [ALIASES]
    tx = fo.freezable(fo.tie(optax.adam(0.1), *fo.tied_paths(model)), ALIASES)
    new, _ = trained_reader(tx, model, tx.init(model), 3)
    kept = [np.asarray(m.embed.weight).tobytes() for m in (model, new)]
    assert kept[0] == kept[1] == np.asarray(new.head.weight).tobytes()

    inner = optax.adam(0.1)
    rest = (model.head.bias, model.middle)
    state = inner.init(rest)

    def whole(rest):
        return eqx.tree_at(lambda m: (m.head.bias, m.middle), model, rest)

    for _ in range(3):
        grads = jax.grad(lambda rest: loss_of_reader(whole(rest)))(rest)
        updates, state = inner.update(grads, state)
        rest = optax.apply_updates(rest, updates)
    assert_close(new, whole(rest))


def test_optimisers_jl_a_tie_trains_as_one_parameter_would():
    model = Reader(jax.random.key(0))
    tx = fo.freezable(fo.tie(optax.adam(0.1), *fo.tied_paths(model)), "middle")
    state = tx.init(model)
    # A count, and two moments of one table and one bias.
    assert sum(x.size for x in jax.tree.leaves(state)) == 1 + 2 * (5 * 3 + 5)
    new, _ = trained_reader(tx, model, state, 4)

    inner = optax.adam(0.1)
    own = (model.embed.weight, model.head.bias)
    state = inner.init(own)

    def whole(own):
        return eqx.tree_at(lambda m: m.head.bias, replace_both(model, own[0]), own[1])

    for _ in range(4):
        grads = jax.grad(lambda own: loss_of_reader(whole(own)))(own)
        updates, state = inner.update(grads, state)
        own = optax.apply_updates(own, updates)
    assert_close(new, whole(own))
    np.testing.assert_array_equal(new.embed.weight, new.head.weight)


@pytest.mark.parametrize("alias", ["embed", "head/weight", fo.of_type(eqx.nn.Embedding)], ids=repr)
def test_optimisers_jl_freezing_one_alias_only_is_an_error_that_names_both(alias):
    model = Reader(jax.random.key(0))
    shared = r"'(embed|head)/weight' would be frozen and '(embed|head)/weight' trained, but they s"
    for inner in (optax.adam(0.1), fo.tie(optax.adam(0.1), ALIASES)):
        with pytest.raises(ValueError, match=shared):
            fo.freezable(inner, alias).init(model)

    # After a jitted step each has a buffer of its own, and only `fo.tie` knows that they are one.
    tx = fo.freezable(fo.tie(optax.adam(0.1), ALIASES))
    model, state = trained_reader(tx, model, tx.init(model), 1)
    assert fo.tied_paths(model) == []
    before = jax.tree.leaves(state)
    with pytest.raises(ValueError, match=r"would be frozen and .* trained, but fo.tie ties them"):
        fo.freeze(state, model, alias)
    assert all(a is b for a, b in zip(before, jax.tree.leaves(state), strict=True))
    assert not any(jax.tree.leaves(fo.mask(state, model)))
    state = fo.thaw(fo.freeze(state, model, ALIASES), model, ALIASES)
    new, _ = trained_reader(tx, model, state, 1)
    np.testing.assert_array_equal(new.embed.weight, new.head.weight)
    assert (new.embed.weight != model.embed.weight).any()
