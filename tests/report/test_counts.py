"""Parameters and bytes of single leaves, and of leaves together."""

import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import freeze_optax as fo
from freeze_optax._report.counts import LeafCounts, count_elements, leaf_bytes, total_bytes
from freeze_optax._rows.rows import Rows
from tests.support.nnx_models import Net, params_of


def counts(params: Any, frozen: Any = fo.nothing) -> tuple[int, int, int, int]:
    summary = fo.summary(params, frozen)
    assert summary.total == summary.trainable + summary.frozen
    return summary.trainable, summary.frozen, summary.trainable_bytes, summary.frozen_bytes


KEY = jax.random.key(0)
# Each with its elements and bytes, and whether it can be trained.
LEAVES = {
    "float32": (jnp.ones((2, 3)), 6, 24, True),
    "bfloat16": (jnp.ones((2, 3), jnp.bfloat16), 6, 12, True),
    "float8": (jnp.ones((2, 3), jnp.float8_e4m3fn), 6, 6, True),
    "complex64": (jnp.ones((2, 3), jnp.complex64), 6, 48, True),
    "scalar": (jnp.float32(1), 1, 4, True),
    "no elements": (jnp.ones((0, 3)), 0, 0, True),
    "NumPy": (np.ones((2, 3)), 6, 48, True),
    "NumPy scalar": (np.float16(1), 1, 2, True),
    "Python float": (1.5, 1, 4, True),
    "Python complex": (1j, 1, 8, True),
    "Python int": (3, 1, 4, False),
    "Python bool": (True, 1, 1, False),
    "int32": (jnp.ones((2, 3), jnp.int32), 6, 24, False),
    "uint8": (jnp.ones((2, 3), jnp.uint8), 6, 6, False),
    # `nbytes` has a whole byte for each, and the device and safetensors have half of one.
    "int4": (jnp.ones((2, 3), jnp.int4), 6, 3, False),
    "float4": (jnp.ones((2, 3), jnp.float4_e2m1fn), 6, 3, True),
    "int2": (jnp.ones((3, 3), jnp.int2), 9, 3, False),
    "bool": (jnp.ones((2, 3), bool), 6, 6, False),
    "key": (KEY, 1, jax.random.key_data(KEY).nbytes, False),
    "keys": (jax.random.split(KEY, 5), 5, 40, False),
    "rbg key": (jax.random.key(0, impl="rbg"), 1, 16, False),
    "raw key": (jax.random.PRNGKey(0), 2, 8, False),
    "function": (jnp.tanh, 0, 0, False),
    "text": ("gelu", 0, 0, False),
    "class": (jnp.float32, 0, 0, False),
}
EVERY_LEAF = pytest.mark.parametrize(
    ("leaf", "count", "size", "trains"), LEAVES.values(), ids=LEAVES
)


@EVERY_LEAF
def test_every_element_counts_and_what_cannot_be_trained_is_frozen(leaf, count, size, trains):
    if hasattr(leaf, "nbytes") and not isinstance(leaf, type) and leaf.nbytes != count:
        assert leaf.nbytes == size
    for params in (leaf, [leaf], {"a": leaf}):
        assert counts(params) == ((count, 0, size, 0) if trains else (0, count, 0, size))
        assert counts(params, True) == (0, count, 0, size)
    if count:
        assert fo.summary({"a": leaf}).rows[0].status == ("trainable" if trains else "frozen")


@EVERY_LEAF
def test_abstract_leaves_count_as_the_arrays_they_stand_for(leaf, count, size, trains):
    if isinstance(leaf, jax.Array):
        abstract = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        assert counts({"a": abstract}) == counts({"a": leaf})
        assert (count_elements(abstract), leaf_bytes(abstract)) == (count, size)


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int2", "float4_e2m1fn", "int8"])
def test_the_bytes_of_small_dtypes_are_those_that_xla_passes(dtype):
    leaf = jax.ShapeDtypeStruct((64, 3), dtype)
    compiled = jax.jit(lambda x: x).lower(leaf).compile()
    assert leaf_bytes(leaf) == compiled.memory_analysis().argument_size_in_bytes


