"""The selectors that ask for the module around a leaf, on every kind of tree and with tables."""

import dataclasses
import typing

import chex
import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx, struct
from flax.core import FrozenDict

import freeze_optax as fo
from freeze_optax._tree.holes import HOLE
from tests.support.selections import Masked, selection


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    kernel: typing.Any
    bias: typing.Any
    name: str = dataclasses.field(default="block", metadata={"static": True})
    frozen_fields: typing.ClassVar = ("bias",)


@struct.dataclass
class Cell:
    kernel: typing.Any
    bias: typing.Any
    frozen_fields: typing.ClassVar = ("bias",)


class PairFields(typing.NamedTuple):
    kernel: typing.Any
    bias: typing.Any


class Pair(PairFields):
    frozen_fields = ("bias",)


@chex.dataclass
class Cheques:
    kernel: typing.Any
    bias: typing.Any
    frozen_fields: typing.ClassVar = ("bias",)


@jax.tree_util.register_pytree_with_keys_class
class Keyed:
    frozen_fields = ("bias",)

    def __init__(self, kernel, bias):
        self.kernel, self.bias = kernel, bias

    def tree_flatten_with_keys(self):
        keys = map(jax.tree_util.GetAttrKey, ("kernel", "bias"))
        return tuple(zip(keys, (self.kernel, self.bias), strict=True)), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)


@pytest.mark.parametrize("cls", [Block, Cell, Pair, Cheques, Keyed])
def test_every_registered_class_is_a_module(cls):
    tree = {"a": [cls(kernel=1.0, bias=2.0)], "b": Masked(3.0, 4.0), "c": 5.0}
    assert sorted(selection(fo.of_type(cls), tree)) == ["a/0/bias", "a/0/kernel"]
    assert selection(fo.of_type(cls, fields=("kernel",)), tree) == ["a/0/kernel"]
    by_answer = fo.by_module(lambda m, path: ("kernel",) if type(m) is cls else False)
    assert selection(by_answer, tree) == ["a/0/kernel"]
    assert selection(fo.declared(), tree) == ["a/0/bias", "b/mask"]


@jax.tree_util.register_pytree_node_class
class Keyless:
    frozen_fields = ("bias",)

    def __init__(self, kernel, bias):
        self.kernel, self.bias = kernel, bias

    def tree_flatten(self):
        return (self.kernel, self.bias), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)


def test_a_class_registered_without_keys_has_positions_for_paths():
    tree = {"a": Keyless(1.0, 2.0), "b": 3.0}
    assert selection(fo.of_type(Keyless), tree) == ["a/0", "a/1"]
    assert selection(fo.of_type(Keyless, fields=("1",)), tree) == ["a/1"]


@pytest.mark.parametrize(
    "selector",
    [
        fo.declared(),
        fo.of_type(Keyless, Keyed, fields=("bias",)),
        fo.by_module(lambda m, path: ("bias",)),
    ],
    ids=["declared", "of_type", "by_module"],
)
def test_fields_of_a_class_registered_without_keys_go_by_the_name_of_the_attribute(selector):
    assert selection(selector, {"a": Keyless(1.0, 2.0), "b": Keyed(3.0, 4.0)}) == ["a/1", "b/bias"]


@jax.tree_util.register_pytree_node_class
class Slotted(Keyless):
    __slots__ = ("bias", "kernel")


@pytest.mark.parametrize("cls", [PairFields, Slotted])
def test_a_field_that_is_none_is_known_without_a_dict_of_attributes(cls):
    tree = {"x": cls(jnp.ones(2), None)}
    assert vars(tree["x"]) == {} if cls is Slotted else not hasattr(tree["x"], "__dict__")
    assert jax.tree.leaves(fo.mask(fo.of_type(cls, fields=("kernel", "bias")), tree)) == [True]
    with pytest.raises(ValueError, match="no such module has a field 'baes'"):
        fo.mask(fo.of_type(cls, fields=("baes",)), tree)


class Gated(nnx.Module):
    frozen_fields = ("gate",)

    def __init__(self, has_gate):
        self.kernel = nnx.Param(jnp.ones(2))
        if has_gate:
            self.gate = nnx.Param(jnp.ones(2))


def test_a_declared_field_may_be_missing_where_another_module_has_it():
    models = {"a": Gated(False), "b": Gated(True), "c": Gated(False)}
    assert selection(fo.declared(), models) == ["b/gate/value"]
    with pytest.raises(ValueError, match="names 'gate', but no module has it: 'a' has 'kernel'"):
        fo.declared()({"a": Gated(False)})


class Inner(nnx.Module):
    frozen_fields = ("gain",)

    def __init__(self, rngs):
        self.linear = nnx.Linear(2, 2, rngs=rngs)
        self.gain = nnx.Param({"value": jnp.ones(2), "x": jnp.ones(2)})


