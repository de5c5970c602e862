"""Rows that train cannot tell: every optimizer of optax, against the bare one on their array."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from tests.support import optimizers
from tests.support.compiling import OPTIMISED
from tests.support.sampling import cases

pytestmark = pytest.mark.usefixtures("standard_promotion")

STEPS = 3
LIVE = {
    "bottom/kernel": [4, 5],  # a block at the end
    "middle/kernel": [2, 3],  # one in the middle
    "top/kernel": [1, 2, 4, 5],  # scattered
    "top/bias": [0, 3],
}
COUNTS = {"bottom/kernel": 6, "middle/kernel": 6, "top/kernel": 6, "top/bias": 4}


def frozen_rows(path: str) -> list[int]:
    return sorted(set(range(COUNTS[path])) - set(LIVE[path]))


FROZEN = ("bottom/bias", *(fo.rows(path, frozen_rows(path)) for path in LIVE))


def sub(tree: Any) -> Any:
    """What a person would keep by hand: the rows that train, and no frozen leaf."""
    kept = {
        "bottom": {"kernel": tree["bottom"]["kernel"]},
        "middle": dict(tree["middle"]),
        "top": dict(tree["top"]),
    }
    for path, rows in LIVE.items():
        node, name = path.split("/")
        kept[node][name] = kept[node][name][np.array(rows)]
    return kept


def whole(subtree: Any, params: Any) -> Any:
    full = {node: {**params[node], **subtree[node]} for node in params}
    for path, rows in LIVE.items():
        node, name = path.split("/")
        full[node][name] = params[node][name].at[np.array(rows)].set(subtree[node][name])
    return full


def loss(params: Any) -> jax.Array:
    x = jnp.linspace(-1.0, 1.0, 18).reshape(3, 6) @ params["bottom"]["kernel"]
    x = jnp.tanh(jnp.tanh(x + params["bottom"]["bias"]) @ params["middle"]["kernel"].T)
    x = x @ params["top"]["kernel"] + params["middle"]["bias"] - params["top"]["bias"]
    return (x**2).mean()


value_and_grad = jax.jit(jax.value_and_grad(loss))


def rubbish(grads: Any) -> Any:
    """What `update` has to ignore at frozen rows, and a hole at a frozen leaf."""
    spoilt = {node: dict(leaves) for node, leaves in grads.items()}
    spoilt["bottom"]["bias"] = optax.MaskedNode()
    for path, value in zip(LIVE, (jnp.nan, jnp.inf, -jnp.inf, jnp.nan), strict=True):
        node, name = path.split("/")
        spoilt[node][name] = grads[node][name].at[np.array(frozen_rows(path))].set(value)
    return spoilt


def rows_alone(grads: Any) -> Any:
    return {**sub(grads), "bottom": {**sub(grads)["bottom"], "bias": optax.MaskedNode()}}


def live_updates(updates: Any) -> Any:
    """The rows that train of whole updates, which have to be -0.0 at the others."""
    for path in LIVE:
        node, name = path.split("/")
        still = np.asarray(updates[node][name])[frozen_rows(path)]
        assert np.all((still == 0) & np.signbit(still))
    return sub(updates)


def without_payloads(tree: Any) -> list[Any]:
    # The sign of a NaN that arithmetic makes depends on how XLA compiles it.
    leaves = jax.tree.leaves(tree)
    floats = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]
    return [
        jnp.where(jnp.isnan(x), jnp.nan, x) if is_float else x
        for x, is_float in zip(leaves, floats, strict=True)
    ]


def same(expected: Any, new: Any) -> None:
    """Whether two trees have the same arrays, bit by bit, whatever nodes they stand in."""
    one, other = map(without_payloads, (expected, new))
    fo.testing.assert_frozen(dict(enumerate(one)), dict(enumerate(other)), True)


def close(expected: Any, new: Any) -> None:
    pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(new), strict=True)
    for one, other in pairs:
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def compare(module: Any, name: str, wrap: Any, form: Any, live: Any, agree: Any) -> None:
    """Steps of both on the same gradients; `form` is what those of ours look like."""
    start = params = optimizers.params()
    bare, tx = optimizers.build(module, name), fo.freezable(optimizers.build(module, name), FROZEN)

    def bare_loss(rows):
        return loss(whole(rows, start))

    @wrap
    def bare_step(rows, state, value, grads):
        extra = optimizers.extras(name, bare_loss, value, grads)
        updates, state = bare.update(grads, state, rows, **extra)
        return optax.apply_updates(rows, updates), updates, state

    @wrap
    def step(params, state, value, grads):
        extra = optimizers.extras(name, loss, value, grads)
        updates, state = tx.update(grads, state, params, **extra)
        return fo.apply_updates(params, updates, frozen=state), updates, state

    rows = sub(params)
    bare_state, state = bare.init(rows), tx.init(params)
    same(bare_state, state)
    for _ in range(STEPS):
        value, grads = value_and_grad(params)
        rows, bare_updates, bare_state = bare_step(rows, bare_state, value, sub(grads))
        params, updates, state = step(params, state, value, form(grads))
        assert isinstance(updates["bottom"]["bias"], optax.MaskedNode)
        agree(bare_state, state)
        agree(bare_updates, live(updates))
        agree(rows, sub(params))
        fo.testing.assert_frozen(start, params, FROZEN)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("module", "name"),
    optimizers.cases(optimizers.complete(), optimizers.FEW_KINDS - {"lbfgs", "muon", "noisy_sgd"}),
)
def test_it_is_bitwise_the_bare_optimizer_on_the_array_of_rows_that_train(module, name):
    def live(updates):
        assert updates["bottom"]["kernel"].shape == (2, 4)
        return updates

    # Its many small sums are rounded alike only where XLA's optimiser has fused them.
    options = dict(OPTIMISED) if name == "lbfgs" else None
    jit = functools.partial(jax.jit, compiler_options=options)
    compare(module, name, jit, rows_alone, live, same)


NAMES = ["adamw", "adafactor", "adadelta", "chain", "lamb", "partition", "sgd"]
SEVERAL = {name: name for name in NAMES}


@pytest.mark.parametrize("name", cases(SEVERAL, ["adamw", "adafactor", "chain", "partition"]))
def test_whole_gradients_with_rubbish_at_frozen_rows_do_as_well_bitwise_in_eager_mode(name):
    compare(optax, name, lambda f: f, rubbish, live_updates, same)


# Where XLA fuses an update with the slicing of its gradient, it may round elsewhere.
@pytest.mark.parametrize("name", cases(SEVERAL, ["adamw", "adafactor", "chain", "partition"]))
def test_whole_gradients_with_rubbish_at_frozen_rows_do_as_well_under_jit(name):
    compare(optax, name, jax.jit, rubbish, live_updates, close)
