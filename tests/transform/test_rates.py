"""`rates`: each update is that of the bare optimizer times the factor of its leaf, by hand."""

import contextlib
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from freeze_optax.testing import assert_frozen
from tests.support import optimizers
from tests.support.memories import assert_same_bits
from tests.support.sampling import cases

pytestmark = pytest.mark.usefixtures("standard_promotion")

HOLE = optax.MaskedNode()


def make_params() -> dict[str, Any]:
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
    layers = {f"layer_{i}": {"bias": draw(2), "kernel": draw(2, 2)} for i in range(3)}
    return {"embed": draw(4, 2), "head": draw(2), **layers}


PARAMS = make_params()
GRADS = jax.tree.map(lambda x: x * 3 - 1, PARAMS)


def factors(state: Any) -> Any:
    return optax.tree_utils.tree_get(state, "factors")


def as_numbers(tree: Any) -> Any:
    return jax.tree.map(float, factors(tree))


def times(tree: Any, by_hand: Any) -> Any:
    """NumPy's product of each update with its factor, both float32."""
    return jax.tree.map(lambda x, f: np.asarray(x) * np.asarray(f, x.dtype), tree, by_hand)


BIAS, KERNEL, EMBED = 0.3, 0.7, 0.05
BY_HAND = {
    "embed": EMBED,
    "head": 1.0,
    **{f"layer_{i}": {"bias": BIAS, "kernel": KERNEL} for i in range(3)},
}
LISTED = [fo.path("embed"), fo.path("*/bias"), fo.path("*/kernel")]
KINDS = jax.tree.map(lambda _: "other", PARAMS) | {"embed": "embed"}
RULES: dict[str, Any] = {
    "mapping": {"embed": EMBED, "*/bias": BIAS, "*/kernel": KERNEL},
    "pairs": [("embed", EMBED), ["*/bias", BIAS], (fo.path("*/kernel"), KERNEL)],
    "the first counts": [("embed", EMBED), ("*/bias", BIAS), ("layer_*", KERNEL), ("head", 1)],
    "lists": [(["embed"], EMBED), ([f"layer_{i}/bias" for i in range(3)], BIAS), ("*/k*", KERNEL)],
    "regex": {"embed": EMBED, fo.regex(".*/bias"): BIAS, fo.regex(".*/kernel"): KERNEL},
    "predicate": {
        fo.where(lambda path, leaf: leaf.shape == (4, 2)): EMBED,
        fo.where(lambda path, leaf: leaf.ndim == 2): KERNEL,
        fo.layers("layer_*"): BIAS,
    },
    "mask": [
        (fo.mask("embed", PARAMS), EMBED),
        (fo.mask("**/bias", PARAMS), BIAS),
        ("*/kernel", KERNEL),
    ],
    "labels": [
        (fo.labelled(KINDS, "embed"), EMBED),
        (fo.path("**/bias"), BIAS),
        (~fo.path("head"), KERNEL),
    ],
    "numbers of NumPy and JAX": [
        ("embed", np.float64(EMBED)),
        ("*/bias", jnp.float32(BIAS)),
        ("*/kernel", np.asarray(KERNEL)),
    ],
}


@pytest.mark.parametrize("name", RULES)
def test_each_leaf_has_the_factor_of_the_first_rule_that_selects_it(name):
    tx = fo.freezable(optax.chain(optax.sgd(1.0), fo.rates(RULES[name])), "layer_1")
    state = tx.init(PARAMS)
    expected = jax.tree.map(np.float32, BY_HAND)
    # What is frozen has none; when it is thawed, it has that of its rule.
    assert_same_bits(factors(state), expected | {"layer_1": {"bias": HOLE, "kernel": HOLE}})
    assert_same_bits(factors(fo.thaw(state, PARAMS, "layer_1")), expected)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_an_update_is_that_of_the_bare_optimizer_times_the_factor_and_the_state_is_its_own(name):
    bare = {"sgd": optax.sgd(0.1, momentum=0.9), "adamw": optax.adamw(0.1, weight_decay=0.1)}[name]
    tx = fo.freezable(optax.chain(bare, fo.rates(RULES["mapping"])), "layer_1/kernel")
    params = without = PARAMS
    state, plain = tx.init(params), bare.init(fo.partition(PARAMS, "layer_1/kernel")[0])
    for i in range(3):
        grads = jax.tree.map(lambda x, i=i: x - i, GRADS)
        updates, state = tx.update(grads, state, params)
        live = [fo.partition(tree, "layer_1/kernel")[0] for tree in (grads, params)]
        expected, plain = bare.update(live[0], plain, live[1])
        numbers = fo.partition(BY_HAND, "layer_1/kernel")[0]
        expected = times(expected, numbers)
        without = jax.tree.map(lambda x: -jnp.zeros_like(x), PARAMS["layer_1"]["kernel"])
        expected["layer_1"]["kernel"] = without
        assert_same_bits(updates, expected)
        assert_same_bits(state.inner[0], plain)
        params = fo.apply_updates(params, updates, frozen=state)


