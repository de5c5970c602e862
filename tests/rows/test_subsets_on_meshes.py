"""Rows of an inner axis and elements on meshes: the values of one device, and the shardings.

The numbers and the optimizer are those of `test_meshes`: float32 holds every result exactly.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import freeze_optax as fo
from tests.rows.test_meshes import (
    AUTO,
    EXPLICIT,
    INNER,
    context,
    loss,
    make_mesh,
    on,
    recorded_steps,
)
from tests.support.sampling import cases

SHAPE = (4, 20)
ELEMENTS = np.random.default_rng(1).random(SHAPE) < 0.6
SPECS = {
    "a block": fo.rows("part", slice(0, 8), axis=1),  # the mesh divides it, and what remains
    "an odd number": fo.rows("part", slice(0, 3), axis=-1),  # it does not
    "scattered": fo.rows("part", list(range(0, 20, 2)), axis=1),  # gathered
    "elements": fo.elements("part", ELEMENTS),
    "rows of two axes": fo.rows("part", [0], axis=1) | fo.rows("part", [0]),
}
LAYOUTS = {
    "along it": PartitionSpec(None, "y"),
    "across it": PartitionSpec("x"),
    "both": PartitionSpec("x", "y"),
    "over two axes": PartitionSpec(None, ("x", "y")),
    "replicated": PartitionSpec(),
}
KINDS = {"explicit": (EXPLICIT, EXPLICIT), "auto": (AUTO, AUTO)}


def make_params():
    random = np.random.default_rng(0)
    return {name: np.float32(random.integers(-8, 8, SHAPE) / 8) for name in ("part", "all")}


def life(params, spec):
    """A life of params and state, with everything that it makes."""
    made = []
    tx = fo.freezable(INNER, [spec, "all"])
    state = tx.init(params)

    step, partitioned_step = recorded_steps(tx, made)

    made.append(fo.hold(jax.tree.map(jnp.negative, params), params, spec))
    params, state = step(params, state)
    holes = fo.grad(loss, frozen=state, holes=True)(params)
    made.append((holes, tx.update(holes, state, params)))
    partitioned_step(params, state)
    state = fo.thaw(state, params, fo.rows("part", [1]))
    partitioned_step(params, state)
    params, state = step(params, state)
    state = fo.freeze(state, params, fo.rows("part", slice(12, 16), axis=1), keep_state=True)
    params, state = step(params, state)
    state = fo.set_frozen(state, params, fo.rows("part", slice(4, 12), axis=1), keep_state=True)
    params, state = step(params, state)
    made.append((params, state, fo.release(state, params), fo.thaw(state, params, "all")))
    return made


def scheduled_life(params, spec):
    phases = fo.Phases({0: [spec, "all"], 1: fo.rows("part", [0])})
    tx = fo.scheduled(INNER, phases)
    state, made = tx.init(params), []
    for _ in range(2):
        grads = fo.grad(loss, frozen=state)(params)
        updates, state = tx.update(grads, state, params)
        params = fo.apply_updates(params, updates, frozen=state)
        made.append((grads, updates, params, state))
    return made


def spec_by_the_rule(mesh, spec, shape):
    """That of the leaf, but an axis on no mesh axes that do not divide its length."""

    def fitting(axes, length):
        names = (axes,) if isinstance(axes, str) else axes or ()
        return axes if length % math.prod(mesh.shape[name] for name in names) == 0 else None

    padded = (*spec, None, None)[:2]
    return PartitionSpec(*map(fitting, padded, shape))


def assert_same(tree, reference, mesh, spec, explicit):
    expected = jax.tree.leaves(reference)
    for (keys, x), y in zip(jax.tree_util.tree_leaves_with_path(tree), expected, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape), keys
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), keys
        if not explicit:  # XLA chooses
            continue
        if x.ndim == 2:
            rule = NamedSharding(mesh, spec_by_the_rule(mesh, spec, x.shape))
            assert x.sharding.is_equivalent_to(rule, 2), (keys, x.shape, x.sharding)
        elif x.ndim == 1 and x.size > 2:  # elements, and no counters
            assert x.sharding.is_fully_replicated, (keys, x.shape, x.sharding)


def _cases(*quick):
    return [
        pytest.param(
            LAYOUTS[layout],
            SPECS[name],
            KINDS[kind],
            id=f"{layout}, {name}, {kind}",
            marks=[] if (layout, name, kind) in quick else [pytest.mark.exhaustive],
        )
        for layout in LAYOUTS
        for name in SPECS
        for kind in KINDS
    ]


@pytest.mark.parametrize(
    ("spec", "frozen", "types"),
    _cases(
        ("both", "an odd number", "explicit"),
        ("both", "elements", "auto"),
    ),
)
def test_a_jitted_run_equals_that_of_one_device_and_keeps_the_shardings(spec, frozen, types):
    mesh = make_mesh(*types)
    run = jax.jit(lambda params: (life(params, frozen), scheduled_life(params, frozen)))
    with context(mesh):
        made = run(on(mesh, spec, make_params()))
    assert_same(made, run(make_params()), mesh, spec, EXPLICIT in types)


@pytest.mark.parametrize(("spec", "frozen", "types"), _cases())
def test_a_run_in_eager_mode_does_too(spec, frozen, types):
    mesh, local = make_mesh(*types), jax.tree.map(jnp.asarray, make_params())
    with context(mesh):
        made = life(on(mesh, spec, make_params()), frozen)
    assert_same(made, life(local, frozen), mesh, spec, EXPLICIT in types)


def test_an_import_gives_the_moments_their_shardings():
    mesh, spec = make_mesh(EXPLICIT, EXPLICIT), PartitionSpec("x", "y")
    params = on(mesh, spec, make_params())
    tx = fo.freezable(INNER, [SPECS["elements"], fo.rows("all", slice(0, 3), axis=1)])
    with context(mesh):
        state = tx.update(params, tx.init(params), params)[1]
    exported = jax.tree.map(np.asarray, fo.export_state(state))
    assert_same(fo.import_state(tx, params, exported), state, mesh, spec, explicit=True)


BITS = np.random.default_rng(0).integers(0, 2**32, SHAPE, np.uint32)
BITS[0], BITS[1] = 0x80000000, np.arange(1, 21)  # -0.0, and subnormal numbers
SPECIAL = {
    "float32": BITS.view(np.float32),
    "bfloat16": (BITS >> 16).astype(np.uint16).view(jnp.bfloat16),
    "complex64": np.concatenate([BITS, BITS], 1).view(np.complex64),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("x", cases(SPECIAL, ["float32", "bfloat16"]))
def test_every_bit_stays_where_parts_go_to_another_device(x, kind):
    mesh = make_mesh(*KINDS[kind])

    def moved(x):
        made = {}
        for name, spec in SPECS.items():
            trainable, rest = fo.partition({"part": x}, spec)
            held = fo.hold({"part": jnp.ones_like(x)}, {"part": x}, spec)
            whole = fo.hold(held, {"part": x}, ~spec)
            made[name] = (trainable["part"], fo.merge(trainable, rest)["part"], whole["part"])
        return made

    with context(mesh):
        made = jax.jit(moved)(on(mesh, PartitionSpec("x", "y"), x))
    for name, (live, *wholes) in made.items():
        frozen = fo.mask(SPECS[name], {"part": x})["part"]
        assert np.asarray(live).tobytes() == x[~np.broadcast_to(frozen, SHAPE)].tobytes(), name
        for whole in wholes:
            assert np.asarray(whole).tobytes() == x.tobytes(), name


def two_steps(params, spec):
    tx = fo.freezable(INNER, [spec, "all"])
    state = tx.init(params)
    for _ in range(2):
        grads = fo.grad(loss, frozen=state)(params)
        updates, state = tx.update(grads, state, params)
        params = fo.apply_updates(params, updates, frozen=state)
    return params


def _mapped(mesh, spec, names):
    return lambda step: jax.shard_map(
        step, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=names
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_inside_shard_map_cuts_the_axis_that_is_whole_there(kind):
    mesh, spec = make_mesh(*KINDS[kind]), PartitionSpec(("x", "y"), None)
    frozen = SPECS["an odd number"]
    step = lambda params: two_steps(params, frozen)  # noqa: E731
    with context(mesh):
        made = jax.jit(_mapped(mesh, spec, {"x", "y"})(step))(on(mesh, spec, make_params()))
    assert_same(made, jax.jit(step)(make_params()), mesh, spec, explicit=True)


@pytest.mark.parametrize("kind", KINDS)
def test_elements_inside_shard_map_are_an_error_with_both_shapes(kind):
    """A device has a part of the leaf there, and the mask is for the whole leaf."""
    mesh, spec = make_mesh(*KINDS[kind]), PartitionSpec(None, "y")
    step = lambda params: two_steps(params, SPECS["elements"])  # noqa: E731
    with context(mesh), pytest.raises(ValueError, match=r"'part' is of shape \(4, 10\).*\(4, 20\)"):
        jax.jit(_mapped(mesh, spec, {"x", "y"})(step))(on(mesh, spec, make_params()))


@pytest.mark.parametrize("kind", KINDS)
def test_elements_inside_shard_map_work_where_each_device_has_the_whole_leaf(kind):
    mesh, spec = make_mesh(*KINDS[kind]), PartitionSpec()
    step = lambda params: two_steps(params, SPECS["elements"])  # noqa: E731
    with context(mesh):
        made = jax.jit(_mapped(mesh, spec, {"x", "y"})(step))(on(mesh, spec, make_params()))
    assert_same(made, jax.jit(step)(make_params()), mesh, spec, explicit=True)


STACK = np.float32(np.random.default_rng(0).integers(1, 3, (4, 8)) / 2)


@pytest.mark.parametrize(
    "spec", [pytest.param(x, id=name) for name, x in LAYOUTS.items() if name != "over two axes"]
)
def test_scan_takes_layers_along_an_inner_axis_however_they_are_sharded(spec):
    frozen = fo.rows("stack", [0, 1, 5], axis=1)

    def outputs(params):
        layers = fo.mask(frozen, params)["stack"]
        step = lambda x, w: (x * w, w + x)  # noqa: E731
        return fo.scan(step, params["carry"], params["stack"], layers, axis=1)

    def run(params):
        total = lambda params: sum((x**2).sum() for x in outputs(params))  # noqa: E731
        return outputs(params), fo.grad(total, [frozen, "carry"])(params)["stack"]

    mesh = make_mesh(EXPLICIT, EXPLICIT)
    of_layer = PartitionSpec(*spec[:1])
    params = {"carry": np.ones(4, np.float32), "stack": STACK}
    sharded = {
        "carry": jax.device_put(params["carry"], NamedSharding(mesh, of_layer)),
        "stack": on(mesh, spec, STACK),
    }
    with context(mesh):
        (carry, stacked), grad = jax.jit(run)(sharded)
    (right_carry, right_stacked), right = jax.jit(run)(params)
    for x, y in ((carry, right_carry), (stacked, right_stacked), (grad, right)):
        np.testing.assert_array_equal(x, y)
    assert grad.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
    assert carry.sharding.is_equivalent_to(NamedSharding(mesh, of_layer), 1)
    # And it is the scan of JAX over moved axes, on one device.
    by_jax = jax.lax.scan(lambda x, w: (x * w, w + x), params["carry"], STACK.T)
    np.testing.assert_array_equal(carry, by_jax[0])
    np.testing.assert_array_equal(stacked, by_jax[1])