def test_rows_of_packed_elements_add_up():
    leaf = jax.ShapeDtypeStruct((3, 3), "float4_e2m1fn")
    assert counts({"a": leaf}, fo.rows("a", [0])) == (6, 3, 3, 2)


def test_leaves_under_jit_count_too():
    seen = []

    @jax.jit
    def look(params):
        seen.append(counts(params, "a"))
        return params

    look({"a": jnp.ones(3), "b": jnp.ones((2, 2), jnp.bfloat16)})
    assert seen == [(4, 3, 8, 12)]


def test_the_bytes_of_a_tree_are_those_of_its_arrays():
    tree = {name: leaf for name, (leaf, *_) in LEAVES.items()}
    assert total_bytes(tree) == sum(size for _, _, size, _ in LEAVES.values())
    assert total_bytes({}) == 0


def test_counts_have_no_largest_number():
    huge = jax.ShapeDtypeStruct((1 << 40, 1 << 40), jnp.float32)
    assert counts({"a": huge, "b": huge}, "a") == (1 << 80, 1 << 80, 1 << 82, 1 << 82)


def test_shapes_of_numpy_integers_count_without_wrapping():
    side = np.int32(1 << 30)
    for leaf in (jax.ShapeDtypeStruct((side, side), jnp.float32), np.ones((np.int64(3), 2))):
        expected = int(leaf.shape[0]) * int(leaf.shape[1])
        assert (count_elements(leaf), type(count_elements(leaf))) == (expected, int)
        assert (leaf_bytes(leaf), type(leaf_bytes(leaf))) == (expected * leaf.dtype.itemsize, int)


TREES = {
    "dict": {"a": jnp.ones(2), "b": {"c": jnp.ones(3)}},
    "FrozenDict": FrozenDict({"a": jnp.ones(2), "b": {"c": jnp.ones(3)}}),
    "nnx.State": nnx.State({"a": nnx.Param(jnp.ones(2)), "b": {"c": nnx.Param(jnp.ones(3))}}),
    "holes": {"a": jnp.ones(2), "b": {"c": jnp.ones(3)}, "d": None, "e": {}},
}


@pytest.mark.parametrize("params", TREES.values(), ids=TREES)
def test_the_same_leaves_count_the_same_in_every_container(params):
    rows = fo.summary(params, "b", depth=2).rows
    assert [(row.path, row.status, row.trainable, row.frozen) for row in rows] == [
        ("a", "trainable", 2, 0),
        ("b", "frozen", 0, 3),
        ("b/c", "frozen", 0, 3),
    ]


def test_a_hole_has_no_parameters():
    trainable, rest = fo.partition(TREES["dict"], "a")
    assert counts(trainable) == (3, 0, 12, 0)
    assert counts(rest) == (2, 0, 8, 0)


def test_sharded_arrays_count_globally_and_copies_of_one_once():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    assert mesh.size == 8
    for spec in (PartitionSpec("data"), PartitionSpec()):
        array = jax.device_put(jnp.ones((16, 3)), NamedSharding(mesh, spec))
        other = jax.device_put(jnp.ones((16, 3)), NamedSharding(mesh, spec))
        assert counts({"a": array, "b": other}, "a") == (48, 48, 192, 192)
        assert counts({"a": array, "b": other, "c": array}, "b") == (48, 48, 192, 192)


def test_rows_count_in_part():
    params = {"a": jnp.ones((5, 2, 3), jnp.bfloat16), "b": jnp.ones(4)}
    assert counts(params, fo.rows("a", [0, 3])) == (18 + 4, 12, 36 + 16, 24)
    assert counts(params, fo.rows("**", slice(0, 1))) == (24 + 3, 6 + 1, 48 + 12, 12 + 4)
    assert counts(params, fo.rows("a", [])) == (34, 0, 76, 0)
    rows = fo.summary(params, fo.rows("a", [0, 3])).rows
    assert [row.status for row in rows] == ["partial", "trainable"]
    empty = {"a": jnp.ones((5, 0))}
    assert counts(empty, fo.rows("a", [0])) == (0, 0, 0, 0)


class Mlp(eqx.Module):
    layers: list[eqx.nn.Linear]
    act: Any = jnp.tanh


