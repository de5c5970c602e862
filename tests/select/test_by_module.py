"""The selectors that ask for the module around a leaf."""

import re
import typing

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from tests.support.selections import Masked, selection


class Scaled(Masked):
    scale: typing.Any
    frozen_fields = ("scale",)


class Attention(eqx.Module):
    query: eqx.nn.Linear
    out: eqx.nn.Linear
    gain: typing.Any


class WideAttention(Attention):
    pass


class Net(eqx.Module):
    embed: Masked
    blocks: list
    head: tuple
    act: typing.Callable

    def __init__(self):
        linear = eqx.nn.Linear(2, 2, key=jax.random.key(0))
        bare = eqx.nn.Linear(2, 2, use_bias=False, key=jax.random.key(1))
        first = Attention(linear, bare, jnp.ones(2))
        last = WideAttention(bare, linear, jnp.ones(2))
        self.embed = Scaled(jnp.ones(2), jnp.ones(2), jnp.ones(2))
        self.blocks = [first, eqx.nn.LayerNorm(2), last]
        self.head = (linear, {"norm": eqx.nn.LayerNorm(2)})
        self.act = jax.nn.relu


NET = Net()
EMBED = ["embed/weight", "embed/mask", "embed/scale"]
FIRST = ["blocks/0/query/weight", "blocks/0/query/bias", "blocks/0/out/weight"]
LAST = ["blocks/2/query/weight", "blocks/2/out/weight", "blocks/2/out/bias"]
GAINS = ["blocks/0/gain", "blocks/2/gain"]
NORM = ["blocks/1/weight", "blocks/1/bias"]
HEAD = ["head/0/weight", "head/0/bias"]
HEAD_NORM = ["head/1/norm/weight", "head/1/norm/bias"]
BIASES = [FIRST[1], LAST[2], HEAD[1]]
WEIGHTS = [FIRST[0], FIRST[2], *LAST[:2], HEAD[0]]
ALL = [*EMBED, *FIRST, GAINS[0], *NORM, *LAST, GAINS[1], *HEAD, *HEAD_NORM, "act"]

LINEAR, LAYER_NORM = eqx.nn.Linear, eqx.nn.LayerNorm


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (fo.of_type(LINEAR), [*FIRST, *LAST, *HEAD]),
        (fo.of_type(LAYER_NORM), NORM + HEAD_NORM),
        (fo.of_type(LAYER_NORM, LINEAR), [*FIRST, *NORM, *LAST, *HEAD, *HEAD_NORM]),
        (fo.of_type(Attention), [*FIRST, GAINS[0], *LAST, GAINS[1]]),
        (fo.of_type(WideAttention), [*LAST, GAINS[1]]),
        (fo.of_type(Net), ALL),
        (fo.of_type(eqx.Module), ALL),
        (fo.of_type(dict), HEAD_NORM),
        (fo.of_type(Attention, fields=("gain",)), GAINS),
        (fo.of_type(Attention, fields=["out", "gain"]), [FIRST[2], GAINS[0], *LAST[1:], GAINS[1]]),
        (fo.of_type(LINEAR, fields=("bias",)), BIASES),
        (fo.of_type(LINEAR, fields={"weight"}), WEIGHTS),
        (fo.of_type(LINEAR, fields=(field for field in ["bias"])), BIASES),
        (fo.of_type(LINEAR, Masked, fields=("bias", "mask")), ["embed/mask", *BIASES]),
        (fo.of_type(Masked, fields=("weight",)), EMBED[:1]),
        (fo.of_type(Net, fields=("head", "embed")), [*EMBED, *HEAD, *HEAD_NORM]),
        (fo.of_type(Net, fields=("act",)), ["act"]),
        (fo.of_type(LINEAR) - fo.of_type(Attention), HEAD),
        (fo.of_type(Attention) & fo.of_type(LINEAR, fields=("bias",)), BIASES[:2]),
        (fo.of_type(LAYER_NORM) - "head", NORM),
        ("head" & ~fo.of_type(LAYER_NORM), HEAD),
        (~fo.of_type(LAYER_NORM, LINEAR), [*EMBED, *GAINS, "act"]),
        (fo.by_module(lambda m, path: type(m) is WideAttention), [*LAST, GAINS[1]]),
        (fo.by_module(lambda m, path: np.bool_(path == "head/1/norm")), HEAD_NORM),
        (fo.by_module(lambda m, path: False), []),
        (fo.by_module(lambda m, path: ["bias"] if type(m) is LINEAR else ()), BIASES),
        (fo.by_module(lambda m, path: {"head"} if path == "" else []), HEAD + HEAD_NORM),
        (
            fo.by_module(lambda m, path: type(m) is LINEAR and m.use_bias),
            [*FIRST[:2], *LAST[1:], *HEAD],
        ),
        (fo.declared(), EMBED[1:]),
        (fo.declared() | fo.of_type(WideAttention, fields=("gain",)), [*EMBED[1:], GAINS[1]]),
    ],
    ids=repr,
)
def test_a_module_is_found_by_its_type_by_answer_or_by_declaration(selector, expected):
    assert selection(selector, NET) == expected


