"""Rows on meshes, above all on those with explicit axes: the values of one device, the shardings.

The numbers and the optimizer are such that float32 holds every result exactly, so that bits can be
compared, however XLA fuses.
"""

import contextlib
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import freeze_optax as fo
from freeze_optax import nnx as fnnx
from tests.support.sampling import cases

EXPLICIT, AUTO = AxisType.Explicit, AxisType.Auto
COUNT = 20
ROWS = {
    "a block": slice(0, 8),  # the mesh divides it, and what remains
    "an odd number": slice(0, 3),  # it does not
    "scattered": list(range(0, COUNT, 2)),  # gathered
}
LAYOUTS = {
    "rows": PartitionSpec("x"),
    "columns": PartitionSpec(None, "y"),
    "both": PartitionSpec("x", "y"),
    "rows over two axes": PartitionSpec(("x", "y")),
    "replicated": PartitionSpec(),
}
EVERY_LAYOUT = pytest.mark.parametrize(
    "spec",
    [
        pytest.param(spec, id=name, marks=[] if name == "both" else [pytest.mark.exhaustive])
        for name, spec in LAYOUTS.items()
    ],
)


def make_mesh(*axis_types: AxisType) -> Any:
    return jax.make_mesh((2, 2), ("x", "y"), axis_types, devices=jax.devices()[:4])


def context(mesh: Any) -> Any:
    return jax.set_mesh(mesh) if EXPLICIT in mesh.axis_types else contextlib.nullcontext()


def make_params() -> Any:
    random = np.random.default_rng(0)
    params = {name: np.float32(random.integers(-8, 8, (COUNT, 4)) / 8) for name in ("part", "all")}
    params["part"][0] = -0.0  # which a sum with 0.0 does not keep; this row is always frozen
    return params


def on(mesh: Any, spec: Any, tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec)), tree)


def sharding_by_the_rule(mesh: Any, spec: Any, shape: tuple[int, ...]) -> Any:
    """The spec of the leaf, but the rows on no axis if the mesh does not divide their number."""
    first, second = (*spec, None, None)[:2]
    axes = (first,) if isinstance(first, str) else first or ()
    divides = shape[0] % math.prod(mesh.shape[axis] for axis in axes) == 0
    return NamedSharding(mesh, PartitionSpec(first if divides else None, second))


def assert_same(tree: Any, reference: Any, mesh: Any, spec: Any) -> None:
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    expected = jax.tree.leaves(reference)
    for (keys, x), y in zip(pairs, expected, strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), keys
        if x.ndim == 2:
            sharding = sharding_by_the_rule(mesh, spec, x.shape)
            assert x.sharding.is_equivalent_to(sharding, 2), (keys, x.shape, x.sharding)


class Momentum(NamedTuple):
    """The state of an optimizer with moments and a count."""

    count: Any
    mu: Any


def _init(params):
    return Momentum(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))


def _update(grads, state, params=None):
    del params
    mu = jax.tree.map(lambda g, m: g + m * 0.5, grads, state.mu)
    rate = -jnp.exp2(-1.0 - state.count.astype(jnp.float32))
    return jax.tree.map(lambda m: m * rate, mu), Momentum(state.count + 1, mu)


INNER = optax.GradientTransformation(_init, _update)


def loss(params):
    return (params["part"] ** 2).sum() + (params["all"] ** 2).sum()


def recorded_steps(tx, made):
    """A step and one in partition style, which add what they make to a list."""

    def step(params, state):
        grads = fo.grad(loss, frozen=state)(params)
        updates, new_state = tx.update(grads, state, params)
        made.append((grads, updates, new_state))
        return fo.apply_updates(params, updates, frozen=new_state), new_state

    def partitioned_step(params, state):
        trainable, rest = fo.partition(params, state)
        grads = jax.grad(lambda trainable: loss(fo.merge(trainable, rest)))(trainable)
        updates, state = tx.update(grads, state, trainable)
        trainable = fo.apply_updates(trainable, updates, frozen=state)
        made.append((trainable, rest, updates, fo.merge(trainable, rest)))

    return step, partitioned_step


