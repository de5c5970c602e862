"""Quantized nodes in training: frozen as a whole, unless a spec tells their leaves apart."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from freeze_optax._state.plan import Plan
from tests.support.nodes import Quantized

pytestmark = pytest.mark.usefixtures("standard_promotion")

DTYPES = [
    "int8",
    "float8_e4m3fn",
    *(pytest.param(x, marks=pytest.mark.exhaustive) for x in ("int4", "uint8", "float8_e5m2")),
]


def make_params(dtype="int8", zero_point=None):
    values = jnp.arange(12).reshape(4, 3).astype(dtype)
    base = Quantized(values, jnp.array([[0.5, 0.25, 1.5]]), zero_point)
    return {"base": base, "bias": jnp.zeros(3), "lora": jnp.full((4, 3), 0.1)}


def loss_fn(params, x=1.0):
    kernel = params["base"].dequantized() + params["lora"]
    return ((jnp.full(4, x) @ kernel + params["bias"] - 1) ** 2).sum()


def run(params, state, tx, steps=2):
    for _ in range(steps):
        grads = fo.grad(loss_fn, frozen=state)(params)
        updates, state = tx.update(grads, state, params)
        params = fo.apply_updates(params, updates, frozen=state)
    return params, state


def run_by_hand(params, names, steps=2):
    """Trains the leaves at some keys alone with the bare optimizer."""
    tx = optax.adamw(0.1)
    trainable = {name: params[name] for name in names}
    state = tx.init(trainable)
    for _ in range(steps):
        grads = jax.grad(lambda part: loss_fn({**params, **part}))(trainable)
        updates, state = tx.update(grads, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    return {**params, **trainable}, state


def assert_same(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw_moves_no_leaf_of_a_quantized_node_where_nothing_is_frozen(dtype):
    params = make_params(dtype, jnp.full((1, 3), 0.5) if dtype == "uint8" else None)
    tx = fo.freezable(optax.adamw(0.1))
    after, state = run(params, tx.init(params), tx)
    expected, bare = run_by_hand(params, ("bias", "lora"))
    assert_same(after, expected)
    assert_same(jax.tree.leaves(state), jax.tree.leaves(bare))


def test_gradient_and_update_of_a_quantized_node_are_zero():
    params = make_params("float8_e4m3fn")
    tx = fo.freezable(optax.adamw(0.1))
    grads = fo.grad(loss_fn, fo.nothing)(params)
    assert not np.asarray(grads["base"].scale).any()
    updates, _ = tx.update(grads, tx.init(params), params)
    assert np.signbit(updates["base"].scale).all()
    assert not np.asarray(updates["base"].scale).any()
    holes = fo.grad(loss_fn, fo.nothing, holes=True)(params)
    assert jax.tree.leaves(holes["base"]) == []


BY_NAME = {
    "difference": fo.everything - fo.path("**/scale", "bias"),
    "complement": ~fo.path("base/scale", "bias"),
    "values alone": ["base/values", "lora"],
    "mask": {"base": Quantized(True, False), "bias": False, "lora": True},
    "regex": ~fo.regex(".*/scale", "bias"),
}


@pytest.mark.parametrize("spec", BY_NAME.values(), ids=BY_NAME)
def test_a_spec_that_tells_the_scale_from_the_values_trains_it(spec):
    params = make_params()
    mask = fo.mask(spec, params)
    assert mask == {"base": Quantized(True, False), "bias": False, "lora": True}
    tx = fo.freezable(optax.adamw(0.1), spec)
    after, state = run(params, tx.init(params), tx)

    base = params["base"]

    def of_scale(part):
        kernel = Quantized(base.values, part["scale"])
        return loss_fn({**params, "bias": part["bias"], "base": kernel})

    bare, part = optax.adamw(0.1), {"bias": params["bias"], "scale": base.scale}
    bare_state = bare.init(part)
    for _ in range(2):
        updates, bare_state = bare.update(jax.grad(of_scale)(part), bare_state, part)
        part = optax.apply_updates(part, updates)
    expected = {**params, "bias": part["bias"], "base": Quantized(base.values, part["scale"])}
    assert_same(after, expected)
    assert fo.mask(state, params) == mask


WHOLE = {
    "nothing": fo.nothing,
    "no mask": {"base": Quantized(False, False), "bias": False, "lora": False},
    "all but the node": fo.everything - fo.path("base", "bias", "lora"),
    "all but its values": fo.everything - fo.path("base/values", "bias", "lora"),
    "the scale": "base/scale",
    "rows of both": fo.rows("base/*", [0]),
}


@pytest.mark.parametrize("spec", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_any_other_spec_freezes_the_node_as_a_whole(spec, dtype):
    params = make_params(dtype)
    expected = {"base": Quantized(True, True), "bias": False, "lora": False}
    assert fo.mask(spec, params) == expected
    assert fo.labels(spec, params)["base"] == Quantized("frozen", "frozen")
    trainable, rest = fo.partition(params, spec)
    assert jax.tree.leaves(trainable["base"]) == []
    assert_same(fo.merge(trainable, rest), params)
    # The mask is a spec with the same meaning, and so is the state.
    assert fo.mask(fo.mask(spec, params), params) == expected
    assert fo.mask(fo.freezable(optax.sgd(0.1), spec).init(params), params) == expected


def test_edits_thaw_a_scale_by_its_path_alone():
    params = make_params()
    state = fo.freezable(optax.adamw(0.1)).init(params)
    for where in (fo.everything, "base", "base/*", "base/values"):
        assert fo.thaw(state, params, where) is state
    assert fo.set_frozen(state, params, fo.nothing) is state
    thawed = fo.thaw(state, params, "base/scale")
    assert fo.mask(thawed, params)["base"] == Quantized(True, False)
    assert fo.thaw(thawed, params, "base") is thawed
    for frozen in (
        fo.freeze(thawed, params, "base"),
        fo.freeze(thawed, params, "base/scale"),
        fo.set_frozen(thawed, params, fo.nothing),
    ):
        assert frozen.plan == state.plan
        assert jax.tree.structure(frozen) == jax.tree.structure(state)


def test_parked_statistics_of_a_scale_continue():
    params = make_params()
    tx = fo.freezable(optax.adamw(0.1), fo.everything - "base/scale")
    params, state = run(params, tx.init(params), tx)
    parked = fo.freeze(state, params, "base", keep_state=True)
    assert_same(fo.thaw(parked, params, "base/scale"), state)


def test_phases_and_schedules_keep_the_node_whole():
    params = make_params()
    phases = fo.Phases({0: "lora", 2: fo.everything - "base/scale"})
    masks = [fo.mask(phases.at(step), params)["base"] for step in (0, 2)]
    assert masks == [Quantized(True, True), Quantized(True, False)]
    tx = fo.scheduled(optax.adamw(0.1), phases)
    state = tx.init(params)
    before = params
    for step in range(3):
        params, state = run(params, state, tx, steps=1)
        moved = not np.array_equal(params["base"].scale, before["base"].scale)
        assert moved == (step == 2)


@pytest.mark.parametrize("spec", [fo.nothing, fo.everything - "base/scale"])
def test_an_export_comes_back_with_the_same_unit(spec):
    params = make_params("float8_e5m2")
    tx = fo.freezable(optax.adamw(0.1), spec)
    _, state = run(params, tx.init(params), tx)
    assert_same(fo.import_state(tx, params, fo.export_state(state)), state)


def test_a_state_of_an_older_version_goes_on_as_it_was():
    # Before quantized nodes were units, nothing frozen meant that a scale trained.
    params = make_params("float8_e4m3fn")
    state = fo.freezable(optax.sgd(0.1)).init(params)
    plan = Plan(state.plan.paths, (False,) * 4, (0,) * 4, state.plan.context)
    old = fo.FreezeState(state.inner, (), plan)
    assert not any(jax.tree.leaves(fo.mask(old, params)))
    moved = fo.apply_updates(params, jax.tree.map(jnp.ones_like, params), frozen=old)
    assert float(moved["base"].scale[0, 0]) == 1.5


def test_adopt_freezes_the_node_and_release_gives_a_whole_state():
    params = make_params("float8_e5m2")
    tx, plain = fo.freezable(optax.adamw(0.1)), optax.adamw(0.1).init(params)
    state = fo.adopt(tx, plain, params)
    assert fo.mask(state, params)["base"] == Quantized(True, True)
    assert_same(fo.release(state, params), plain)


def test_scan_counts_a_stack_of_quantized_layers_as_frozen():
    stack = {"base": Quantized(jnp.ones((3, 2, 2), jnp.int8), jnp.ones((3, 1, 2)))}
    params = {**stack, "lora": jnp.full((3, 2, 2), 0.1)}

    def loss(params, scan):
        def layer(x, layer):
            return jnp.tanh(x @ (layer["base"].dequantized() + layer["lora"])), None

        return scan(layer, jnp.ones(2), params)[0].sum()

    frozen = fo.rows("lora", [0, 1])
    grads = fo.grad(lambda p: loss(p, lambda *a: fo.scan(*a, frozen=frozen)), frozen)(params)
    expected = jax.grad(lambda x: loss({**params, "lora": x}, jax.lax.scan))(params["lora"])
    np.testing.assert_array_equal(grads["lora"][2], expected[2])
    assert not np.asarray(grads["lora"][:2]).any()
    assert not np.asarray(grads["base"].scale).any()


def test_the_summary_says_that_nodes_are_frozen_as_a_whole():
    params = make_params()
    text = str(fo.summary(params, optimizer=optax.adamw(0.1)))
    assert "base   frozen" in text
    assert "quantized: 1 node, frozen as a whole: 'base'" in text
    assert "quantized: 1 node" in fo.summary(params).to_markdown()
    assert fo.summary(params).frozen == 15
    assert "quantized" not in str(fo.summary(params, fo.everything - "base/scale"))
    assert "quantized: 2 nodes" in str(fo.summary({"a": params, "b": params}))
    assert "quantized" not in fo.summary(params).to_dict()
