"""The functions for NNX in each mode of Flax: values are those of bare optax and of graph mode."""

import contextlib

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
    plain,
    trained,
)

pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),
    pytest.mark.skipif(not hasattr(nnx, "set_graph_mode"), reason="this Flax has one mode"),
]

MODES = {"graph": (True, True), "tree": (False, False), "graph without updates": (True, False)}
ADAM = optax.adam(0.1)


# The other tests for NNX are in graph mode, as long as Flax has it as its default.
@pytest.fixture(
    params=[
        "tree",
        *(
            pytest.param(m, marks=pytest.mark.exhaustive)
            for m in ("graph", "graph without updates")
        ),
    ]
)
def mode(request):
    """A context of the mode; what is outside of it is in graph mode."""

    @contextlib.contextmanager
    def enter():
        graph, updates = MODES[request.param]
        with nnx.set_graph_mode(graph), nnx.set_graph_updates(updates):
            yield

    return enter


def distill(student, teacher, scale=1.0):
    value = ((student(BATCH) - teacher(BATCH)) ** 2).mean() * scale
    return value, {"value": value}


def test_values_gradients_and_what_the_function_writes_are_those_of_nnx(mode):
    models, teachers = [Net(), Net()], [Net(), Net()]
    argument = nnx.DiffState(0, by_hand("backbone", "head/bias"))
    (value, aux), expected = nnx.value_and_grad(distill, argnums=argument, has_aux=True)(
        models[1], teachers[1], scale=2.0
    )
    with mode():
        frozen = ["backbone", "head/bias"]
        differentiate = fnnx.value_and_grad(distill, frozen, has_aux=True)
        (found, found_aux), grads = differentiate(models[0], teachers[0], scale=2.0)
        assert trained(fnnx.wrt(models[0], frozen), models[0]) == trained(
            argument.filter, models[0]
        )
    assert (found, found_aux) == (value, aux)
    assert_gradient(grads, expected, models[0])
    # BatchNorm statistics and RNG counts, of both models.
    assert_same(models[0], models[1])
    assert_same(teachers[0], teachers[1])
    assert models[0].norm.mean[...].any()


def test_rows_are_frozen_in_each_mode(mode):
    _, expected = nnx.value_and_grad(loss)(Net())
    kernel = np.array(expected["backbone"]["kernel"][...])
    kernel[[0, 2]] = 0.0
    expected["backbone"]["kernel"] = expected["backbone"]["kernel"].replace(jnp.asarray(kernel))
    with mode():
        grads = fnnx.grad(loss, fo.rows("backbone/kernel", [0, 2]))(Net())
    assert_gradient(grads, expected, Net())


def test_a_shared_variable_has_one_gradient_in_each_mode(mode):
    expected = nnx.grad(loss, argnums=nnx.DiffState(0, by_hand("head/bias")))(Tied())
    with mode():
        grads, table = fnnx.grad(loss, "head/bias")(Tied()), fnnx.modules(Tied())
    assert_gradient(grads, expected, Tied())
    assert table.aliases == {"head/kernel": "a/kernel"}


class Deep(nnx.Module):
    def __init__(self):
        self.layers = nnx.List(nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(3))

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


@pytest.mark.parametrize(
    ("frozen", "products"), [("layers/{0,1}", 3 + 1), ("layers/{1,2}", 3 + 2 + 1), (True, 3)]
)
def test_frozen_variables_have_no_backward_pass_in_any_mode(mode, frozen, products):
    graph, state = nnx.split(Deep())

    def grads(state):
        return plain(fnnx.grad(loss, frozen)(nnx.merge(graph, state), jnp.ones((2, 4))))

    with mode():
        assert str(jax.make_jaxpr(grads)(state)).count("= dot_general[") == products


def reference_run(frozen_at, steps):
    """The params after a run over plain arrays: a bare Adam for each leaf, made when it thaws."""
    graph, state, rest = nnx.split(Deep(), nnx.Param, ...)
    leaves, treedef = jax.tree.flatten(state)
    states = {}

    def fun(leaves):
        return loss(nnx.merge(graph, treedef.unflatten(leaves), rest), jnp.ones((2, 4)))

    for step in range(steps):
        frozen = fo.mask(frozen_at(step), state)
        grads = jax.grad(fun)(leaves)
        for i, is_frozen in enumerate(jax.tree.leaves(frozen)):
            if is_frozen:
                states.pop(i, None)
                continue
            own = states.setdefault(i, ADAM.init(leaves[i]))
            updates, states[i] = ADAM.update(grads[i], own, leaves[i])
            leaves[i] = optax.apply_updates(leaves[i], updates)
    return nnx.to_pure_dict(treedef.unflatten(leaves))


def step(model, optimizer):
    optimizer.update(model, fnnx.grad(loss, optimizer)(model, jnp.ones((2, 4))))


@pytest.mark.parametrize("argument", [{}, {"graph": False}], ids=["in the mode", "tree step"])
def test_a_run_with_edits_is_that_of_bare_optimizers(mode, argument):
    with mode():
        model = Deep()
        tx = fo.freezable(ADAM, "layers/0")
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param, **argument)
        jitted = nnx.jit(step, **argument)
        jitted(model, optimizer)
        fnnx.thaw(optimizer, model, "layers/0/kernel")
        fnnx.freeze(optimizer, model, fo.of_type(nnx.Linear) & fo.path("layers/2"))
        jitted(model, optimizer)
        fnnx.set_frozen(optimizer, model, "**/bias")
        jitted(model, optimizer)
        assert optimizer.step[...] == 3
    phases = ["layers/0", ["layers/0/bias", "layers/2"], "**/bias"]
    expected = reference_run(phases.__getitem__, 3)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        nnx.to_pure_dict(params_of(model)),
        expected,
    )