def test_the_state_of_the_optimizer_before_it_is_none_of_its_business():
    # At the end of the chain it scales decay too; before it, it does not.
    rules = {fo.everything: 0.5}
    decay = optax.add_decayed_weights(0.1)
    before, after = (optax.chain(*x) for x in ((fo.rates(rules), decay), (decay, fo.rates(rules))))
    found = [tx.update(GRADS, tx.init(PARAMS), PARAMS)[0] for tx in (before, after)]
    expected = jax.tree.map(lambda g, p: g * np.float32(0.5) + np.float32(0.1) * p, GRADS, PARAMS)
    assert_same_bits(found[0], expected)
    expected = jax.tree.map(lambda g, p: (g + np.float32(0.1) * p) * np.float32(0.5), GRADS, PARAMS)
    assert_same_bits(found[1], expected)


LOUD = {
    "matches none": ({"embd": 0.1}, "pattern 'embd' selects no leaf"),
    "selects none": ({fo.where(lambda p, x: x.ndim > 2): 0.1}, "rule 1 of .* selects no leaf"),
    "shadowed": (
        {"layer_*": 0.1, "layer_1/bias": 0.2},
        r"rule 2 of fo.rates, path\('layer_1/bias'\), wins no leaf: all that it selects "
        r"\('layer_1/bias'\) goes by rule 1 of fo.rates, path\('layer_\*'\), before it",
    ),
    "layers shadowed": (
        [("layer_*", 0.1), *fo.layerwise("layer_*", 0.5)],
        "rule 2 of .* wins no leaf: .* goes by rule 1",
    ),
    "rows": ({fo.rows("embed", [0]): 0.1}, "rule 1 .* selects a part of 'embed' .* a factor is"),
    "a layer in a layer": (
        fo.layerwise(["layer_*", "layer_1/kernel"], 0.5),
        "fo.layerwise has 'layer_1/kernel' as a layer, and 'layer_1' too",
    ),
}


@pytest.mark.parametrize("frozen", [fo.nothing, "layer_1"], ids=["", "frozen"])
@pytest.mark.parametrize("name", LOUD)
def test_rules_that_do_not_fit_the_params_are_an_error_whatever_is_frozen(name, frozen):
    rules, error = LOUD[name]
    for tx in (fo.freezable(fo.rates(rules), frozen), fo.rates(rules)):
        with pytest.raises(ValueError, match=error):
            tx.init(PARAMS)


def test_a_leaf_without_a_rule_is_an_error_if_there_is_no_default_and_if_it_trains():
    rules, no_rule = {"layer_*": 0.1, "head": 1.0}, r"no rule of fo\.rates selects 'embed', and"
    for tx in (fo.rates(rules, default=None), fo.freezable(fo.rates(rules, default=None))):
        with pytest.raises(ValueError, match=no_rule):
            tx.init(PARAMS)
    tx = fo.freezable(fo.rates(rules, default=None), "embed")
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=no_rule):
        fo.thaw(state, PARAMS, "embed")
    assert as_numbers(state)["embed"] == HOLE
    with_integers = {**PARAMS, "steps": jnp.arange(2)}
    tx = fo.rates({**rules, "embed": 0.5}, default=None)
    assert as_numbers(tx.init(with_integers))["steps"] == HOLE


