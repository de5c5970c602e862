"""`place` and `place_state`: each array in the memory where it belongs, with every bit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import NamedSharding, PartitionSpec

import freeze_optax as fo
from tests.support.memories import (
    DEVICE,
    HOST,
    JITS,
    PLACES,
    assert_same_bits,
    jit_keeps_memory,
    kinds,
    make_params,
    on_host,
)

pytestmark = pytest.mark.usefixtures("standard_promotion")

A_ON_HOST = {"a": HOST, "b": DEVICE, "c": DEVICE}
ALL_ON_DEVICE = dict.fromkeys("abc", DEVICE)
MOMENTUM = optax.sgd(0.1, momentum=0.9)


def trace(state: Any) -> Any:
    return optax.tree_utils.tree_get(state, "trace")


def parked(params: Any, *names: str) -> Any:
    state = fo.freezable(MOMENTUM).init(params)
    return fo.freeze(state, params, list(names), keep_state=True)


@pytest.mark.parametrize("jit", JITS)
@pytest.mark.parametrize("where", PLACES)
def test_what_is_frozen_goes_to_the_host_and_comes_back(where, jit):
    params = make_params(where)
    state = fo.freezable(MOMENTUM, ["a", fo.rows("b", slice(0, 4))]).init(params)
    placed = jit(lambda params: fo.place(params, state))(params)
    back = jit(lambda params: fo.place(params, state, "device"))(placed)
    assert_same_bits(placed, params)
    assert_same_bits(back, params)
    assert kinds(back) == ALL_ON_DEVICE
    if jit is not jax.jit or jit_keeps_memory():
        assert kinds(placed) == A_ON_HOST
        assert placed["a"].sharding.with_memory_kind(DEVICE) == params["a"].sharding
        assert back["a"].sharding == params["a"].sharding
    if jit is not jax.jit:
        assert placed["b"] is params["b"]
        assert fo.place(placed, state) is placed, "all is in its place"
        assert fo.place(params, state, "device") is params


def test_what_trains_next_comes_to_the_device_and_what_is_frozen_next_leaves_it():
    params = make_params("mesh")
    tx = fo.freezable(MOMENTUM, "a")
    state = tx.init(params)
    placed = fo.place(params, state)
    state = fo.set_frozen(state, placed, "b")
    moved = fo.place(placed, state)
    assert_same_bits(moved, params)
    assert kinds(moved) == {"a": DEVICE, "b": HOST, "c": DEVICE}
    assert moved["c"] is params["c"]


@pytest.mark.parametrize(
    "dtype", ["int4", "int8", "bool", "bfloat16", "float8_e8m0fnu", "complex64", "uint32"]
)
def test_leaves_that_cannot_be_trained_and_narrow_dtypes_go_with_every_bit(dtype):
    numbers = np.arange(16).reshape(2, 8).astype(jnp.dtype(dtype))
    params = {"w": jnp.asarray(numbers), "numpy": numbers}
    placed = fo.place(params, ["w", "numpy"])
    assert kinds(placed) == {"w": HOST, "numpy": HOST}
    assert_same_bits(placed, {"w": params["w"], "numpy": params["w"]})
    assert_same_bits(fo.place(placed, ["w"], "device"), {"w": params["w"], "numpy": params["w"]})


def test_keys_and_what_is_no_array_stay():
    params = {"w": jnp.ones(2), "key": jax.random.key(0), "x": 2.0, "n": 3, "f": jax.nn.relu}
    params |= {"t": np.ones(2, ">f4"), "none": None, "hole": optax.MaskedNode()}
    placed = fo.place(params, fo.everything)
    assert placed["w"].sharding.memory_kind == HOST
    assert {name: placed[name] for name in params if name != "w"} == {
        name: params[name] for name in params if name != "w"
    }


def test_arrays_of_numpy_become_arrays_of_their_own():
    params = {"a": np.ones((64, 64), np.float32), "b": np.ones((64, 64), np.float32), "c": np.ones}
    with jax.default_device(jax.devices()[3]):
        placed = fo.place(params, "a")
    params["a"][:], params["b"][:] = 2.0, 2.0
    assert kinds([placed["a"], placed["b"]]) == [HOST, DEVICE]
    assert placed["a"].devices() == placed["b"].devices() == {jax.devices()[3]}
    assert np.all(np.asarray(placed["a"]) == 1.0)
    assert np.all(np.asarray(placed["b"]) == 1.0)


def test_frozen_arrays_of_numpy_never_pass_through_device_memory():
    base = np.ones((256, 64), np.float32)
    before = {id(x) for x in jax.live_arrays()}
    seen = list[str]()
    original = jax.device_put

    def record(x: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(x, *args, **kwargs)
        seen.extend(result.sharding.memory_kind for _ in [0] if np.shape(x) == base.shape)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_put", record)
        placed = fo.place({"base": base}, "base")
    assert seen == [HOST]
    big = [x for x in jax.live_arrays() if id(x) not in before and x.shape == base.shape]
    assert kinds(big) == [HOST]
    assert placed["base"].shape == base.shape


@pytest.mark.parametrize("where", [3, "mesh"])
def test_arrays_that_are_committed_to_no_device_go_to_those_of_the_others(where):
    third = jax.device_put(jnp.ones(2), jax.devices()[3])
    committed = make_params("mesh")["a"] if where == "mesh" else third
    params = {"a": committed, "scale": jnp.ones(()), "numpy": np.ones(3, np.float32)}
    placed = fo.place(params, fo.everything)
    devices = {name: x.devices() for name, x in placed.items()}
    assert devices == dict.fromkeys(params, committed.devices())
    # jit takes no arrays that are committed to different devices.
    assert_same_bits(jax.jit(lambda x: x)(placed), jax.tree.map(jnp.asarray, params))


def test_small_statistics_of_a_parked_leaf_go_to_all_devices_of_the_mesh():
    params = make_params("mesh")
    # An array of length 1 stands for the factors of a leaf that is too small for factors.
    state = fo.freezable(optax.chain(optax.scale_by_factored_rms(), MOMENTUM)).init(params)
    state = fo.freeze(state, params, "a", keep_state=True)
    placed = fo.place_state(state)
    hosted = [x for x in jax.tree.leaves(placed) if x.sharding.memory_kind == HOST]
    assert {len(x.devices()) for x in hosted} == {8}
    assert {(1,), (8, 2)} == {x.shape for x in hosted}
    assert_same_bits(jax.jit(lambda x: x)(placed), state)


def test_leaves_that_share_a_buffer_share_one_on_the_host():
    table = jnp.ones((3, 2))
    numbers = np.ones((4, 2), np.float32)
    params = {"embed": table, "head": table, "x": numbers, "y": numbers, "z": jnp.zeros(2)}
    placed = fo.place(params, ["embed", "head", "x", "y"])
    assert fo.tied_paths(placed) == [("embed", "head"), ("x", "y")]
    assert placed["embed"].sharding.memory_kind == HOST
    assert fo.tied_paths(fo.place(placed, "z")) == [("embed", "head"), ("x", "y")]
    with pytest.raises(ValueError, match="'embed' would be frozen and 'head' trained, but they"):
        fo.place(params, "embed")
    assert fo.tied_paths(fo.place(placed, "embed", "device")) == [("embed", "head"), ("x", "y")]


def test_an_abstract_array_gets_a_sharding_of_that_memory():
    params = make_params("mesh")
    sharding = params["a"].sharding
    abstract = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding if name == "a" else None)
        for name, x in params.items()
    }
    placed = fo.place(abstract, "a")
    assert placed["a"].sharding == sharding.with_memory_kind(HOST)
    assert placed["b"] is abstract["b"]
    assert fo.place(placed, "a") is placed
    assert fo.place(placed, "a", "device") == abstract
    # Without a sharding it is where the others are, or else on the default device.
    both = fo.place(abstract, ["a", "b"])
    assert both["b"].sharding.memory_kind == HOST
    assert both["b"].sharding.device_set == jax.device_put(0).sharding.device_set


def test_a_memory_that_the_devices_lack_is_an_error_that_lists_those_they_have():
    params = {"a": np.ones(2, np.float32), "b": jnp.ones(2)}
    has = "has no memory of the kind 'hbm'; it has 'device', 'pinned_host'"
    for tree in (params, {"b": make_params("mesh")["a"]}):
        with pytest.raises(ValueError, match=has):
            fo.place(tree, "b", "hbm")
    with pytest.raises(ValueError, match=has):
        jax.jit(lambda params: fo.place(params, "b", "hbm"))(params)
    with pytest.raises(ValueError, match=has):
        fo.place_state(parked(make_params("mesh"), "a"), "hbm")
    with pytest.raises(TypeError, match="name of a kind of memory, 'pinned_host' or 'device' say"):
        fo.place(params, "b", jax.memory.Space.Host)


def test_a_spec_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="'x'"):
        fo.place({"a": jnp.ones(2)}, "x")


@pytest.mark.parametrize("jit", JITS)
@pytest.mark.parametrize("where", PLACES)
def test_parked_statistics_go_to_the_host_and_all_others_stay(where, jit):
    params = make_params(where)
    state = {"opt": (parked(params, "a"), optax.EmptyState()), "step": jnp.zeros(3)}
    placed = jit(fo.place_state)(state)
    back = jit(lambda state: fo.place_state(state, "device"))(placed)
    assert_same_bits(placed, state)
    assert_same_bits(back, state)
    assert kinds(trace(back["opt"])) == ALL_ON_DEVICE
    if jit is not jax.jit:
        assert trace(placed)["b"] is trace(state)["b"]
        assert fo.place_state(placed) is placed
        assert fo.place_state(state, "device") is state
        assert trace(back)["a"].sharding == trace(state)["a"].sharding
    if jit is not jax.jit or jit_keeps_memory():
        assert kinds(trace(placed)) == A_ON_HOST
        assert kinds([x for x in jax.tree.leaves(placed) if x is not trace(placed)["a"]]) == [
            DEVICE for _ in jax.tree.leaves(placed)[1:]
        ]


def test_the_parked_rows_of_a_leaf_go_without_those_that_train():
    params = make_params("one device")
    state = fo.freezable(MOMENTUM).init(params)
    state = fo.freeze(state, params, fo.rows("a", slice(0, 4)), keep_state=True)
    placed = fo.place_state(state)
    assert_same_bits(placed, state)
    assert sorted(jax.tree.leaves(kinds(trace(placed)["a"]))) == [DEVICE, HOST]
    assert kinds(trace(placed)["b"]) == DEVICE


def test_the_state_of_many_models_is_placed_under_vmap():
    params = jax.tree.map(lambda x: jnp.stack([x, x]), make_params("one device"))
    state = jax.vmap(lambda params: parked(params, "a"))(params)
    placed = jax.vmap(fo.place_state)(state)
    assert_same_bits(placed, state)
    if jit_keeps_memory():
        assert kinds(trace(placed)) == A_ON_HOST


def test_without_parked_statistics_the_state_itself_is_returned():
    params = make_params("one device")
    for inner in (MOMENTUM, optax.flatten(MOMENTUM)):
        state = fo.freezable(inner, "a").init(params) if inner is MOMENTUM else None
        state = fo.freezable(inner).init(params) if state is None else state
        assert fo.place_state(state) is state


def test_a_state_of_scheduled_is_refused_and_its_params_are_not():
    params = make_params("one device")
    tx = fo.scheduled(MOMENTUM, fo.Phases({0: ["a", "b"], 1: "a"}))
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"in which nothing is parked for good.*phases\.at"):
        fo.place_state(state)
    assert kinds(fo.place(params, state)) == A_ON_HOST


def test_a_state_of_rotating_is_placed_with_what_is_parked_beside_the_stack():
    params = make_params("one device")
    tx = fo.rotating(MOMENTUM, "c", count=2, every=1, order="ascending")
    state = fo.freeze(tx.init(params), params, "a", keep_state=True)
    placed = fo.place_state(state)
    assert kinds(trace(placed)) == A_ON_HOST
    assert kinds(fo.place(params, placed)) == A_ON_HOST

    def run(params: Any, state: Any) -> Any:
        for _ in range(2):
            updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        return updates, fo.place_state(state, "device")

    assert_same_bits(run(params, placed), run(params, state))


def test_what_holds_no_state_is_an_error_that_shows_the_call():
    with pytest.raises(TypeError, match=r"the order is place_state\(state\), with a state of fo."):
        fo.place_state({"a": jnp.ones(2)})
    with pytest.raises(TypeError, match="place_state takes an optimizer state, not a transform"):
        fo.place_state(fo.freezable(MOMENTUM))


def test_boxes_and_variables_keep_their_metadata():
    leaf = jnp.ones(2)
    params = {"a": linen.Partitioned(leaf, ("x",)), "b": nnx.Param(leaf + 1, note="kept")}
    placed = fo.place(params, ["a", "b"])
    assert placed["a"].names == ("x",)
    assert placed["a"].value.sharding.memory_kind == HOST
    assert placed["b"].note == "kept"
    assert placed["b"][...].sharding.memory_kind == HOST
    assert params["b"][...].sharding.memory_kind == DEVICE


def test_a_mesh_with_axes_of_its_own_type_keeps_them():
    mesh = jax.make_mesh((8,), ("x",))
    params = {"a": jax.device_put(jnp.ones((8, 2)), NamedSharding(mesh, PartitionSpec("x")))}
    placed = fo.place(params, "a")
    assert placed["a"].sharding == params["a"].sharding.with_memory_kind(HOST)
    assert fo.place(placed, "a", "device")["a"].sharding == params["a"].sharding


@pytest.mark.parametrize("jit", JITS)
@pytest.mark.parametrize("where", PLACES)
def test_what_is_parked_later_joins_what_is_parked_already(where, jit):
    params = make_params(where)
    tx = fo.freezable(optax.chain(MOMENTUM, fo.rates({}, 0.5)))
    state = fo.freeze(tx.init(params), params, "a", keep_state=True)

    def edit(verb: Any, *args: Any) -> Any:
        return jit(lambda state, params: verb(state, params, *args))

    for verb, where_ in [(fo.freeze, "b"), (fo.set_frozen, ["a", "b"])]:
        placed = edit(verb, where_, True)(fo.place_state(state), params)
        assert_same_bits(placed, edit(verb, where_, True)(state, params))
        if jit is not jax.jit or jit_keeps_memory():
            assert kinds(trace(placed)) == {"a": HOST, "b": HOST, "c": DEVICE}
    rows = fo.rows("b", slice(0, 2))
    placed = edit(fo.freeze, rows, True)(fo.place_state(state), params)
    assert_same_bits(placed, edit(fo.freeze, rows, True)(state, params))
    if jit is not jax.jit or jit_keeps_memory():
        assert sorted(jax.tree.leaves(kinds(trace(placed)["b"]))) == [DEVICE, HOST]


def test_what_is_parked_stays_where_it_trained_if_none_or_not_all_is_on_the_host():
    params = make_params("one device")
    state = parked(params, "a", "b")
    half = fo.place_state(parked(params, "a"))
    half = fo.freeze(half, params, "b", keep_state=True)
    assert kinds(trace(half)) == {"a": HOST, "b": HOST, "c": DEVICE}
    one = jax.tree.map(lambda x: on_host(x) if x is trace(state)["a"] else x, state)
    for before, expected in [(one, A_ON_HOST), (state, ALL_ON_DEVICE)]:
        after = fo.freeze(before, params, fo.rows("c", slice(0, 2)), keep_state=True)
        assert {name: kinds(trace(after)[name]) for name in "ab"} == {
            name: expected[name] for name in "ab"
        }
        assert set(jax.tree.leaves(kinds(trace(after)["c"]))) == {DEVICE}
