"""The selectors that users write."""

import re
import typing

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import freeze_optax as fo
from freeze_optax._tree.holes import HOLE

PARAMS = {
    "embed": 0.5,
    "encoder": {f"layer_{i}": {"bias": 1.0, "kernel": 2.0} for i in (0, 1, 2, 10)},
    "head": {"bias": 3.0, "kernel": 4.0},
}


def selection(selector, tree=PARAMS):
    """The paths of the selected leaves, read from the mask by jax alone."""
    mask = selector(tree)
    assert jax.tree.structure(mask) == jax.tree.structure(tree)
    found = jax.tree_util.tree_leaves_with_path(mask)
    return [jax.tree_util.keystr(k, simple=True, separator="/") for k, flag in found if flag]


def layer(*numbers):
    return [f"encoder/layer_{i}/{name}" for i in numbers for name in ("bias", "kernel")]


HEAD = ["head/bias", "head/kernel"]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (fo.path("embed"), ["embed"]),
        (fo.path("encoder/layer_1"), layer(1)),
        (fo.path("encoder/layer_{0..2}"), layer(0, 1, 2)),
        (fo.path("encoder/layer_{2..7}"), layer(2)),
        (fo.path("head", "embed"), ["embed", *HEAD]),
        (
            fo.path("**/bias") & fo.path("encoder/layer_?"),
            layer(0)[:1] + layer(1)[:1] + layer(2)[:1],
        ),
        (fo.path("**"), ["embed", *layer(0, 1, 10, 2), *HEAD]),
    ],
    ids=repr,
)
def test_path_selects_the_leaves_at_and_below_what_it_names(selector, expected):
    assert selection(selector) == expected


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("head/kernle", "nearest: 'head/kernel'"),
        ("encoder/layer_3", "nearest: 'encoder/layer_"),
        ("layer_0", "nearest: 'encoder/layer_0'"),
        ("zzz", "the tree has 'embed', "),
        ("head/kernel/w", "nearest: 'head/kernel'"),
        ("encoder/", "nearest: 'encoder'"),
        ("/head", "nearest: 'head'"),
    ],
)
def test_a_path_that_selects_nothing_names_the_nearest(pattern, nearest):
    with pytest.raises(ValueError, match=f"pattern '{pattern}' selects no leaf; {nearest}"):
        fo.path("head", pattern)(PARAMS)


def test_braces_must_match_as_a_whole_only():
    assert selection(fo.path("{head,tail}")) == HEAD
    with pytest.raises(ValueError, match=r"pattern '{tail,toe}' selects no leaf"):
        fo.path("{tail,toe}")(PARAMS)


def test_path_sees_components_in_the_slashes_of_a_key():
    params = {"mlp/~/linear_0": {"w": 1.0}, "mlp/~/linear_1": {"w": 2.0}, "out": {"w": 3.0}}
    first, second = "mlp/~/linear_0/w", "mlp/~/linear_1/w"
    assert selection(fo.path("mlp"), params) == [first, second]
    assert selection(fo.path("**/linear_1"), params) == [second]
    assert selection(fo.layers("mlp/~/*")[0], params) == [first]


def test_an_nnx_model_needs_no_value_in_its_patterns():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    mask = fo.path("kernel")(nnx.state(model))
    assert nnx.to_pure_dict(mask) == {"bias": False, "kernel": True}
    with pytest.raises(ValueError, match="'kernel/value' selects no leaf; nearest: 'kernel'"):
        fo.path("kernel/value")(model)


def test_a_bare_array_is_named_by_stars():
    assert fo.path("**")(jnp.ones(2)) is True
    with pytest.raises(ValueError, match=r"'w' selects no leaf; the tree (is|has) (?!no leaves)"):
        fo.path("w")(jnp.ones(2))


