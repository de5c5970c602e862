"""What stores an `nnx.Optimizer` beside the caller: it follows an edit, or its next use raises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import freeze_optax as fo
from freeze_optax import nnx as fnnx
from tests.support.nnx_models import assert_same, by_hand, loss, plain

pytestmark = pytest.mark.usefixtures("standard_promotion")

ADAM, SGD = optax.adam(0.1), optax.sgd(0.1)


class Net(nnx.Module):
    def __init__(self):
        self.backbone, self.head = (nnx.Linear(3, 3, rngs=nnx.Rngs(i)) for i in range(2))

    def __call__(self, x):
        return self.head(jnp.tanh(self.backbone(x)))


STALE = "this optimizer is out of date: .* nnx.cached_partial .* call them again after an edit"
EDITS = {
    "freeze": lambda o, m: fnnx.freeze(o, m, "head"),
    "freeze and park": lambda o, m: fnnx.freeze(o, m, "head", keep_state=True),
    "thaw": lambda o, m: fnnx.thaw(o, m, "backbone"),
    "swap": lambda o, m: fnnx.set_frozen(o, m, "head"),
}


def our_step(model, optimizer):
    optimizer.update(model, fnnx.grad(loss, optimizer)(model))


def plain_step(model, optimizer):
    optimizer.update(model, nnx.grad(loss)(model))


def jit_partial(step, model, optimizer):
    return nnx.jit_partial(step, model, optimizer, graph=False)


def cached_partial(step, model, optimizer):
    return nnx.cached_partial(nnx.jit(step), model, optimizer)


needs_tree_mode = pytest.mark.skipif(
    not hasattr(nnx, "jit_partial"), reason="this Flax has no tree mode"
)


@pytest.mark.parametrize(
    ("store", "step", "inner", "edit"),
    [
        (cached_partial, our_step, ADAM, "swap"),
        (cached_partial, plain_step, SGD, "freeze and park"),
        pytest.param(jit_partial, plain_step, ADAM, "thaw", marks=needs_tree_mode),
        pytest.param(cached_partial, plain_step, ADAM, "freeze", marks=pytest.mark.exhaustive),
        pytest.param(cached_partial, our_step, SGD, "thaw", marks=pytest.mark.exhaustive),
        pytest.param(
            jit_partial, our_step, SGD, "swap", marks=[needs_tree_mode, pytest.mark.exhaustive]
        ),
    ],
)
def test_a_step_that_stores_the_optimizer_raises_after_an_edit_and_works_when_made_anew(
    store, step, inner, edit
):
    model, twin = Net(), Net()
    optimizer, reference = (
        nnx.Optimizer(m, fo.freezable(inner, "backbone"), wrt=nnx.Param) for m in (model, twin)
    )
    stored = store(step, model, optimizer)
    stored()
    step(twin, reference)
    EDITS[edit](optimizer, model)
    EDITS[edit](reference, twin)
    before = jax.tree.map(jnp.copy, (plain(model), plain(optimizer)))
    for _ in range(2):
        with pytest.raises(ValueError, match=STALE):
            stored()
        # The failed call has changed neither.
        fo.testing.assert_frozen(before, (plain(model), plain(optimizer)), True)
    store(step, model, optimizer)()
    step(twin, reference)
    assert optimizer.step[...] == reference.step[...] == 2
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, plain(model), plain(twin))


def test_an_edit_that_changes_nothing_or_fails_leaves_a_stored_step_as_it_is():
    model = Net()
    optimizer = nnx.Optimizer(model, fo.freezable(ADAM, "backbone"), wrt=nnx.Param)
    stored, step = cached_partial(our_step, model, optimizer), optimizer.step
    stored()
    fnnx.freeze(optimizer, model, "backbone/kernel")
    with pytest.raises(ValueError, match="selects no leaf"):
        fnnx.thaw(optimizer, model, "backbon")
    stored()
    assert optimizer.step is step
    assert step[...] == 2


def test_a_step_count_that_a_user_kept_raises_and_the_optimizer_s_own_counts_on():
    model = Net()
    optimizer = nnx.Optimizer(model, fo.freezable(ADAM, "backbone"), wrt=nnx.Param)
    our_step(model, optimizer)
    kept, metadata = optimizer.step, optimizer.step.get_metadata()
    fnnx.thaw(optimizer, model, "backbone")
    for use in (lambda: kept[...], lambda: kept + 1, lambda: int(kept), lambda: jnp.add(kept, 1)):
        with pytest.raises(ValueError, match=r"take optimizer\.step again"):
            use()
    assert type(optimizer.step) is type(kept)
    assert optimizer.step.get_metadata() == metadata
    assert optimizer.step[...] == 1


def test_a_compiled_step_refuses_the_optimizer_after_an_edit():
    model = Net()
    optimizer = nnx.Optimizer(model, fo.freezable(ADAM, "backbone"), wrt=nnx.Param)
    compiled = nnx.jit(our_step).lower(model, optimizer).compile()
    compiled(model, optimizer)
    fnnx.freeze(optimizer, model, "head", keep_state=True)
    with pytest.raises(TypeError, match="does not match the input pytree"):
        compiled(model, optimizer)


def test_the_variables_of_a_split_from_before_an_edit_raise():
    model = Net()
    optimizer = nnx.Optimizer(model, fo.freezable(ADAM, "backbone"), wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))
    fnnx.freeze(optimizer, model, "head", keep_state=True)
    old_model, old_optimizer = nnx.merge(graph, state)
    for call in (
        lambda: fnnx.grad(loss, old_optimizer)(old_model),
        lambda: fnnx.freeze(old_optimizer, old_model, "head/bias"),
        lambda: plain_step(old_model, old_optimizer),
    ):
        with pytest.raises(ValueError, match=STALE):
            call()


def test_an_edit_in_the_body_of_a_loop_is_an_error():
    model = Net()
    optimizer = nnx.Optimizer(model, fo.freezable(ADAM, "backbone"), wrt=nnx.Param)

    def body(_, pair):
        fnnx.set_frozen(pair[1], pair[0], "head")
        return pair

    with pytest.raises((TypeError, ValueError), match=r"same (reference and )?pytree structure"):
        nnx.fori_loop(0, 2, body, (model, optimizer))


@needs_tree_mode
def test_an_edit_that_tree_mode_keeps_inside_of_jit_is_an_error_at_the_next_use():
    model = Net()
    optimizer = nnx.Optimizer(model, fo.freezable(ADAM, "backbone"), wrt=nnx.Param)

    @nnx.jit(graph=False)
    def edit(model, optimizer):
        fnnx.set_frozen(optimizer, model, "head")

    edit(model, optimizer)
    for call in (
        lambda: fnnx.grad(loss, optimizer)(model),
        lambda: fnnx.thaw(optimizer, model, "backbone"),
        lambda: plain_step(model, optimizer),
    ):
        with pytest.raises(ValueError, match=r"In tree mode, an edit inside of nnx\.jit does not"):
            call()


@needs_tree_mode
def test_an_optimizer_may_be_made_and_edited_inside_of_jit_in_tree_mode():
    @nnx.jit(graph=False)
    def make():
        model = Net()
        optimizer = nnx.Optimizer(model, fo.freezable(ADAM, "backbone"), wrt=nnx.Param)
        fnnx.set_frozen(optimizer, model, "head")
        return model, optimizer

    model, optimizer = make()
    twin = Net()
    reference = nnx.Optimizer(twin, ADAM, wrt=by_hand("head"))
    our_step(model, optimizer)
    reference.update(twin, nnx.grad(loss, argnums=nnx.DiffState(0, by_hand("head")))(twin))
    assert_same(model, twin)
