"""Tied leaves train as one shared parameter: every optimizer of optax, bitwise, against that."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import freeze_optax as fo
from tests.support import optimizers
from tests.support.sampling import cases

pytestmark = pytest.mark.usefixtures("standard_promotion")

GROUP = ("bottom/kernel", "top/kernel")
STEPS = 3


def start() -> Any:
    params = optimizers.params()
    params["top"]["kernel"] = params["bottom"]["kernel"]
    return params


def one_leaf(tree: Any) -> Any:
    """What a person would write: the shared kernel is there once, and no holes."""
    return {**tree, "top": {"bias": tree["top"]["bias"]}}


def whole(tree: Any) -> Any:
    return {**tree, "top": {**tree["top"], "kernel": tree["bottom"]["kernel"]}}


def loss(params: Any) -> jax.Array:
    x = jnp.linspace(-1.0, 1.0, 18).reshape(3, 6) @ params["bottom"]["kernel"]
    x = jnp.tanh(x + params["bottom"]["bias"]) * params["middle"]["kernel"][:3]
    x = (x + params["middle"]["bias"] + params["top"]["bias"]) @ params["top"]["kernel"].T
    return ((x - 0.5) ** 2).mean()


def shared_loss(tree: Any) -> jax.Array:
    return loss(whole(tree))


def nbytes(state: Any) -> int:
    leaves = jax.tree.leaves(state)
    keys = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
    raw = [jax.random.key_data(x) if k else x for x, k in zip(leaves, keys, strict=True)]
    return sum(x.nbytes for x in raw)


def train(tx, params, loss_fn, name="", jit=True) -> tuple[list[Any], Any]:
    """The params and updates after each step, and the last state."""

    def step(params, state):
        value, grads = jax.value_and_grad(loss_fn)(params)
        extra = optimizers.extras(name, loss_fn, value, grads)
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), updates, state

    step = jax.jit(step) if jit else step
    state, history = tx.init(params), []
    for _ in range(STEPS):
        params, updates, state = step(params, state)
        history.append((params, updates))
    return history, state


def assert_shared(history: list[Any], expected: list[Any]) -> None:
    for step, bare in zip(history, expected, strict=True):
        fo.testing.assert_frozen(tuple(map(whole, bare)), step, True)


# All that tests/support/optimizers.py builds: its EXCLUDED says why not the rest. With groups of
# two, as the sum of three gradients depends on their order.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("module", "name"),
    optimizers.cases(optimizers.complete(), optimizers.FEW_KINDS - {"lbfgs", "muon", "noisy_sgd"}),
)
def test_a_group_follows_the_bare_optimizer_on_one_shared_leaf_bitwise(module, name):
    bare = optimizers.build(module, name)
    expected, bare_state = train(bare, one_leaf(start()), shared_loss, name)
    tx = fo.freezable(fo.tie(optimizers.build(module, name), GROUP))
    history, state = train(tx, start(), loss, name)
    assert_shared(history, expected)
    assert nbytes(state) == nbytes(bare_state)


MASK = {
    "bottom": {"kernel": True, "bias": False},
    "middle": {"kernel": False, "bias": True},
    "top": {"kernel": True, "bias": True},
}
LABELS = jax.tree.map(lambda flag: "adam" if flag else "sgd", MASK)
INNERS = {"adam": optax.adam(0.1), "sgd": optax.sgd(0.1, momentum=0.9)}

# The transformation of the tied tree, and the bare one of the shared tree.
COMPOSITIONS = {
    "in MultiSteps": (
        optax.MultiSteps(fo.tie(optax.adam(0.1), GROUP), 2).gradient_transformation(),
        optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    ),
    "around a mask of the whole tree": (
        fo.tie(optax.masked(optax.adam(0.1), MASK), GROUP),
        optax.masked(optax.adam(0.1), one_leaf(MASK)),
    ),
    "around labels of the whole tree": (
        fo.tie(optax.partition(INNERS, LABELS), GROUP),
        optax.partition(INNERS, one_leaf(LABELS)),
    ),
    "in a partition": (
        optax.partition({**INNERS, "adam": fo.tie(INNERS["adam"], GROUP)}, LABELS),
        optax.partition(INNERS, one_leaf(LABELS)),
    ),
    "in inject_hyperparams": (
        optax.inject_hyperparams(lambda rate: fo.tie(optax.adam(rate), GROUP))(rate=0.1),
        optax.inject_hyperparams(lambda rate: optax.adam(rate))(rate=0.1),  # noqa: PLW0108
    ),
    "in a chain": (
        optax.chain(fo.tie(optax.chain(optax.clip(0.1), INNERS["sgd"]), GROUP), optax.scale(0.5)),
        optax.chain(optax.clip(0.1), INNERS["sgd"], optax.scale(0.5)),
    ),
    "in another tie": (
        fo.tie(fo.tie(optax.adam(0.1), GROUP)),
        optax.adam(0.1),
    ),
}


@pytest.mark.parametrize("jit", cases({"eager": False, "jit": True}, ["jit"]))
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_it_composes_inside_and_outside(composition, jit):
    tied, bare = map(optax.with_extra_args_support, COMPOSITIONS[composition])
    expected, bare_state = train(bare, one_leaf(start()), shared_loss, jit=jit)
    for tx in (tied, fo.freezable(tied)):
        history, state = train(tx, start(), loss, jit=jit)
        assert_shared(history, expected)
        if composition != "in MultiSteps":  # which accumulates what comes in, the whole tree
            assert nbytes(state) == nbytes(bare_state)


def lookahead(tx: Any, fast: Any, loss_fn: Any) -> Any:
    params = optax.LookaheadParams.init_synced(fast)
    state = tx.init(params)
    for _ in range(STEPS):
        updates, state = tx.update(jax.grad(loss_fn)(params.fast), state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("outside", [False, True], ids=["inside", "outside"])
def test_both_copies_of_lookahead(outside):
    ahead = lambda tx: optax.lookahead(tx, 2, 0.5)  # noqa: E731
    expected = lookahead(ahead(optax.adam(0.1)), one_leaf(start()), shared_loss)
    tie = lambda tx: fo.tie(tx, GROUP)  # noqa: E731
    tied = ahead(tie(optax.adam(0.1))) if outside else tie(ahead(optax.adam(0.1)))
    for tx in (tied, fo.freezable(tied)):
        params = lookahead(tx, start(), loss)
        for copy, bare_copy in zip(params, expected, strict=True):
            fo.testing.assert_frozen(whole(bare_copy), copy, True)


SEARCHES = {
    "lbfgs": optax.lbfgs,
    "backtracking": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15, slope_rtol=0.9)
    ),
    "zoom": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(15)),
}


# Both searches of optax: L-BFGS has the other one.
@pytest.mark.parametrize("search", cases({x: x for x in SEARCHES}, ["lbfgs", "backtracking"]))
def test_a_line_search_sees_the_slope_along_the_shared_leaf(search):
    # Gradients that nearly cancel at first: that of one member alone is of another sign or size.
    table = jnp.array([1.0, 2.0, 3.0])
    scale, pull = jnp.array([1.0, 4.0, 9.0]), jnp.array([10.0, 1.0, 1.0])

    def loss(tree):
        quadratic = 3 * (scale * tree["embed"] ** 2).sum() - (tree["head"] * pull).sum()
        return quadratic + (tree["own"] ** 4).sum()

    def run(tx, tree, loss):
        state = tx.init(tree)

        @jax.jit
        def step(tree, state):
            value, grad = jax.value_and_grad(loss)(tree)
            extra = {"value": value, "grad": grad, "value_fn": loss}
            updates, state = tx.update(grad, state, tree, **extra)
            return optax.apply_updates(tree, updates), state

        for _ in range(6):
            tree, state = step(tree, state)
        return tree

    def shared(tree):
        return {**tree, "head": tree["embed"]}

    bare = {"embed": table, "own": table}
    expected = shared(run(SEARCHES[search](), bare, lambda tree: loss(shared(tree))))
    tied = fo.tie(SEARCHES[search](), ("embed", "head"))
    for tx in (tied, fo.freezable(tied)):
        new = run(tx, shared(bare), loss)
        # XLA fuses the two programs differently, to the last bits.
        jax.tree.map(assert_close, new, expected)


def assert_close(x: jax.Array, y: jax.Array) -> None:
    assert jnp.allclose(x, y, rtol=1e-5, atol=1e-6), (x, y)


def test_a_function_that_gives_gradients_gives_those_of_the_shared_leaf():
    def sam():
        adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
        return optax.contrib.sam(optax.sgd(0.1), adversary, opaque_mode=True)

    def run(tx, tree, loss_fn):
        state, grad = tx.init(tree), jax.grad(loss_fn)

        @jax.jit
        def step(tree, state):
            extra = {"grad_fn": lambda tree, _: grad(tree)}
            updates, state = tx.update(grad(tree), state, tree, **extra)
            return optax.apply_updates(tree, updates), state

        for _ in range(STEPS):
            tree, state = step(tree, state)
        return tree

    expected = whole(run(sam(), one_leaf(start()), shared_loss))
    for tx in (fo.tie(sam(), GROUP), fo.freezable(fo.tie(sam(), GROUP))):
        fo.testing.assert_frozen(expected, run(tx, start(), loss), True)
