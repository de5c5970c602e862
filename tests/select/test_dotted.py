"""Flat dicts with dotted names, as of PyTorch: one way to read the dots as separators."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from freeze_optax._files.checkpoint_headers import read_headers
from tests.support.checkpoints import npz

NAMES = ("attn.q.weight", "attn.q.bias", "norm.weight")
FLAT = {f"model.layers.{i}.{name}": jnp.full((2, 3), i + 1.0) for i in range(11) for name in NAMES}
FLAT |= {"model.embed.weight": jnp.ones((4, 2)), "lm_head.weight": jnp.ones(3)}


def nested(tree):
    """The same params as PyTorch's modules nest them."""
    root = {}
    for name, leaf in tree.items():
        *above, last = name.split(".")
        node = root
        for key in above:
            node = node.setdefault(key, {})
        node[last] = leaf
    return root


SPECS = {
    "str": "model/layers/{0..3}",
    "path": fo.path("**/bias", "lm_head"),
    "list": ["lm_head", "**/norm"],
    "regex": fo.regex(r"model/layers/\d/norm/.*"),
    "layers": fo.layers("model/layers/*")[:-2],
    "one layer": fo.layers("model/layers/*")[-1],
    "blocks": fo.layers("model/layers/*/attn")[2:4],
    "rows": fo.rows("model/embed/weight", [0, 2]),
    "where": fo.where(lambda path, leaf: path.endswith("/q/weight")),
    "algebra": ~fo.path("model/layers/10") - "lm_head",
    "prefix mask": {"model": True, "lm_head": {"weight": False}},
    "labels": fo.labelled({"model": {"layers": "cold", "embed": "hot"}, "lm_head": "hot"}, "cold"),
    "bool": True,
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_spec_selects_in_a_flat_dict_what_it_selects_in_the_nested_one(spec):
    expected = fo.mask(spec, nested(FLAT))
    found = nested(fo.mask(fo.dotted(spec), FLAT))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert repr(fo.dotted(spec)).startswith("dotted(")


@pytest.mark.usefixtures("standard_promotion")
def test_training_keeps_the_flat_dict():
    spec = fo.layers("model/layers/*")[:-2]
    states = []
    for params, frozen in ((FLAT, fo.dotted(spec)), (nested(FLAT), spec)):
        tx = fo.freezable(optax.adamw(0.1), frozen)
        state = tx.init(params)
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        states.append(fo.apply_updates(params, updates, frozen=state))
    assert states[0].keys() == FLAT.keys()
    jax.tree.map(np.testing.assert_array_equal, nested(states[0]), states[1])


def test_edits_and_phases_take_it():
    state = fo.freezable(optax.adam(0.1), fo.dotted("model")).init(FLAT)
    thawed = fo.thaw(state, FLAT, fo.dotted(fo.layers("model/layers/*")[-1]))
    trains = [name for name, frozen in fo.mask(thawed, FLAT).items() if not frozen]
    assert trains == ["lm_head.weight", *sorted(f"model.layers.10.{name}" for name in NAMES)]
    # A state has the names as they are stored, inside `dotted` too.
    assert fo.mask(fo.dotted([thawed, "lm_head"]), FLAT)["lm_head.weight"]
    phases = fo.Phases({0: fo.dotted("model"), 5: fo.nothing})
    assert fo.mask(phases.at(0), FLAT) == fo.mask(state, FLAT)


def test_the_command_line_reads_the_file_with_the_same_spec(tmp_path):
    file = tmp_path / "model.npz"
    file.write_bytes(npz(**FLAT))
    for spec in ("model/layers/{0..3}", fo.layers("model/layers/*")[:-2]):
        of_file, of_dict = fo.summary(read_headers(file), spec), fo.summary(FLAT, fo.dotted(spec))
        assert of_file == of_dict
        assert "layers" in [row.path.split("/")[-1] for row in of_dict.rows]


INDEXED = {
    "model.layers.*": "model/layers/*",
    "model.layers.{0..3}.*": "model/layers/{0..3}/*",
    "model.layers.*.weight": "model/layers/*/weight",
}


@pytest.mark.parametrize(("pattern", "better"), INDEXED.items())
def test_layers_that_would_count_tensors_are_an_error_with_the_remedy(pattern, better):
    with pytest.raises(ValueError, match=r"names '.*' and '.*', two leaves of one layer") as error:
        fo.mask(fo.layers(pattern)[:-2], FLAT)
    assert str(error.value).endswith(f"fo.dotted(fo.layers({better!r})[:-2])")


def test_layers_of_one_leaf_each_and_names_with_numbers_are_counted():
    mask = fo.mask(fo.layers("model.layers.*.norm.weight")[:-2], FLAT)
    assert [name for name, frozen in mask.items() if frozen] == sorted(
        f"model.layers.{i}.norm.weight" for i in range(9)
    )
    assert fo.mask(fo.layers("model.layers.*"), FLAT)["model.layers.0.norm.weight"]
    numbers = {"scale_1.5": 1.0, "scale_1.7": 2.0, "scale_2": 3.0}
    assert fo.mask(fo.layers("scale_*")[-1], numbers)["scale_2"]


MISTAKES = {
    "path": (fo.path("model/layers/0"), "fo.dotted(fo.path('model/layers/0'))"),
    "str": ("lm_head", "fo.dotted(fo.path('lm_head'))"),
    "regex": (fo.regex("model/layers/.*"), "fo.dotted(fo.regex('model/layers/.*'))"),
    "layers": (fo.layers("model/layers/*")[-1], "fo.dotted(fo.layers('model/layers/*')[-1])"),
    "dots of PyTorch": (
        "model.layers.{0..2}.norm",
        "fo.dotted(fo.path('model/layers/{0..2}/norm'))",
    ),
    "layers of PyTorch": (
        fo.layers("model.layers.?")[0],
        "fo.dotted(fo.layers('model/layers/?')[0])",
    ),
    "dots": (fo.dotted("model.layers.{0..2}"), "write 'model/layers/{0..2}'"),
    "dots in layers": (fo.dotted(fo.layers("model.layers.*")[0]), "write 'model/layers/*'"),
}


@pytest.mark.parametrize(("spec", "remedy"), MISTAKES.values(), ids=MISTAKES)
def test_the_error_of_a_spec_for_nested_names_says_what_to_write(spec, remedy):
    with pytest.raises(ValueError, match=r"selects no leaf|names no node") as error:
        fo.mask(spec, FLAT)
    assert str(error.value).endswith(remedy)


def test_the_dots_of_a_pattern_for_a_nested_tree_are_explained_too():
    with pytest.raises(ValueError, match="write 'model/layers/0/norm'"):
        fo.mask("model.layers.0.norm", nested(FLAT))


@pytest.mark.parametrize("pattern", ["model.", "[.]", ".", "model[.]x", "{a.b,c}.d"])
def test_dots_that_no_glob_has_as_separators_are_no_other_error(pattern):
    with pytest.raises(ValueError, match="selects no leaf"):
        fo.mask(pattern, {"a": 1.0, "model.x.y": 2.0})


def test_two_names_that_become_one_are_an_error():
    params = {"a.b": 1.0, "a": {"b": 2.0}}
    with pytest.raises(ValueError, match=r"'a/b' and 'a.b' are one path, 'a/b'"):
        fo.mask(fo.dotted("a"), params)
