"""Linen's metadata boxes: params in boxes are like the same params without them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import freeze_optax as fo
from freeze_optax import linen
from freeze_optax._export.encoding import pack_text, unpack_text
from freeze_optax.testing import assert_frozen

pytestmark = pytest.mark.usefixtures("standard_promotion")

unbox = nn.meta.unbox


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.initializers.ones
        x = nn.Dense(3, kernel_init=nn.with_partitioning(init, ("x", None)), name="layer_0")(x)
        logical = nn.with_logical_partitioning(init, ("embed", "mlp"))
        x = nn.Dense(3, kernel_init=logical, name="layer_1")(x)
        gain = self.param("value", nn.with_partitioning(init, ("x",)), (3,))
        return nn.LayerNorm(name="norm")(x) * gain


X = jax.ShapeDtypeStruct((1, 2), jnp.float32)
TABLE = linen.modules(Net(), X)


def params():
    return Net().init(jax.random.key(0), jnp.ones((1, 2)))["params"]


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


SPECS = {
    "path": fo.path("**/kernel", "value"),
    "regex": fo.regex(".*/kernel"),
    "where": fo.where(lambda path, leaf: path.endswith("kernel") and leaf.ndim == 2),
    "layers": fo.layers("layer_*")[0],
    "labelled": fo.labelled(unbox(fo.labels("*/kernel", params())), "frozen"),
    "label function": fo.labelled(fo.path("*/kernel").labels, "frozen"),
    "mask": {
        "layer_0": {"kernel": True, "bias": False},
        "layer_1": False,
        "norm": False,
        "value": True,
    },
    "boxed mask": fo.mask("*/kernel", params()),
    "of_type": fo.of_type(nn.Dense, fields=("kernel",), modules=TABLE),
    "by_module": fo.by_module(
        lambda module, path: ("kernel",) if isinstance(module, nn.Dense) else (), modules=TABLE
    ),
    "rows": fo.rows("*/kernel", [1]),
    "state": fo.freezable(optax.adam(0.1), "*/kernel").init(params()),
    "state of unboxed params": fo.freezable(optax.adam(0.1), "*/kernel").init(unbox(params())),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_spec_selects_boxed_params_as_unboxed_ones(spec):
    mask = fo.mask(spec, params())
    assert jax.tree.structure(mask) == jax.tree.structure(params())
    assert_same(unbox(mask), fo.mask(spec, unbox(params())))
    assert any(np.any(x) for x in jax.tree.leaves(mask))


def test_a_pattern_that_names_the_value_of_a_box_names_the_path_to_write_instead():
    with pytest.raises(ValueError, match="selects no leaf; nearest: 'layer_0/kernel'"):
        fo.mask("layer_0/kernel/value", params())


def test_reports_and_messages_have_the_paths_of_unboxed_params():
    assert str(fo.summary(params(), "*/kernel", optax.adam(0.1))) == str(
        fo.summary(unbox(params()), "*/kernel", optax.adam(0.1))
    )
    new = fo.assign(params(), {"layer_1/kernel": 2.0})
    assert isinstance(new["layer_1"]["kernel"], nn.LogicallyPartitioned)
    assert_same(unbox(new), fo.assign(unbox(params()), {"layer_1/kernel": 2.0}))
    with pytest.raises(AssertionError, match="layer_1/kernel: 9 of 9 elements differ"):
        assert_frozen(params(), new, "layer_1")
    assert_frozen(unbox(params()), params(), fo.everything)
    array = jnp.ones(2)
    tied = {"a": nn.Partitioned(array, names=("x",)), "b": array}
    assert fo.tied_paths(tied) == [("a", "b")]


def test_hold_takes_boxes_that_both_trees_share():
    old = params()
    new = {**old, "norm": jax.tree.map(lambda x: x + 1, old["norm"])}
    assert_same(fo.hold(new, old, fo.everything), old)


INNER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
EDITS = [
    lambda state, params: fo.thaw(state, params, "layer_0/kernel"),
    lambda state, params: fo.freeze(state, params, "value", keep_state=True),
    lambda state, params: fo.freeze(state, params, fo.rows("layer_1/kernel", [0]), keep_state=True),
    lambda state, params: fo.freeze(state, params, "norm"),
    lambda state, params: fo.thaw(state, params, fo.everything),
    lambda state, params: fo.set_frozen(state, params, "norm"),
]


def run(change):
    """Trains through all edits; `change` changes the trees before and after each of them."""
    tree = params()
    tx = fo.freezable(INNER, "layer_0")
    state = tx.init(tree)
    update = jax.jit(tx.update)
    for i, edit in enumerate(EDITS):
        tree, state = change(2 * i, tree), change(2 * i, state)
        grads = jax.tree.map(lambda x, i=i: x * (0.3 + i), tree)
        updates, state = update(grads, state, tree)
        tree = fo.apply_updates(tree, updates, frozen=state)
        tree, state = change(2 * i + 1, tree), change(2 * i + 1, state)
        state = edit(state, tree)
    return tree, state


def text(keys):
    return "/" + jax.tree_util.keystr(keys, simple=True, separator="/")


def boxed_again(boxes, tree):
    """Puts each array of a tree that Linen unboxed into its box again, by the end of its path."""

    def boxed(keys, x):
        # Where rows of a leaf have separate statistics, their index is the last key.
        found = [box for end, box in boxes if text(keys).rstrip("/012").endswith(end)]
        return found[0].replace(value=x) if found else x

    return jax.tree_util.tree_map_with_path(
        boxed, tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
    )


def test_a_state_survives_unboxing_and_boxing_between_all_edits():
    def is_box(x):
        return isinstance(x, nn.meta.AxisMetadata)

    found = jax.tree_util.tree_leaves_with_path(params(), is_leaf=is_box)
    boxes = [(text(k), x) for k, x in found if is_box(x)]
    expected = run(lambda _, tree: unbox(tree))
    assert len(set(expected[1].plan.cohorts)) > 2
    for change in (
        lambda _, tree: tree,
        lambda i, tree: unbox(tree) if i % 4 < 2 else boxed_again(boxes, unbox(tree)),
    ):
        assert_same(unbox(run(change)), expected)


def test_exports_of_boxed_and_unboxed_params_are_the_same_and_fit_both():
    tree, state = run(lambda _, tree: tree)
    tx = fo.freezable(INNER)
    exported, unboxed = fo.export_state(state), fo.export_state(unbox(state))
    assert_same(exported, unboxed)
    assert_same(fo.import_state(tx, tree, unboxed), state)
    assert_same(fo.import_state(tx, unbox(tree), exported), unbox(state))
    assert_same(fo.release(unbox(state), unbox(tree)), unbox(fo.release(state, tree)))
    plain = fo.release(unbox(state), unbox(tree))
    assert_same(fo.release(fo.adopt(tx, plain, unbox(tree)), unbox(tree)), plain)


def test_an_export_with_the_paths_of_version_0_1_0_still_fits_boxed_params():
    tree, state = run(lambda _, tree: tree)
    exported = fo.export_state(state)
    about = unpack_text(exported)
    boxed = ("layer_0/kernel", "layer_1/kernel", "value")

    def former(path):
        return f"{path}/value" if path.endswith(boxed) else path

    leaves = [{**entry, "path": former(entry["path"])} for entry in about["leaves"]]
    about = {**about, "paths": list(map(former, about["paths"])), "leaves": leaves}
    assert "value/value" in json.dumps(about)
    old = {**exported, "about": pack_text({k: x for k, x in about.items() if k != "sum"})}
    assert_same(fo.import_state(fo.freezable(INNER), tree, old), state)
    with pytest.raises(ValueError, match="only in it: 'layer_0/kernel/value'"):
        fo.import_state(fo.freezable(INNER), unbox(tree), old)


def test_a_schedule_runs_on_after_unboxing():
    tx = fo.scheduled(optax.adam(0.1), fo.Phases({0: fo.regex(".*/kernel"), 1: fo.nothing}))

    def state_after(change):
        tree, state = params(), tx.init(params())
        for _ in range(2):
            _, state = jax.jit(tx.update)(tree, state, tree)
            tree, state = change(tree), change(state)
        return state

    assert_same(unbox(state_after(lambda tree: tree)), state_after(unbox))


def test_a_static_label_tree_in_boxes_fits_inside_after_an_edit():
    tree = params()
    labels = fo.path("*/kernel").labels(tree)
    tx = fo.freezable(
        optax.partition({"frozen": optax.sgd(0.1), "trainable": INNER}, labels), "norm"
    )
    state = fo.thaw(tx.init(tree), tree, "norm")
    updates, _ = tx.update(tree, state, tree)
    expected = optax.partition({"frozen": optax.sgd(0.1), "trainable": INNER}, unbox(labels))
    plain = unbox(tree)
    assert_same(unbox(updates), expected.update(plain, expected.init(plain), plain)[0])


def test_a_box_around_a_tree_can_be_edited():
    box = nn.Partitioned({"a": jnp.ones(2), "b": jnp.ones(2)}, names=("x",))
    tree = {"w": box, "v": jnp.ones(2)}
    tx = fo.freezable(optax.adam(0.1), "w/a")
    state = fo.thaw(tx.init(tree), tree, "w/a")
    assert_same(state.inner, optax.adam(0.1).init(tree))