def steps(params, where):
    """A life of params and state, with everything that it makes."""
    made = []
    mine = fo.rows("part", where)
    tx = fo.freezable(INNER, [mine, "all"])
    state = tx.init(params)
    frozen = np.arange(COUNT)[where]
    live = np.setdiff1d(np.arange(COUNT), frozen)

    step, partitioned_step = recorded_steps(tx, made)

    made.append((state, tx.update(params, state)[0]))
    made.append(fo.hold(jax.tree.map(jnp.negative, params), params, mine))
    made.append(fo.assign(params, {"all": 0.5}))
    params, state = step(params, state)
    state = fo.thaw(state, params, fo.rows("part", frozen[1:2].tolist()))
    live_grads = fo.grad(loss, frozen=state, holes=True)(params)
    made.append((live_grads, tx.update(live_grads, state, params)))
    partitioned_step(params, state)
    params, state = step(params, state)
    made.append(optax.apply_updates(params, made[-1][1]))
    state = fo.freeze(state, params, fo.rows("part", live[:2].tolist()), keep_state=True)
    state = fo.thaw(state, params, fo.rows("part", slice(1, None)))
    params, state = step(params, state)
    made.append((state, fo.release(state, params), fo.thaw(state, params, "all")))
    return made, fo.adopt(tx, INNER.init(params), params)


def scheduled_steps(params, where):
    phases = fo.Phases({0: [fo.rows("part", where), "all"], 1: fo.rows("part", [0])})
    tx = fo.scheduled(INNER, phases)
    state = tx.init(params)
    made = [state]
    for _ in range(2):
        grads = fo.grad(loss, frozen=state)(params)
        updates, state = tx.update(grads, state, params)
        params = fo.apply_updates(params, updates, frozen=state)
        made.append((grads, updates, params, state))
    return made


def _cases(*quick):
    """All pairs of a layout and rows; those that are not named are exhaustive."""
    return [
        pytest.param(
            spec,
            where,
            id=f"{layout}, {rows}",
            marks=[] if (layout, rows) in quick else [pytest.mark.exhaustive],
        )
        for layout, spec in LAYOUTS.items()
        for rows, where in ROWS.items()
    ]


@pytest.mark.parametrize(
    ("spec", "where"),
    _cases(("both", "an odd number")),
)
def test_a_jitted_run_equals_that_of_one_device_and_keeps_the_shardings(spec, where):
    mesh = make_mesh(EXPLICIT, EXPLICIT)
    run = jax.jit(lambda params: (steps(params, where), scheduled_steps(params, where)))
    with context(mesh):
        made = run(on(mesh, spec, make_params()))
    assert_same(made, run(make_params()), mesh, spec)


@pytest.mark.parametrize(("spec", "where"), _cases())
def test_a_run_in_eager_mode_does_too(spec, where):
    mesh, local = make_mesh(EXPLICIT, EXPLICIT), jax.tree.map(jnp.asarray, make_params())
    with context(mesh):
        made = steps(on(mesh, spec, make_params()), where)
    assert_same(made, steps(local, where), mesh, spec)


@EVERY_LAYOUT
def test_without_a_mesh_in_the_context_zeros_have_the_sharding_of_their_leaf(spec):
    # JAX 0.12 makes zeros like a traced leaf without it.
    mesh = make_mesh(EXPLICIT, EXPLICIT)
    params, frozen = on(mesh, spec, make_params()), [fo.rows("part", slice(0, 3)), "all"]

    def zeros(params):
        tx = fo.freezable(INNER, frozen)
        return fo.grad(loss, frozen)(params), tx.update(params, tx.init(params), params)[0]

    assert_same(jax.jit(zeros)(params), jax.jit(zeros)(make_params()), mesh, spec)


def test_an_import_gives_the_moments_of_rows_the_sharding_by_the_rule():
    mesh, spec = make_mesh(EXPLICIT, EXPLICIT), PartitionSpec("x", "y")
    params = on(mesh, spec, make_params())
    tx = fo.freezable(INNER, [fo.rows("part", slice(0, 3)), fo.rows("all", slice(0, 8))])
    state = tx.update(params, tx.init(params), params)[1]
    exported = jax.tree.map(np.asarray, fo.export_state(state))
    assert_same(fo.import_state(tx, params, exported), state, mesh, spec)
    assert str(fo.summary(params, state, optimizer=tx)) == str(
        fo.summary(make_params(), state, optimizer=tx)
    )