class Outer(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.inner = Inner(rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.items = nnx.List([nnx.Linear(2, 2, rngs=rngs)])
        self.value = nnx.Param(jnp.ones(2))


INNER = ["inner/gain/value", "inner/gain/x", "inner/linear/bias", "inner/linear/kernel"]
NNX_NORM = ["norm/bias", "norm/mean", "norm/scale", "norm/var"]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (fo.of_type(Inner), INNER),
        (fo.of_type(nnx.Linear), [*INNER[2:], "items/0/bias", "items/0/kernel"]),
        (fo.of_type(nnx.BatchNorm), NNX_NORM),
        (fo.of_type(nnx.BatchStat), NNX_NORM[1::2]),
        (fo.of_type(nnx.BatchNorm, fields=("mean", "scale")), NNX_NORM[1:3]),
        (fo.of_type(Inner, fields=("gain",)), INNER[:2]),
        (fo.of_type(Outer, fields=("value",)), ["value"]),
        (fo.declared(), INNER[:2]),
        (fo.by_module(lambda m, path: path == "norm"), NNX_NORM),
    ],
    ids=repr,
)
def test_an_nnx_model_is_a_tree_that_holds_its_modules(selector, expected):
    model = Outer()
    mask = nnx.to_pure_dict(nnx.state(selector(model)))
    found = jax.tree_util.tree_leaves_with_path(mask)
    assert len(found) == len(INNER) + len(NNX_NORM) + 3
    paths = [jax.tree_util.keystr(k, simple=True, separator="/") for k, flag in found if flag]
    assert paths == expected


def test_by_module_is_asked_about_the_modules_of_an_nnx_model_and_not_about_its_internals():
    asked = {}

    def fn(module, path):
        asked[path] = type(module)
        return False

    fo.by_module(fn)(Outer())
    modules = {"": Outer, "inner": Inner, "inner/linear": nnx.Linear, "norm": nnx.BatchNorm}
    assert asked == {**modules, "items": nnx.List, "items/0": nnx.Linear}


def test_a_module_in_two_places_is_selected_in_both():
    shared = Masked(1.0, 2.0)
    tree = {"a": shared, "b": [shared], "c": 3.0}
    assert selection(fo.of_type(Masked), tree) == ["a/weight", "a/mask", "b/0/weight", "b/0/mask"]
    assert selection(fo.declared(), tree) == ["a/mask", "b/0/mask"]
    only_b = fo.by_module(lambda m, path: path == "b/0")
    assert selection(only_b, tree) == ["b/0/weight", "b/0/mask"]


def test_a_layer_shared_by_equinox_is_selected_where_the_tree_keeps_it():
    embed = eqx.nn.Embedding(3, 2, key=jax.random.key(0))
    head = eqx.nn.Linear(2, 3, use_bias=False, key=jax.random.key(1))
    shared = eqx.nn.Shared((embed, head), lambda pair: pair[1].weight, lambda pair: pair[0].weight)
    mask = fo.of_type(eqx.nn.Embedding)(shared)
    assert mask.pytree[0].weight is True
    assert jax.tree.leaves(mask).count(True) == 1


def test_a_module_deep_down_is_found():
    tree = Masked(1.0, 2.0)
    for _ in range(500):
        tree = [tree]
    assert jax.tree.leaves(fo.declared()(tree)) == [False, True]
    assert jax.tree.leaves(fo.of_type(Masked, fields=("weight",))(tree)) == [True, False]


def test_modules_are_found_around_holes_which_stay():
    tree = [Masked(1.0, 2.0), eqx.nn.LayerNorm(2)]
    rest, masked = fo.partition(tree, fo.of_type(Masked))
    norm = eqx.tree_at(lambda m: (m.weight, m.bias), tree[1], (HOLE, HOLE))
    assert jax.tree.structure(masked) == jax.tree.structure([tree[0], norm])
    bools = eqx.tree_at(lambda m: (m.weight, m.bias), tree[1], (False, True))
    assert fo.of_type(eqx.nn.LayerNorm, fields=("bias",))(rest) == [Masked(HOLE, HOLE), bools]
    no_bools = eqx.tree_at(lambda m: (m.weight, m.bias), tree[1], (False, False))
    assert fo.of_type(Masked)(rest) == [Masked(HOLE, HOLE), no_bools]
    assert fo.declared()(rest) == [Masked(HOLE, HOLE), no_bools]
    assert fo.declared()(masked) == [Masked(False, True), norm]


PARAMS = {
    "Dense_0": {"kernel": 1.0, "bias": 2.0},
    "norm": {"scale": 3.0},
    "blocks": [{"Dense_0": {"kernel": 4.0}}],
    "gain": 5.0,
}
DENSE, NORM = linen.Dense(2), linen.LayerNorm()


