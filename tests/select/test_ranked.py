"""The leaves with the highest and the lowest scores."""

import itertools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import freeze_optax as fo
from tests.support.nnx_models import Net, Tied

PARAMS = {
    f"layer_{i}": {"down": jnp.ones(i + 1), "up": jnp.ones(4), "bias": jnp.ones(1)}
    for i in (2, 10, 0)
}
SCORES = {
    "layer_0/down": 5.0,
    "layer_2/down": 1.0,
    "layer_10/down": 3.0,
    "layer_0/up": 40.0,
    "layer_2/up": 20.0,
    "layer_10/up": -10.0,
}


def selected(selector, params=PARAMS):
    return {path for path, flag in flat(selector(params)).items() if flag}


def flat(tree):
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in pairs}


def best(scores, count, reverse=True):
    return set(sorted(scores, key=scores.get, reverse=reverse)[:count])


@pytest.mark.parametrize("share", [0, 0.1, 0.25, 1 / 3, 0.5, np.float32(0.75), 1])
def test_the_share_of_leaves_is_that_of_a_sorted_list(share):
    count = round(share * len(SCORES))
    assert selected(fo.top_leaves(SCORES, share)) == best(SCORES, count)
    assert selected(fo.bottom_leaves(SCORES, share)) == best(SCORES, count, reverse=False)


@pytest.mark.parametrize("share", [0, 1 / 3, 2 / 3, 1])
def test_within_a_kind_the_layers_compete_with_each_other(share):
    expected = set()
    for kind in ("up", "down"):
        own = {path: score for path, score in SCORES.items() if path.endswith(kind)}
        expected |= best(own, round(3 * share))
    assert selected(fo.top_leaves(SCORES, share, within="kind")) == expected


def test_within_patterns_the_leaves_below_each_compete():
    within = ["layer_0", fo.path("layer_{0,2}"), "**/up"]
    chosen = selected(fo.top_leaves(SCORES, 0.5, within=within))
    # layer_0: up of two. layer_2, as layer_0 went by the first: up of two. Then layer_10/up alone,
    # of which a half is none.
    assert chosen == {"layer_0/up", "layer_2/up"}
    assert selected(fo.top_leaves(SCORES, 1, within=within)) == set(SCORES) - {"layer_10/down"}


def test_within_a_function_the_leaves_with_one_value_compete():
    def name(path):
        return None if path.endswith("down") else path.partition("/")[0] == "layer_0"

    assert selected(fo.top_leaves(SCORES, 0.5, within=name)) == {"layer_2/up"}
    assert selected(fo.bottom_leaves(SCORES, 0.5, within=name)) == {"layer_10/up"}


def test_the_share_of_parameters_is_the_nearest_that_the_highest_leaves_make_up():
    sizes = {path: leaf.size for path, leaf in flat(PARAMS).items() if path in SCORES}
    for name, reverse in (("top_leaves", True), ("bottom_leaves", False)):
        order = sorted(SCORES, key=SCORES.get, reverse=reverse)
        sums = [0, *itertools.accumulate(sizes[path] for path in order)]
        for share in (0, 0.1, 0.3, 0.5, 0.9, 1):
            distances = [abs(x - share * sums[-1]) for x in sums]
            expected = set(order[: distances.index(min(distances))])
            selector = getattr(fo, name)(SCORES, share, count="parameters")
            assert selected(selector) == expected
            assert selected(selector, jax.eval_shape(lambda: PARAMS)) == expected


def test_of_equal_scores_the_first_in_natural_order_win():
    equal = dict.fromkeys(SCORES, 1.0)
    first = {"layer_0/down", "layer_0/up", "layer_2/down"}
    assert selected(fo.top_leaves(equal, 0.5)) == first
    assert selected(fo.bottom_leaves(equal, 0.5)) == first
    assert selected(fo.top_leaves(equal, 1 / 3, within="kind")) == {"layer_0/down", "layer_0/up"}


@pytest.mark.parametrize("name", ["top_leaves", "bottom_leaves"])
@pytest.mark.parametrize("count", ["leaves", "parameters"])
def test_of_one_leaf_the_share_is_rounded(name, count):
    for share, expected in ((0, set()), (0.5, set()), (0.51, {"a"}), (1, {"a"})):
        selector = getattr(fo, name)({"a": 7}, share, count=count)
        assert selected(selector, {"a": jnp.ones(3), "b": 1.0}) == expected


def test_infinite_scores_and_large_integers_are_ordered():
    scores = {"a": 2**60, "b": 2**60 + 1, "c": np.inf, "d": -np.inf}
    params = dict.fromkeys(scores, 1.0)
    order = ["c", "b", "a", "d"]
    for count in range(5):
        assert selected(fo.top_leaves(scores, count / 4), params) == set(order[:count])


