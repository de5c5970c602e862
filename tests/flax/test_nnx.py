"""NNX: the modules of a model, filters of what trains, and gradients that skip what does not."""

import pickle
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import freeze_optax as fo
from freeze_optax import nnx as fnnx
from tests.support.nnx_models import (
    Net,
    Tied,
    assert_gradient,
    assert_same,
    by_hand,
    loss,
    params_of,
    paths_of,
    plain,
    trained,
)
from tests.support.sampling import cases, stride

pytestmark = pytest.mark.usefixtures("standard_promotion")


class Containers(nnx.Module):
    def __init__(self, rngs):
        linear = lambda: nnx.Linear(2, 2, rngs=rngs)  # noqa: E731
        self.list = nnx.List([linear(), nnx.List([linear()])])
        self.dict = nnx.Dict(first=linear(), second=nnx.Dict(third=linear()))
        self.plain = nnx.data([linear(), {"norm": nnx.BatchNorm(2, rngs=rngs)}, (linear(),)])
        self.sequential = nnx.Sequential(linear(), nnx.relu, nnx.Sequential(linear()))
        self.weight = nnx.Param(jnp.ones(2))
        self.static = "no child"


class NoPytree(nnx.Module, pytree=False):
    def __init__(self, rngs):
        self.linear = nnx.Linear(2, 2, rngs=rngs)
        self.list = [nnx.Linear(2, 2, rngs=rngs)]
        self.dict = {"norm": nnx.BatchNorm(2, rngs=rngs), "nested": Containers(rngs)}
        self.activation, self.array = nnx.relu, jnp.ones(2)
        self.owner = self


class Parent(nnx.Module):
    """Each of its children holds the other, and itself."""

    def __init__(self, rngs):
        self.left, self.right = nnx.Linear(2, 2, rngs=rngs), nnx.Linear(2, 2, rngs=rngs)
        self.left.parents = nnx.data([self])
        self.right.parent = self


ZOO = {
    "Linear": lambda rngs: nnx.Linear(2, 3, rngs=rngs),
    "Linear without bias": lambda rngs: nnx.Linear(2, 3, use_bias=False, rngs=rngs),
    "LinearGeneral": lambda rngs: nnx.LinearGeneral((2,), (3,), rngs=rngs),
    "Einsum": lambda rngs: nnx.Einsum("ij,jk->ik", (2, 3), (3,), rngs=rngs),
    "Conv": lambda rngs: nnx.Conv(2, 3, (3,), rngs=rngs),
    "Embed": lambda rngs: nnx.Embed(2, 3, rngs=rngs),
    "BatchNorm": lambda rngs: nnx.BatchNorm(2, rngs=rngs),
    "LayerNorm": lambda rngs: nnx.LayerNorm(2, rngs=rngs),
    "Dropout": lambda rngs: nnx.Dropout(0.5, rngs=rngs),
    "LoRA": lambda rngs: nnx.LoRA(2, 1, 3, base_module=nnx.Linear(2, 3, rngs=rngs), rngs=rngs),
    "LoRALinear": lambda rngs: nnx.LoRALinear(2, 3, lora_rank=1, rngs=rngs),
    "MultiHeadAttention": lambda rngs: nnx.MultiHeadAttention(
        2, 4, normalize_qk=True, dropout_rate=0.1, rngs=rngs
    ),
    "LSTMCell": lambda rngs: nnx.LSTMCell(2, 3, rngs=rngs),
    "RNN": lambda rngs: nnx.RNN(nnx.GRUCell(2, 3, rngs=rngs)),
    "PReLU": lambda rngs: nnx.PReLU(),
    "containers": Containers,
    "no pytree": NoPytree,
    "parents": Parent,
    "all": lambda rngs: nnx.List(make(rngs) for name, make in ZOO.items() if name != "all"),
}


# The others are in `all`, too.
ODDEST = ("LoRA", "RNN", "containers", "no pytree", "parents", "all")


@pytest.fixture(params=cases({name: name for name in ZOO}, ODDEST))
def inhabitant(request):
    return ZOO[request.param](nnx.Rngs(0, dropout=1))


def test_modules_are_those_that_nnx_iterates_over(inhabitant):
    # flax 0.12.0 has the method only, later ones deprecate it.
    pairs = getattr(nnx, "iter_modules", nnx.Module.iter_modules)(inhabitant)
    expected = {"/".join(map(str, path)): id(module) for path, module in pairs}
    assert {path: id(module) for path, module in fnnx.modules(inhabitant).items()} == expected