def test_a_tree_without_leaves_matches_no_pattern():
    with pytest.raises(ValueError, match="pattern 'w' selects no leaf; the tree has no leaves"):
        fo.path("w")({"w": None})


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (fo.regex(r"encoder/layer_\d/bias"), [path for i in (0, 1, 2) for path in layer(i)[:1]]),
        (fo.regex(r".*/layer_1\d*/.*"), layer(1, 10)),
        (fo.regex("head/bias", "embed"), ["embed", "head/bias"]),
        (fo.regex("(?i)HEAD/.*"), HEAD),
    ],
    ids=repr,
)
def test_regex_matches_the_whole_path_of_a_leaf(selector, expected):
    assert selection(selector) == expected


@pytest.mark.parametrize("pattern", ["kernel", "head", "head/kerne", "ead/kernel", "embed/.*"])
def test_a_regex_that_matches_no_whole_path_is_an_error(pattern):
    with pytest.raises(ValueError, match=f"regex '{re.escape(pattern)}' selects no leaf; "):
        fo.regex("embed", pattern)(PARAMS)


def test_a_regex_error_suggests_only_what_a_regex_could_match():
    with pytest.raises(ValueError, match=r"regex 'head' selects no leaf; ((?!'head').)*$"):
        fo.regex("head")(PARAMS)


def test_a_malformed_regex_is_an_error_at_once():
    with pytest.raises(re.error, match="unterminated character set"):
        fo.regex("[")


@pytest.mark.parametrize("function", [fo.path, fo.regex])
def test_no_pattern_is_an_error(function):
    name = function.__name__
    with pytest.raises(ValueError, match=rf"fo\.{name}\(\) needs a pattern.*fo\.nothing"):
        function()


@pytest.mark.parametrize("function", [fo.path, fo.regex, fo.layers])
@pytest.mark.parametrize("pattern", [["head"], ("head",), 1, None, fo.path("head")])
def test_a_pattern_that_is_no_string_is_an_error(function, pattern):
    name = function.__name__
    with pytest.raises(TypeError, match=rf"fo\.{name} takes strings.*but got .*; unpack a list"):
        function(pattern)


@pytest.mark.parametrize("function", [fo.path, fo.layers])
def test_a_malformed_glob_is_an_error_at_once(function):
    with pytest.raises(ValueError, match=r"pattern 'a\[': `\[` without `\]`"):
        function("a[")


LAYERS = fo.layers("encoder/layer_*")


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (LAYERS, layer(0, 1, 10, 2)),
        (LAYERS[0], layer(0)),
        (LAYERS[2], layer(2)),
        (LAYERS[3], layer(10)),
        (LAYERS[-1], layer(10)),
        (LAYERS[-4], layer(0)),
        (LAYERS[:-2], layer(0, 1)),
        (LAYERS[-2:], layer(10, 2)),
        (LAYERS[::2], layer(0, 2)),
        (LAYERS[::-3], layer(0, 10)),
        (LAYERS[1:99], layer(1, 10, 2)),
        (LAYERS[4:], []),
        (LAYERS[2:1], []),
        (LAYERS[0] | LAYERS[-1], layer(0, 10)),
        (~LAYERS[:], ["embed", *HEAD]),
        (fo.layers("**/layer_*")[1], layer(1)),
        (fo.layers("*")[0], ["embed"]),
        (fo.layers("**/bias")[-1], ["head/bias"]),
    ],
    ids=repr,
)
def test_layers_are_indexed_in_natural_order(selector, expected):
    assert selection(selector) == expected


def test_a_numpy_integer_indexes_layers_as_it_does_a_list():
    assert selection(LAYERS[np.int64(1)]) == layer(1)
    assert selection(LAYERS[: np.int64(1)]) == layer(0)


def test_layers_sort_every_number_in_a_path_by_value():
    params = {f"stage{i}": [float(i * j) for j in range(11)] for i in (1, 2, 10)}
    assert selection(fo.layers("*/*")[10:12], params) == ["stage1/10", "stage2/0"]
    assert selection(fo.layers("stage*")[2], params) == [f"stage10/{j}" for j in range(11)]


def test_text_between_numbers_is_in_the_order_of_its_letters():
    names = ["block_1_aa", "block_1_b", "block_10_aa", "block_10_b", "block_10_ba"]
    params = {name: jnp.ones(1) for name in names}
    assert [selection(fo.layers("*")[i], params) for i in range(5)] == [[name] for name in names]


