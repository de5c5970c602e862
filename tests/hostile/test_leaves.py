"""Leaves of every kind that may stand among params, through everything that takes params."""

import enum
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax import experimental

import freeze_optax as fo

pytestmark = pytest.mark.usefixtures("standard_promotion")


class Color(enum.Enum):
    RED = 1


def read_only() -> np.ndarray:
    x = np.ones(3, np.float32)
    x.setflags(write=False)
    return x


def deleted() -> jax.Array:
    x = jnp.ones(3)
    x.delete()
    return x


new_ref = getattr(jax, "new_ref", None) or experimental.mutable_array  # its name before JAX 0.9
UNTRAINABLE: dict[str, Any] = {
    "int": 3,
    "bool": True,
    "str": "adam",
    "bytes": b"x",
    "function": jnp.tanh,
    "class": jnp.float32,
    "object": object(),
    "ellipsis": ...,
    "enum": Color.RED,
    "set": {1},
    "dtype": np.dtype("f4"),
    "key": jax.random.key(0),
    "keys": jax.random.split(jax.random.key(0), 3),
    "raw key": jax.random.PRNGKey(0),
    "int8": jnp.ones(2, jnp.int8),
    "int4": jnp.ones(2, jnp.int4),
    "uint4": jnp.ones(2, jnp.uint4),
    "int2": jnp.ones(2, jnp.int2),
    "bools": jnp.ones(2, bool),
    "no integers": jnp.ones((0, 3), jnp.int32),
    "scales": jnp.ones(2, jnp.float8_e8m0fnu),
    "float0": np.zeros(2, jax.dtypes.float0),
    "NumPy int": np.int8(1),
    "NumPy bool": np.bool_(True),
    "NumPy str": np.str_("x"),
    "NumPy ints": np.arange(3),
    "objects": np.array([1, "a"], object),
    "strings": np.array(["a", "b"]),
    "byte strings": np.array([b"a"]),
    "structured": np.zeros(2, [("a", "f4"), ("b", "i4")]),
    "dates": np.array(["2020-01-01"], "M8[D]"),
    "durations": np.array([1], "m8[s]"),
    "void": np.zeros(2, "V4"),
}
FROZEN: dict[str, Any] = {
    "float32": jnp.ones(2),
    "read-only": read_only(),
    "deleted": deleted(),
    "abstract": jax.ShapeDtypeStruct((2,), jnp.float32),
    "float": 1.5,
    "big endian": np.ones(2, ">f4"),
    "long double": np.ones(2, np.longdouble),
    # NumPy's files and references lose what would train: an error, unless a spec freezes it.
    "raw bfloat16": np.ones(2, jnp.bfloat16).view("V2"),
    "raw float8": np.ones(2, jnp.float8_e4m3fn).view("V1"),
    "reference": new_ref(jnp.ones(2)),
}
LOST = ("raw bfloat16", "raw float8", "reference")
STILL = {**UNTRAINABLE, **FROZEN}
# Beside what no array of jax can be, a step can be taken, but no state be made without the spec.
OF_JAX = [name for name in STILL if name not in ("big endian", "long double")]
W = jnp.array([1.0, 2.0])
BARE = optax.sgd(0.5, momentum=0.9)


def beside(name: str) -> tuple[dict[str, Any], Any]:
    """A leaf that trains and one that doesn't; and a spec, which need not name what can't train."""
    return {"w": W, "x": STILL[name]}, "x" if name in FROZEN else fo.nothing


def loss(params: Any) -> jax.Array:
    return (params["w"] ** 3).sum()


@pytest.mark.parametrize("name", STILL)
def test_what_does_not_train_is_selected_split_held_and_counted(name):
    params, spec = beside(name)
    assert fo.mask(spec, params) == {"w": False, "x": True}
    assert fo.labels(spec, params) == {"w": "trainable", "x": "frozen"}
    trainable, rest = fo.partition(params, spec)
    assert trainable == {"w": W, "x": optax.MaskedNode()}
    assert fo.merge(trainable, rest)["x"] is params["x"]
    assert fo.hold({"w": W, "x": 0}, params, "x")["x"] is params["x"]
    assert fo.assign(params, {"w": 0.0})["x"] is params["x"]
    assert fo.tied_paths(params) == []
    fo.testing.assert_frozen(params, {"w": 2 * W, "x": params["x"]}, spec)
    assert fo.summary(params, spec).trainable == 2