def test_by_module_asks_about_every_module_and_no_mere_container():
    asked = {}

    def fn(module, path):
        assert path not in asked
        asked[path] = module
        return False

    fo.by_module(fn)(NET)
    assert {path: type(module) for path, module in asked.items()} == {
        "": Net,
        "embed": Scaled,
        "blocks/0": Attention,
        "blocks/0/query": LINEAR,
        "blocks/0/out": LINEAR,
        "blocks/1": LAYER_NORM,
        "blocks/2": WideAttention,
        "blocks/2/query": LINEAR,
        "blocks/2/out": LINEAR,
        "head/0": LINEAR,
        "head/1/norm": LAYER_NORM,
    }
    assert asked["blocks/0"] is NET.blocks[0]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (fo.of_type(LINEAR, fields=("bias",)), BIASES),
        (
            fo.by_module(lambda m, path: isinstance(m, Attention)),
            [*FIRST, GAINS[0], *LAST, GAINS[1]],
        ),
        (fo.declared(), EMBED[1:]),
    ],
    ids=repr,
)
def test_an_abstract_model_holds_its_modules_too(selector, expected):
    abstract = eqx.filter_eval_shape(Net)
    arrays = [x for x in jax.tree.leaves(abstract) if not callable(x)]
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in arrays)
    assert selection(selector, abstract) == expected


def test_a_list_that_holds_a_module_selector_is_a_union():
    tree = {"norm": Masked(1.0, 2.0), "head": 3.0, "tail": 4.0}
    mask = fo.mask([fo.of_type(Masked, fields=("weight",)), "head"], tree)
    assert mask == {"norm": Masked(True, False), "head": True, "tail": False}


def test_a_module_selector_gives_labels_for_optax():
    labels = fo.declared().labels({"a": Masked(1.0, 2.0), "steps": 3})
    assert labels == {"a": Masked("trainable", "frozen"), "steps": "frozen"}


TRAINED = {"a": Masked(jnp.zeros(2), jnp.zeros(2)), "b": jnp.zeros(2)}
ONES = {"a": Masked(jnp.ones(2), jnp.ones(2)), "b": jnp.ones(2)}


@pytest.mark.parametrize(
    ("make", "moved"),
    [
        (lambda selector: fo.freezable(optax.sgd(1.0), selector), (-1.0, 0.0, -1.0)),
        (lambda selector: fo.freezable(optax.sgd(1.0), [selector, "b"]), (-1.0, 0.0, 0.0)),
        (lambda selector: optax.masked(optax.sgd(1.0), selector), (1.0, -1.0, 1.0)),
        (lambda selector: optax.masked(optax.sgd(1.0), ~selector), (-1.0, 1.0, -1.0)),
    ],
    ids=["freezable", "list", "masked", "masked ~"],
)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("selector", [fo.declared(), fo.of_type(Masked, fields=("mask",))])
def test_a_module_selector_goes_wherever_a_mask_does(selector, wrap, make, moved):
    tx = make(selector)
    updates, _ = wrap(tx.update)(ONES, wrap(tx.init)(TRAINED), TRAINED)
    found = [float(x[0]) for x in (updates["a"].weight, updates["a"].mask, updates["b"])]
    assert found == list(moved)
    assert jax.tree.structure(updates) == jax.tree.structure(TRAINED)


@pytest.mark.parametrize("selector", [fo.declared(), fo.by_module(lambda m, path: ("mask",))])
def test_optax_maps_over_the_state_of_a_transformation_masked_by_modules(selector):
    tx = optax.masked(optax.trace(0.9), selector)
    state = optax.tree_map_params(tx, lambda x: x + 1, tx.init(TRAINED))
    trace = state.inner_state.trace
    assert isinstance(trace["b"], optax.MaskedNode)
    assert isinstance(trace["a"].weight, optax.MaskedNode)
    assert trace["a"].mask.tolist() == [1.0, 1.0]


class Plain:
    frozen_fields = ("offset",)


class Both(Scaled, Plain):
    offset: typing.Any
    frozen_fields = ()


