"""A population of models under `jax.vmap`, whose layers in turns are in host memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from freeze_optax._rows.host_rows import row_of_host, with_row_replaced
from tests.support.memories import HOST, jit_keeps_memory, kinds, on_host

pytestmark = pytest.mark.usefixtures("standard_promotion")

MODELS, DEPTH = 3, 4
ONE = {"layers": {"w": jnp.linspace(0.5, 1.5, DEPTH * 2).reshape(DEPTH, 2)}, "head": jnp.ones(2)}
PARAMS = jax.tree.map(lambda x: jnp.stack([x * (1 + i / 9) for i in range(MODELS)]), ONE)
KEYS = jax.random.split(jax.random.key(0), MODELS)


def loss(params):
    def layer(x, p):
        return jnp.tanh(x * p["w"]), None

    return fo.scan(layer, jnp.ones(2), params["layers"], stream=True)[0] @ params["head"]


def transformation(key):
    return fo.rotating(optax.adam(0.1), "layers", 1, 2, order="random", key=key)


def run(params):
    states = jax.vmap(lambda key, params: transformation(key).init(params))(KEYS, params)

    @jax.jit
    @jax.vmap
    def step(params, state):
        tx = transformation(KEYS[0])  # the key of the state counts
        grads = fo.grad(loss, frozen=state)(params)
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    rows = []
    for _ in range(5):
        params, states = step(params, states)
        rows.append(np.asarray(states.rows).ravel())
    return params, states, rows


def test_each_model_reads_and_writes_its_own_layers_there():
    expected, expected_states, rows = run(PARAMS)
    assert any(len(set(own.tolist())) > 1 for own in rows)  # not all train the same layer
    placed, states, _ = run(fo.place(PARAMS, "layers"))
    if jit_keeps_memory():
        assert kinds(placed["layers"]) == {"w": HOST}

    def assert_close(x, y):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-6, atol=1e-7)

    jax.tree.map(assert_close, (placed, states), (expected, expected_states))


@pytest.mark.parametrize("stacked", ["array", "row", "index"])
def test_a_row_may_be_of_a_population_or_of_all(stacked):
    x = jnp.arange(24.0).reshape(4, 3, 2)
    rows, indices = -jnp.ones((2, 4, 1, 2)), jnp.array([0, 2])
    arrays = jnp.stack([x, 10 * x])
    many = {"array": stacked == "array", "row": stacked == "row", "index": stacked == "index"}

    def replaced(x, row, i):
        x = with_row_replaced(x, row, i, 1)
        return x, row_of_host(x, i, 1)

    arguments = arrays if many["array"] else x, rows if many["row"] else rows[0], indices
    arguments = arguments if many["index"] else (*arguments[:2], indices[1])
    found, read = jax.vmap(replaced, [0 if flag else None for flag in many.values()])(*arguments)
    for j in range(2):
        own = np.array(arrays[j] if many["array"] else x)
        i = int(indices[j] if many["index"] else indices[1])
        own[:, i] = -1.0
        np.testing.assert_array_equal(found[j], own)
        np.testing.assert_array_equal(read[j], own[:, i])


@pytest.mark.parametrize("outer", [(0, 0, 0), (0, None, None), (0, None, 0), (None, None, 0)])
@pytest.mark.parametrize("inner", [(0, 0, 0), (0, None, 0), (None, 0, 0), (0, 0, None)])
def test_populations_of_populations_have_rows_of_their_own(outer, inner):
    shapes = {"array": (4, 3, 2), "row": (4, 1, 2), "index": ()}
    stacks = {name: [] for name in shapes}
    for axes in (outer, inner):  # as many models in each, so that no shape tells them apart
        for name, axis in zip(shapes, axes, strict=True):
            stacks[name] += [2] if axis == 0 else []
    shapes = {name: (*stacks[name], *shape) for name, shape in shapes.items()}
    x = jnp.arange(float(np.prod(shapes["array"]))).reshape(shapes["array"])
    row = -1.0 - jnp.arange(float(np.prod(shapes["row"]))).reshape(shapes["row"])
    i = jnp.arange(np.prod(shapes["index"]), dtype=jnp.int32).reshape(shapes["index"]) % 3

    def ours(x, row, i):
        return with_row_replaced(x, row, i, 1), row_of_host(x, i, 1)

    def plain(x, row, i):
        replaced = jax.lax.dynamic_update_slice_in_dim(x, row, i, 1)
        return replaced, jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False)

    expected = jax.vmap(jax.vmap(plain, inner), outer)(x, row, i)
    for given in (x, on_host(x)):
        found = jax.vmap(jax.vmap(ours, inner), outer)(given, row, i)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
