"""NNX's filters and types of Variables as specs: what NNX itself matches is frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import freeze_optax as fo
from freeze_optax import nnx as fnnx
from tests.support.nnx_models import params_of, paths_of, plain, trained

pytestmark = pytest.mark.usefixtures("standard_promotion")


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List(
            [nnx.LoRALinear(3, 3, lora_rank=2, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)]
        )
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.tagged = nnx.Param(jnp.ones(2), tag="cold")

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.norm(x) * self.tagged[...]


ALL = paths_of(params_of(Net()))
LORA = {"layers/0/lora/lora_a", "layers/0/lora/lora_b"}
NATIVE = {
    "type": nnx.LoRAParam,
    "OfType": nnx.OfType(nnx.LoRAParam),
    "Not": nnx.Not(nnx.LoRAParam),
    "Any": nnx.Any(nnx.LoRAParam, nnx.PathContains("bias")),
    "All": nnx.All(nnx.PathContains("layers"), nnx.Not(nnx.LoRAParam)),
    "an index": nnx.PathContains(0),
    "a path": nnx.filterlib.PathIn(("layers", 1, "kernel")),
    "a tag": nnx.Any("cold"),
    "a predicate": nnx.All(lambda path, value: path[-1] == "kernel" and value.ndim == 2),
    "everything": ...,
    "nothing": nnx.Nothing(),
    "a filter of ours": fnnx.wrt(Net(), "layers"),
}
ADAM = optax.adam(0.1)


def frozen_in(mask):
    pairs = nnx.to_flat_state(mask)
    return {"/".join(map(str, path)) for path, x in pairs if jax.tree.leaves(x)[0]}


def true_in(tree):
    """The paths of a dict where all is true, or other than zero."""
    flat = nnx.traversals.flatten_mapping(tree)
    return {"/".join(map(str, path)) for path, x in flat.items() if np.all(x)}


@pytest.mark.parametrize("case", NATIVE)
def test_a_filter_freezes_the_variables_that_nnx_matches_with_it(case):
    spec, model = NATIVE[case], Net()
    expected = paths_of(nnx.state(model, nnx.All(nnx.Param, spec)))
    assert frozen_in(fo.mask(spec, params_of(model))) == expected
    assert trained(fnnx.wrt(model, spec), model) == ALL - expected
    # The model itself has BatchNorm statistics too.
    on_model = frozen_in(nnx.state(fo.mask(spec, model)))
    assert on_model == paths_of(nnx.state(model, spec))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (nnx.LoRAParam, LORA),
        (nnx.Not(nnx.LoRAParam), ALL - LORA),
        ([nnx.LoRAParam, "norm"], LORA | {"norm/scale", "norm/bias"}),
        ((nnx.PathContains("norm"), nnx.LoRAParam), LORA | {"norm/scale", "norm/bias"}),
        (fo.of_type(nnx.LoRAParam), LORA),
        (fo.of_type(nnx.LoRAParam, nnx.BatchNorm) - "norm/bias", LORA | {"norm/scale"}),
        (~fo.of_type(nnx.LoRAParam), ALL - LORA),
    ],
    ids=["type", "Not", "list", "tuple", "of_type", "of_type of both", "all but"],
)
def test_types_of_variables_select_in_every_function_for_nnx(spec, expected):
    model = Net()
    optimizers = [nnx.Optimizer(model, fo.freezable(ADAM), wrt=nnx.Param) for _ in range(3)]
    fnnx.freeze(optimizers[0], model, spec)
    fnnx.set_frozen(optimizers[1], model, spec)
    fnnx.freeze(optimizers[2], model, fo.everything)
    fnnx.thaw(optimizers[2], model, spec)
    masks = [frozen_in(fo.mask(optimizer, params_of(model))) for optimizer in optimizers]
    assert masks == [expected, expected, ALL - expected]
    assert trained(fnnx.wrt(model, spec), model) == ALL - expected

    def total(model):
        return sum(map(jnp.sum, jax.tree.leaves(params_of(model))))

    assert true_in(plain(fnnx.grad(total, spec)(model))) == ALL - expected


@pytest.mark.parametrize("pure", [False, True], ids=["State", "dict"])
def test_a_table_of_modules_knows_the_types_of_variables_too(pure):
    spec = fo.of_type(nnx.LoRAParam, nnx.BatchNorm, modules=fnnx.modules(Net()))
    params = params_of(Net())
    mask = fo.mask(spec, plain(params)) if pure else nnx.to_pure_dict(fo.mask(spec, params))
    assert true_in(mask) == LORA | {"norm/scale", "norm/bias"}


def test_lora_trains_its_factors_as_a_bare_optimizer_does_and_keeps_every_bit_of_the_base():
    x, y = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), jnp.ones((4, 2))

    def loss(model):
        return ((model(x) - y) ** 2).mean()

    model = nnx.LoRA(3, 2, 2, base_module=nnx.Linear(3, 2, rngs=nnx.Rngs(1)), rngs=nnx.Rngs(0))
    base = jax.tree.map(jnp.copy, plain(params_of(model.base_module)))
    graph, own, rest = nnx.split(model, nnx.LoRAParam, ...)
    own, rest = nnx.to_pure_dict(own), jax.tree.map(jnp.copy, rest)
    tx = fo.freezable(optax.adamw(0.1), nnx.Not(nnx.LoRAParam))
    optimizer, state = nnx.Optimizer(model, tx, wrt=nnx.Param), optax.adamw(0.1).init(own)

    def loss_of_own(own):
        lora = nnx.state(nnx.merge(graph, nnx.state(model, nnx.LoRAParam), rest), nnx.LoRAParam)
        nnx.replace_by_pure_dict(lora, own)
        return loss(nnx.merge(graph, lora, rest))

    losses = []
    for _ in range(5):
        value, grads = fnnx.value_and_grad(loss, optimizer)(model)
        optimizer.update(model, grads)
        losses.append(float(value))
        updates, state = optax.adamw(0.1).update(jax.grad(loss_of_own)(own), state, own)
        own = optax.apply_updates(own, updates)
    assert losses[-1] < losses[0]
    found = nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, own)
    fo.testing.assert_frozen(base, plain(params_of(model.base_module)), True)
    assert len(jax.tree.leaves(optax.tree_utils.tree_get(optimizer.opt_state, "mu"))) == 2


MISTAKES = {
    "no such variable": (
        nnx.OfType(nnx.Cache),
        ValueError,
        r"OfType\(.*Cache.*\) matches no variable; there are variables of the types 'Param', 'L",
    ),
    "a module in a filter": (nnx.OfType(nnx.BatchNorm), ValueError, r"write fo\.of_type\(\.\.\.\)"),
    "a module": (
        nnx.BatchNorm,
        TypeError,
        r"the class BatchNorm is not a spec; fo\.of_type\(BatchNorm\) selects",
    ),
    "no such type": (
        fo.of_type(nnx.Cache),
        ValueError,
        r"of_type\(Cache\): no variable is a Cache; the tree has 'Param', 'LoRAParam'",
    ),
    "not among the params": (fo.of_type(nnx.BatchStat), ValueError, "BatchStat"),
    "a str is a path, not a tag": ("cold", ValueError, "pattern 'cold' selects no leaf"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_says_what_there_is(case):
    spec, error, message = MISTAKES[case]
    for call in (
        lambda: fnnx.wrt(Net(), spec),
        lambda: nnx.Optimizer(Net(), fo.freezable(ADAM, spec), wrt=nnx.Param),
    ):
        with pytest.raises(error, match=message):
            call()


def test_a_tree_without_variables_is_an_error():
    with pytest.raises(
        ValueError, match=r"LoRAParam is an NNX filter, .* but the tree, a dict, holds"
    ):
        fo.mask(nnx.LoRAParam, {"a": 1.0})
    assert fo.mask(nnx.LoRAParam, {}) == {}
