"""Layers that take turns on meshes: all is as on one device, and stays sharded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import freeze_optax as fo
from tests.runs import test_distributed
from tests.support import distributed_worker
from tests.support.sampling import cases

pytestmark = pytest.mark.usefixtures("standard_promotion")

DEPTH, WIDTH, BATCH, STEPS = 4, 8, 4, 3
KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {
    "head": jax.random.normal(KEYS[0], (WIDTH, 2)),
    "layers": {
        "b": jax.random.normal(KEYS[1], (DEPTH, WIDTH)),
        "w": jax.random.normal(KEYS[2], (DEPTH, WIDTH, WIDTH)) / 3,
    },
}
X = jax.random.normal(KEYS[3], (STEPS, BATCH, WIDTH))
TURNS = ([1, 3], [0, 1], [2, 3])
TX = fo.rotating(
    optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1)), "layers", 2, 1, order=TURNS
)
SPECS = {
    "one axis of the weights": {"b": P(None, None), "w": P(None, None, "model")},
    "both axes of the weights": {"b": P(None, "model"), "w": P(None, "data", "model")},
    "the layers": {"b": P("data"), "w": P("data", None, None)},
    "the layers and the weights": {"b": P("data", None), "w": P("data", None, "model")},
}


def mesh_of(kind, **axes):
    count = int(np.prod(list(axes.values())))
    devices = np.array(jax.devices()[:count]).reshape(*axes.values())
    return Mesh(devices, tuple(axes), axis_types=(kind,) * len(axes))


def layer(h, weights):
    replicated = None
    if AxisType.Explicit in jax.typeof(weights["w"]).sharding.mesh.axis_types:
        # On explicit axes a contraction along a sharded axis needs the sharding of its result.
        replicated = P(*[None] * h.ndim)
        weights = jax.tree.map(lambda x: jax.sharding.reshard(x, P(*[None] * x.ndim)), weights)
    h = h + jnp.tanh(jnp.dot(h, weights["w"]) + weights["b"])
    return h if replicated is None else jax.sharding.reshard(h, replicated), None


def loss(params, x):
    h, _ = fo.scan(layer, x, params["layers"])
    return ((h @ params["head"]) ** 2).mean()


@functools.partial(jax.jit, donate_argnums=(0, 1))
def step(params, state, x):
    value, grads = fo.value_and_grad(loss, frozen=state)(params, x)
    updates, state = TX.update(grads, state, params)
    return fo.apply_updates(params, updates, frozen=state), state, value


@functools.cache
def on_one_device():
    params = jax.tree.map(jnp.copy, PARAMS)
    state, history = TX.init(params), []
    for x in X:
        params, state, value = step(params, state, x)
        history.append(jax.tree.map(np.asarray, (params, state.state.inner, value)))
    return history


def assert_close(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), got, expected)


def on_mesh(mesh, specs):
    shardings = {
        "head": NamedSharding(mesh, P()),
        "layers": {name: NamedSharding(mesh, spec) for name, spec in specs.items()},
    }
    # Copies, as the step takes the buffers.
    return jax.tree.map(jax.device_put, jax.tree.map(np.asarray, PARAMS), shardings)


def normalised(spec, ndim):
    return (*spec, *[None] * (ndim - len(spec)))


KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
ALWAYS = (
    "auto, the layers and the weights",
    "explicit, the layers and the weights",
)


@pytest.mark.parametrize(
    ("kind", "name"),
    cases({f"{kind}, {name}": (KINDS[kind], name) for kind in KINDS for name in SPECS}, ALWAYS),
)
def test_a_run_on_a_mesh_is_that_on_one_device_and_stays_sharded(kind, name):
    expected, programs = on_one_device(), step._cache_size()
    mesh = mesh_of(kind, data=2, model=2)
    with jax.set_mesh(mesh):
        params = on_mesh(mesh, SPECS[name])
        before = jax.tree.map(np.asarray, params)
        # Under jit the state is on the mesh from the start.
        state = (TX.init if kind == AxisType.Explicit else jax.jit(TX.init))(params)
        for turn, x, (of_params, of_state, of_value) in zip(TURNS, X, expected, strict=True):
            places = jax.tree.map(lambda x: (x.sharding.spec, x.ndim), params)
            params, state, value = step(params, state, jax.device_put(x, NamedSharding(mesh, P())))
            assert_close((params, state.state.inner, value), (of_params, of_state, of_value))
            still = fo.rows("layers", [i for i in range(DEPTH) if i not in turn])
            fo.testing.assert_frozen(before, params, still)
            before = jax.tree.map(np.asarray, params)
            if kind == AxisType.Explicit:
                for (spec, ndim), leaf in zip(
                    jax.tree.leaves(places, is_leaf=lambda x: isinstance(x, tuple)),
                    jax.tree.leaves(params),
                    strict=True,
                ):
                    assert normalised(leaf.sharding.spec, ndim) == normalised(spec, ndim)
                # The moments lie as the layers that train, each device has all of which.
                for moment in ("mu", "nu"):
                    found = optax.tree_utils.tree_get(state, moment)["layers"]["w"]
                    spec = normalised(SPECS[name]["w"], 3)
                    assert normalised(found.sharding.spec, 3) == (None, *spec[1:])
    if kind == AxisType.Explicit:
        # As for a plain optimizer: JAX knows the same sharding by two names, P() and P(None, None).
        assert step._cache_size() - programs <= 2


@pytest.mark.parametrize("holes", cases({"compact": True, "whole": False}, ["compact"]))
def test_gradients_are_averaged_over_devices_as_they_are(holes):
    mesh = mesh_of(AxisType.Auto, data=4)
    state = TX.init(PARAMS)

    def of_shard(params, state, x):
        grads = fo.grad(loss, frozen=state, holes=holes)(params, x)
        return jax.lax.pmean(grads, "data")

    mapped = jax.shard_map(
        of_shard, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P(), check_vma=False
    )

    @jax.jit
    def both(params, state, x):
        grads = mapped(params, state, x)
        expected = fo.grad(loss, frozen=state, holes=holes)(params, x)
        updates, _ = TX.update(grads, state, params)
        return grads, expected, fo.apply_updates(params, updates, frozen=state)

    grads, expected, params = both(PARAMS, state, X[0])
    assert grads["layers"]["w"].shape[0] == (2 if holes else DEPTH)
    assert_close(grads, expected)
    assert_close(params, on_one_device()[0][0])


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_processes_end_where_one_device_ends(tmp_path):
    test_distributed.run("rotating", tmp_path)
    batches = [distributed_worker.make_batch(step) for step in range(distributed_worker.STEPS)]
    start = jax.tree.map(jnp.asarray, distributed_worker.rotating_params())
    params, _, rows = distributed_worker.rotate(start, batches)
    assert len(set(map(str, rows))) >= 3
    for process, held in enumerate(test_distributed.load("rotating", tmp_path)):
        assert np.load(tmp_path / f"rows-{process}.npz")["rows"].tolist() == rows
        for path, leaf in jax.tree.leaves_with_path(params):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            np.testing.assert_allclose(held[f"whole {name}"], leaf, rtol=1e-4, atol=1e-6)
        # Each process has its part of the layers, and of what is split over another axis.
        weights = [x for name, x in held.items() if name.startswith("['params']['layers']['w'] on")]
        moments = [
            x for name, x in held.items() if name.startswith("['moments']['layers']['b'] on")
        ]
        assert [x.shape for x in weights] == [(1, 8, 8)] * 2
        assert [x.shape for x in moments] == [(1, 2)] * 2
