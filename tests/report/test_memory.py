"""Where the bytes of a summary are, in device or host memory, and what a step streams of them."""

import json
import pickle
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from rich.console import Console

import freeze_optax as fo
from tests.support.memories import HOST, PLACES, make_params, on_host
from tests.support.nnx_models import Net

pytestmark = pytest.mark.usefixtures("standard_promotion")

ADAM = optax.adam(0.1)


def in_memory(tree: Any, *, host: bool) -> int:
    """The bytes of the arrays of a tree that are in host memory, or of all others."""
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    return sum(x.nbytes for x in arrays if (x.sharding.memory_kind != "device") == host)


def assert_counts(summary: fo.Summary, tree: Any) -> None:
    """The bytes in each memory are those of the arrays of a tree; no byte is forgotten."""
    assert summary.host_bytes == in_memory(tree, host=True)
    assert summary.device_bytes == in_memory(tree, host=False)
    params = summary.trainable_bytes + summary.frozen_bytes
    assert summary.host_bytes + summary.device_bytes == params + (summary.state_bytes or 0)


def layers(count: int = 4) -> dict[str, Any]:
    made = {f"layer_{i}": {"bias": jnp.ones(2), "kernel": jnp.ones((2, 2))} for i in range(count)}
    return {**made, "head": jnp.ones(2)}


def hosted(params: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: on_host(x) if name in names else x for name, x in params.items()}


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def on_host_by_row(summary: fo.Summary) -> dict[str, int]:
    return {row.path: row.host_bytes for row in summary.rows}


# The bytes.


@pytest.mark.parametrize("place", PLACES)
def test_params_and_the_arrays_of_a_state_count_in_the_memory_that_they_are_in(place):
    params = make_params(place)
    tx = fo.freezable(optax.chain(optax.clip(1.0), ADAM))
    state = fo.freeze(tx.init(params), params, "b", keep_state=True)
    assert_counts(fo.summary(params, state), (params, state))
    params["a"], params["b"] = on_host(params["a"]), on_host(params["b"])
    # Both moments of `c`, which trains, and the parked ones of `b`.
    mu, nu = (optax.tree_utils.tree_get(state, name) for name in ("mu", "nu"))
    state = optax.tree_utils.tree_set(state, mu={**mu, "c": on_host(mu["c"])}, nu=on_host(nu))
    summary = fo.summary(params, state)
    assert_counts(summary, (params, state))
    size = params["a"].nbytes
    assert on_host_by_row(summary) == {"a": 2 * size, "b": 2 * size, "c": 2 * size}
    # `a` is on the host, but it trains.
    assert summary.streamed_bytes == 2 * params["b"].nbytes


@pytest.mark.parametrize(
    "inner", [ADAM, optax.sgd(0.1), optax.adafactor(0.1)], ids=["adam", "sgd", "adafactor"]
)
@pytest.mark.parametrize("form", [lambda x: x, abstract], ids=["arrays", "abstract"])
def test_the_state_of_an_optimizer_counts_where_its_init_makes_it(inner, form):
    params = hosted(layers(), "layer_0", "layer_1")
    state = fo.freezable(inner, "layer_0").init(params)
    for optimizer in (inner, fo.freezable(inner)):
        summary = fo.summary(form(params), "layer_0", optimizer)
        assert_counts(summary, (params, state))
        assert summary.to_dict() == fo.summary(params, state).to_dict()


def test_an_abstract_state_counts_by_its_shardings_and_without_one_on_the_device():
    params = hosted(layers(), "layer_0", "layer_1")
    state = fo.freezable(ADAM, "layer_0").init(params)
    summary = fo.summary(abstract(params), abstract(state))
    assert_counts(summary, (params, state))
    unplaced = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    assert fo.summary(params, unplaced).host_bytes == in_memory(params, host=True)


def sharding(kind: str | None) -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.devices()[0], memory_kind=kind)