def test_numbers_of_numpy_and_jax_are_scores_and_later_changes_of_the_mapping_are_not_seen():
    scores = {"a": np.float32(1), "b": jnp.float32(3), "c": np.array(2, "int8")}
    selector = fo.top_leaves(scores, 1 / 3)
    scores["a"] = 9.0
    assert selected(selector, dict.fromkeys(scores, 1.0)) == {"b"}


class Score(NamedTuple):
    gradient: float
    update: float


def test_an_attribute_of_a_score_counts():
    scores = {"a": Score(1.0, 2.0), "b": Score(2.0, 1.0)}
    params = dict.fromkeys(scores, 1.0)
    assert selected(fo.top_leaves(scores, 0.5, what="gradient"), params) == {"b"}
    assert selected(fo.top_leaves(scores, 0.5, what="update"), params) == {"a"}
    with pytest.raises(TypeError, match="say which of its numbers counts: what='gradient'"):
        fo.top_leaves(scores, 0.5)
    with pytest.raises(TypeError, match="neither is its attribute 'size'"):
        fo.top_leaves(scores, 0.5, what="size")


def test_the_algebra_optax_and_the_label_functions_take_it():
    top = fo.top_leaves(SCORES, 1 / 3)
    assert selected(top) == {"layer_0/up", "layer_2/up"}
    assert selected(~top) == flat(PARAMS).keys() - selected(top)
    assert selected(top - "layer_0") == selected(top & fo.path("layer_2")) == {"layer_2/up"}
    assert selected("**/bias" | top) == selected(top) | selected(fo.path("**/bias"))
    assert top.labels(PARAMS)["layer_2"] == {
        "bias": "trainable",
        "down": "trainable",
        "up": "frozen",
    }
    masked = optax.masked(optax.scale(2.0), top)
    updates, _ = masked.update(PARAMS, masked.init(PARAMS))
    assert {path: float(x[0]) for path, x in flat(updates).items()} == {
        path: 2.0 if path in selected(top) else 1.0 for path in flat(PARAMS)
    }


@pytest.mark.usefixtures("standard_promotion")
def test_it_is_a_spec_of_the_transformation_and_of_edits():
    tx = fo.freezable(optax.sgd(1.0), ~fo.top_leaves(SCORES, 1 / 3))
    state = tx.init(PARAMS)
    trained = flat(fo.mask(state, PARAMS))
    assert {path for path, frozen in trained.items() if not frozen} == {"layer_0/up", "layer_2/up"}
    updates, state = tx.update(PARAMS, state, PARAMS)
    assert {path for path, x in flat(updates).items() if x.any()} == {"layer_0/up", "layer_2/up"}
    state = fo.thaw(state, PARAMS, fo.bottom_leaves(SCORES, 1 / 6))
    assert not fo.mask(state, PARAMS)["layer_10"]["up"]
    assert fo.summary(PARAMS, state).trainable == 12
    phases = fo.Phases({0: fo.everything - fo.top_leaves(SCORES, 0.5, count="parameters")})
    phases.validate(PARAMS)


def test_inside_of_the_transformation_a_hole_counts_as_a_leaf_without_parameters():
    params = {"a": jnp.ones(2), "b": jnp.ones(2), "c": optax.MaskedNode()}
    scores = {"a": 2.0, "b": 1.0, "c": 3.0}
    assert fo.top_leaves(scores, 1 / 3)(params) == {"a": False, "b": False, "c": params["c"]}
    by_parameters = fo.top_leaves(scores, 0.5, count="parameters")(params)
    assert by_parameters == {"a": True, "b": False, "c": params["c"]}


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.ones, ("x", None))
        return nn.Dense(2, kernel_init=init, name="dense")(x)


TREES = {
    "linen boxes": (
        lambda: Linen().init(jax.random.key(0), jnp.ones((1, 2)))["params"],
        "dense/kernel",
    ),
    "equinox": (lambda: eqx.nn.MLP(2, 2, 3, 1, key=jax.random.key(0)), "layers/1/weight"),
    "nnx model": (Net, "head/kernel"),
    "nnx state": (lambda: nnx.state(Net(), nnx.Param), "head/kernel"),
    "an alias": (Tied, "head/kernel"),
    "one array": (lambda: jnp.ones((2, 2)), ""),
}


@pytest.mark.parametrize("name", TREES)
def test_a_leaf_of_any_tree_is_found_by_its_path(name):
    make, path = TREES[name]
    tree = make()
    spec = fo.path(path) if path else fo.everything
    assert jax.tree.leaves(fo.top_leaves({path: 1.0}, 1)(tree)) == jax.tree.leaves(spec(tree))
    assert any(jax.tree.leaves(fo.top_leaves({path: 1.0}, 1)(tree)))


