"""What people do with a gradient, on params with leaves that have none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo

pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),  # these operations mix dtypes
    pytest.mark.filterwarnings("ignore:.*global_norm is deprecated"),
]

TRAINED = ("half", "w")


def _params():
    return {
        "count": jnp.array([2**24 + 1, -7]),  # no float32 holds it
        "half": jnp.array([1.0, -2.0], jnp.bfloat16),
        "frozen": jnp.array([-0.0, jnp.nan]),
        "key": jax.random.key(0),
        "keys": jax.random.split(jax.random.key(1), 3),
        "mask": jnp.array([True, False]),
        "table": jnp.array([255, 1], jnp.uint8),
        "w": jnp.array([3.0, 4.0]),
    }


def _loss(params):
    noise = jax.random.normal(params["key"], (2,)) * params["mask"] * params["table"][1]
    return (params["w"] ** 2 + params["half"] ** 3 + noise + params["count"]).sum()


def _grads(params):
    return fo.grad(_loss, "frozen")(params)


def _trainable_grads(params):
    """The gradients of JAX alone, of the trainable leaves alone."""
    trainable = {name: params[name] for name in TRAINED}
    return jax.grad(lambda part: _loss({**params, **part}))(trainable)


def _add(a, b):
    return jax.tree.map(jnp.add, a, b)


def _accumulate(grads):
    start = jax.tree.map(jnp.zeros_like, grads)
    return jax.lax.scan(lambda acc, _: (_add(acc, grads), None), start, length=2)[0]


def _pmean(grads):
    return jax.vmap(lambda _: jax.lax.pmean(grads, "i"), axis_name="i")(jnp.ones(2))


def _mean_over_devices(grads):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("d",))
    spec = jax.sharding.PartitionSpec()
    mean = functools.partial(jax.lax.pmean, axis_name="d")
    return jax.shard_map(mean, mesh=mesh, in_specs=spec, out_specs=spec)(grads)


def _mapped(function):
    return lambda grads: jax.tree.map(function, grads)


OPERATIONS = {
    "global norm": optax.global_norm,
    "pmean": _pmean,
    "pmean over devices": _mean_over_devices,
    "add": lambda grads: _add(grads, grads),
    "accumulate": _accumulate,
    "cast": _mapped(lambda g: g.astype(jnp.bfloat16)),
    "scale": _mapped(lambda g: 0.5 * g),
    "unscale": _mapped(lambda g: g / 2),
    "are finite": _mapped(lambda g: jnp.isfinite(g).all()),
    "choose": _mapped(lambda g: jnp.where(jnp.isfinite(g), g, jnp.zeros_like(g))),
    "moment": lambda grads: optax.tree_utils.tree_update_moment(grads, grads, 0.9, 2),
}


def _bits(tree):
    return jax.tree.map(lambda x: (str(x.dtype), x.shape, np.asarray(x).tobytes()), tree)


MAPPED = ("unscale", "are finite", "choose", "moment")  # as "scale" is


@pytest.mark.parametrize(
    "operation",
    [
        pytest.param(operation, id=name, marks=[pytest.mark.exhaustive] * (name in MAPPED))
        for name, operation in OPERATIONS.items()
    ],
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_operations_on_a_gradient_give_what_they_give_for_the_trainable_leaves(operation, compiled):
    run = jax.jit if compiled else lambda f: f
    params = _params()
    result = run(lambda params: operation(_grads(params)))(params)
    expected = run(lambda params: operation(_trainable_grads(params)))(params)
    if isinstance(result, dict):
        assert set(result) == set(params)
        result = {name: result[name] for name in TRAINED}
    assert _bits(result) == _bits(expected)


def test_per_example_gradients_have_zeros_for_each_example():
    params = _params()
    grads = jax.vmap(fo.grad(lambda p, x: x * _loss(p), "frozen"), (None, 0))(params, jnp.ones(2))
    shapes = {name: (2, *leaf.shape) for name, leaf in params.items()}
    assert jax.tree.map(jnp.shape, grads) == shapes


def test_an_accumulator_like_the_params_keeps_its_dtypes_through_a_scan():
    params = {name: leaf for name, leaf in _params().items() if not name.startswith("key")}

    def loss(p):
        return (p["w"] ** 2 + p["half"] ** 3 + p["count"]).sum()

    @jax.jit
    def accumulated(params):
        start = jax.tree.map(jnp.zeros_like, params)
        grads = fo.grad(loss, "frozen")(params)
        return jax.lax.scan(lambda acc, _: (_add(acc, grads), None), start, length=3)[0]

    acc = accumulated(params)
    assert {name: x.dtype for name, x in acc.items()} == {n: x.dtype for n, x in params.items()}
    np.testing.assert_array_equal(acc["w"], 3 * 2 * np.array([3.0, 4.0], np.float32))


GRADIENTS = {
    "ours": _grads,
    "averaged": lambda params: _pmean_of_one(_grads(params)),
    "of JAX": lambda params: {
        **jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), params),
        **_trainable_grads(params),
        "frozen": jnp.full(2, jnp.nan),
    },
}


def _pmean_of_one(grads):
    # The mean of integers is a float, to which no large integer can be added without a change.
    return jax.tree.map(lambda x: x[0], _pmean(grads))


@pytest.mark.parametrize("gradients", GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize("with_params", [True, False], ids=["params", "no params"])
def test_updates_leave_integers_and_frozen_leaves_to_the_bit(gradients, with_params):
    params = _params()
    tx = fo.freezable(optax.sgd(0.5), "frozen")
    state = tx.init(params)
    grads = gradients(params)
    updates, _ = tx.update(grads, state, *([params] if with_params else []))
    new = fo.apply_updates(params, updates, state)
    fo.testing.assert_frozen(params, new, state)
    keys = ("key", "keys")  # optax adds to every leaf, and to a key nothing can be added
    without = {name: leaf for name, leaf in params.items() if name not in keys}
    for apply in (optax.apply_updates, jax.jit(optax.apply_updates)):
        added = apply(without, {name: updates[name] for name in without})
        for name in ("count", "mask", "table", "frozen"):
            assert _bits(added[name]) == _bits(params[name])
    optimizer = optax.sgd(0.5)
    part = _trainable_grads(params)
    expected, _ = optimizer.update(part, optimizer.init(part))
    assert _bits({name: updates[name] for name in TRAINED}) == _bits(expected)


@pytest.mark.parametrize("outside", [False, True], ids=["inside", "outside"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "scan"])
def test_multi_steps_accumulates_and_leaves_the_frozen_leaves(outside, compiled):
    if outside and jax.__version_info__ < (0, 8):
        pytest.skip("this version can't make the accumulator of a key, as MultiSteps does")
    params = _params()
    inner = optax.sgd(0.5)
    if outside:
        tx = optax.MultiSteps(fo.freezable(inner, "frozen"), 2).gradient_transformation()
    else:
        tx = fo.freezable(optax.MultiSteps(inner, 2).gradient_transformation(), "frozen")

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(_grads(params), state, params)
        return (fo.apply_updates(params, updates, "frozen"), state), None

    carry = (params, tx.init(params))
    if compiled:
        (new, _), _ = jax.lax.scan(step, carry, length=2)
    else:
        for _ in range(2):
            carry, _ = step(carry, None)
        new, _ = carry
    fo.testing.assert_frozen(params, new, ["frozen"])
    np.testing.assert_array_equal(new["w"], np.zeros(2, np.float32))  # w - 0.5 * 2w