@pytest.mark.parametrize("name", STILL)
def test_beside_it_a_leaf_trains_as_the_bare_optimizer_does(name):
    params, spec = beside(name)
    tx = fo.freezable(BARE, spec)
    state = tx.init(params)
    value, grads = fo.value_and_grad(loss, state)(params)
    assert (value, grads["w"].tolist()) == (9.0, [3.0, 12.0])
    expected, after = BARE.update(grads["w"], BARE.init(W), W)
    for given in (grads["x"], None, optax.MaskedNode()):
        updates, new = tx.update({"w": grads["w"], "x": given}, state, params)
        np.testing.assert_array_equal(updates["w"], expected)
        applied = fo.apply_updates(params, updates, state)
        assert applied["x"] is params["x"]
        np.testing.assert_array_equal(applied["w"], W + expected)
        trace = optax.tree_utils.tree_get(new, "trace")
        np.testing.assert_array_equal(trace["w"], after[0].trace)
        assert trace["x"] == optax.MaskedNode()
    assert fo.grad(loss, state, holes=True)(params)["x"] == optax.MaskedNode()


@pytest.mark.parametrize("name", STILL)
def test_beside_it_a_leaf_is_frozen_parked_and_thawed(name):
    params, spec = beside(name)
    state = fo.freezable(BARE, spec).init(params)
    parked = fo.freeze(state, params, "w", keep_state=True)
    back = fo.thaw(parked, params, "w")
    trace = [optax.tree_utils.tree_get(x, "trace")["w"] for x in (state, back)]
    assert trace[0] is trace[1]
    assert fo.mask(fo.freeze(state, params, "w"), params) == {"w": True, "x": True}
    if name in UNTRAINABLE:
        assert fo.thaw(state, params, True) is state
        assert fo.set_frozen(state, params, fo.nothing) is state


@pytest.mark.parametrize("name", STILL)
def test_beside_it_rows_are_thawed(name):
    params, spec = beside(name)
    state = fo.freezable(BARE, (spec, fo.rows("w", [0]))).init(params)
    assert fo.mask(fo.thaw(state, params, fo.rows("w", [0])), params) == {"w": False, "x": True}


@pytest.mark.parametrize("name", OF_JAX)
def test_beside_it_a_state_is_exported_and_comes_back(name):
    params, spec = beside(name)
    tx = fo.freezable(BARE, spec)
    state = tx.init(params)
    back = fo.import_state(tx, params, fo.export_state(state))
    assert jax.tree.structure(back) == jax.tree.structure(state)


@pytest.mark.parametrize("name", OF_JAX)
def test_beside_it_the_state_of_a_leaf_is_counted(name):
    params, spec = beside(name)
    summary = fo.summary(params, spec, BARE)
    assert (summary.trainable, summary.state_bytes) == (2, 8)
    assert (
        summary.state_bytes == fo.summary(params, fo.freezable(BARE, spec).init(params)).state_bytes
    )
    assert str(summary).split("\n")[-1].startswith("trainable: 2 of")


@pytest.mark.parametrize(
    "name",
    [
        "function",
        "key",
        "no integers",
        "scales",
        "strings",
        "durations",
        *(name for name in FROZEN if name in OF_JAX),
    ],
)
def test_beside_it_a_leaf_goes_through_phases(name):
    params, spec = beside(name)
    tx = fo.scheduled(BARE, fo.Phases({0: spec, 1: ["w", "x"]}))
    state = tx.init(params)
    grads = fo.grad(loss, state)(params)
    expected, _ = BARE.update(grads["w"], BARE.init(W), W)
    updates, state = tx.update(grads, state, params)
    np.testing.assert_array_equal(updates["w"], expected)
    updates, _ = tx.update(grads, state, params)
    np.testing.assert_array_equal(updates["w"], [0.0, 0.0])


