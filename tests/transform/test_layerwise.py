"""`layerwise`: powers of the decay, by the rank of the layer, against numbers written by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo

LAYERS = [f"layer_{i}" for i in range(12)]  # of which layer_2 comes before layer_10


def tree(value: Any = 1.0) -> dict[str, Any]:
    layers = {name: {"bias": value, "kernel": value} for name in LAYERS}
    return {"embed": value, "encoder": layers, "head": {"bias": value, "kernel": value}}


def factors(rules: Any, params: Any, **options: Any) -> dict[str, float]:
    """The factors by path, as float32."""
    made = fo.rates(rules, **options).init(params).factors
    pairs = jax.tree.leaves_with_path(made)
    key = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")  # noqa: E731
    return {key(path): float(x) for path, x in pairs}


def in_32(**by_hand: float) -> dict[str, float]:
    return {path: float(np.float32(x)) for path, x in by_hand.items()}


def of_layers(decay: float, names: list[str], prefix: str = "encoder/") -> dict[str, float]:
    """What a loop over the layers from the last to the first gives."""
    found: dict[str, float] = {}
    factor = 1.0
    for name in reversed(names):
        found |= {f"{prefix}{name}/{leaf}": factor for leaf in ("bias", "kernel")}
        factor *= decay
    return in_32(**found)


OTHERS = {"embed": 1.0, "head/bias": 1.0, "head/kernel": 1.0}


@pytest.mark.parametrize("decay", [0.5, 1.0, 0.0, 2.0, 1 / 2.6])
def test_the_last_layer_has_factor_1_and_each_below_it_decay_times_that_of_the_next(decay):
    expected = OTHERS | of_layers(decay, LAYERS)
    found = factors(fo.layerwise("encoder/layer_*", decay), tree())
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([*found.values()], [expected[p] for p in found], rtol=3e-7)


def test_a_list_goes_from_the_lowest_to_the_highest():
    rules = fo.layerwise(["embed", "encoder/layer_*", "head"], 0.5)
    expected = of_layers(0.5, [*LAYERS, "head"])
    expected = {p.replace("encoder/head", "head"): x for p, x in expected.items()}
    assert factors(rules, tree(), default=None) == expected | {"embed": 0.5**13}
    turned = fo.layerwise(["head", "embed"], 0.5)
    assert factors(turned, tree()) == {
        **dict.fromkeys(of_layers(0.5, LAYERS), 1.0),
        "embed": 1.0,
        "head/bias": 0.5,
        "head/kernel": 0.5,
    }


def test_slices_of_layers_and_braces_are_patterns_too():
    top = fo.layerwise(fo.layers("encoder/layer_*")[9:], 0.5)
    expected = OTHERS | dict.fromkeys(of_layers(1.0, LAYERS), 1.0) | of_layers(0.5, LAYERS[9:])
    assert factors(top, tree()) == expected
    assert factors(fo.layerwise("encoder/layer_{9..11}", 0.5), tree()) == expected
    some = fo.layerwise([fo.layers("encoder/layer_*")[:2], "head"], 0.5)
    found = factors(some, tree())
    assert [found[f"{name}/bias"] for name in ("encoder/layer_0", "encoder/layer_1", "head")] == [
        *(0.25, 0.5),
        1.0,
    ]


@pytest.mark.parametrize(
    "patterns",
    [
        [fo.dotted("embed"), fo.dotted("encoder/layer/*"), fo.dotted("head")],
        [fo.dotted(fo.path("embed")), fo.dotted(fo.layers("encoder/layer/*")), fo.dotted("head")],
    ],
    ids=["globs", "layers"],
)
def test_dotted_names_have_the_factors_of_the_nested_tree(patterns):
    nested = {"embed": 1.0, "encoder": {"layer": {str(i): {"w": 1.0} for i in range(11)}}}
    nested["head"] = {"w": 1.0}
    flat = {path.replace("/", "."): x for path, x in factors([("**", 1.0)], nested).items()}
    expected = factors(fo.layerwise(["embed", "encoder/layer/*", "head"], 0.5), nested)
    found = factors(fo.layerwise(patterns, 0.5), flat, default=None)
    assert {path.replace(".", "/"): x for path, x in found.items()} == expected
    assert expected["encoder/layer/10/w"] == 0.5 == 2 * expected["encoder/layer/9/w"]


def test_dotted_patterns_beside_others_are_an_error():
    with pytest.raises(ValueError, match=r"'head', which is not; write fo.dotted\('head'\)"):
        fo.layerwise([fo.dotted("encoder/layer/*"), "head"], 0.5)


def test_it_is_one_rule_that_joins_others_by_the_first_match():
    rules = [
        ("**/bias", 3.0),
        ("embed", 0.01),
        *fo.layerwise("encoder/layer_*", 0.5),
        ("head", 7.0),
    ]
    assert len(fo.layerwise("encoder/layer_*", 0.5)) == 1
    expected = in_32(embed=0.01) | {"head/bias": 3.0, "head/kernel": 7.0}
    for path, factor in of_layers(0.5, LAYERS).items():
        expected[path] = 3.0 if path.endswith("bias") else factor
    assert factors(rules, tree(), default=None) == expected
    two = [*fo.layerwise("encoder/layer_{0..2}", 0.5), *fo.layerwise("encoder/layer_*", 0.1)]
    found = factors(two, tree())
    # The second counts all the layers, though the first has taken some.
    assert [found[f"encoder/layer_{i}/bias"] for i in range(3)] == [0.25, 0.5, 1.0]
    assert found["encoder/layer_9/bias"] == float(np.float32(0.1**2))


def test_ranks_count_layers_that_are_frozen_and_stay_when_these_thaw():
    rules = fo.layerwise("encoder/layer_*", 0.5)
    params = jax.tree.map(jnp.asarray, tree())
    frozen = "encoder/layer_{0..5,11}"
    tx = fo.freezable(optax.chain(optax.sgd(1.0), fo.rates(rules)), frozen)
    state = tx.init(params)
    whole = fo.rates(rules).init(params).factors
    expected = jax.tree.map(
        lambda f, is_frozen: optax.MaskedNode() if is_frozen else f, whole, fo.mask(frozen, params)
    )
    get = lambda state: jax.tree.map(float, optax.tree_utils.tree_get(state, "factors"))  # noqa: E731
    assert get(state) == jax.tree.map(float, expected)
    assert get(fo.thaw(state, params, "encoder")) == jax.tree.map(float, whole)


def test_stacked_layers_have_one_factor_and_sequences_their_natural_order():
    stacked = {"blocks": jnp.ones((4, 2)), "head": jnp.ones(2)}
    assert factors(fo.layerwise(["blocks", "head"], 0.5), stacked) == {"blocks": 0.5, "head": 1.0}
    listed = {"layers": [jnp.ones(1) for _ in range(11)]}
    found = factors(fo.layerwise("layers/*", 0.5), listed)
    assert [found[f"layers/{i}"] for i in range(11)] == [0.5 ** (10 - i) for i in range(11)]


def test_layers_without_params_do_not_count():
    params = {"layer_0": {"w": 1.0}, "layer_1": {}, "layer_2": {"w": 1.0}}
    assert factors(fo.layerwise("layer_*", 0.5), params) == {"layer_0/w": 0.5, "layer_2/w": 1.0}


@pytest.mark.parametrize(
    ("pattern", "error"),
    [
        ("encodr/layer_*", r"layers\('encodr/layer_.'\) names no node; nearest: 'encoder/layer_9'"),
        (["embed", "top"], r"layers\('top'\) names no node"),
        (["encoder", "encoder/layer_0"], "'encoder/layer_0' as a layer, and 'encoder' too"),
        (["encoder/layer_*", "encoder/layer_1"], "'encoder/layer_1' as a layer, and 'encoder/la"),
        (["encoder/layer_1/bias", "encoder/layer_*"], "'encoder/layer_1/bias' as a layer, and"),
        ("**", "two layers; give patterns whose nodes are apart"),
    ],
)
def test_patterns_that_do_not_fit_the_params_are_an_error(pattern, error):
    with pytest.raises(ValueError, match=error):
        fo.rates(fo.layerwise(pattern, 0.5)).init(tree())


@pytest.mark.parametrize(
    ("arguments", "kind", "error"),
    [
        (("layer_*", True), TypeError, "takes a number for its decay, not True"),
        (("layer_*", "0.9"), TypeError, "takes a number for its decay"),
        (("layer_*", None), TypeError, "takes a number for its decay"),
        (("layer_*", -0.9), ValueError, "finite number, 0 or more, not -0.9; 0.9 makes"),
        (("layer_*", np.nan), ValueError, "finite number, 0 or more"),
        (("layer_*", np.inf), ValueError, "finite number, 0 or more"),
        ((fo.path("layer_*"), 0.9), TypeError, "it has to know which layer comes first"),
        ((["layer_*", fo.regex("a")], 0.9), TypeError, "it has to know which layer comes first"),
        (([], 0.9), ValueError, "needs a pattern"),
        ((3, 0.9), TypeError, "takes globs or fo.layers"),
    ],
)
def test_misuse_is_an_error_at_once(arguments, kind, error):
    with pytest.raises(kind, match=error):
        fo.layerwise(*arguments)


def test_numbers_of_numpy_and_jax_are_decays():
    for decay in (np.float32(0.5), np.float64(0.5), np.asarray(0.5), jnp.float32(0.5)):
        assert factors(fo.layerwise("encoder/layer_*", decay), tree()) == OTHERS | of_layers(
            0.5, LAYERS
        )


def test_a_decay_too_large_for_so_many_layers_is_an_error():
    with pytest.raises(ValueError, match="finite number, 0 or more"):
        fo.rates(fo.layerwise("encoder/layer_*", 1e30)).init(tree())
    with pytest.raises(ValueError, match="finite number, 0 or more"):
        fo.rates(fo.layerwise("encoder/layer_*", 1e300)).init(tree())


def test_each_layer_learns_at_its_own_rate():
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda _: jnp.asarray(rng.normal(size=2), jnp.float32), tree())
    inner = optax.chain(optax.sgd(0.1), fo.rates(fo.layerwise("encoder/layer_*", 0.9)))
    tx = fo.freezable(inner, "embed")
    updates, _ = tx.update(params, tx.init(params), params)
    for i, name in enumerate(LAYERS):
        rate = np.float32(0.1) * np.float32(0.9 ** (11 - i))
        for leaf in ("bias", "kernel"):
            expected = -rate * np.asarray(params["encoder"][name][leaf])
            np.testing.assert_allclose(updates["encoder"][name][leaf], expected, rtol=3e-7)
