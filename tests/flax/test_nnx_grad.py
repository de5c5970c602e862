"""Gradients of NNX models: those of NNX where a variable trains, no backward pass elsewhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import freeze_optax as fo
from freeze_optax import nnx as fnnx
from tests.support.nnx_models import (
    BATCH,
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

pytestmark = pytest.mark.usefixtures("standard_promotion")

SPECS = {
    "nothing": (fo.nothing, []),
    "a str": ("backbone", ["backbone"]),
    "a selector": (~fo.path("head"), ["backbone", "norm"]),
    "a list": (["backbone/kernel", fo.path("head")], ["backbone/kernel", "head"]),
    "a bool": (False, []),
    "a mask of dicts": ({"backbone": True, "norm": False, "head": False}, ["backbone"]),
    "a mask of States": (fo.path("**/bias")(params_of(Net())), ["backbone/bias", "norm/bias"]),
    "a function": (lambda tree: fo.mask("norm/*", tree), ["norm"]),
    "a type": (fo.of_type(nnx.Linear), ["backbone", "head"]),
}
SPECS["a mask of States"][1].append("head/bias")


def hand_gradient(model, *frozen):
    return nnx.value_and_grad(loss, argnums=nnx.DiffState(0, by_hand(*frozen)))(model)


@pytest.mark.parametrize("case", SPECS)
def test_gradients_and_the_state_of_the_model_are_those_of_nnx_and_zeros(case):
    spec, frozen = SPECS[case]
    model, twin = Net(), Net()
    for _ in range(2):
        value, grads = fnnx.value_and_grad(loss, spec)(model)
        expected, twin_grads = hand_gradient(twin, *frozen)
        assert value == expected
        assert_gradient(grads, twin_grads, model)
    # Two steps of BatchNorm statistics and RNG counts.
    assert_same(model, twin)
    with pytest.raises(AssertionError, match="norm/mean"):
        assert_same(model, Net())


def test_grad_is_the_gradient_alone():
    assert_same(fnnx.grad(loss, "head")(Net()), fnnx.value_and_grad(loss, "head")(Net())[1])
    assert_gradient(fnnx.grad(loss, "head")(Net()), hand_gradient(Net(), "head")[1], Net())


def test_auxiliary_values_and_further_arguments_go_through():
    def fun(model, x, scale=1.0, power=2):
        value = (model(x) ** power).mean() * scale
        return value, {"value": value, "outputs": model(x)}

    differentiate = functools.partial(
        nnx.value_and_grad, fun, argnums=nnx.DiffState(0, by_hand("head")), has_aux=True
    )
    expected, twin_grads = differentiate()(Net(), BATCH, 3.0, power=4)
    (value, aux), grads = fnnx.value_and_grad(fun, "head", has_aux=True)(
        Net(), BATCH, scale=3.0, power=4
    )
    fo.testing.assert_frozen(expected, (value, aux), True)
    assert_gradient(grads, twin_grads, Net())
    grads, aux = fnnx.grad(fun, "head", has_aux=True)(Net(), BATCH, 3.0, 4)
    fo.testing.assert_frozen(expected[1], aux, True)
    assert_gradient(grads, twin_grads, Net())


def test_any_keyword_reaches_the_function_model_too():
    def fun(net, model=1.0, fun=2.0, frozen=0.0):
        return net(BATCH).sum() * model * fun + frozen

    options = {"model": 3.0, "fun": 4.0, "frozen": 5.0}
    value, twin_grads = nnx.value_and_grad(fun, argnums=nnx.DiffState(0, by_hand("head")))(
        Net(), **options
    )
    assert fnnx.value_and_grad(fun, "head")(Net(), **options)[0] == value
    assert_gradient(fnnx.grad(fun, "head")(Net(), **options), twin_grads, Net())


def test_another_model_among_the_arguments_is_not_differentiated():
    def distill(student, teacher):
        return ((student(BATCH) - teacher(BATCH)) ** 2).mean()

    argument = nnx.DiffState(0, by_hand("norm"))
    teacher, twin_teacher = (nnx.Linear(3, 2, rngs=nnx.Rngs(3)) for _ in range(2))
    actual = fnnx.grad(distill, "norm")(Net(), teacher)
    assert_gradient(actual, nnx.grad(distill, argnums=argument)(Net(), twin_teacher), Net())


class Deep(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List(nnx.Linear(16, 16, rngs=rngs) for _ in range(6))

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


@pytest.mark.parametrize(
    ("where", "frozen", "products"),
    [
        ("layers/{0..4}", [f"layers/{i}" for i in range(5)], 6 + 1),
        ("layers/{1..5}", [f"layers/{i}" for i in range(1, 6)], 6 + 5 + 1),
        (fo.everything, ["layers"], 6),
        (fo.nothing, [], 6 + 5 + 6),
    ],
    ids=["all but the last", "all but the first", "everything", "nothing"],
)
def test_frozen_variables_have_no_backward_pass(where, frozen, products):
    graph, state = nnx.split(Deep())
    batch = jnp.ones((2, 16))

    def ours(state):
        return plain(fnnx.grad(loss, where)(nnx.merge(graph, state), batch))

    def theirs(state):
        argument = nnx.DiffState(0, by_hand(*frozen))
        return plain(nnx.grad(loss, argnums=argument)(nnx.merge(graph, state), batch))

    def flops(function):
        analysis = jax.jit(function).lower(state).compile().cost_analysis()
        return analysis.get("flops", 0.0)  # It is absent where there are none.

    # In the jaxpr too: an eager loop runs what XLA would drop as dead.
    assert str(jax.make_jaxpr(ours)(state)).count("= dot_general[") == products
    assert flops(ours) == flops(theirs)


ADAM = optax.adam(0.1)
FROZEN_ADAM = fo.freezable(ADAM, "backbone")
OPTIMIZERS = {
    "freezable": (FROZEN_ADAM, ADAM),
    "in a chain": (optax.chain(optax.clip(0.01), FROZEN_ADAM), optax.chain(optax.clip(0.01), ADAM)),
    "around a chain": (
        fo.freezable(optax.chain(optax.clip_by_global_norm(0.1), ADAM), "backbone"),
        optax.chain(optax.clip_by_global_norm(0.1), ADAM),
    ),
    "in MultiSteps": (optax.MultiSteps(FROZEN_ADAM, 2), optax.MultiSteps(ADAM, 2)),
    "in injected hyperparameters": (
        optax.inject_hyperparams(lambda rate: fo.freezable(optax.adam(rate), "backbone"))(rate=0.1),
        optax.inject_hyperparams(lambda rate: optax.chain(optax.adam(rate)))(rate=0.1),
    ),
    "plain, with a filter": (ADAM, ADAM),
}
FOLLOWED = {
    "optimizer": lambda optimizer: optimizer,
    "opt_state": lambda optimizer: optimizer.opt_state,
    "list": lambda optimizer: [optimizer, "backbone/bias"],
    "mask": lambda optimizer: fo.mask("backbone", plain(params_of(Net()))),
}


@pytest.mark.parametrize(
    ("case", "how"),
    [(case, "optimizer") for case in OPTIMIZERS if case != "around a chain"]
    + [("freezable", "list"), ("freezable", "mask"), ("in MultiSteps", "opt_state")],
)
def test_an_optimizer_takes_the_gradients_of_what_it_trains(case, how):
    tx, bare = OPTIMIZERS[case]
    model, twin = Net(), Net()
    wrt = fnnx.wrt(model, "backbone") if tx is ADAM else nnx.Param
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)
    reference = nnx.Optimizer(twin, bare, wrt=by_hand("backbone"))
    differentiate = fnnx.value_and_grad(loss, FOLLOWED[how](optimizer))
    for _ in range(4):
        _, grads = differentiate(model)
        assert paths_of(grads) == trained(optimizer.wrt, model)
        optimizer.update(model, grads)
        reference.update(twin, hand_gradient(twin, "backbone")[1])
    assert_same(model, twin)
    fo.testing.assert_frozen(plain(params_of(Net())), plain(params_of(model)), "backbone")


A, B = "lora/lora_a", "lora/lora_b"


@pytest.mark.parametrize(
    ("tx", "how", "moved"),
    [
        (fo.freezable(ADAM, A), "optimizer", {B}),
        (fo.freezable(ADAM, A), "opt_state", {B}),
        (fo.freezable(ADAM), "opt_state", {A, B}),
        (ADAM, "optimizer", {A, B}),
    ],
    ids=["optimizer", "opt_state", "nothing frozen", "plain"],
)
def test_gradients_are_of_the_variables_of_the_optimizer(tx, how, moved):
    model, start = (nnx.LoRALinear(3, 2, lora_rank=2, rngs=nnx.Rngs(0)) for _ in range(2))
    for each in (model, start):
        # It starts as zeros, and then the gradient of the other factor is zero.
        each.lora.lora_b[...] = jnp.ones((2, 2))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    grads = fnnx.grad(loss, FOLLOWED[how](optimizer))(model)
    assert paths_of(grads) == {A, B}
    optimizer.update(model, grads)
    pairs = zip(*(nnx.to_flat_state(nnx.state(m)) for m in (start, model)), strict=True)
    changed = {"/".join(p) for (p, x), (_, y) in pairs if not np.array_equal(x[...], y[...])}
    assert changed == moved


def test_one_function_follows_the_optimizer_through_its_edits():
    model, twin = Net(), Net()
    optimizer = nnx.Optimizer(model, FROZEN_ADAM, wrt=nnx.Param)
    differentiate = fnnx.value_and_grad(loss, frozen=optimizer)
    for frozen in ("backbone", "head", "norm"):
        fnnx.set_frozen(optimizer, model, frozen)
        assert_gradient(differentiate(model)[1], hand_gradient(twin, frozen)[1], model)


def test_an_optimizer_that_keeps_its_model_is_followed_too():
    model, twin = Net(), Net()
    optimizer = nnx.ModelAndOptimizer(model, FROZEN_ADAM, wrt=nnx.Param)
    reference = nnx.Optimizer(twin, ADAM, wrt=by_hand("backbone"))
    for _ in range(2):
        optimizer.update(fnnx.grad(loss, optimizer)(model))
        reference.update(twin, hand_gradient(twin, "backbone")[1])
    assert_same(model, twin)


class Odd(nnx.Module):
    def __init__(self):
        self.pair = nnx.Param({"x": jnp.ones(2), "y": (jnp.ones(3), jnp.ones(()))})
        self.half = nnx.Param(jnp.ones(2, jnp.bfloat16))
        self.complex = nnx.Param(jnp.array([1 + 2j, 3 + 4j], jnp.complex64))
        self.steps, self.flag = nnx.Param(jnp.array(3)), nnx.Param(jnp.array(True))
        self.empty = nnx.Param(None)

    def __call__(self):
        leaves = [*jax.tree.leaves(self.pair), self.half[...], self.complex[...]]
        return sum((jnp.abs(x) ** 2).sum().astype(jnp.float32) for x in leaves)


def test_variables_of_any_content_have_gradients_of_their_dtype():
    gradient = {"x": 2 * jnp.ones(2), "y": (2 * jnp.ones(3), jnp.array(2.0))}
    values = {
        "pair": gradient,
        "half": jnp.array([2, 2], jnp.bfloat16),
        "complex": jnp.array([2 - 4j, 6 - 8j], jnp.complex64),
    }
    of_integers = {"steps": jnp.array(0), "flag": jnp.array(False)}
    for frozen in ([], ["pair"], ["half", "complex"], fo.everything):
        names = list(values) if frozen is fo.everything else frozen
        zeros = jax.tree.map(jnp.zeros_like, {name: values[name] for name in names})
        grads = nnx.to_pure_dict(fnnx.grad(Odd.__call__, frozen)(Odd()))
        expected = values | zeros | of_integers | {"empty": None}
        fo.testing.assert_frozen(expected, grads, True)


def test_the_state_of_an_optimizer_names_the_variables_that_hold_trees():
    model = Odd()
    optimizer = nnx.Optimizer(model, fo.freezable(ADAM, "half"), wrt=nnx.Param)
    grads = fnnx.grad(Odd.__call__, optimizer.opt_state)(model)
    assert set(grads) == {"pair", "half", "complex", "steps", "flag"}


def test_an_update_with_integers_and_everything_frozen_changes_nothing():
    model = Odd()
    with pytest.warns(UserWarning, match="all 7 leaves are frozen"):
        optimizer = nnx.Optimizer(model, fo.freezable(ADAM, "{half,complex,pair}"), wrt=nnx.Param)
    optimizer.update(model, fnnx.grad(Odd.__call__, optimizer)(model))
    fo.testing.assert_frozen(plain(Odd()), plain(model), True)


# Not "pair" itself: NNX's update makes an nnx.State of the dict in it, but not of its holes.
@pytest.mark.parametrize("frozen", [fo.nothing, "half"])
def test_a_variable_that_holds_a_tree_trains_on(frozen):
    # Only floats, for the sake of the reference.
    class Pair(nnx.Module):
        def __init__(self):
            self.pair = nnx.Param({"x": jnp.ones(2), "y": jnp.ones(3)})
            self.half = nnx.Param(jnp.ones(2))

        def __call__(self):
            return sum((x**2).sum() for x in jax.tree.leaves(params_of(self)))

    model, twin = Pair(), Pair()
    optimizer = nnx.Optimizer(model, fo.freezable(ADAM, frozen), wrt=nnx.Param)
    filter_ = by_hand(*([] if frozen is fo.nothing else [frozen]))
    reference = nnx.Optimizer(twin, ADAM, wrt=filter_)
    for _ in range(3):
        optimizer.update(model, fnnx.grad(Pair.__call__, optimizer)(model))
        grads = nnx.grad(Pair.__call__, argnums=nnx.DiffState(0, filter_))(twin)
        reference.update(twin, grads)
    leaves = [jax.tree.leaves(params_of(m)) for m in (model, twin)]
    fo.testing.assert_frozen(leaves[1], leaves[0], True)


def test_a_scheduled_optimizer_is_an_error_that_says_what_to_use():
    tx = fo.scheduled(ADAM, fo.Phases({0: "backbone", 2: fo.nothing}))
    optimizer = nnx.Optimizer(Net(), tx, wrt=nnx.Param)
    with pytest.raises(ValueError, match="what is frozen changes while the program runs"):
        fnnx.value_and_grad(loss, optimizer)


def test_an_optimizer_of_another_model_is_an_error_that_names_the_odd_paths():
    optimizer = nnx.Optimizer(Tied(), fo.freezable(ADAM, "a"), wrt=nnx.Param)
    for frozen in (optimizer, optimizer.opt_state):
        with pytest.raises(ValueError, match=r"different params: .*'a/bias'"):
            fnnx.grad(loss, frozen)(Net())


def test_the_gradient_keeps_the_name_of_the_function():
    def loss(model, x):
        """Says what it is."""
        return model(x).sum()

    for wrap in (fnnx.grad, fnnx.value_and_grad):
        wrapped = wrap(loss, fo.nothing)
        assert (wrapped.__name__, wrapped.__doc__) == ("loss", "Says what it is.")


@pytest.mark.parametrize("where", [[0, 2], slice(0, 2)], ids=["scattered", "block"])
def test_the_gradient_of_a_variable_is_that_of_nnx_where_it_trains_and_zero_in_frozen_rows(where):
    frozen = fo.path("head") | fo.rows("backbone/kernel", where)
    value, grads = fnnx.value_and_grad(loss, frozen)(Net())
    expected_value, expected = hand_gradient(Net(), "head")
    assert value == expected_value
    kernel = np.array(expected["backbone"]["kernel"][...])
    assert kernel.all()
    kernel[where] = 0.0
    expected["backbone"]["kernel"] = expected["backbone"]["kernel"].replace(jnp.asarray(kernel))
    assert_gradient(grads, expected, Net())


def test_grad_gives_the_auxiliary_value_beside_the_gradient():
    def fun(model):
        return loss(model), "aux"

    grads, aux = fnnx.grad(fun, "head", has_aux=True)(Net())
    assert aux == "aux"
    assert_same(grads, fnnx.grad(loss, "head")(Net()))