@pytest.mark.parametrize("index", [4, -5])
def test_a_layer_out_of_range_is_an_error_that_names_the_layers(index):
    match = rf"layers\('encoder/layer_\*'\)\[{index}\] is out of range.*4 nodes, 'encoder/layer_0'"
    with pytest.raises(IndexError, match=match):
        LAYERS[index](PARAMS)


@pytest.mark.parametrize("index", [slice(None), slice(9, None), 0, None])
def test_layers_that_name_no_node_are_an_error(index):
    layers = fo.layers("encodr/*")
    with pytest.raises(ValueError, match=r"layers\('encodr/\*'\) names no node; nearest: 'encoder"):
        (layers if index is None else layers[index])(PARAMS)


@pytest.mark.parametrize("index", ["a", 1.0, None, (0, 1), True])
def test_layers_are_indexed_like_a_list_and_by_nothing_else(index):
    with pytest.raises(TypeError, match=re.escape(f"an int or a slice, not {index!r}")):
        LAYERS[index]


@pytest.mark.parametrize("index", [slice("x", None), slice(0, 1.5), slice(None, None, "2")])
def test_a_slice_of_anything_but_ints_is_an_error_at_once(index):
    with pytest.raises(TypeError, match=re.escape(f"with a slice of ints, not {index!r}")):
        LAYERS[index]


def test_a_slice_without_a_step_is_an_error_at_once():
    with pytest.raises(ValueError, match="a slice step cannot be zero"):
        LAYERS[::0]


def test_layers_are_indexed_once():
    with pytest.raises(TypeError, match=r"is indexed already; join two with \|"):
        LAYERS[:2][0]


def test_layers_cannot_be_iterated_as_how_many_there_are_depends_on_the_tree():
    with pytest.raises(TypeError, match="not iterable"):
        iter(LAYERS)


def test_nodes_without_leaves_do_not_count_as_layers():
    params = {"layer_0": {"w": 1.0}, "layer_1": {}, "layer_2": None, "layer_3": {"w": 2.0}}
    assert selection(fo.layers("layer_*")[1], params) == ["layer_3/w"]
    assert selection(fo.layers("layer_*")[-2], params) == ["layer_0/w"]


class Activation(eqx.Module):
    fn: typing.Callable


def test_nodes_that_hold_a_function_only_do_not_count_as_layers():
    model = {"layers": [{"w": 1.0}, Activation(jax.nn.relu), {"w": 2.0}, Activation(jax.nn.relu)]}
    assert selection(fo.layers("layers/*")[-1], model) == ["layers/2/w"]
    arrays = eqx.filter(model, lambda leaf: isinstance(leaf, float))
    assert selection(fo.layers("layers/*")[-1], arrays) == ["layers/2/w"]


def test_a_quantised_layer_counts_and_one_with_a_key_and_nothing_else_does_not():
    params = {"layer_0": {"w": np.ones(2, np.int8)}, "layer_1": {"rng": jax.random.key(0)}}
    params["layer_2"] = {"w": jnp.ones(2)}
    assert selection(fo.layers("layer_*")[0], params) == ["layer_0/w"]
    assert selection(fo.layers("layer_*")[1], params) == ["layer_2/w"]


def test_nodes_of_holes_count_as_layers_so_that_ranks_stay():
    params = {"layer_0": {"w": HOLE}, "layer_1": {"w": 1.0}, "layer_2": {"w": HOLE}}
    assert fo.layers("layer_*")[1](params) == {**params, "layer_1": {"w": True}}
    assert fo.layers("layer_*")[-1](params) == {**params, "layer_1": {"w": False}}


def by_size(tree):
    return jax.tree.map(lambda leaf: "big" if leaf > 2.5 else "small", tree)