STACK = np.float32(np.random.default_rng(0).integers(1, 3, (8, 4)) / 2)


@EVERY_LAYOUT
def test_scan_takes_a_stack_however_it_is_sharded(spec):
    frozen = fo.rows("stack", [0, 1, 5])

    def outputs(params):
        layers = fo.mask(frozen, params)["stack"]
        return fo.scan(lambda x, w: (x * w, w + x), params["carry"], params["stack"], layers)

    def total(params):
        return sum((x**2).sum() for x in outputs(params))

    def run(params):
        grads = fo.grad(total, [frozen, "carry"])(params)
        return outputs(params), grads["stack"]

    mesh = make_mesh(EXPLICIT, EXPLICIT)
    of_layer = NamedSharding(mesh, PartitionSpec(*spec[1:]))
    params = {"carry": np.ones(4, np.float32), "stack": STACK}
    sharded = {
        "carry": jax.device_put(params["carry"], of_layer),
        "stack": on(mesh, spec, STACK),
    }
    with context(mesh):
        (carry, stacked), grad = jax.jit(run)(sharded)
    assert_same(grad, jax.jit(run)(params)[1], mesh, spec)
    assert_same((carry, stacked), jax.jit(outputs)(params), mesh, PartitionSpec(None, *spec[1:]))


def test_scan_sends_one_frozen_layer_at_a_time():
    mesh = make_mesh(EXPLICIT, EXPLICIT)

    def run(stack):
        return fo.scan(lambda x, w: (x + w.sum(), None), jnp.zeros(()), stack, frozen=True)[0]

    with context(mesh):
        stack = on(mesh, PartitionSpec("x"), STACK)
        assert "all-gather" not in jax.jit(run).lower(stack).compile().as_text()


BITS = np.random.default_rng(0).integers(0, 2**32, (COUNT, 4), np.uint32)
BITS[:, 0], BITS[:, 1] = 0x80000000, np.arange(1, COUNT + 1)  # -0.0, and subnormal numbers
SPECIAL = {
    "float32": BITS.view(np.float32),
    "bfloat16": np.concatenate([BITS >> 16, BITS], 1).astype(np.uint16).view(jnp.bfloat16),
    "complex64": np.concatenate([BITS, BITS], 1).view(np.complex64),
}


@pytest.mark.parametrize("axis_type", [EXPLICIT, AUTO], ids=["explicit", "auto"])
@pytest.mark.parametrize("x", cases(SPECIAL, ["float32", "bfloat16"]))
@pytest.mark.parametrize("where", [[0, 1, 2, 17], ROWS["scattered"]], ids=["in runs", "scattered"])
def test_every_bit_stays_where_rows_go_to_another_device(where, x, axis_type):
    mesh, rows = make_mesh(axis_type, axis_type), fo.rows("w", where)

    def moved(x):
        trainable, rest = fo.partition({"w": x}, rows)
        other = {"w": jnp.ones_like(x)}
        held = fo.hold(other, {"w": x}, rows)
        return trainable["w"], rest["w"], fo.merge(trainable, rest), fo.hold(held, {"w": x}, ~rows)

    with context(mesh):
        live, rest, *wholes = jax.jit(moved)(on(mesh, PartitionSpec("x", "y"), x))
    (frozen,) = jax.tree.leaves(rest)
    assert np.asarray(live).tobytes() == np.delete(x, where, axis=0).tobytes()
    assert np.asarray(frozen).tobytes() == x[where].tobytes()
    for whole in wholes:
        assert np.asarray(whole["w"]).tobytes() == x.tobytes()


def two_steps(params, where):
    tx = fo.freezable(INNER, [fo.rows("part", where), "all"])
    state = tx.init(params)
    for _ in range(2):
        grads = fo.grad(loss, frozen=state)(params)
        updates, state = tx.update(grads, state, params)
        params = fo.apply_updates(params, updates, frozen=state)
    return params