@pytest.mark.sampled
def test_every_variable_of_a_shared_layer_goes_by_both_paths(inhabitant):
    pair = nnx.List([inhabitant, inhabitant])
    own = paths_of(nnx.state(inhabitant, nnx.Variable))
    assert fnnx.modules(pair).aliases == {f"1/{path}": f"0/{path}" for path in own}
    params = paths_of(params_of(inhabitant))
    for path in sorted(params)[:: stride(1)]:
        expected = {f"0/{other}" for other in params - {path}}
        assert trained(fnnx.wrt(pair, f"1/{path}"), pair) == expected


def test_a_shared_module_is_in_the_table_under_each_path():
    model = Tied()
    model.twin = model.out
    table = fnnx.modules(model)
    assert list(table) == ["", "a", "head", "out", "twin"]
    assert table["twin"] is table["out"] is model.out


def test_a_module_may_hold_itself():
    model = Tied()
    model.loop = model
    assert list(fnnx.modules(model)) == ["", "a", "head", "out"]


@pytest.mark.parametrize("pytree", [True, False])
def test_variables_may_be_shared_with_an_object_that_is_no_module(pytree):
    class Box(nnx.Pytree, pytree=pytree):
        def __init__(self):
            self.weight, self.linear = nnx.Param(jnp.ones(2)), nnx.Linear(1, 1, rngs=nnx.Rngs(0))

    class Model(nnx.Module):
        def __init__(self):
            self.box = Box()
            self.x = self.y = self.box.weight

    model = Model()
    assert set(fnnx.modules(model)) == {"", "box/linear"}
    assert trained(fnnx.wrt(model, "x"), model) == {"box/linear/kernel", "box/linear/bias"}


def test_only_a_module_has_modules():
    with pytest.raises(TypeError, match="an NNX module is needed here, not a State"):
        fnnx.modules(nnx.state(Tied()))


NORM = ["norm/bias", "norm/scale"]
BIASES = ["backbone/bias", "head/bias"]
BY_MODULE = {
    "type": (lambda t: fo.of_type(nnx.BatchNorm, modules=t), NORM),
    "field": (lambda t: fo.of_type(nnx.Linear, fields=("bias",), modules=t), BIASES),
    "path and type": (lambda t: "head" | fo.of_type(nnx.BatchNorm, modules=t), ["head", *NORM]),
    "function": (lambda t: fo.by_module(lambda m, path: path == "norm", modules=t), NORM),
    "fields by function": (
        lambda t: fo.by_module(lambda m, _: ("bias",) * isinstance(m, nnx.Linear), modules=t),
        BIASES,
    ),
}


@pytest.mark.parametrize("case", BY_MODULE)
def test_types_and_fields_are_found_through_a_table_and_where_the_model_is_given(case):
    select, frozen = BY_MODULE[case]
    model = Net()
    expected = trained(by_hand(*frozen), model)
    tx = fo.freezable(optax.adam(0.1), select(fnnx.modules(model)))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    flags = nnx.to_flat_state(fo.mask(optimizer, params_of(model)))
    assert {"/".join(path) for path, x in flags if not any(jax.tree.leaves(x))} == expected
    assert trained(fnnx.wrt(model, select(None)), model) == expected
    twin = Net()
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, by_hand(*frozen)))(twin)
    assert_gradient(fnnx.grad(loss, select(None))(model), grads, model)


def test_nnx_s_own_filter_by_type_of_module_matches_nothing():
    assert not nnx.to_flat_state(nnx.state(Net(), nnx.OfType(nnx.BatchNorm)))
    with pytest.raises(ValueError, match=r"pass modules=.* or modules=nnx.modules\(model\)"):
        nnx.Optimizer(
            Net(), fo.freezable(optax.adam(0.1), fo.of_type(nnx.BatchNorm)), wrt=nnx.Param
        )


def test_filters_are_equal_if_they_let_the_same_variables_through():
    model = Net()
    one, other = fnnx.wrt(model, "backbone"), fnnx.wrt(Net(), ["backbone/*"])
    assert one == other
    assert hash(one) == hash(other)
    assert one != fnnx.wrt(model, "head")
    assert trained(one, model) == {"head/bias", "head/kernel", "norm/bias", "norm/scale"}


def test_a_filter_that_version_0_1_0_pickled_is_the_same_filter():
    filter_ = fnnx.wrt(Net(), "backbone")
    present = f"c{type(filter_).__module__}\n{type(filter_).__qualname__}\n".encode()
    pickled = pickle.dumps(filter_, protocol=0)
    assert present in pickled
    assert pickle.loads(pickled.replace(present, b"cfreeze_optax.nnx\n_Variables\n")) == filter_


