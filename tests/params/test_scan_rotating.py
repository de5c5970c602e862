"""A scan over layers that take turns: its gradient against that of one `jax.lax.scan` over all."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from tests.support.sampling import cases

DEPTH, WIDTH, BATCH = 5, 4, 3
KEYS = jax.random.split(jax.random.key(0), 5)
PARAMS = {
    "embed": jax.random.normal(KEYS[0], (BATCH, WIDTH)),
    "head": jax.random.normal(KEYS[3], (WIDTH,)),
    "layers": {
        "b": jax.random.normal(KEYS[1], (DEPTH, WIDTH)),
        "w": jax.random.normal(KEYS[2], (DEPTH, WIDTH, WIDTH)) / 2,
    },
}
KEY = jax.random.key(3)
TURNS = ([0, 1], [1, 3], [3, 4], [0, 4])


def rotating(frozen=fo.nothing, axis=0, stack="layers"):
    return fo.rotating(optax.sgd(0.1), stack, 2, 1, order=TURNS, frozen=frozen, axis=axis)


def plain_scan(f, init, xs, axis=0, unroll=1):
    xs = jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), xs)
    return jax.lax.scan(f, init, xs, unroll=unroll)


def layer(h, weights):
    return h + jnp.tanh(h @ weights["w"] + weights["b"]), None


def value(h, params):
    return ((h @ params["head"]) ** 2).sum()


def base(scan, params, f=layer, **kwargs):
    return value(scan(f, params["embed"], params["layers"], **kwargs)[0], params)


def twice(scan, params):
    h, _ = scan(layer, params["embed"], params["layers"])
    return value(scan(layer, h, params["layers"])[0], params)


def leaf_by_leaf(scan, params):
    h, _ = scan(lambda h, w: (jnp.tanh(h @ w), None), params["embed"], params["layers"]["w"])
    return value(scan(lambda h, b: (h * b, None), h, params["layers"]["b"])[0], params)


def trained_constant(scan, params):
    return base(scan, params, lambda h, x: (h + jnp.tanh(h @ x["w"] + params["head"]), None))


def counter_and_outputs(scan, params):
    def f(carry, x):
        h, i = carry
        noise = jax.random.bernoulli(jax.random.fold_in(KEY, i), 0.5, h.shape)
        h = h + jnp.tanh(h @ x["w"] + x["b"]) * noise.astype(h.dtype)
        return {"h": h, "i": i + 1}, (i, h.sum(), h > 0, x["b"])

    def of_pair(carry, x):
        carry, ys = f((carry["h"], carry["i"]), x)
        return carry, ys

    carry, ys = scan(of_pair, {"h": params["embed"], "i": jnp.int32(0)}, params["layers"])
    assert (ys[0].dtype, ys[2].dtype) == (jnp.int32, bool)
    return value(carry["h"], params) + (ys[1] ** 2).sum() + (ys[3] ** 3).sum()


def weak_carry(scan, params):
    def f(carry, x):
        h, total = carry
        h, _ = layer(h, x)
        return (h, total + h.sum()), None

    h, total = scan(f, (params["embed"], 0.0), params["layers"])[0]
    return value(h, params) + total


def key_in_carry(scan, params):
    def f(carry, x):
        h, key = carry
        key, own = jax.random.split(key)
        return (h * jax.random.uniform(own, h.shape) + jnp.tanh(h @ x["w"]), key), None

    return value(scan(f, (params["embed"], KEY), params["layers"])[0][0], params)


def other_arrays(scan, params):
    def f(h, x):
        weights, key, factor, index = x
        noise = jax.random.uniform(key, h.shape) + index.astype(h.dtype)
        return h + jnp.tanh(h @ weights["w"] + weights["b"]) * noise * factor, None

    factors = jnp.outer(jnp.arange(DEPTH, dtype=jnp.float32), params["head"])
    xs = params["layers"], jax.random.split(KEY, DEPTH), factors, jnp.arange(DEPTH)
    return value(scan(f, params["embed"], xs)[0], params)


def inner_loops(scan, params):
    def f(h, x):
        rows = jnp.stack([x["b"], params["head"]])
        h, _ = jax.lax.scan(lambda h, row: (jnp.tanh(h @ x["w"] + row), None), h, rows)
        return jax.lax.cond(h.sum() > 0, lambda h: h * x["b"], lambda h: h, h), None

    return base(scan, params, f)


@jax.custom_vjp
def square(x):
    return x**2


square.defvjp(lambda x: (x**2, x), lambda x, g: (g * 2 * x,))


def unused_leaf(scan, params):
    return base(scan, params, lambda h, x: (jnp.tanh(square(h) @ x["w"]), None))


def carry_of_layers(scan, params):
    f = lambda h, x: (x["w"], (h**2).sum())  # noqa: E731
    h, sums = scan(f, jnp.zeros((WIDTH, WIDTH)), params["layers"])
    return value(params["embed"] @ h, params) + (sums**2).sum()


def by_example(scan, params):
    def of_example(x):
        return base(scan, {**params, "embed": x})

    return jax.vmap(of_example)(params["embed"]).sum()


def with_penalty(scan, params):
    # As the examples of Flax have it.
    weights = [x for x in jax.tree.leaves(params) if x.ndim > 1]
    return base(scan, params) + sum((x**2).sum() for x in weights)


def cast(scan, params):
    def is_float(x):
        return jnp.issubdtype(x.dtype, jnp.floating)

    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if is_float(x) else x, params)
    return base(scan, half).astype(jnp.float32)


CASES = {
    "weights": base,
    "rematerialised": functools.partial(base, f=jax.checkpoint(layer)),
    "some rematerialised": functools.partial(
        base, f=jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_saveable)
    ),
    "unrolled": functools.partial(base, unroll=True),
    "unrolled by two": functools.partial(base, unroll=2),
    "loss rematerialised": lambda scan, params: jax.checkpoint(functools.partial(base, scan))(
        params
    ),
    "nested jit": lambda scan, params: jax.jit(functools.partial(base, scan))(params),
    "two scans of one stack": twice,
    "a scan for each leaf": leaf_by_leaf,
    "a trained constant": trained_constant,
    "a counter in the carry, and outputs": counter_and_outputs,
    "a carry of weak type": weak_carry,
    "a key in the carry": key_in_carry,
    "other arrays beside the layers": other_arrays,
    "loops inside": inner_loops,
    "an unused leaf": unused_leaf,
    "layers in the carry": carry_of_layers,
    "one example at a time": by_example,
    "a penalty on all weights": with_penalty,
    "cast before": cast,
}


def masked(gradient, rows, axis=0):
    """A gradient of a whole leaf, with zeros but for some rows."""
    shape = [1] * gradient.ndim
    shape[axis] = gradient.shape[axis]
    is_live = jnp.zeros(gradient.shape[axis], bool).at[rows].set(True)
    return jnp.where(is_live.reshape(shape), gradient, 0)


def reference(loss, params, rows):
    found, gradient = jax.value_and_grad(functools.partial(loss, plain_scan))(params)
    of_layers = jax.tree.map(lambda x: masked(x, rows), gradient["layers"])
    return found, {**gradient, "layers": of_layers}


def assert_close(got, expected, tolerance=1e-5):
    def check(a, b):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        as_wide = np.complex64 if jnp.iscomplexobj(a) else np.float32
        wide = [np.asarray(x).astype(as_wide) for x in (a, b)]
        scale = max(1.0, float(np.abs(wide[1]).max(initial=0)))
        np.testing.assert_allclose(*wide, rtol=tolerance, atol=tolerance * scale)

    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(check, got, expected)


# Those that go through most of our code.
ALWAYS = (
    "rematerialised",
    "a counter in the carry, and outputs",
    "other arrays beside the layers",
    "an unused leaf",
    "one example at a time",
    "a penalty on all weights",
)


@pytest.mark.parametrize("loss", cases(CASES, ALWAYS))
def test_the_gradient_is_that_of_a_plain_scan_whichever_layers_train(loss):
    @jax.jit
    def both(params, state):
        got = fo.value_and_grad(functools.partial(loss, fo.scan), frozen=state)(params)
        return got, reference(loss, params, state.rows)

    state = rotating().init(PARAMS)
    for turn in TURNS:
        got, expected = both(PARAMS, state._replace(rows=jnp.array(turn, jnp.int32)))
        assert_close(got, expected, 0.05 if loss is cast else 1e-5)
    assert both._cache_size() == 1


@pytest.mark.parametrize(
    "name", ["weights", "a trained constant", "other arrays beside the layers"]
)
def test_the_gradient_is_the_same_where_other_leaves_are_frozen_and_in_eager_mode(name):
    loss, frozen = CASES[name], ("embed", "head")
    state = rotating(frozen).init(PARAMS)._replace(rows=jnp.array([1, 3], jnp.int32))
    got = fo.value_and_grad(functools.partial(loss, fo.scan), frozen=state)(PARAMS)
    found, expected = jax.jit(functools.partial(reference, loss))(PARAMS, state.rows)
    zeros = {name: jnp.zeros_like(PARAMS[name]) for name in frozen}
    assert_close(got, (found, expected | zeros))


def test_holes_leave_the_layers_that_train():
    state = rotating("embed").init(PARAMS)._replace(rows=jnp.array([1, 3], jnp.int32))
    loss = functools.partial(base, fo.scan)
    got = jax.jit(fo.grad(loss, frozen=state, holes=True))(PARAMS)
    assert got["embed"] == optax.MaskedNode()
    whole = jax.jit(functools.partial(reference, base))(PARAMS, state.rows)[1]["layers"]
    assert_close(got["layers"], jax.tree.map(lambda x: x[jnp.array([1, 3])], whole))


@pytest.mark.parametrize(
    "dtype",
    cases(
        {"float16": jnp.float16, "bfloat16": jnp.bfloat16, "complex": jnp.complex64}, ["bfloat16"]
    ),
)
def test_the_gradient_keeps_its_dtype(dtype):
    is_complex = dtype == jnp.complex64
    convert = lambda x: jax.lax.complex(x, 0.3 * x) if is_complex else x.astype(dtype)  # noqa: E731
    params = jax.tree.map(convert, PARAMS)

    def loss(scan, params):
        h, _ = scan(
            lambda h, x: (h + (h @ x["w"] + x["b"]) / 8, None), params["embed"], params["layers"]
        )
        return (jnp.abs(h @ params["head"]) ** 2).sum().astype(jnp.float32)

    state = rotating().init(params)._replace(rows=jnp.array([0, 3], jnp.int32))

    @jax.jit
    def both(params, state):
        got = fo.value_and_grad(functools.partial(loss, fo.scan), frozen=state)(params)
        return got, reference(loss, params, state.rows)

    assert_close(*both(params, state), 1e-5 if is_complex else 0.03)


def test_layers_along_another_axis():
    moved = {**PARAMS, "layers": jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), PARAMS["layers"])}
    state = rotating(axis=1).init(moved)._replace(rows=jnp.array([1, 4], jnp.int32))
    loss = functools.partial(base, fo.scan)
    along = functools.partial(loss, axis=1)
    found, gradient = jax.jit(fo.value_and_grad(along, frozen=state))(moved)
    of_layers = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), gradient["layers"])
    expected = jax.jit(functools.partial(reference, base))(PARAMS, state.rows)
    assert_close((found, {**gradient, "layers": of_layers}), expected)
    with pytest.raises(ValueError, match=r"'layers/\w' take turns along axis 1, but fo.scan was"):
        fo.grad(loss, frozen=state)(moved)


@pytest.mark.exhaustive
def test_a_population_of_which_each_model_trains_other_layers():
    state = rotating().init(PARAMS)
    rows = jnp.array(TURNS, jnp.int32)
    params = jax.tree.map(lambda x: jnp.stack([x * (1 + i) for i in range(len(TURNS))]), PARAMS)

    def ours(params, rows):
        loss = functools.partial(base, fo.scan)
        return fo.value_and_grad(loss, frozen=state._replace(rows=rows))(params)

    got = jax.jit(jax.vmap(ours))(params, rows)
    expected = jax.jit(jax.vmap(functools.partial(reference, base)))(params, rows)
    assert_close(got, expected, 1e-4)


# What is kept and what is computed.


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for param in eqn.params.values():
            inner = getattr(param, "jaxpr", param)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("f", [layer, jax.checkpoint(layer)], ids=["kept", "rematerialised"])
def test_no_weights_and_no_gradient_of_all_of_them_are_kept(f):
    state = rotating().init(PARAMS)
    loss = functools.partial(base, fo.scan, f=f)
    jaxpr = jax.make_jaxpr(fo.grad(loss, frozen=state, holes=True))(PARAMS).jaxpr
    weights = {x.shape for x in jax.tree.leaves(PARAMS["layers"])}
    scans = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "scan"]
    made = [x.aval.shape for e in scans for x in e.outvars]
    assert made
    assert not weights & set(made)
    if f is not layer:
        forward = [shape for shape in made if shape[:1] == (DEPTH,)]
        assert sum(map(math.prod, forward)) == DEPTH * BATCH * WIDTH
    whole = [
        e.primitive.name for e in equations(jaxpr) for x in e.outvars if x.aval.shape in weights
    ]
    assert set(whole) == {"stop_gradient"}


@pytest.mark.parametrize(
    ("frozen", "turn", "count"),
    [("embed", [3, 4], 2), ("embed", [1, 4], 4), ("embed", [0, 1], 5), (fo.nothing, [3, 4], 5)],
    ids=["the last", "the second", "the first", "below trains"],
)
def test_the_backward_pass_stops_at_the_lowest_layer_that_trains(frozen, turn, count):
    passed = []

    @jax.custom_vjp
    def counted(h):
        return h

    def backward(_, g):
        jax.debug.callback(lambda: passed.append(1))
        return (g,)

    counted.defvjp(lambda h: (h, None), backward)
    state = rotating(frozen).init(PARAMS)._replace(rows=jnp.array(turn, jnp.int32))
    loss = functools.partial(base, fo.scan, f=lambda h, x: layer(counted(h), x))
    jax.block_until_ready(jax.jit(fo.grad(loss, frozen=state))(PARAMS))
    jax.effects_barrier()
    assert len(passed) == count


def test_a_whole_array_beside_a_stack_gets_its_gradient_along_another_axis_too():
    key = jax.random.key(0)
    params = {"w": jax.random.normal(key, (3, 4, 3)), "scale": jax.random.normal(key, (3, 4))}

    def loss(scan, params):
        def layer(x, weights):
            return jnp.tanh(x @ weights["w"]) * weights["scale"], None

        return scan(layer, jnp.ones((2, 3)), params)[0].sum()

    def scan_of_axis(f, init, xs):
        return jax.lax.scan(f, init, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), xs))

    tx = fo.rotating(optax.sgd(1.0), "w", 2, 1, order="ascending", axis=1)
    state = tx.init(params)
    scan = functools.partial(fo.scan, axis=1)
    got = jax.jit(fo.grad(functools.partial(loss, scan), frozen=state))(params)
    expected = jax.jit(jax.grad(functools.partial(loss, scan_of_axis)))(params)
    np.testing.assert_allclose(got["scale"], expected["scale"], rtol=1e-6)
    np.testing.assert_allclose(got["w"][:, :2], expected["w"][:, :2], rtol=1e-6)
    assert not got["w"][:, 2:].any()