class Diamond(Both, Masked):
    pass


def test_declarations_of_all_bases_add_up():
    tree = [Masked(1.0, 2.0), Scaled(1.0, 2.0, 3.0), Both(1.0, 2.0, 3.0, 4.0)]
    tree.append(Diamond(1.0, 2.0, 3.0, 4.0))
    scaled, both = Scaled(False, True, True), Both(False, True, True, True)
    diamond = Diamond(False, True, True, True)
    assert fo.declared()(tree) == [Masked(False, True), scaled, both, diamond]


def test_a_declared_field_may_hold_a_subtree_or_nothing_as_long_as_it_is_there():
    tree = [Masked(1.0, None), Masked(2.0, {"x": [3.0], "y": Masked(4.0, 5.0)}), Masked(6.0, ())]
    inside = {"x": [True], "y": Masked(True, True)}
    assert fo.declared()(tree) == [Masked(False, None), Masked(False, inside), Masked(False, ())]


def test_that_no_class_declares_anything_is_no_error():
    assert fo.declared()([eqx.nn.LayerNorm(2, use_bias=False)])[0].weight is False


@pytest.mark.parametrize(
    ("selector", "match"),
    [
        (fo.of_type(eqx.nn.Conv), r"of_type\(Conv\): no module is a Conv; the tree has 'Net', "),
        (
            fo.of_type(LINEAR, eqx.nn.GroupNorm),
            r"of_type\(Linear, GroupNorm\): no module is a GroupNorm; nearest: 'LayerNorm'",
        ),
        (
            fo.of_type(LINEAR, fields=("bias", "kernel")),
            r"of_type\(Linear, fields=\('bias', 'kernel'\)\): no such module has a field "
            r"'kernel'; 'blocks/0/query', a Linear, has 'weight', 'bias'$",
        ),
        (
            fo.of_type(Attention, fields=("weight",)),
            "has a field 'weight'; 'blocks/0', a Attention, has 'query', 'out', 'gain'$",
        ),
        (
            fo.by_module(lambda m, path: ("bais",) if path == "head/0" else False),
            r"by_module\(.*\) named the field 'bais' at 'head/0', but this Linear has "
            "'weight', 'bias'$",
        ),
        (
            fo.by_module(lambda m, path: ("in_features",) if path == "head/0" else False),
            "named the field 'in_features' at 'head/0', but this Linear has 'weight', 'bias', and "
            "its 'in_features' is static$",
        ),
        (
            fo.of_type(LINEAR, fields=("in_features",)),
            "no such module has a field 'in_features'; 'blocks/0/query', a Linear, has 'weight', "
            "'bias', and its 'in_features' is static$",
        ),
    ],
    ids=lambda x: repr(x) if isinstance(x, fo.Selector) else "",
)
def test_a_type_or_field_that_is_nowhere_is_an_error_that_says_what_there_is(selector, match):
    with pytest.raises(ValueError, match=match):
        selector(NET)


def test_a_field_that_is_none_or_empty_is_no_slip():
    no_bias = eqx.nn.Linear(2, 2, use_bias=False, key=jax.random.key(0))
    tree = [no_bias, eqx.nn.LayerNorm(2, use_weight=False)]
    either = fo.by_module(lambda m, path: ("weight", "bias"))
    assert selection(either, tree) == ["0/weight", "1/bias"]
    masks = [Masked(1.0, None), Masked(1.0, ()), Masked(1.0, {})]
    assert selection(fo.by_module(lambda m, path: ("mask",)), masks) == []


def test_fields_are_direct():
    with pytest.raises(ValueError, match="no such module has a field 'query/bias'"):
        fo.of_type(Attention, fields=("query/bias",))(NET)
    with pytest.raises(ValueError, match="named the field 'query/bias' at 'blocks/0'"):
        fo.by_module(lambda m, path: ["query/bias"] if path == "blocks/0" else False)(NET)


def test_modules_without_a_leaf_are_an_error_that_names_them():
    tree = {"a": Masked(None, ()), "b": 1.0}
    with pytest.raises(ValueError, match=r"of_type\(Masked\) selects no leaf: .* none at 'a'$"):
        fo.of_type(Masked)(tree)
    no_bias = eqx.nn.Linear(2, 2, use_bias=False, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"selects no leaf: the tree has none at 'x/bias'$"):
        fo.of_type(LINEAR, fields=("bias",))({"x": no_bias})