def test_every_kind_of_params():
    linear = eqx.nn.Linear(2, 3, key=jax.random.key(0))
    expected = [("layers", "partial", 3, 6), ("layers/0", "partial", 3, 6)]
    expected += [("layers/0/bias", "trainable", 3, 0), ("layers/0/weight", "frozen", 0, 6)]
    kinds = [Mlp([linear]), {"layers": [{"bias": linear.bias, "weight": linear.weight}]}]
    for params in kinds:
        rows = fo.summary(params, "layers/0/weight").rows
        found = sorted((row.path, row.status, row.trainable, row.frozen) for row in rows)
        assert found == expected


def test_an_nnx_model_and_its_state_have_the_same_rows():
    model = Net()
    expected = [("backbone", "frozen", 0, 16), ("head", "trainable", 10, 0)]
    expected += [("norm", "trainable", 8, 0)]
    rows = fo.summary(params_of(model), "backbone").rows
    assert [(row.path, row.status, row.trainable, row.frozen) for row in rows] == expected
    rows = {row.path: row for row in fo.summary(model, "backbone", depth=2).rows}
    assert (rows["backbone"].status, rows["backbone"].total) == ("frozen", 16)
    assert rows["backbone/kernel"].total == 12
    assert "drop/rngs" in rows
    assert rows["drop"].status == "frozen"


def test_containers_nested_as_deep_as_jax_takes_them_have_their_rows():
    params: Any = jnp.ones(2)
    for _ in range(700):
        params = {"n": params}
    summary = fo.summary(params)
    assert (summary.total, len(summary.rows)) == (2, 700)


def test_a_bare_array_is_a_row_without_a_path():
    rows = fo.summary(jnp.ones((2, 3)), True).rows
    assert [(row.path, row.status, row.total) for row in rows] == [("", "frozen", 6)]
    assert "(the params)" in str(fo.summary(jnp.ones(3)))


@pytest.mark.parametrize("params", [{}, [], (), {"a": {}}])
def test_no_params_are_no_rows(params):
    summary = fo.summary(params, fo.nothing, optax.adam(0.1))
    assert (summary.rows, summary.total, summary.state_bytes) == ([], 0, 4)