def shape(given: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((2,), jnp.float32, sharding=given)


MESH = AbstractMesh((1,), ("x",))
LEAVES = {
    "no sharding": (shape(None), False),
    "the default": (shape(sharding(None)), False),
    "device": (shape(sharding("device")), False),
    "pinned": (shape(sharding(HOST)), True),
    "unpinned": (shape(sharding("unpinned_host")), True),
    "abstract mesh": (shape(NamedSharding(MESH, PartitionSpec())), False),
    "abstract host": (shape(NamedSharding(MESH, PartitionSpec(), memory_kind=HOST)), True),
    "NumPy": (np.ones(2, np.float32), False),
    "a number": (1.0, False),
    "no param": ("text", False),
}


@pytest.mark.parametrize(("leaf", "is_on_host"), LEAVES.values(), ids=LEAVES)
def test_a_leaf_is_on_the_host_if_its_kind_of_memory_is_not_that_of_the_device(leaf, is_on_host):
    summary = fo.summary({"w": leaf, "head": jnp.ones(2)}, "w")
    assert summary.host_bytes == (8 if is_on_host else 0)
    assert ("host memory" in str(summary)) == is_on_host


def test_an_array_in_unpinned_host_memory_counts_as_on_the_host():
    params = {"w": jax.device_put(jnp.ones(3), sharding("unpinned_host")), "head": jnp.ones(2)}
    assert_counts(fo.summary(params, "w"), params)


def test_tied_leaves_on_the_host_count_once():
    table = on_host(jnp.ones((4, 2)))
    params = {"embed": table, "head": {"bias": jnp.ones(2), "kernel": table}}
    summary = fo.summary(params, ["embed", "head/kernel"], depth=2)
    assert summary.host_bytes == table.nbytes
    assert summary.streamed_bytes == 2 * table.nbytes
    assert on_host_by_row(summary)["head/kernel"] == 0


def test_what_a_step_streams_is_the_frozen_share_of_each_leaf_integers_too():
    stack = on_host(jnp.ones((4, 3)))
    quantized = on_host(jnp.ones((5, 5), jnp.int8))
    params = {"stack": stack, "quantized": quantized, "head": jnp.ones(2)}
    summary = fo.summary(params, fo.rows("stack", slice(0, 3)))
    assert summary.host_bytes == stack.nbytes + quantized.nbytes
    assert summary.streamed_bytes == 2 * (stack[:3].nbytes + quantized.nbytes)


def test_metadata_boxes_and_the_variables_of_an_nnx_model_count_where_their_values_are():
    boxed = {"w": nn.Partitioned(on_host(jnp.ones(4)), ("x",)), "head": jnp.ones(2)}
    assert_counts(fo.summary(boxed, "w", ADAM), (boxed, ADAM.init({"head": boxed["head"]})))
    model = Net()  # its optimizer has only some of its Variables
    optimizer = nnx.Optimizer(model, fo.freezable(ADAM, "backbone"), wrt=nnx.Param)
    head = nnx.state(model.head)
    nnx.update(model.head, on_host(head))
    nnx.update(model.backbone, on_host(nnx.state(model.backbone)))
    of_params = fo.summary(model, optimizer)
    assert of_params.host_bytes == in_memory(nnx.state((model.head, model.backbone)), host=True)
    assert of_params.streamed_bytes == 2 * in_memory(nnx.state(model.backbone), host=True)
    # The moments that `init` would make go with their params; each is as large as its param.
    planned = fo.summary(model, "backbone", ADAM)
    moments = 2 * in_memory(nnx.state(model.head), host=True)
    assert planned.host_bytes == of_params.host_bytes + moments


def test_the_state_of_a_schedule_counts_in_the_memory_that_it_is_in():
    params = layers()
    state = fo.scheduled(ADAM, fo.Phases({0: "layer_*", 5: "layer_{0..2}"})).init(params)
    assert_counts(fo.summary(params, state), (params, state))
    state = on_host(state)
    assert_counts(fo.summary(params, state), (params, state))


def test_a_state_that_mixes_its_leaves_in_one_array_counts_as_a_whole():
    params = layers()
    state = fo.freezable(optax.flatten(ADAM)).init(params)
    state = jax.tree.map(lambda x: on_host(x) if x.ndim else x, state)
    summary = fo.summary(params, state)
    assert_counts(summary, (params, state))
    assert set(on_host_by_row(summary).values()) == {0}


# The table.


def test_repeated_layers_in_different_memories_are_different_rows():
    params = {"encoder": layers(6), "head": jnp.ones(2)}
    params["encoder"] = hosted(params["encoder"], "layer_0", "layer_1", "layer_2")
    frozen = fo.path("encoder")
    layer = 4 * (2 + 2 * 2)
    assert on_host_by_row(fo.summary(params, frozen)) == {
        "encoder": 3 * layer,
        "encoder/head": 0,
        "encoder/layer_{0..2}": 3 * layer,
        "encoder/layer_{3..5}": 0,
        "head": 0,
    }
    # All of it in one memory is one row.
    whole = {**params, "encoder": on_host(params["encoder"])}
    assert list(on_host_by_row(fo.summary(whole, frozen))) == ["encoder", "head"]


def test_a_subtree_is_opened_where_the_moments_of_a_part_of_it_are_on_the_host():
    params = {"encoder": layers(2), "head": jnp.ones(2)}
    state = fo.freeze(fo.freezable(ADAM).init(params), params, "encoder", keep_state=True)
    moments = {name: optax.tree_utils.tree_get(state, name) for name in ("mu", "nu")}
    assert [row.path for row in fo.summary(params, state).rows] == ["encoder", "head"]
    moments = {
        name: {**tree, "encoder": hosted(tree["encoder"], "layer_0")}
        for name, tree in moments.items()
    }
    state = optax.tree_utils.tree_set(state, **moments)
    summary = fo.summary(params, state)
    assert on_host_by_row(summary) == {
        "encoder": 48,
        "encoder/head": 0,
        "encoder/layer_0": 48,
        "encoder/layer_1": 0,
        "head": 0,
    }
    # Parked moments are not streamed.
    assert summary.streamed_bytes == summary.least_seconds(1) == 0
    assert "streams" not in str(summary)


def test_all_forms_of_the_table_show_what_is_on_the_host():
    params = hosted(layers(), "layer_0", "layer_1")
    summary = fo.summary(params, "layer_{0..2}", ADAM)
    notes = [
        "memory: 124 bytes on the device, 48 bytes on the host",
        "a step streams: at most 96 bytes, 48 bytes in each pass",
    ]
    cells = ["0 bytes", "48 bytes", "0 bytes", "0 bytes"]
    lines = str(summary).splitlines()
    assert lines[0].endswith("optimizer state   host memory")
    assert [line.rsplit("   ", 1)[-1].strip() for line in lines[2:6]] == cells
    assert lines[-3:-1] == notes
    assert summary.render(Console(width=20, color_system=None)).splitlines()[2:6] == lines[2:6]
    markdown = summary.to_markdown().split("\n\n")
    assert markdown[-3:-1] == notes
    header, _, *rows = markdown[0].splitlines()
    assert header.endswith("| optimizer state | host memory |")
    assert [row.split(" | ")[-1].removesuffix(" |") for row in rows] == cells
    html = summary._repr_html_()
    assert ">host memory</th>" in html
    assert re.findall(">([^<>]*)</td></tr>", html) == cells
    assert all(note in html for note in notes)


def test_with_all_in_device_memory_the_table_does_not_speak_of_memory():
    summary = fo.summary(layers(), "layer_0", ADAM)
    for text in (str(summary), summary.to_markdown(), summary._repr_html_()):
        assert "memory" not in text
        assert "host" not in text
        assert "streams" not in text
    assert summary.least_seconds(1) == 0


def test_the_keys_of_the_dict_stay_and_each_row_has_its_bytes_on_the_host():
    params = hosted(layers(2), "layer_0")
    here, there = fo.summary(layers(2), "layer_*"), fo.summary(params, "layer_*")
    assert list(there.to_dict()) == list(here.to_dict())
    rows = json.loads(json.dumps(there.to_dict()))["rows"]
    assert {row["path"]: row["host_bytes"] for row in rows} == on_host_by_row(there)
    assert {**here.to_dict(), "rows": 0} == {**there.to_dict(), "rows": 0}
    assert here != there


def test_a_summary_has_its_memories_after_pickling():
    summary = fo.summary(hosted(layers(2), "layer_0"), "layer_*", ADAM)
    copy = pickle.loads(pickle.dumps(summary))
    assert copy == summary
    assert str(copy) == str(summary)
    assert copy.least_seconds(64e9) == summary.least_seconds(64e9) > 0


# The bound of the time.


def test_the_least_time_is_that_of_the_bytes_that_travel():
    params = hosted(layers(), "layer_0", "layer_1", "head")
    summary = fo.summary(params, "layer_*")
    travels = in_memory((params["layer_0"], params["layer_1"]), host=True)
    for bandwidth in (64e9, 3, np.float32(8), np.int64(5)):
        expected = [passes * travels / float(bandwidth) for passes in (1, 2)]
        found = [summary.least_seconds(bandwidth, passes) for passes in (1, 2)]
        assert found == pytest.approx(expected)
        assert all(type(x) is float for x in found)
    assert summary.least_seconds(64e9) == summary.streamed_bytes / 64e9


@pytest.mark.parametrize("bandwidth", [0, -1.0, float("nan"), float("inf"), np.float64(0)], ids=str)
def test_a_bandwidth_that_is_not_positive_is_a_value_error(bandwidth):
    with pytest.raises(ValueError, match="bandwidth is in bytes per second, positive and finite"):
        fo.summary(layers()).least_seconds(bandwidth)


@pytest.mark.parametrize("bandwidth", ["64e9", None, True, np.True_, 1j, [1.0]], ids=repr)
def test_a_bandwidth_that_is_no_number_is_a_type_error(bandwidth):
    with pytest.raises(TypeError, match="bandwidth is a number of bytes per second, such as 64e9"):
        fo.summary(layers()).least_seconds(bandwidth)


@pytest.mark.parametrize("passes", [0, 3, -1, np.int64(4)], ids=repr)
def test_passes_other_than_one_or_two_are_a_value_error(passes):
    with pytest.raises(ValueError, match=r"passes is 1 \(the forward pass alone\) or 2 "):
        fo.summary(layers()).least_seconds(1, passes)


@pytest.mark.parametrize("passes", [1.0, True, np.True_, "1", None], ids=repr)
def test_passes_that_are_no_integer_are_a_type_error(passes):
    with pytest.raises(TypeError, match="passes is the int 1 or 2, not "):
        fo.summary(layers()).least_seconds(1, passes)