def test_a_rule_on_what_is_frozen_at_first_counts_when_it_is_thawed():
    rules = {"embed": 0.5, fo.where(lambda p, x: x.shape == (2, 2)): 0.25}
    frozen = ["embed", "**/kernel"]
    tx = fo.freezable(optax.chain(optax.sgd(1.0), fo.rates(rules, default=2.0)), frozen)
    state = tx.init(PARAMS)
    by_hand = {"embed": 0.5, "head": 2.0}
    by_hand |= {f"layer_{i}": {"bias": 2.0, "kernel": 0.25} for i in range(3)}
    assert as_numbers(state) == jax.tree.map(
        lambda f, is_frozen: HOLE if is_frozen else f, by_hand, fo.mask(frozen, PARAMS)
    )
    for edited in (
        fo.thaw(state, PARAMS, fo.everything),
        fo.set_frozen(fo.freeze(state, PARAMS, "head"), PARAMS, fo.nothing),
    ):
        assert as_numbers(edited) == by_hand
        updates, _ = tx.update(GRADS, edited, PARAMS)
        assert_same_bits(updates, times(jax.tree.map(jnp.negative, GRADS), by_hand))


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "bool": (True, TypeError, "the factor of .* is True, not a number"),
    "bool of NumPy": (np.bool_(True), TypeError, "not a number"),
    "bool array": (jnp.asarray(True), TypeError, "not a number"),
    "schedule": (optax.constant_schedule(0.1), TypeError, "a schedule goes to fo.since_thaw"),
    "string": ("0.1", TypeError, "the factor of .* is '0.1', not a number"),
    "complex": (1j, TypeError, "not a number"),
    "key": (jax.random.key(0), TypeError, "not a number"),
    "negative": (-0.1, ValueError, r"is -0.1, but a factor is a finite number, 0 or more"),
    "NaN": (np.nan, ValueError, "a finite number, 0 or more"),
    "infinite": (jnp.asarray(jnp.inf), ValueError, "a finite number, 0 or more"),
    "infinite in float32": (1e39, ValueError, r"is 1e\+39, .* of at most 3.4e\+38"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_factor_that_is_none_is_an_error_at_once(name):
    factor, error, text = WRONG[name]
    with pytest.raises(error, match=text):
        fo.rates({"embed": factor})
    with pytest.raises(error, match=text):
        fo.rates({}, default=factor)
    state = fo.freezable(fo.rates({})).init(PARAMS)
    with pytest.raises(error, match=text):
        fo.adjust(state, PARAMS, "embed", factor)


def test_what_are_no_rules_is_an_error_at_once():
    for rules in ("embed", ["embed"], [("embed", 0.1, 2)], None, 0.5):
        with pytest.raises(TypeError, match=r"fo\.rates takes rules, a mapping from spec to fac"):
            fo.rates(rules)
    for factor in (jnp.ones(2), np.ones(1), None):
        with pytest.raises((ValueError, TypeError), match=r"is an array of shape|not a number"):
            fo.rates({"embed": factor})


@contextlib.contextmanager
def doubles(name: str) -> Any:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", "64" in name[-2:] or "128" in name or before)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


FLOATS = ["float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2"]
FACTORS = [0.1, 1 / 3, 1.0, 2.5, 0.0]


@pytest.mark.parametrize("name", FLOATS)
def test_a_product_is_exact_but_for_its_rounding_in_any_dtype(name):
    with doubles(name), jax.numpy_dtype_promotion("strict"):
        dtype = jnp.dtype(name)
        drawn = np.random.default_rng(1).normal(size=999).astype(dtype)
        special = np.asarray([0.0, -0.0, np.inf, -np.inf, np.nan]).astype(dtype)
        update = {str(i): jnp.asarray(np.concatenate([drawn, special])) for i in range(5)}
        tx = fo.rates({str(i): f for i, f in enumerate(FACTORS)})
        state = tx.init(update)
        wide = np.float64 if name == "float64" else np.float32
        assert {x.dtype for x in jax.tree.leaves(state)} == {np.dtype(wide)}
        for scale in (tx.update, jax.jit(tx.update)):
            scaled, _ = scale(update, state)
            for i, factor in enumerate(FACTORS):
                assert scaled[str(i)].dtype == dtype
                given, found = (np.asarray(x[str(i)]) for x in (update, scaled))
                if not factor:
                    assert (found == 0).all()
                    assert np.signbit(found.astype(np.float32)).all()
                    continue
                exact = given.astype(np.float64) * np.float64(wide(factor))
                rounded = exact.astype(wide).astype(dtype)
                np.testing.assert_array_equal(found.astype(wide), rounded.astype(wide))
                if factor == 1.0:
                    np.testing.assert_array_equal(found.astype(wide), given.astype(wide))
                    assert (np.signbit(found.astype(wide)) == np.signbit(given.astype(wide))).all()


@pytest.mark.parametrize("name", ["complex64", "complex128"])
def test_a_complex_update_is_scaled_in_both_parts_by_themselves(name):
    with doubles(name), jax.numpy_dtype_promotion("strict"):
        part = np.float32 if name == "complex64" else np.float64
        numbers = np.asarray([1.5, -0.0, 0.0, np.inf, -np.inf, np.nan], part)
        pairs = np.asarray(list(itertools.product(numbers, numbers)), part)
        update = {"a": jnp.asarray(pairs.reshape(-1).view(name)), "b": jnp.ones(2, name)}
        tx = fo.rates({"a": 2.0, "b": 0.0})
        state = tx.init(update)
        assert {x.dtype for x in jax.tree.leaves(state)} == {np.dtype(part)}
        scaled, _ = jax.jit(tx.update)(update, state)
        assert scaled["a"].dtype == name
        np.testing.assert_array_equal(np.asarray(scaled["a"]).view(part).reshape(-1, 2), pairs * 2)
        assert_same_bits(scaled["b"], np.full(2, complex(-0.0, -0.0), name))


def odd_params(name: str) -> Any:
    """Zeros of either sign, infinities and quiet NaNs, in each leaf."""
    numbers = np.asarray([0.0, -0.0, 1.5, -2.0, np.inf, -np.inf, np.nan, 0.5])
    leaf = numbers.astype(jnp.dtype(name))
    if name.startswith("complex"):
        pairs = np.stack([numbers, numbers[::-1]], -1).view(np.complex128)[:, 0]
        leaf = np.concatenate([pairs[:-1], [complex(-0.0, -0.0)]]).astype(name)
    return {"still": jnp.asarray(leaf), "moves": jnp.ones(8, leaf.dtype)}


ODD = {"NaN": np.nan, "infinity": np.inf, "-infinity": -np.inf, "finite": 0.5, "zero": 0.0}
FROZEN_CASES = {
    f"{name}-{dtype}": (name, dtype)
    for name in ("sgd", "adamw", "lion", "adagrad", "rmsprop")
    for dtype in (*FLOATS, "complex64", "complex128")
}
BARE: dict[str, Any] = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
    "lion": lambda: optax.lion(0.1),
    "adagrad": lambda: optax.adagrad(0.1),
    "rmsprop": lambda: optax.rmsprop(0.1),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    cases(
        {k: v for k, v in FROZEN_CASES.items() if "float8" not in k or "sgd" in k},
        {"sgd-float32", "sgd-bfloat16", "sgd-float16", "sgd-complex64", "adamw-float32"},
    ),
)
def test_a_factor_of_zero_keeps_a_leaf_as_freezing_does_and_moves_its_moments(name, dtype):
    with doubles(dtype):
        bare, params = BARE[name](), odd_params(dtype)
        factor_zero = fo.freezable(optax.chain(bare, fo.rates({"still": 0.0})))
        frozen = fo.freezable(bare, "still")
        whole, held = params, params
        state, plain, other = (
            factor_zero.init(params),
            bare.init(params),
            frozen.init(params),
        )
        for odd in ODD.values():
            grads = {"still": jnp.full_like(params["still"], odd), "moves": params["moves"]}
            updates, state = factor_zero.update(grads, state, whole)
            expected, plain = bare.update(grads, plain, whole)
            minus = complex(-0.0, -0.0) if "complex" in dtype else -0.0
            assert_same_bits(updates["still"], np.full(8, minus, jnp.dtype(dtype)))
            assert_same_bits(updates["moves"], expected["moves"])
            assert_same_bits(state.inner[0], plain)
            own, other = frozen.update(grads, other, held)
            both = (
                fo.apply_updates(whole, updates, frozen=state),
                fo.apply_updates(held, own, frozen=other),
                optax.apply_updates(whole, updates),
            )
            for one in both[1:]:
                assert_frozen(both[0], one, "still")
            whole, held = both[0], both[1]
        assert_frozen(params, whole, "still")


@pytest.mark.parametrize(("module", "name"), optimizers.cases(optimizers.complete(), {"sgd"}))
def test_a_factor_of_zero_equals_freezing_under_every_optimizer(module, name):
    bare = optimizers.build(module, name)
    params = optimizers.params()
    params["middle"]["bias"] = params["middle"]["bias"].at[0].set(-0.0)
    tx = fo.freezable(optax.chain(bare, fo.rates({"middle": 0.0})))
    grads = jax.tree.map(jnp.cos, params)
    state, plain, trained = tx.init(params), bare.init(params), params
    loss = lambda p: sum(jnp.sin(x).sum() for x in jax.tree.leaves(p))  # noqa: E731
    for _ in range(2):
        extra = optimizers.extras(name, loss, loss(trained), grads)
        updates, state = tx.update(grads, state, trained, **extra)
        expected, plain = bare.update(grads, plain, trained, **extra)
        still = jax.tree.map(lambda x: jnp.full_like(x, -0.0), params["middle"])
        assert_same_bits(updates, expected | {"middle": still})
        assert_same_bits(state.inner[0], plain)
        trained = fo.apply_updates(trained, updates, frozen=state)
    assert_frozen(params, trained, "middle")