@pytest.mark.parametrize(
    "selector",
    [fo.of_type(LINEAR), fo.by_module(lambda m, path: True), fo.declared()],
    ids=["of_type", "by_module", "declared"],
)
@pytest.mark.parametrize("tree", [{"a": {"b": 1.0}}, {}, [1.0], 1.0, None], ids=repr)
def test_a_tree_without_modules_is_an_error_that_names_the_adapters(selector, tree):
    match = rf"looks for modules, but the tree, a {type(tree).__name__}, holds none; .*"
    with pytest.raises(ValueError, match=match + r"modules=linen\.modules.*nnx\.modules"):
        selector(tree)
    with pytest.raises(ValueError, match=match):
        fo.mask([~selector], tree)


@pytest.mark.parametrize("answer", ["bias", None, 1, 0.0, jnp.array(True), ("bias", 1), b"bias"])
def test_by_module_takes_a_bool_or_names_and_an_error_gives_the_path(answer):
    def ask(module, path):
        return answer if path == "blocks/1" else False

    gave = re.escape(repr(answer))
    match = rf"ask.* gave {gave} at 'blocks/1', a LayerNorm; it must give True, False or a tuple"
    with pytest.raises(TypeError, match=match):
        fo.by_module(ask)(NET)


@pytest.mark.parametrize("odd", [LINEAR.__call__, "Linear", (LINEAR, LAYER_NORM), None, list[int]])
def test_of_type_takes_classes_one_by_one(odd):
    with pytest.raises(TypeError, match=f"takes classes, .* but got {re.escape(repr(odd))}"):
        fo.of_type(LINEAR, odd)


def test_of_type_needs_a_type():
    with pytest.raises(TypeError, match=r"fo\.of_type takes classes, .* and got none"):
        fo.of_type()


@pytest.mark.parametrize("fields", ["bias", ("bias", 1), [None], [("bias",)], None, 3])
def test_fields_are_strings_in_a_container(fields):
    match = rf"fields of fo\.of_type are strings, .* not {re.escape(repr(fields))}"
    with pytest.raises(TypeError, match=match):
        fo.of_type(LINEAR, fields=fields)


def test_fields_may_come_one_by_one():
    selector = fo.of_type(LINEAR, fields=iter(["bias"]))
    assert selection(selector, NET) == selection(fo.of_type(LINEAR, fields=("bias",)), NET)
    assert selection(selector, NET)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("of_type", lambda table: fo.of_type(LINEAR, modules=table)),
        ("by_module", lambda table: fo.by_module(lambda m, path: True, modules=table)),
        ("declared", lambda table: fo.declared(modules=table)),
    ],
)
@pytest.mark.parametrize("table", [NET, [NET], "Net", {0: NET}, {("a",): NET}], ids=type)
def test_modules_are_a_table_of_paths_and_anything_else_is_an_error_at_once(name, make, table):
    kind = type(table).__name__
    with pytest.raises(TypeError, match=rf"fo\.{name} are a table {{path: module}}, not a {kind};"):
        make(table)


def test_modules_of_another_tree_are_an_error_that_shows_paths_of_both():
    table = {"": NET, "params": NET, **{f"params/{i}": NET.head[0] for i in range(3)}}
    match = (
        r"the modules of of_type\(Linear\) are not of this tree: it has nothing at 'params', "
        r"'params/0', 'params/1' and 1 more, but 'embed/weight', 'embed/mask', 'embed/scale' and "
        r"15 more; params go without the collection's name: variables\['params'\]"
    )
    with pytest.raises(ValueError, match=match):
        fo.of_type(LINEAR, modules=table)(NET)


class Typo(eqx.Module):
    mask: typing.Any
    frozen_fields = ("maks",)


class Text(eqx.Module):
    mask: typing.Any
    frozen_fields = "mask"


def test_a_declared_field_that_no_module_has_is_an_error():
    match = r"Typo\.frozen_fields names 'maks', but no module has it: 'x' has 'mask'$"
    with pytest.raises(ValueError, match=match):
        fo.declared()({"x": Typo(1.0), "y": Masked(2.0, 3.0)})


class Sized(eqx.Module):
    weight: typing.Any
    size: int = eqx.field(static=True, default=2)
    frozen_fields = ("size",)


def test_a_declared_field_that_is_static_is_an_error():
    match = "Sized.frozen_fields names 'size', but no module has it: 'x' has 'weight', and its 's"
    with pytest.raises(ValueError, match=match):
        fo.declared()({"x": Sized(1.0)})


def test_a_declaration_that_is_no_tuple_of_names_is_an_error():
    with pytest.raises(TypeError, match=r"Text\.frozen_fields is 'mask'; it must be a tuple"):
        fo.declared()([Text(1.0)])