def test_phases_need_no_promotion_of_dtypes_of_their_own():
    params = {"w": W, "x": jnp.ones(3)}
    tx = fo.scheduled(BARE, fo.Phases({0: "x", 1: "w", 2: fo.nothing}))
    with jax.numpy_dtype_promotion("strict"):
        state = tx.init(params)
        grads = fo.grad(loss, state)(params)
        updates, _ = tx.update(grads, state, params)
    np.testing.assert_array_equal(updates["w"], -0.5 * np.array([3.0, 12.0]))


TRAINABLE: dict[str, Callable[[], Any]] = {
    "float": lambda: 1.5,
    "complex": lambda: 1.5 + 2j,
    "NaN": lambda: float("nan"),
    "NumPy float": lambda: np.float32(1.5),
    "NumPy double": lambda: np.float64(1.5),
    "float64": lambda: np.ones(2),
    "float16": lambda: np.ones(2, np.float16),
    "read-only": read_only,
    "no elements": lambda: np.zeros((0, 2), np.float32),
    "0-d": lambda: jnp.ones(()),
    "weak": lambda: jnp.asarray(1.0),
    "complex64": lambda: jnp.ones(2, jnp.complex64),
    "bfloat16": lambda: jnp.ones(2, jnp.bfloat16),
    "NumPy bfloat16": lambda: np.ones(2, ml_dtypes.bfloat16),
    "float8": lambda: jnp.ones(2, jnp.float8_e4m3fn),
    "float8_e5m2": lambda: jnp.ones(2, jnp.float8_e5m2),
    "float4": lambda: jnp.ones(2, jnp.float4_e2m1fn),
}


def told(x: Any) -> tuple[Any, ...]:
    """What makes two leaves the same to jax, with every bit."""
    return type(x), np.asarray(x).tobytes(), jnp.result_type(x), getattr(x, "weak_type", None)


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_leaf_of_any_dtype_trains_as_the_bare_optimizer_trains_it(name):
    leaf = TRAINABLE[name]()
    params, tx = {"s": jnp.ones(3), "x": leaf}, fo.freezable(BARE, "s")
    state, alone = tx.init(params), BARE.init({"x": leaf})
    for _ in range(2):
        updates, state = tx.update(params, state, params)
        expected, alone = BARE.update({"x": leaf}, alone, {"x": leaf})
        assert told(updates["x"]) == told(expected["x"])
        assert list(map(told, jax.tree.leaves(state))) == list(map(told, jax.tree.leaves(alone)))
    back = fo.import_state(tx, params, fo.export_state(state))
    bits = [[(x.dtype, np.asarray(x).tobytes()) for x in jax.tree.leaves(s)] for s in (back, state)]
    assert bits[0] == bits[1]
    fresh = fo.thaw(fo.freeze(state, params, "x"), params, "x")
    first = BARE.init({"x": leaf})
    assert list(map(told, jax.tree.leaves(fresh))) == list(map(told, jax.tree.leaves(first)))
    parked = fo.freeze(state, params, "x", keep_state=True)
    assert fo.apply_updates(params, updates, parked)["x"] is leaf


def test_a_dtype_that_jax_has_not_is_the_error_of_jax_where_it_should_train():
    with pytest.raises(TypeError, match="is not a valid JAX array type"):
        fo.freezable(BARE).init({"x": FROZEN["long double"]})


def test_a_deleted_array_is_the_error_of_jax_where_its_values_are_asked_for():
    params = {"w": W, "x": deleted()}
    with pytest.raises(RuntimeError, match="deleted"):
        fo.apply_updates(params, {"w": W, "x": jnp.ones(3)})
    with pytest.raises(RuntimeError, match="deleted"):
        fo.testing.assert_frozen(params, {"w": W, "x": jnp.ones(3)}, "x")
    with pytest.raises(RuntimeError, match="deleted"):
        fo.assign({"w": jnp.ones(3)}, {"w": params["x"]})


