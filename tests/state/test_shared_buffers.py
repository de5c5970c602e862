"""`tied_paths`, and the errors where one of the leaves that share a buffer would be frozen."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.core import FrozenDict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import freeze_optax as fo
from freeze_optax._state import shared_buffers

pytestmark = pytest.mark.usefixtures("standard_promotion")


def table() -> jax.Array:
    return jnp.arange(8.0)


def shared() -> dict[str, Any]:
    """Params with one array as `embed` and as `head/kernel`."""
    array = table()
    head = {"bias": jnp.ones(2), "kernel": array}
    return {"body": jnp.full(8, 2.0), "embed": array, "head": head}


def test_each_group_is_listed_once_in_the_order_of_the_tree():
    a, b = table(), table()
    tree = {"z": a, "m": [b, jnp.ones(3), b], "c": {"x": a, "y": b}, "d": table()}
    assert fo.tied_paths(tree) == [("c/x", "z"), ("c/y", "m/0", "m/2")]
    assert fo.tied_paths(FrozenDict(tree)) == fo.tied_paths(tree)
    assert fo.tied_paths(shared()) == [("embed", "head/kernel")]


@pytest.mark.parametrize("tree", [{}, [], None, jnp.ones(2), {"a": jnp.ones(2), "b": jnp.ones(2)}])
def test_nothing_is_tied_where_no_two_leaves_share(tree):
    assert fo.tied_paths(tree) == []


def test_array_objects_that_share_a_buffer_are_tied_and_copies_are_not():
    array = table()
    device = jax.devices()[0]
    tree = {
        "a": array,
        "asarray": jnp.asarray(array),
        "astype": array.astype(jnp.float32),
        "copy": jnp.copy(array),
        "equal": table(),
        "put": jax.device_put(array, device),
        "put elsewhere": jax.device_put(array, jax.devices()[1]),
        "sliced": array[:4],
    }
    assert tree["put"] is not array
    assert fo.tied_paths(tree) == [("a", "asarray", "astype", "put")]


def test_what_array_objects_share_is_asked_only_of_those_at_one_address(monkeypatch):
    asked: list[Any] = []
    monkeypatch.setattr(shared_buffers, "_buffer", lambda leaf: asked.append(leaf) or id(leaf))
    a, b = table(), table()
    assert fo.tied_paths({"a": a, "b": b, "c": table(), "d": b}) == [("b", "d")]
    assert [leaf is b for leaf in asked] == [True, True]


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()), ("data",))


@pytest.mark.parametrize("axes", [("data",), (None,)], ids=["split", "replicated"])
def test_sharded_arrays_are_tied_by_the_buffers_of_all_shards(axes):
    sharding = NamedSharding(mesh(), PartitionSpec(*axes))
    array, other = (jax.device_put(np.arange(8.0), sharding) for _ in range(2))
    put = jax.device_put(array, sharding)
    shards = [shard.data for shard in array.addressable_shards]
    same = jax.make_array_from_single_device_arrays(array.shape, sharding, shards)
    assert same is not array
    tree = {"a": array, "b": other, "c": array, "d": put, "e": jnp.copy(array), "f": table()}
    assert fo.tied_paths({**tree, "g": same}) == [("a", "c", "d", "g")]


def test_arrays_that_have_only_some_shards_in_common_are_not_tied():
    sharding = NamedSharding(mesh(), PartitionSpec("data"))
    array, other = (jax.device_put(np.arange(8.0), sharding) for _ in range(2))
    shards = [x.data for x in array.addressable_shards]
    shards[-1] = other.addressable_shards[-1].data
    mixed = jax.make_array_from_single_device_arrays((8,), sharding, shards)
    assert fo.tied_paths({"a": array, "b": mixed}) == []


def test_numpy_arrays_are_tied_where_they_are_one_view_of_one_memory():
    array = np.arange(6.0)
    tree = {
        "a": array,
        "copy": array.copy(),
        "part": array[:3],
        "reversed": array[::-1],
        "same part": array[:3],
        "view": array[:],
    }
    assert fo.tied_paths(tree) == [("a", "view"), ("part", "same part")]


def test_outputs_of_jit_are_never_tied():
    outputs = [
        jax.jit(lambda: [jnp.zeros(8), jnp.zeros(8)])(),
        jax.jit(lambda x: [x, x])(table()),
        jax.jit(lambda x: [x + 1, x + 1])(table()),
    ]
    assert [fo.tied_paths(tree) for tree in outputs] == [[], [], []]
    stepped = jax.jit(lambda tree: tree)(shared())
    assert fo.tied_paths(stepped) == []


def test_tracers_and_abstract_arrays_are_never_tied_even_as_one_object():
    seen = []

    def look(x):
        seen.append(fo.tied_paths({"a": x, "b": x, "c": [x]}))
        return x

    jax.jit(look)(table())
    jax.eval_shape(look, jnp.ones(3))
    jax.grad(lambda x: look(x).sum())(table())
    jax.vmap(look)(table())
    look(jax.ShapeDtypeStruct((2,), jnp.float32))
    assert seen == [[]] * 5


def test_leaves_without_memory_are_not_tied():
    empty, text, hole = jnp.zeros((0, 3)), "x", optax.MaskedNode()
    for leaf in (empty, np.zeros(0), 1.0, 3, True, 1j, np.float32(2), text, jnp.tanh, hole, None):
        assert fo.tied_paths({"a": leaf, "b": leaf}) == []
    array = table()
    tree = {"a": array, "b": hole, "c": array, "d": hole}
    assert fo.tied_paths(tree) == [("a", "c")]


def test_one_key_at_two_paths_is_tied_and_an_equal_one_is_not():
    key = jax.random.key(0)
    assert fo.tied_paths({"a": key, "b": key, "c": jax.random.key(0)}) == [("a", "b")]


def test_deleted_arrays_raise_nothing_and_different_ones_are_not_tied():
    tree = {"a": table(), "b": table(), "c": table()}
    jax.jit(lambda x: x + 1, donate_argnums=0)(tree["a"])
    tree["b"].delete()
    assert tree["a"].is_deleted()
    assert fo.tied_paths(tree) == []
    assert fo.mask(fo.freezable(optax.sgd(0.1), "a").init(tree), tree)["a"] is True


class Tied(eqx.Module):
    embed: jax.Array
    layers: list[eqx.nn.Linear]
    act: Any = jnp.tanh


def test_fields_of_an_equinox_model():
    array = jnp.ones((4, 4))
    linear = eqx.nn.Linear(4, 4, key=jax.random.key(0))
    head = eqx.tree_at(lambda m: m.weight, linear, array)
    model = Tied(array, [linear, head])
    expected = [("embed", "layers/1/weight"), ("layers/0/bias", "layers/1/bias")]
    assert fo.tied_paths(model) == expected


class Model(nnx.Module):
    def __init__(self):
        array = table()
        self.embed, self.head, self.own = nnx.Param(array), nnx.Param(array), nnx.Param(table())


def test_variables_of_an_nnx_model_and_of_its_state():
    model = Model()
    assert fo.tied_paths(nnx.state(model)) == [("embed", "head")]
    assert fo.tied_paths(model) == [("embed", "head")]
    # One Variable at two places is one leaf of the state.
    model.head = model.embed
    assert fo.tied_paths(nnx.state(model)) == []


def test_params_of_a_linen_model():
    variables = linen.Dense(4).init(jax.random.key(0), jnp.ones((1, 4)))
    other = linen.Dense(4).init(jax.random.key(1), jnp.ones((1, 4)))["params"]
    params = {"a": variables["params"], "b": {**other, "kernel": variables["params"]["kernel"]}}
    assert fo.tied_paths(params) == [("a/kernel", "b/kernel")]


EMBED_FROZEN = (
    "'embed' would be frozen and 'head/kernel' trained, but they share one buffer; freeze all or "
    "none of them, or give one its own with jnp.copy"
)
HEAD_FROZEN = EMBED_FROZEN.replace("'embed'", "-").replace("'head/kernel'", "'embed'")
HEAD_FROZEN = HEAD_FROZEN.replace("-", "'head/kernel'")

PARTING = [
    pytest.param("embed", EMBED_FROZEN, id="first"),
    pytest.param(("body", "embed"), EMBED_FROZEN, id="first and others"),
    pytest.param("head", HEAD_FROZEN, id="second, by its node"),
    pytest.param(~fo.path("embed"), HEAD_FROZEN, id="all but the first"),
    pytest.param(
        {"body": False, "embed": True, "head": {"bias": True, "kernel": False}},
        EMBED_FROZEN,
        id="mask",
    ),
]
JOINED = [fo.nothing, "body", ("embed", "head/kernel"), "{embed,head}"]


@pytest.mark.parametrize(("frozen", "match"), PARTING)
def test_init_raises_where_one_is_frozen_and_another_is_not(frozen, match):
    tx = fo.freezable(optax.sgd(0.1), frozen)
    for tree in (shared(), optax.LookaheadParams.init_synced(shared())):
        with pytest.raises(ValueError, match=match):
            tx.init(tree)


@pytest.mark.parametrize("frozen", JOINED)
def test_init_takes_all_frozen_or_all_trained(frozen):
    state = fo.freezable(optax.adam(0.1), frozen).init(shared())
    mask = fo.mask(state, shared())
    assert mask["embed"] == mask["head"]["kernel"] == (frozen not in JOINED[:2])


def test_the_error_names_all_leaves_of_a_group():
    array = np.ones(3)
    tree = {"a": array, "b": array, "c": array[:], "d": np.ones(3)}
    with pytest.raises(ValueError, match="'a', 'c' would be frozen and 'b' trained"):
        fo.freezable(optax.sgd(0.1), ("a", "c", "d")).init(tree)


@pytest.mark.parametrize("frozen", ["embed", "head"])
def test_init_takes_anything_where_no_buffer_is_shared(frozen):
    tx = fo.freezable(optax.sgd(0.1), frozen)
    tree = shared()
    own = {**tree, "embed": jnp.copy(tree["embed"])}
    expected = fo.mask(frozen, tree)
    assert fo.mask(tx.init(own), tree) == expected
    # Without buffers there is nothing to tell.
    assert fo.mask(jax.jit(tx.init)(tree), tree) == expected
    assert fo.mask(jax.eval_shape(tx.init, tree), tree) == expected
    assert fo.mask(tx.init(jax.eval_shape(lambda: tree)), tree) == expected


def test_shared_leaves_that_cannot_be_trained_are_no_error():
    count, key = jnp.array(3), jax.random.key(0)
    tree = {"a": count, "b": count, "c": key, "d": key, "w": jnp.ones(2), "v": jnp.ones(2)}
    state = fo.freezable(optax.sgd(0.1), ("a", "c", "w")).init(tree)
    assert [path for path, flag in fo.mask(state, tree).items() if not flag] == ["v"]
    assert fo.mask(fo.thaw(state, tree, "**"), tree)["w"] is False


@pytest.mark.parametrize("spec", ["embed", "head"])
def test_scheduled_raises_where_a_phase_parts_them(spec):
    phases = fo.Phases({0: ("embed", "head/kernel"), 2: spec, 4: fo.nothing})
    with pytest.raises(ValueError, match=r"'embed'.*but they share one buffer"):
        fo.scheduled(optax.adam(0.1), phases).init(shared())
    phases = fo.Phases({0: ("embed", "head/kernel"), 2: "{embed,head}", 4: fo.nothing})
    state = fo.scheduled(optax.adam(0.1), phases).init(shared())
    assert not any(jax.tree.leaves(fo.mask(state, shared())))


EDITS = {
    "freeze": (fo.nothing, lambda s, t: fo.freeze(s, t, "embed"), EMBED_FROZEN),
    "park": (fo.nothing, lambda s, t: fo.freeze(s, t, "head", keep_state=True), HEAD_FROZEN),
    "thaw": ("{embed,head}", lambda s, t: fo.thaw(s, t, "head"), EMBED_FROZEN),
    "set_frozen": ("body", lambda s, t: fo.set_frozen(s, t, "embed"), EMBED_FROZEN),
    "in a chain": (fo.nothing, lambda s, t: fo.freeze((s, ()), t, "embed"), EMBED_FROZEN),
    "adopted": (
        fo.nothing,
        lambda s, t: fo.freeze(fo.adopt(fo.freezable(optax.adam(0.1)), s.inner, t), t, "embed"),
        EMBED_FROZEN,
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_that_parts_them_raises_and_changes_nothing(edit):
    frozen, run, match = EDITS[edit]
    tree = shared()
    state = fo.freezable(optax.adam(0.1), frozen).init(tree)
    before, text, plan_hash = jax.tree.leaves((tree, state)), repr(state), hash(state.plan)
    mask = fo.mask(state, tree)
    with pytest.raises(ValueError, match=match):
        run(state, tree)
    after = jax.tree.leaves((tree, state))
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert (repr(state), hash(state.plan)) == (text, plan_hash)
    assert fo.mask(state, tree) == mask
    assert fo.tied_paths(tree) == [("embed", "head/kernel")]


@pytest.mark.parametrize("keep_state", [False, True], ids=["drop", "park"])
def test_an_edit_may_move_them_together(keep_state):
    tree = shared()
    both = ("embed", "head/kernel")
    state = fo.freezable(optax.adam(0.1)).init(tree)
    state = fo.freeze(state, tree, both, keep_state)
    assert fo.mask(state, tree) == fo.mask(both, tree)
    state = fo.thaw(state, tree, both)
    assert not any(jax.tree.leaves(fo.mask(state, tree)))
    state = fo.set_frozen(state, tree, "{embed,head}", keep_state)
    assert fo.mask(state, tree) == fo.mask("{embed,head}", tree)


def test_import_to_a_set_that_parts_them_raises():
    tree, tx = shared(), fo.freezable(optax.adam(0.1))
    exported = fo.export_state(tx.init(tree))
    with pytest.raises(ValueError, match=EMBED_FROZEN):
        fo.import_state(tx, tree, exported, frozen="embed")
    state = fo.import_state(tx, tree, exported, frozen="{embed,head}")
    assert fo.mask(state, tree) == fo.mask("{embed,head}", tree)


def step(tx: Any, tree: Any, state: Any, jit: bool) -> tuple[Any, Any]:
    def run(tree, state):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, tree), state, tree)
        return fo.apply_updates(tree, updates, frozen=state), state

    return (jax.jit(run) if jit else run)(tree, state)


def test_after_a_jitted_step_they_have_buffers_of_their_own_and_may_part():
    tx, tree = fo.freezable(optax.adam(0.1)), shared()
    tree, state = step(tx, tree, tx.init(tree), jit=True)
    state = fo.freeze(state, tree, "embed")
    assert fo.mask(state, tree) == fo.mask("embed", tree)


def test_frozen_together_they_share_their_buffer_through_eager_steps_and_may_not_part():
    both = ("embed", "head/kernel")
    tx, tree = fo.freezable(optax.adam(0.1), both), shared()
    tree, state = step(tx, tree, tx.init(tree), jit=False)
    assert fo.tied_paths(tree) == [both]
    with pytest.raises(ValueError, match=HEAD_FROZEN):
        fo.thaw(state, tree, "embed")
    tree, state = step(tx, tree, fo.thaw(state, tree, both), jit=False)
    assert fo.tied_paths(tree) == []
    assert fo.mask(fo.freeze(state, tree, "embed"), tree) == fo.mask("embed", tree)


TIED = "fo.tie ties them; freeze all or none of them"


def test_what_tie_ties_may_never_part_though_no_buffer_is_shared():
    tie = fo.tie(optax.adam(0.1), ("embed", "head/kernel"))
    match = f"'embed' would be frozen and 'head/kernel' trained, but {TIED}"
    for inner in (tie, optax.chain(optax.clip(1.0), optax.chain(tie, optax.scale(0.5)))):
        tx, tree = fo.freezable(inner), shared()
        tree, state = step(tx, tree, tx.init(tree), jit=True)
        assert fo.tied_paths(tree) == []
        for keep_state in (False, True):
            with pytest.raises(ValueError, match=match):
                fo.freeze(state, tree, "embed", keep_state)
        with pytest.raises(ValueError, match=match):
            fo.set_frozen(state, tree, ("embed", "body"))
        with pytest.raises(ValueError, match=match):
            fo.thaw(fo.freeze(state, tree, "{embed,head}"), tree, "head")
        with pytest.raises(ValueError, match=match):
            fo.freezable(inner, "embed").init(tree)
        assert fo.mask(state, tree) == fo.mask(fo.nothing, tree)


@pytest.mark.parametrize("earlier", [0, 1], ids=["first state", "second state"])
@pytest.mark.parametrize("way", ["freeze", "import_state", "scheduled"])
def test_each_state_of_one_transformation_knows_what_tie_ties(way, earlier):
    inner = fo.tie(optax.adam(0.1), ("embed", "head/kernel"))
    tx, tree = fo.freezable(inner), jax.tree.map(jnp.copy, shared())
    for _ in range(earlier):
        fo.freeze(tx.init(tree), tree, "body")
    parting = {
        "freeze": lambda: fo.freeze(tx.init(tree), tree, "embed"),
        "import_state": lambda: fo.import_state(
            tx, tree, fo.export_state(tx.init(tree)), frozen="embed"
        ),
        "scheduled": lambda: fo.scheduled(inner, fo.Phases({0: fo.nothing, 3: "embed"})).init(tree),
    }
    with pytest.raises(ValueError, match=f"'embed' would be .*'head/kernel' trained, but {TIED}"):
        parting[way]()
    assert shared_buffers._collected.get() is None  # else later edits would go on collecting
