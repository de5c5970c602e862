"""`nnx.adjust`: factors of an `nnx.Optimizer` in place, in each mode; nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import freeze_optax as fo
from freeze_optax import nnx as fnnx
from tests.support.nnx_models import Tied, assert_same, by_hand, loss, params_of, plain

pytestmark = pytest.mark.usefixtures("standard_promotion")


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.backbone = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(self.backbone(x)))


RULES = {"backbone": 0.5, "**/bias": 0.25}
INNER = optax.chain(optax.adam(0.1), fo.rates(RULES))
BY_HAND = {
    "backbone": {"kernel": 0.5, "bias": 0.5},
    "head": {"kernel": 1.0, "bias": 0.25},
    "norm": {"scale": 1.0, "bias": 0.25},
}
HOLE = optax.MaskedNode()
MODES = [
    "graph",
    pytest.param(
        "tree",
        marks=pytest.mark.skipif(
            not hasattr(nnx, "set_graph_mode"), reason="this Flax has one mode"
        ),
    ),
]


def factors(optimizer):
    found = optax.tree_utils.tree_get(optimizer.opt_state, "factors")
    return jax.tree.map(lambda x: np.asarray(x).tolist(), nnx.to_pure_dict(found))


def make(frozen=fo.nothing, inner=INNER, model=Net, **options):
    model = model()
    return model, nnx.Optimizer(model, fo.freezable(inner, frozen), wrt=nnx.Param, **options)


def step(model, optimizer):
    optimizer.update(model, fnnx.grad(loss, optimizer)(model))


def reference_run(by_hand_factors):
    """The params after a step for each tree of factors: bare Adam on plain arrays, and NumPy."""
    graph, state = nnx.split(Net())

    @jax.jit
    def gradient(params):
        def fun(params):
            nnx.replace_by_pure_dict(state, params)
            return loss(nnx.merge(graph, state))

        return jax.grad(fun)(params)

    adam, params = optax.adam(0.1), nnx.to_pure_dict(state)
    bare, update = adam.init(params), jax.jit(adam.update)
    for numbers in by_hand_factors:
        updates, bare = update(gradient(params), bare)
        params = jax.tree.map(lambda p, u, f: p + u * np.float32(f), params, updates, numbers)
    return params


def close(actual, expected):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), actual, expected
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_run_is_that_of_bare_optax_and_factors_by_hand_without_a_trace_for_a_factor(mode):
    options = {"graph": False} if mode == "tree" else {}
    traces = []

    @nnx.jit(**options)
    def jitted(model, optimizer):
        traces.append(1)
        step(model, optimizer)

    model, optimizer = make(**options)
    assert factors(optimizer) == BY_HAND
    jitted(model, optimizer)
    after = [BY_HAND]
    for where, factor in (("backbone", 0.0), (fo.of_type(nnx.LayerNorm), 2.0), (True, 0.125)):
        fnnx.adjust(optimizer, model, where, factor)
        jitted(model, optimizer)
        named = {
            "backbone": ("backbone",),
            True: ("backbone", "head", "norm"),
        }.get(where if isinstance(where, str | bool) else None, ("norm",))
        after.append(
            {k: dict.fromkeys(v, factor) if k in named else v for k, v in after[-1].items()}
        )
        assert factors(optimizer) == after[-1]
    assert len(traces) == 1
    assert optimizer.step[...] == 4
    close(nnx.to_pure_dict(params_of(model)), reference_run(after))


@pytest.mark.parametrize("mode", MODES)
def test_it_changes_the_named_variables_in_place_and_nothing_else(mode):
    model, optimizer = make("norm", **({"graph": False} if mode == "tree" else {}))
    variables = jax.tree.leaves(nnx.state(optimizer), is_leaf=lambda x: isinstance(x, nnx.Variable))
    state, count = optimizer.opt_state, optimizer.step
    before = jax.tree.map(jnp.copy, plain(optimizer))
    arrays = jax.tree.leaves(plain(optimizer))
    fnnx.adjust(optimizer, model, "head", 0.75)
    assert optimizer.opt_state is state
    assert optimizer.step is count
    after = jax.tree.leaves(nnx.state(optimizer), is_leaf=lambda x: isinstance(x, nnx.Variable))
    assert [type(x) for x in after] == [type(x) for x in variables]
    changed = [
        (float(x), float(y))
        for x, y in zip(arrays, jax.tree.leaves(plain(optimizer)), strict=True)
        if x is not y
    ]
    assert sorted(changed) == [(0.25, 0.75), (1.0, 0.75)]
    assert jax.tree.structure(before) == jax.tree.structure(plain(optimizer))
    assert factors(optimizer)["norm"] == {"scale": HOLE, "bias": HOLE}


@pytest.mark.parametrize("store", ["cached_partial", "jit_partial"])
def test_a_step_that_stores_the_optimizer_follows(store):
    if not hasattr(nnx, store):
        pytest.skip("this Flax has no tree mode")
    model, optimizer = make()
    if store == "cached_partial":
        stored = nnx.cached_partial(nnx.jit(step), model, optimizer)
    else:
        stored = nnx.jit_partial(step, model, optimizer, graph=False)
    stored()
    after = [BY_HAND]
    for factor in (0.0, 3.0):
        fnnx.adjust(optimizer, model, "backbone", factor)
        stored()
        after.append(BY_HAND | {"backbone": dict.fromkeys(("kernel", "bias"), factor)})
    close(nnx.to_pure_dict(params_of(model)), reference_run(after))
    assert factors(optimizer) == after[-1]


@pytest.mark.exhaustive  # the code for it is not that of NNX
def test_factor_0_keeps_a_layer_as_freezing_does():
    model, optimizer = make(inner=optax.chain(optax.adamw(0.1), fo.rates({"backbone": 0.0})))
    twin, frozen = make("backbone", optax.adamw(0.1))
    for _ in range(2):
        step(model, optimizer)
        step(twin, frozen)
    assert_same(params_of(model)["backbone"], params_of(Net())["backbone"])
    close(plain(params_of(model)), plain(params_of(twin)))
    mu = optax.tree_utils.tree_get(optimizer.opt_state, "mu")
    assert np.any(mu["backbone"]["kernel"][...])


def test_inside_of_jit_it_takes_a_traced_factor():
    model, optimizer = make()

    @nnx.jit
    def train(model, optimizer, factor):
        fnnx.adjust(optimizer, model, "head", factor)
        step(model, optimizer)

    train(model, optimizer, 0.75)
    train(model, optimizer, 0.5)
    after = [BY_HAND | {"head": dict.fromkeys(("kernel", "bias"), f)} for f in (0.75, 0.5)]
    assert factors(optimizer) == after[-1]
    close(nnx.to_pure_dict(params_of(model)), reference_run(after))


def test_a_shared_variable_is_named_by_each_of_its_paths():
    inner = optax.chain(optax.sgd(0.1), fo.rates({"a/kernel": 0.5}))
    model, optimizer = make(inner=inner, model=Tied)
    assert factors(optimizer)["a"]["kernel"] == 0.5
    fnnx.adjust(optimizer, model, "head/kernel", 0.25)
    assert factors(optimizer)["a"]["kernel"] == 0.25


def test_it_works_beside_the_other_edits_and_on_rows():
    model, optimizer = make(fo.rows("backbone/kernel", [0]))
    fnnx.adjust(optimizer, model, "backbone/kernel", 0.75)
    fnnx.freeze(optimizer, model, "head", keep_state=True)
    fnnx.adjust(optimizer, model, "head/kernel", 2.0)
    fnnx.freeze(optimizer, model, "norm")
    fnnx.thaw(optimizer, model, "head")
    fnnx.thaw(optimizer, model, "norm")
    expected = {**BY_HAND, "backbone": {"kernel": 0.75, "bias": 0.5}, "head": {"kernel": 2.0}}
    expected["head"]["bias"] = 0.25
    assert factors(optimizer) == expected
    before = params_of(Net())["backbone"]["kernel"][...]
    step(model, optimizer)
    moved = np.asarray(params_of(model)["backbone"]["kernel"][...] != before).any(1)
    assert moved.tolist() == [False, True, True]


def test_misuse_is_an_error_that_changes_nothing():
    model, optimizer = make("norm")
    before = jax.tree.map(jnp.copy, plain(optimizer))
    _, without = make(inner=optax.adam(0.1))
    cases = [
        (
            (optimizer, model, "norm", 0.5),
            ValueError,
            "'norm/bias', 'norm/scale', which has no fac",
        ),
        ((optimizer, model, ["head", "norm"], 0.5), ValueError, "has no factor in the state"),
        ((optimizer, model, "heat", 0.5), ValueError, "pattern 'heat' selects no leaf"),
        ((optimizer, model, "head", -1), ValueError, "0 or more"),
        ((optimizer, model, "head", True), TypeError, "True, not a number"),
        ((without, model, "head", 0.5), TypeError, "no state of fo.rates is"),
        ((optimizer.opt_state, model, "head", 0.5), TypeError, "takes an nnx.Optimizer first"),
        ((optimizer, plain(model), "head", 0.5), TypeError, "module|Module"),
        ((model, optimizer, "head", 0.5), TypeError, "takes an nnx.Optimizer first, not a Net"),
        ((optimizer, Tied(), "head", 0.5), ValueError, "different params: only in"),
    ]
    for arguments, error, text in cases:
        with pytest.raises(error, match=text):
            fnnx.adjust(*arguments)
        fo.testing.assert_frozen(before, plain(optimizer), True)
    # A copy that another edit has left behind.
    graph, state = nnx.split((model, optimizer))
    fnnx.freeze(optimizer, model, "head", keep_state=True)
    old_model, old_optimizer = nnx.merge(graph, state)
    with pytest.raises(ValueError, match=r"freeze, thaw or set_frozen|edit"):
        fnnx.adjust(old_optimizer, old_model, "backbone", 0.5)


def test_only_the_variables_that_the_optimizer_has_count():
    model = Net()
    tx = fo.freezable(optax.chain(optax.sgd(0.1), fo.rates({"backbone": 0.5}, default=None)))
    optimizer = nnx.Optimizer(model, tx, wrt=by_hand("head", "norm"))
    fnnx.adjust(optimizer, model, "backbone/bias", 0.25)
    assert factors(optimizer) == {"backbone": {"kernel": 0.5, "bias": 0.25}}
