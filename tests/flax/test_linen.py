"""The modules of a Linen model by path."""

import functools
import os
import subprocess
import sys
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState

import freeze_optax as fo
from freeze_optax import linen
from freeze_optax._tree.modules import Modules
from tests.support.linen_zoo import (
    MODELS,
    Adapted,
    Attribute,
    Block,
    Compact,
    Lifts,
    LowRank,
    Twice,
    X,
    blocks,
    under,
)

KEY = jax.random.key(0)


def params_of(model, *args, **kwargs):
    return jax.eval_shape(functools.partial(model.init, **kwargs), KEY, *args)["params"]


def selection(selector, tree):
    """The paths of the selected leaves, read from the mask by jax alone."""
    mask = selector(tree)
    assert jax.tree.structure(mask) == jax.tree.structure(tree)
    found = jax.tree_util.tree_leaves_with_path(mask)
    return {jax.tree_util.keystr(k, simple=True, separator="/") for k, flag in found if flag}


models = pytest.mark.parametrize(("model", "types", "others"), MODELS.values(), ids=MODELS)


def assert_types(table, types):
    assert set(table) == set(types)
    odd = {path: table[path] for path, kind in types.items() if not isinstance(table[path], kind)}
    assert not odd


@models
def test_every_module_is_at_its_path(model, types, others):
    assert_types(linen.modules(model, X), types)


@models
def test_a_table_does_not_depend_on_what_has_run_before(model, types, others):
    params_of(model, X)
    linen.modules(model, X)
    assert_types(linen.modules(model, X), types)


@models
def test_types_select_just_the_leaves_of_their_modules(model, types, others):
    table, params = linen.modules(model, X), params_of(model, X)
    leaves = {nn.Dense: ("kernel", "bias"), nn.LayerNorm: ("scale", "bias")}
    expected = {
        kind: {leaf for path, t in types.items() if t is kind for leaf in under(path, *names)}
        for kind, names in leaves.items()
    }
    for kind, paths in expected.items():
        if paths:
            assert selection(fo.of_type(kind, modules=table), params) == paths
    everything = selection(fo.everything, params)
    assert everything == set().union(others, *expected.values())
    root = fo.by_module(lambda m, path: path == "", modules=table)
    assert selection(root, params) == everything


def test_modules_that_share_a_scope_both_have_its_params():
    table, params = linen.modules(Adapted(), X), params_of(Adapted(), X)
    assert set(params["adapted"]) == {"a", "b", "bias", "kernel"}
    adapter = fo.of_type(LowRank, fields=("a", "b"), modules=table)
    assert selection(adapter, params) == {"adapted/a", "adapted/b"}
    dense = fo.of_type(nn.Dense, fields=("kernel",), modules=table)
    assert selection(dense, params) == {"adapted/kernel", "head/kernel"}


class Classifier(nn.Module):
    classes: int
    rate: float = 0.5

    @nn.compact
    def __call__(self, batch, mode, *, train, key=None, widths=(3,)):
        assert train is True
        assert mode == "full"
        assert widths == (3, 4)
        assert key is None or jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        x = batch["x"][0]
        for width in widths:
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(width)(x))
        x = nn.Dropout(self.rate, deterministic=not train)(x)
        noise = jax.random.normal(self.make_rng("noise"), x.shape)
        return nn.Dense(self.classes, name="head")(x + noise)


def classify(x, key=None):
    options = {"train": True, "widths": (3, 4), "key": key}
    return linen.modules(Classifier(2), {"x": [x]}, "full", **options)


NORMS = {"BatchNorm_0": nn.BatchNorm, "BatchNorm_1": nn.BatchNorm, "Dropout_0": nn.Dropout}
CLASSIFIER = {
    "": Classifier,
    **NORMS,
    **dict.fromkeys(("Dense_0", "Dense_1", "head"), nn.Dense),
}


@pytest.mark.parametrize("x", [X, jnp.ones((2, 3)), np.ones((2, 3), np.float32)], ids=type)
@pytest.mark.parametrize("key", [None, KEY, jax.eval_shape(lambda: KEY)], ids=type)
def test_arrays_are_traced_and_everything_else_is_passed_on(x, key):
    assert_types(classify(x, key), CLASSIFIER)


def test_what_is_not_among_the_params_is_no_leaf():
    table = classify(X)
    args, static = ({"x": [X]},), {"train": True, "widths": (3, 4)}
    initialize = functools.partial(Classifier(2).init, mode="full", **static)
    variables = jax.eval_shape(initialize, KEY, *args)
    assert set(variables) == {"params", "batch_stats"}
    norm = selection(fo.of_type(nn.BatchNorm, modules=table), variables["params"])
    assert norm == {f"BatchNorm_{i}/{name}" for i in (0, 1) for name in ("bias", "scale")}
    with pytest.raises(ValueError, match="selects no leaf: the tree has none at 'Dropout_0'"):
        fo.of_type(nn.Dropout, modules=table)(variables["params"])