class Root:
    frozen_fields = ("gain",)


TABLE = {"": Root(), "Dense_0": DENSE, "norm": NORM, "blocks/0/Dense_0": DENSE}
DENSE_0 = ["Dense_0/bias", "Dense_0/kernel"]
LAST_KERNEL = "blocks/0/Dense_0/kernel"


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (fo.of_type(linen.Dense, modules=TABLE), [*DENSE_0, LAST_KERNEL]),
        (fo.of_type(linen.LayerNorm, modules=TABLE), ["norm/scale"]),
        (fo.of_type(linen.Module, modules=TABLE), [*DENSE_0, LAST_KERNEL, "norm/scale"]),
        (fo.of_type(linen.Dense, fields=("bias",), modules=TABLE), DENSE_0[:1]),
        (fo.of_type(Root, modules=TABLE), [*DENSE_0, LAST_KERNEL, "gain", "norm/scale"]),
        (fo.of_type(Root, fields=("gain", "norm"), modules=TABLE), ["gain", "norm/scale"]),
        (fo.of_type(linen.Dense, modules=FrozenDict(TABLE)), [*DENSE_0, LAST_KERNEL]),
        (fo.by_module(lambda m, path: m is NORM, modules=TABLE), ["norm/scale"]),
        (fo.by_module(lambda m, path: () if path else ["gain"], modules=TABLE), ["gain"]),
        (fo.declared(modules=TABLE), ["gain"]),
        (fo.declared(TABLE) | "norm", ["gain", "norm/scale"]),
    ],
    ids=repr,
)
@pytest.mark.parametrize("wrap", [lambda t: t, FrozenDict], ids=["dict", "FrozenDict"])
def test_a_table_names_the_modules_of_params_that_hold_none(wrap, selector, expected):
    assert selection(selector, wrap(PARAMS)) == expected


def test_a_table_serves_abstract_params():
    tree = jax.tree.map(lambda _: jax.ShapeDtypeStruct((2,), jnp.float32), PARAMS)
    assert selection(fo.of_type(linen.LayerNorm, modules=TABLE), tree) == ["norm/scale"]


def test_a_table_comes_before_the_modules_of_the_tree():
    tree = {"a": Masked(1.0, 2.0), "b": Masked(3.0, 4.0)}
    table = {"b": tree["b"]}
    assert selection(fo.of_type(Masked, modules=table), tree) == ["b/weight", "b/mask"]
    assert selection(fo.declared(table), tree) == ["b/mask"]


def test_a_table_may_name_haiku_modules_by_their_slashes():
    params = {"mlp/~/linear_0": {"w": 1.0, "b": 2.0}, "mlp/~/linear_1": {"w": 3.0}}
    names = []
    hk.transform(lambda: names.append(hk.Linear(2))).init(jax.random.key(0))
    table = {"mlp/~/linear_0": names[0]}
    assert selection(fo.of_type(hk.Linear, modules=table), params) == [
        "mlp/~/linear_0/b",
        "mlp/~/linear_0/w",
    ]


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("features", "'Dense_0', but this Dense has 'bias', 'kernel', and its 'features' is stat"),
        ("kernels", "'Dense_0', but this Dense has 'bias', 'kernel'$"),
    ],
)
def test_a_field_without_a_param_in_a_table_is_an_error(name, match):
    by_name = fo.by_module(lambda m, path: (name,), modules={"Dense_0": DENSE})
    with pytest.raises(ValueError, match=f"named the field '{name}' at {match}"):
        by_name({"Dense_0": {"kernel": 1.0, "bias": 2.0}})


def test_a_field_that_a_module_keeps_outside_of_the_params_is_no_slip():
    norm = nnx.BatchNorm(2, use_bias=False, rngs=nnx.Rngs(0))
    fields = ("mean", "bias", "scale")
    mask = fo.by_module(lambda m, path: fields, modules={"": norm})(nnx.state(norm, nnx.Param))
    assert nnx.to_pure_dict(mask) == {"scale": True}


def test_a_box_around_a_param_is_no_component_of_a_field():
    params = {"Dense_0": {"kernel": linen.Partitioned(1.0, names=("x",)), "bias": 2.0}}
    of_kernel = fo.of_type(linen.Dense, fields=("kernel",), modules={"Dense_0": DENSE})
    boxed = linen.Partitioned(True, names=("x",))
    assert of_kernel(params) == {"Dense_0": {"kernel": boxed, "bias": False}}


def test_boxes_are_no_modules_that_params_would_hold():
    params = {"Dense_0": {"kernel": linen.Partitioned(1.0, names=("x",)), "bias": 2.0}}
    with pytest.raises(ValueError, match=r"declared\(\) looks for modules, .* holds none"):
        fo.declared()(params)