def test_a_filter_trains_as_one_by_hand_and_never_retraces():
    traces = []

    @nnx.jit
    def step(model, optimizer):
        traces.append(1)
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, optimizer.wrt))(model)
        optimizer.update(model, grads)

    def train(filter_of):
        model = Net()
        optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=filter_of(model))
        for _ in range(3):
            # Made anew, as in a loop that makes its step in a function.
            optimizer.wrt = filter_of(model)
            step(model, optimizer)
        return model, optimizer

    hand = by_hand("backbone", "norm")
    actual = train(lambda model: fnnx.wrt(model, fo.path("backbone", "norm")))
    assert len(traces) == 1
    expected = train(lambda model: hand)
    assert len(traces) == 2
    for one, other in zip(actual, expected, strict=True):
        assert_same(one, other)
    fo.testing.assert_frozen(plain(params_of(Net())), plain(params_of(actual[0])), "backbone")


def test_what_cannot_be_trained_is_left_out_of_a_filter():
    model = Tied()
    model.steps, model.flag = nnx.Param(jnp.array(3)), nnx.Param(jnp.array(True))
    assert trained(fnnx.wrt(model, fo.nothing), model) == paths_of(params_of(Tied()))
    assert trained(fnnx.wrt(model, fo.everything), model) == set()


def test_naming_another_path_of_a_shared_variable_names_it():
    for where, frozen in {
        "head/kernel": ["a/kernel"],
        "head": ["a/kernel", "head/bias"],
        fo.regex("head/k.*"): ["a/kernel"],
        fo.layers("{a,head}")[1]: ["a/kernel", "head/bias"],
        fo.of_type(nnx.Linear, fields=("kernel",)): ["a/kernel", "out/kernel"],
        fo.by_module(lambda _, path: path == "head"): ["a/kernel", "head/bias"],
        fo.by_module(lambda _, path: ("kernel",) * (path == "head")): ["a/kernel"],
        fo.path("a") - "head/kernel": ["a/bias"],
    }.items():
        model = Tied()
        expected = trained(by_hand(*frozen), model)
        assert trained(fnnx.wrt(model, where), model) == expected
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, by_hand(*frozen)))(Tied())
        assert_gradient(fnnx.grad(loss, where)(model), grads, model)


def test_a_shared_variable_is_frozen_through_a_table_by_any_path():
    model = Tied()
    table = fnnx.modules(model)
    for where, frozen in {
        fo.by_module(lambda _, path: path == "head", modules=table): ["a/kernel", "head/bias"],
        fo.by_module(lambda _, p: ("kernel",) * (p == "head"), modules=table): ["a/kernel"],
    }.items():
        optimizer = nnx.Optimizer(model, fo.freezable(optax.adam(0.1), where), wrt=nnx.Param)
        before = dict(nnx.to_flat_state(jax.tree.map(jnp.copy, params_of(model))))
        optimizer.update(model, nnx.grad(loss)(model))
        after = dict(nnx.to_flat_state(params_of(model)))
        moved = {p for p in before if not np.array_equal(before[p][...], after[p][...])}
        assert {"/".join(path) for path in moved} == trained(by_hand(*frozen), model)


def test_a_typo_is_an_error_with_the_nearest_paths_of_either_name():
    for function in (fnnx.wrt, lambda model, where: fnnx.grad(loss, where)(model)):
        with pytest.raises(ValueError, match="'head/kernal' selects no leaf; nearest: 'head/kern"):
            function(Tied(), "head/kernal")


def test_a_part_of_a_variable_is_no_variable():
    class Model(nnx.Module):
        def __init__(self):
            self.pair = nnx.Param({"x": jnp.ones(2), "y": jnp.ones(3)})
            self.pair_too = nnx.Param({"x": jnp.ones(2), "y": jnp.ones(3)})

    for call in (lambda: fnnx.wrt(Model(), "*/x"), lambda: fnnx.grad(loss, "*/x")(Model())):
        with pytest.raises(ValueError, match="of 'pair' only some leaves are frozen"):
            call()


def test_the_functions_for_models_want_a_model():
    state: Any = nnx.state(Net())
    for call in (lambda: fnnx.wrt(state, "head"), lambda: fnnx.grad(loss, "head")(state)):
        with pytest.raises(TypeError, match="an NNX module is needed here, not a State"):
            call()


def test_rows_of_a_variable_are_no_filter():
    message = (
        "NNX takes a Variable as a whole, but of 'backbone/kernel' 2 of 3 rows are frozen; give an "
        "optimizer of fo.freezable, with wrt=nnx.Param, that spec"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fnnx.wrt(Net(), fo.path("head") | fo.rows("*/kernel", [0, 2]))