def test_none_and_what_does_not_fit_are_errors():
    with pytest.raises(TypeError, match="the params are missing"):
        fo.summary(None)
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    with pytest.raises(ValueError, match="pattern 'c' selects no leaf; the tree has 'a', 'b'"):
        fo.summary(params, "c")
    with pytest.raises(ValueError, match=r"nothing for 'b'"):
        fo.summary(params, {"a": True})
    state = fo.freezable(optax.adam(0.1), "x").init({"x": jnp.ones(2), "y": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"different params.*'a'.*'x'"):
        fo.summary(params, state)


# Tied leaves.


def tied() -> dict[str, Any]:
    table = jnp.ones((4, 2))
    return {"embed": table, "head": {"bias": jnp.ones(2), "kernel": table}, "more": [table]}


def test_tied_leaves_count_once_at_the_first_path():
    params = tied()
    assert counts(params) == (10, 0, 40, 0)
    assert counts(params, "head/bias") == (8, 2, 32, 8)
    assert counts(params, ("embed", "head/kernel", "more")) == (2, 8, 8, 32)
    rows = fo.summary(params, "head/bias", depth=2).rows
    assert [(row.path, row.status, row.total, row.same_as) for row in rows] == [
        ("embed", "trainable", 8, ""),
        ("head", "partial", 2, ""),
        ("head/bias", "frozen", 2, ""),
        ("head/kernel", "trainable", 0, "embed"),
        ("more", "trainable", 0, ""),
        ("more/0", "trainable", 0, "embed"),
    ]


def test_abstract_leaves_are_never_tied():
    assert counts(jax.eval_shape(tied)) == (26, 0, 104, 0)


def test_tied_leaves_of_which_some_would_train_are_an_error():
    for frozen in ("embed", "head", fo.rows("more", slice(0, 2))):
        with pytest.raises(ValueError, match=r"would be frozen.* trained, but they share one"):
            fo.summary(tied(), frozen)


def test_leaves_that_cannot_be_trained_may_be_tied_to_anything():
    count = jnp.ones(3, jnp.int32)
    assert counts({"a": count, "b": count, "w": jnp.ones(2)}, "a") == (2, 3, 8, 12)


def test_tied_layers_fold_and_name_what_they_share():
    shared = {"w": jnp.ones(3), "b": jnp.ones(1)}
    params = {f"layer_{i}": dict(shared) for i in range(4)}
    rows = fo.summary({**params, "out": jnp.ones(2)}, "layer_*/b").rows
    assert [(row.path, row.total, row.same_as) for row in rows] == [
        ("layer_0", 4, ""),
        ("layer_0/b", 1, ""),
        ("layer_0/w", 3, ""),
        ("layer_{1..3}", 0, ""),
        ("layer_{1..3}/b", 0, "layer_0/b"),
        ("layer_{1..3}/w", 0, "layer_0/w"),
        ("out", 2, ""),
    ]


def test_a_folded_row_does_not_say_that_all_share_what_only_one_shares():
    arrays = [jnp.ones(3) for _ in range(3)]
    params = {
        "decoder": {f"l{i}": {"b": jnp.ones(1), "w": x} for i, x in enumerate(arrays)},
        "encoder": {f"l{i}": {"b": jnp.ones(1), "w": x} for i, x in enumerate(arrays)},
    }
    rows = {row.path: row.same_as for row in fo.summary(params, "*/*/b").rows}
    # Encoder layer 1 has the array of decoder layer 1, not that of layer 0.
    assert rows.get("encoder/l{0..2}/w") != "decoder/l0/w"


# Tallies themselves.


def some() -> list[LeafCounts]:
    array = jnp.ones((4, 3))
    part = Rows(np.asarray([True, False, False, False]))
    whole = [
        LeafCounts.of_leaf(array, flag, alias) for flag in (True, False, part) for alias in (0, 1)
    ]
    return [*whole, LeafCounts.of_leaf(3, True, False), LeafCounts()]


def test_a_tally_is_of_one_leaf():
    array = jnp.ones((4, 3))
    expected = {"trainable": (12, 0, 48, 0), "frozen": (0, 12, 0, 48), "partial": (9, 3, 36, 12)}
    flags = {"trainable": False, "frozen": True, "partial": some_rows()}
    for status, flag in flags.items():
        tally = LeafCounts.of_leaf(array, flag, False)
        assert tally.status == status
        assert (
            tally.trainable,
            tally.frozen,
            tally.trainable_bytes,
            tally.frozen_bytes,
        ) == expected[status]
        alias = LeafCounts.of_leaf(array, flag, True)
        assert (alias.total, alias.trainable_bytes, alias.frozen_bytes) == (0, 0, 0)
        assert alias.status == status


def some_rows() -> Rows:
    return Rows(np.asarray([True, False, False, False]))


def test_tallies_add_up_in_any_order_and_grouping():
    tallies = [t.with_state(i, 2 * i, (0.1 * (i % 2), 1.0)) for i, t in enumerate(some())]
    names = [name for name in vars(LeafCounts()) if name != "factors"]
    sums = {name: sum(getattr(t, name) for t in tallies) for name in names}
    expected = {**sums, "factors": (0.0, 0.1, 1.0)}
    for order in itertools.islice(itertools.permutations(tallies), 0, 2000, 400):
        assert vars(LeafCounts.sum(order)) == expected
        assert LeafCounts.sum(
            [LeafCounts.sum(order[:3]), LeafCounts.sum(order[3:])]
        ) == LeafCounts.sum(order)
    assert LeafCounts.sum([]) == LeafCounts()
    assert LeafCounts.sum([tallies[2]] * 3) == tallies[2].times(3)


def test_what_is_unknown_of_one_is_unknown_of_all():
    known, unknown = (
        LeafCounts.of_leaf(1.0, False, False).with_state(8, 0),
        LeafCounts().with_state(None, None),
    )
    total = LeafCounts.sum([known, unknown, known])
    assert (total.state_bytes, total.saved_bytes, total.trainable) == (None, None, 2)
    assert unknown.times(4).state_bytes is None