def test_dots_in_names_are_separators_where_they_are_read_so():
    params = {"layers.0.weight": jnp.ones(2), "layers.1.weight": jnp.ones(2)}
    scores = {"layers/0/weight": 1.0, "layers/1/weight": 2.0}
    assert selected(fo.dotted(fo.top_leaves(scores, 0.5)), params) == {"layers.1.weight"}


def test_the_text_of_the_selector():
    texts = {
        fo.top_leaves({"a": 1.0}, 0.25): "top_leaves(scores of 1 leaves, 0.25)",
        ~fo.bottom_leaves(SCORES, 1, "kind", "parameters"): (
            "~bottom_leaves(scores of 6 leaves, 1.0, within='kind', count='parameters')"
        ),
        fo.top_leaves(SCORES, 0, within=["a"]): (
            "top_leaves(scores of 6 leaves, 0.0, within=['a'])"
        ),
        fo.top_leaves(SCORES, 0, within=len): "top_leaves(scores of 6 leaves, 0.0, within=len)",
    }
    for selector, text in texts.items():
        assert repr(selector) == text


ONE = {"a": 1.0}
WRONG = {
    "NaN": (({"a": 1.0, "b": np.float32("nan")}, 0.5), {}, ValueError, "score of 'b' is NaN"),
    "no scores": (({}, 0.5), {}, ValueError, "no scores; to select no leaf write fo.nothing"),
    "no mapping": (([1.0], 0.5), {}, TypeError, "a mapping from path to score, not a list"),
    "text": (({"a": "1"}, 0.5), {}, TypeError, "score of 'a' is '1', not a real number"),
    "bool": (({"a": True}, 0.5), {}, TypeError, "score of 'a' is True, not a real number"),
    "complex": (({"a": 1j}, 0.5), {}, TypeError, "score of 'a' is 1j, not a real number"),
    "array": (({"a": np.ones(1)}, 0.5), {}, TypeError, "score of 'a' is .* not a real number"),
    "nested": (({"a": {"b": 1.0}}, 0.5), {}, TypeError, "scores are by the whole path"),
    "key": (({0: 1.0}, 0.5), {}, TypeError, "scores by the path of a leaf, a text, not by 0"),
    "share over": ((ONE, 1.1), {}, ValueError, "share of the leaves is from 0 to 1, not 1.1"),
    "share under": ((ONE, -0.1), {}, ValueError, "from 0 to 1, not -0.1"),
    "share NaN": ((ONE, float("nan")), {}, ValueError, "from 0 to 1, not nan"),
    "share text": ((ONE, "half"), {}, TypeError, "share of the leaves is a number .* not 'half'"),
    "share bool": ((ONE, True), {}, TypeError, "share of the leaves is a number .* not True"),
    "count": ((ONE, 1), {"count": "bytes"}, ValueError, "'leaves' or 'parameters', not 'bytes'"),
    "within": ((ONE, 1), {"within": "a"}, TypeError, r"not 'a'; write \['a'\]"),
    "within none": ((ONE, 1), {"within": []}, ValueError, "within is an empty list"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_errors_at_once(name):
    arguments, options, error, message = WRONG[name]
    for function in (fo.top_leaves, fo.bottom_leaves):
        with pytest.raises(error, match=message):
            function(*arguments, **options)


def test_what_does_not_fit_the_tree_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"scores for 'layer_0/upp'.* nearest: 'layer_0/up'"):
        fo.top_leaves({"layer_0/upp": 1.0}, 1)(PARAMS)
    with pytest.raises(ValueError, match="scores for 'layer_0', but the tree has no such leaf"):
        fo.top_leaves({"layer_0": 1.0}, 1)(PARAMS)
    with pytest.raises(ValueError, match=r"fo.top_leaves, path\('head'\), .* selects no leaf"):
        fo.top_leaves(SCORES, 1, within=["head", "layer_0"])(PARAMS)
    with pytest.raises(ValueError, match="selects a part of 'layer_0/up'"):
        fo.top_leaves(SCORES, 1, within=[fo.rows("layer_0/up", [0])])(PARAMS)
    with pytest.raises(TypeError, match=r"within gives \[\] for 'layer_.*', but a group"):
        fo.top_leaves(SCORES, 1, within=lambda path: [])(PARAMS)
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        fo.top_leaves({"a/b": 1.0}, 1)({"a/b": 1.0, "a": {"b": 1.0}})
    with pytest.raises(TypeError, match="score of 'a' is traced"):
        jax.jit(lambda x: fo.top_leaves({"a": x}, 1)({"a": 1.0}))(1.0)
