"""Frozen means bit-identical: one tree of awkward leaves, optimizers of several kinds, four modes.

Strict dtype promotion is off while an optax optimizer runs, as Adam's own bias correction raises
a Python float to an integer count.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from tests.support.compiling import OPTIMISED

STEPS = 3


def _array(dtype, unsigned, *bits):
    return jnp.asarray(np.asarray(bits, unsigned).view(dtype))


# Zeros of either sign, subnormals, infinities, NaNs quiet and signalling with payloads.
LEAVES = {
    "bfloat16": _array(
        jnp.bfloat16, "u2", 0, 0x8000, 1, 0x807F, 0x7F80, 0xFF80, 0x7FC1, 0xFF81, 0x3F80
    ),
    "bool": jnp.asarray([True, False]),
    "complex64": _array(np.complex64, "u4", 0x80000000, 1, 0x7FC00001, 0xFF800000),
    "float16": _array(
        np.float16, "u2", 0, 0x8000, 1, 0x83FF, 0x7C00, 0xFC00, 0x7E01, 0xFC01, 0x3C00
    ),
    "float32": _array(
        np.float32,
        "u4",
        *(0, 0x80000000, 1, 0x807FFFFF, 0x7F800000, 0xFF800000, 0x7FC00001, 0xFF800001, 0x3F800000),
    ),
    "float8_e4m3fn": _array(jnp.float8_e4m3fn, "u1", *range(256)),
    "float8_e5m2": _array(jnp.float8_e5m2, "u1", *range(256)),
    "int4": jnp.arange(-8, 8, dtype=jnp.int4),
    "int8": _array(np.int8, "u1", 0, 1, 0x7F, 0x80, 0xFF),
    "key": jax.random.key(7),
    "keys": jax.random.split(jax.random.key(8), 3),
    "uint32": jnp.asarray([0, 1, 2**32 - 1], jnp.uint32),
}
EAGER_LEAVES = {
    "class": jnp.float32,
    "float": -0.0,
    "function": len,
    "numpy": np.asarray([0x80000001, 0x7F800001], np.uint32).view(np.float32),
    "string": "text",
}
INEXACT = [n for n, x in LEAVES.items() if jnp.issubdtype(x.dtype, jnp.inexact)]


def _shape(leaf):
    return leaf.shape if isinstance(leaf, jax.Array | np.ndarray) else ()


# What may stand in the gradient at a frozen leaf.
GRADIENTS = {
    "NaN": lambda leaf: jnp.full(_shape(leaf), jnp.nan),
    "None": lambda leaf: None,
    "float0": lambda leaf: np.zeros(_shape(leaf), jax.dtypes.float0),
    "hole": lambda leaf: optax.MaskedNode(),
    "infinity": lambda leaf: jnp.full(_shape(leaf), -jnp.inf),
}
OPTIMIZERS = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "lion": optax.lion(1e-3),
}


def _params(leaves):
    """Each leaf once for each kind of gradient, and some that are frozen only by their dtype."""
    untrainable = {name: leaf for name, leaf in leaves.items() if name not in (*INEXACT, "float")}
    untrainable.pop("numpy", None)
    return {
        "backbone": {kind: dict(leaves) for kind in GRADIENTS},
        "head": jnp.asarray([1.0, -2.0, 3.0]),
        "untrainable": untrainable,
    }


def _bits(tree):
    """The raw bytes of each array with its dtype; the very object of anything else."""

    def bits(leaf):
        if not isinstance(leaf, jax.Array | np.ndarray):
            return str(leaf) if isinstance(leaf, float) else leaf
        name = str(leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return name, leaf.shape, np.asarray(leaf).tobytes()

    return jax.tree.map(bits, tree)


def _loss(params):
    # Reads a frozen leaf, so that it has a gradient to be left out.
    scale = jnp.isfinite(params["backbone"]["NaN"]["float32"]).sum().astype(jnp.float32)
    return jnp.square(params["head"] * scale).sum()


def _awful(params):
    """For each frozen leaf, something a gradient might hold there."""
    return {
        "backbone": {
            kind: {name: GRADIENTS[kind](leaf) for name, leaf in leaves.items()}
            for kind, leaves in params["backbone"].items()
        },
        "untrainable": {name: GRADIENTS["NaN"](x) for name, x in params["untrainable"].items()},
    }


def _update(tx, params, state, awful):
    grads = awful | {"head": fo.grad(_loss, state)(params)["head"]}
    with jax.numpy_dtype_promotion("standard"):
        return tx.update(grads, state, params)


def _step(tx, params, state, awful):
    updates, new_state = _update(tx, params, state, awful)
    return fo.apply_updates(params, updates, frozen=state), new_state


def _loop(step, params, state, awful):
    for _ in range(STEPS):
        params, state = step(params, state, awful)
    return params


def _eager(tx, *args):
    return _loop(functools.partial(_step, tx), *args)


def _one_jit(tx, *args):
    return _loop(jax.jit(functools.partial(_step, tx)), *args)


def _two_jits(tx, *args):
    update = jax.jit(functools.partial(_update, tx))

    # The state goes in as an argument: what is frozen is part of its structure, so of the trace.
    apply = jax.jit(fo.apply_updates)

    def step(params, state, awful):
        updates, new_state = update(params, state, awful)
        return apply(params, updates, state), new_state

    return _loop(step, *args)


def _two_jits_without_spec(tx, *args):
    """As a training loop that does not tell `apply_updates` what is frozen, with holes alone."""
    params, state, _ = args
    update, apply = jax.jit(functools.partial(_update, tx)), jax.jit(fo.apply_updates)
    frozen = {name: leaves for name, leaves in params.items() if name != "head"}
    holes = jax.tree.map(lambda _: optax.MaskedNode(), frozen)
    for _ in range(STEPS):
        updates, state = update(params, state, holes)
        params = apply(params, updates)
    return params


def _scan(tx, params, state, awful):
    def body(carry, _):
        return _step(tx, *carry, awful), None

    run = jax.jit(lambda carry: jax.lax.scan(body, carry, length=STEPS)[0])
    return run((params, state))[0]


MODES = {
    "eager": _eager,
    "one jit": _one_jit,
    "two jits": _two_jits,
    "two jits with holes": _two_jits_without_spec,
    "scan": _scan,
}


@pytest.mark.parametrize("run", MODES.values(), ids=MODES)
@pytest.mark.parametrize("inner", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_frozen_leaves_keep_every_bit(inner, run):
    params = _params(LEAVES | EAGER_LEAVES if run is _eager else LEAVES)
    before = _bits(params)
    tx = fo.freezable(inner, "backbone")
    after = run(tx, params, tx.init(params), _awful(params))
    assert _bits(after) | {"head": None} == before | {"head": None}
    assert not np.any(np.isclose(after["head"], params["head"], atol=1e-4))


@pytest.mark.parametrize("run", [_one_jit, _scan], ids=["one jit", "scan"])
def test_the_trainable_leaf_beside_them_moves_as_under_the_bare_optimizer(run):
    params, inner = _params(LEAVES), OPTIMIZERS["sgd"]
    tx = fo.freezable(inner, "backbone")
    after = run(tx, params, tx.init(params), _awful(params))

    @jax.jit
    def bare(head, state):
        grads = jax.grad(lambda head: _loss(params | {"head": head}))(head)
        updates, state = inner.update(grads, state, head)
        return optax.apply_updates(head, updates), state

    head, state = params["head"], inner.init(params["head"])
    for _ in range(STEPS):
        head, state = bare(head, state)
    assert _bits(after["head"]) == _bits(head)


def _is_signalling(array):
    """Where a float has a NaN whose topmost mantissa bit is clear; float8_e4m3fn has none."""
    if array.dtype == np.complex64:
        return _is_signalling(array.view(np.float32)).reshape(*array.shape, 2).any(-1)
    if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype == jnp.float8_e4m3fn:
        return np.zeros(array.shape, bool)
    bits = array.view(f"u{array.dtype.itemsize}")
    quiet = bits >> (jnp.finfo(array.dtype).nmant - 1) & 1
    return np.isnan(array.astype(np.float32)) & (quiet == 0)


@pytest.mark.parametrize("inner", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optax_apply_updates_under_jit_keeps_every_bit_but_signalling_nans(inner):
    # optax adds at every leaf, so only numbers can be there.
    leaves = {name: np.asarray(x) for name, x in LEAVES.items() if not name.startswith("key")}
    leaves = {name: x[~_is_signalling(x)] for name, x in leaves.items()}
    params = {"backbone": jax.tree.map(jnp.asarray, leaves), "head": jnp.asarray([1.0, -2.0])}
    tx = fo.freezable(inner, "backbone")

    # It is XLA's optimiser that leaves the addition out.
    @functools.partial(jax.jit, compiler_options=dict(OPTIMISED))
    def step(params, state, grads):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    grads = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan), leaves)
    grads, state, after = {"backbone": grads, "head": jnp.ones(2)}, tx.init(params), params
    for _ in range(STEPS):
        after, state = step(after, state, grads)
    assert _bits(after["backbone"]) == _bits(leaves)
    assert not np.any(np.isclose(after["head"], params["head"], atol=1e-4))


@pytest.mark.parametrize("inner", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optax_apply_updates_in_eager_mode_keeps_the_signs_of_zeros(inner):
    zeros = np.asarray([0.0, -0.0, 0.0, -0.0], np.float32)
    leaves = {name: zeros.astype(jnp.dtype(name)) for name in INEXACT if name != "complex64"}
    leaves["complex64"] = np.asarray([0, 0, 1, 1, 0, 1, 1, 0], np.uint32) << 31
    leaves["complex64"] = leaves["complex64"].view(np.complex64)
    params = {"backbone": jax.tree.map(jnp.asarray, leaves), "head": jnp.ones(2)}
    tx = fo.freezable(inner, "backbone")
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    after = optax.apply_updates(params, updates)
    assert _bits(after["backbone"]) == _bits(leaves)
    assert not np.any(np.isclose(after["head"], params["head"], atol=1e-4))