def test_everything_that_takes_params_takes_tracers():
    params = {"w": W, "x": jnp.ones(3)}
    tx = fo.freezable(BARE, "x")
    told = []

    @jax.jit
    def inside(params: Any) -> Any:
        state = tx.init(params)
        told.append((fo.mask("x", params), fo.labels("x", params), fo.mask(state, params)))
        told.append((fo.tied_paths({**params, "y": params["x"]}), fo.summary(params, state).total))
        merged = fo.merge(*fo.partition(params, "x"))
        held = fo.hold(fo.assign(merged, {"x": params["x"][0] + 1.0}), params, "w")
        state = fo.thaw(fo.freeze(state, params, "w", keep_state=True), params, True)
        updates, _ = tx.update(
            fo.grad(lambda p: (p["w"] @ W) + p["x"].sum(), state)(held), state, held
        )
        return fo.apply_updates(held, updates, state)

    new = inside(params)
    assert told[0] == ({"w": False, "x": True}, {"w": "trainable", "x": "frozen"}, told[0][0])
    assert told[1] == ([], 5)
    np.testing.assert_array_equal(new["w"], W - 0.5 * W)
    np.testing.assert_array_equal(new["x"], np.full(3, 1.5))


def test_everything_that_needs_no_values_takes_abstract_leaves():
    params = {"w": W, "x": jnp.ones((3, 2)), "n": jnp.ones((), jnp.int32)}
    abstract = jax.eval_shape(lambda: params)
    tx = fo.freezable(BARE, fo.rows("x", [0]))
    for spec in (
        fo.rows("x", [0]),
        fo.layers("*")[-1],
        fo.where(lambda path, leaf: leaf.ndim == 1),
    ):
        for found, expected in zip(
            jax.tree.leaves(fo.mask(spec, abstract)),
            jax.tree.leaves(fo.mask(spec, params)),
            strict=True,
        ):
            np.testing.assert_array_equal(found, expected)
    state = jax.eval_shape(tx.init, abstract)
    edited = jax.eval_shape(lambda s, p: fo.freeze(s, p, "w"), state, abstract)
    real = fo.freeze(tx.init(params), params, "w")
    assert jax.tree.structure(edited) == jax.tree.structure(real)
    assert [x.shape for x in jax.tree.leaves(edited)] == [x.shape for x in jax.tree.leaves(real)]
    assert fo.merge(*fo.partition(abstract, "w")) == abstract
    assert fo.tied_paths({**abstract, "y": abstract["x"]}) == []
    assert fo.summary(abstract, "x", BARE).to_dict() == fo.summary(params, "x", BARE).to_dict()
    fo.Phases({0: "w", 1: fo.rows("x", [0])}).validate(abstract)


TAKE_PARAMS: dict[str, Callable[[Any], Any]] = {
    "mask": lambda params: fo.mask("w", params),
    "labels": fo.path("w").labels,
    "partition": lambda params: fo.partition(params, fo.nothing),
    "grad": fo.grad(loss, fo.nothing),
    "init": fo.freezable(BARE).init,
    "scheduled": fo.scheduled(BARE, fo.Phases({0: "x", 5: "w"})).init,
    "apply_updates": lambda params: fo.apply_updates(params, params),
    "summary": fo.summary,
    "summary of an optimizer": lambda params: fo.summary(params, "w", BARE),
    "set_frozen": lambda params: fo.set_frozen(frozen_x(params), params, "w"),
    "thaw": lambda params: fo.thaw(frozen_x(params), params, "x"),
}


def frozen_x(params: Any) -> Any:
    return fo.freezable(BARE, "x").init(params)


@pytest.mark.parametrize("take", TAKE_PARAMS.values(), ids=TAKE_PARAMS)
def test_a_leaf_that_would_silently_not_train_is_an_error_with_its_path_and_the_remedy(take):
    remedies = (r"x.view\(jnp.bfloat16\)", r"x.view\(jnp.float8_e4m3fn\)", r"ref\[...\]")
    for name, remedy in zip(LOST, remedies, strict=True):
        with pytest.raises(ValueError, match=f"the leaf 'x' is .*{remedy}.*; or freeze it"):
            take({"w": W, "x": STILL[name]})


def test_a_traced_reference_is_an_error_too():
    def step(params):
        return fo.partition(params, "w")[0]["w"]

    with pytest.raises(ValueError, match="'x' is a reference"):
        jax.jit(step)({"w": W, "x": new_ref(jnp.ones(2))})


def test_the_views_that_the_errors_name_train():
    for dtype, raw in (("bfloat16", "V2"), ("float8_e4m3fn", "V1")):
        x = np.ones(2, dtype).view(raw).view(dtype)
        assert fo.mask(fo.nothing, {"x": x}) == {"x": False}