AROUND = {
    "explicit and auto axes": (
        (EXPLICIT, AUTO),
        PartitionSpec("x", "y"),
        lambda step, mesh: step,
    ),
    "shard_map over one explicit axis of two": (
        (EXPLICIT, EXPLICIT),
        PartitionSpec("x", "y"),
        lambda step, mesh: jax.shard_map(
            step,
            mesh=mesh,
            in_specs=PartitionSpec(None, "y"),
            out_specs=PartitionSpec(None, "y"),
            axis_names={"y"},
        ),
    ),
    "shard_map over all axes": (
        (EXPLICIT, EXPLICIT),
        PartitionSpec(None, ("x", "y")),
        lambda step, mesh: jax.shard_map(
            step,
            mesh=mesh,
            in_specs=PartitionSpec(None, ("x", "y")),
            out_specs=PartitionSpec(None, ("x", "y")),
        ),
    ),
}


@pytest.mark.parametrize(("axis_types", "spec", "around"), AROUND.values(), ids=AROUND)
@pytest.mark.parametrize("name", ["an odd number", "scattered"])
def test_a_step_works_inside_of(axis_types, spec, around, name):
    mesh = make_mesh(*axis_types)

    def step(params):
        return two_steps(params, ROWS[name])

    with context(mesh):
        made = jax.jit(around(step, mesh))(on(mesh, spec, make_params()))
    assert_same(made, jax.jit(step)(make_params()), mesh, spec)


def test_zeros_vary_over_manual_axes_as_their_leaf_does():
    # Else the branches of `scheduled`, and the carry of a scan, would differ in their types.
    mesh, spec = make_mesh(AUTO, AUTO), PartitionSpec(None, ("x", "y"))

    def run(params):
        tx = fo.scheduled(INNER, fo.Phases({0: [fo.rows("part", [0]), "all"], 1: fo.nothing}))

        def step(carry, _):
            params, state, total = carry
            grads = fo.grad(loss, frozen=state)(params)
            updates, state = tx.update(grads, state, params)
            params = fo.apply_updates(params, updates, frozen=state)
            return (params, state, jax.tree.map(jnp.add, total, updates)), None

        start = (params, tx.init(params), jax.tree.map(jnp.zeros_like, params))
        (params, _, total), _ = jax.lax.scan(step, start, length=2)
        return params, total

    mapped = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)
    made = jax.jit(mapped)(on(mesh, spec, make_params()))
    assert_same(made, jax.jit(run)(make_params()), mesh, spec)


def test_an_ensemble_under_vmap_may_be_sharded_over_its_members():
    mesh = make_mesh(EXPLICIT, EXPLICIT)
    members = jax.tree.map(lambda x: np.stack([x, 2 * x]), make_params())
    step = jax.jit(jax.vmap(lambda params: two_steps(params, ROWS["an odd number"])))
    with context(mesh):
        made = step(on(mesh, PartitionSpec("x", None, "y"), members))
    expected = step(members)
    for name, leaf in made.items():
        assert np.asarray(leaf).tobytes() == np.asarray(expected[name]).tobytes()
        assert leaf.sharding.spec == PartitionSpec("x", None, "y")


def test_an_nnx_optimizer_of_rows_takes_variables_on_explicit_axes():
    mesh, spec = make_mesh(EXPLICIT, EXPLICIT), PartitionSpec("x", "y")

    class Model(nnx.Module):
        def __init__(self, weights):
            self.part = nnx.Param(weights)

    def run(weights):
        model = Model(weights)
        tx = fo.freezable(INNER, fo.rows("part", slice(0, 3)))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        for _ in range(2):
            grads = fnnx.grad(lambda model: (model.part[...] ** 2).sum(), optimizer)(model)
            optimizer.update(model, grads)
            fnnx.thaw(optimizer, model, fo.rows("part", [1]))
        return model.part[...], grads["part"][...], jax.tree.leaves(optimizer.opt_state)

    part = make_params()["part"]
    with context(mesh):
        made = run(on(mesh, spec, part))
    assert_same(made, run(jnp.asarray(part)), mesh, spec)