PREFIX = {"embed": "cold", "encoder": "warm", "head": {"bias": "hot", "kernel": "cold"}}


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (fo.labelled(PREFIX, "cold"), ["embed", "head/kernel"]),
        (fo.labelled(PREFIX, "cold", "hot"), ["embed", *HEAD]),
        (fo.labelled(PREFIX, "warm"), layer(0, 1, 10, 2)),
        (fo.labelled(by_size, "big"), HEAD),
        (fo.labelled(by_size(PARAMS), "big"), HEAD),
        (fo.labelled(lambda tree: PREFIX, "hot"), ["head/bias"]),
        (fo.labelled({"embed": 0, "encoder": 1, "head": 0}, 0), ["embed", *HEAD]),
        (fo.labelled(lambda tree: "all", "all"), ["embed", *layer(0, 1, 10, 2), *HEAD]),
    ],
)
def test_labelled_selects_what_a_label_tree_or_function_names(selector, expected):
    assert selection(selector) == expected


class CallableLabels(eqx.Module):
    embed: str
    encoder: str
    head: str

    def __call__(self, tree):
        raise AssertionError("labels that are a tree are read, not called")


def test_a_callable_label_tree_is_read():
    labels = CallableLabels("cold", "cold", "hot")
    assert selection(fo.labelled(labels, "hot")) == HEAD


@pytest.mark.parametrize("labels", [PREFIX, lambda tree: PREFIX])
def test_an_unknown_label_is_an_error_that_names_those_there_are(labels):
    with pytest.raises(
        ValueError, match="label 'frozen' is at no leaf; the tree has 'cold', 'warm'"
    ):
        fo.labelled(labels, "cold", "frozen")(PARAMS)
    with pytest.raises(ValueError, match="label 'colt' is at no leaf; nearest: 'cold'"):
        fo.labelled(labels, "colt")(PARAMS)


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        ({"embed": "cold", "encoder": "cold"}, "it has nothing for 'head/bias', 'head/kernel'"),
        ({**PREFIX, "tail": "cold"}, "it has 'tail', which the tree does not have"),
    ],
)
def test_labels_of_another_tree_name_the_odd_paths(labels, match):
    with pytest.raises(ValueError, match=f"the label tree does not fit the tree: {match}"):
        fo.labelled(labels, "cold")(PARAMS)


def test_labelled_needs_a_label():
    with pytest.raises(ValueError, match=r"needs the labels to select: fo\.labelled\(labels, '"):
        fo.labelled(PREFIX)


@pytest.mark.parametrize(
    ("predicate", "expected"),
    [
        (lambda path, leaf: leaf > 2.5, HEAD),
        (lambda path, leaf: path.startswith("head"), HEAD),
        (lambda path, leaf: np.bool_(leaf == 0.5), ["embed"]),
        (lambda path, leaf: False, []),
    ],
)
def test_where_asks_the_predicate_about_path_and_leaf(predicate, expected):
    assert selection(fo.where(predicate)) == expected


@pytest.mark.parametrize(
    ("answer", "text"),
    [(1, "1"), (None, "None"), ("yes", "'yes'"), (jnp.array(True), "Array"), ([], r"\[\]")],
)
def test_a_predicate_that_gives_no_bool_is_an_error_that_names_the_path(answer, text):
    def predicate(path, leaf):
        return answer if path == "head/bias" else False

    match = rf"where\(.*predicate\) gave {text}.* at 'head/bias'; it must give True or False"
    with pytest.raises(TypeError, match=match):
        fo.where(predicate)(PARAMS)


def test_where_sees_shapes_and_dtypes_of_abstract_leaves():
    tree = {"w": jax.ShapeDtypeStruct((2, 2), jnp.float32), "b": jax.ShapeDtypeStruct((2,), int)}
    assert selection(fo.where(lambda path, leaf: leaf.ndim > 1), tree) == ["w"]


def test_where_is_not_asked_about_holes():
    asked = []

    def predicate(path, leaf):
        asked.append((path, leaf))
        return True

    assert fo.where(predicate)({"a": HOLE, "b": 1.0}) == {"a": HOLE, "b": True}
    assert asked == [("b", 1.0)]