def test_the_modules_have_the_attributes_of_the_model():
    table = linen.modules(Attribute(Block(width=3), [nn.Dense(5, use_bias=False)]), X)
    assert type(table) is Modules
    assert table.aliases == {}
    assert table["layers_0"].features == 5
    assert table["layers_0"].use_bias is False
    assert table["inner"] == Block(width=3, name="inner")
    assert table[""].inner.width == 3
    wide = fo.by_module(lambda m, path: getattr(m, "features", 0) > 4, modules=table)
    assert selection(wide, params_of(table[""], X)) == {"layers_0/kernel"}


@models
def test_no_module_of_a_table_is_bound(model, types, others):
    for module in linen.modules(model, X).values():
        fields = [getattr(module, name) for name in module.__dataclass_fields__]
        attributes = jax.tree.leaves(fields, is_leaf=lambda x: isinstance(x, nn.Module))
        for part in (module, *attributes):
            assert getattr(part, "scope", None) is None
            assert getattr(part, "parent", None) is None


def test_the_model_itself_stays_unbound_and_as_it_was():
    model = nn.Sequential([nn.Dense(3), Block()])
    linen.modules(model, X)
    assert model.scope is None
    assert model.layers[1] == Block()
    assert model.layers[1].scope is None


class Scale(nn.Module):
    factor: typing.Any

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x) * self.factor


class Computed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Scale(x.mean())(x)


@pytest.mark.parametrize(
    "model",
    [Compact(), nn.Sequential([nn.Dense(3)]), Lifts(), Computed()],
    ids=lambda model: type(model).__name__,
)
def test_no_tracer_leaks(model):
    with jax.checking_leaks():
        table = linen.modules(model, X)
    assert type(table[""]) is type(model)


def test_nothing_is_computed_however_large():
    wide = jax.ShapeDtypeStruct((1, 10**8), jnp.float32)
    assert_types(linen.modules(nn.Dense(10**8), wide), {"": nn.Dense})


def test_the_model_may_be_traced_inside_another_trace():
    def traced(x):
        assert_types(linen.modules(Twice(), x), {"": Twice, **blocks("block")})
        return x

    assert jax.eval_shape(traced, X) == X


class TwoWays(nn.Module):
    def setup(self):
        self.dense, self.norm = nn.Dense(3), nn.LayerNorm()

    def __call__(self, x):
        return self.norm(self.dense(x))

    def encode(self, x):
        return self.dense(x)


@pytest.mark.parametrize("method", ["encode", TwoWays.encode, lambda m, x: m.dense(x)])
def test_another_method_may_be_traced(method):
    assert_types(linen.modules(TwoWays(), X, method=method), {"": TwoWays, "dense": nn.Dense})


@pytest.mark.parametrize("odd", [nn.Dense, {"kernel": 1.0}, lambda x: x, None])
def test_something_else_than_a_linen_module_is_an_error(odd):
    kind = type(odd).__name__
    with pytest.raises(TypeError, match=rf"takes a Linen module and the arg.*, not a {kind}$"):
        linen.modules(odd, X)


@pytest.mark.usefixtures("standard_promotion")
def test_a_table_drives_a_train_state():
    model, x = Compact(), jnp.ones((2, 3))
    params = model.init(KEY, x)["params"]
    frozen = fo.of_type(nn.Dense, modules=linen.modules(model, X))
    tx = fo.freezable(optax.adam(0.1), frozen)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(state):
        def loss(params):
            return jnp.sum(state.apply_fn({"params": params}, x)[:, 0])

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    after = step(step(state)).params
    same = jax.tree.map(lambda a, b: bool((a == b).all()), params, after)
    dense = {"bias": True, "kernel": True}
    norm = {"bias": False, "scale": False}
    first = {"Dense_0": dense, "norm": norm}
    encoder = {"first": first, "rest_0": first, "rest_1": dense, "gain": False}
    assert same == {"Dense_0": dense, "head": dense, "encoder": encoder}


NO_FLAX = """
import sys
sys.modules["flax"] = None
import freeze_optax as fo
for name in ("linen", "nnx"):
    try:
        __import__(f"freeze_optax.{name}")
    except ImportError as error:
        print(error)
print(fo.path("a")({"a": 1.0, "b": 2.0}))
class Table: frozen_fields = ("b",)
print(fo.declared({"": Table()})({"a": 1.0, "b": 2.0}))
"""


def test_without_flax_the_adapters_name_the_extra_and_the_rest_works():
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", NO_FLAX],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert run.stdout.splitlines() == [
        "freeze_optax.linen needs flax: pip install 'freeze_optax[flax]'",
        "freeze_optax.nnx needs flax: pip install 'freeze_optax[flax]'",
        "{'a': True, 'b': False}",
        "{'a': False, 'b': True}",
    ]
