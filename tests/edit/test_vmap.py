"""States of `jax.vmap(init)`: edits under vmap equal those of each model, others name the axis."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from tests.support.memories import assert_same_bits

pytestmark = pytest.mark.usefixtures("standard_promotion")

COUNT = 3
AXES = {"about": None, "leaves": 0}
OPTIMIZERS = {
    "adam": optax.adam(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "clip, noise": optax.chain(
        optax.clip_by_global_norm(0.1), optax.add_noise(0.1, 0.5, 0), optax.adamw(0.1)
    ),
}
EDITS: dict[str, Callable[[Any, Any], Any]] = {
    "freeze": lambda s, p: fo.freeze(s, p, "b"),
    "park": lambda s, p: fo.freeze(s, p, "b", keep_state=True),
    "thaw": lambda s, p: fo.thaw(s, p, "a"),
    "set_frozen": lambda s, p: fo.set_frozen(s, p, "b", keep_state=True),
    "rows": lambda s, p: fo.set_frozen(s, p, fo.rows("b", [0, 2]), keep_state=True),
    "phases": lambda s, p: fo.set_frozen(s, p, fo.Phases({0: "a", 5: "b"}).at(5)),
    "release": fo.release,
}


def make_params() -> Any:
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=(COUNT, *shape)), jnp.float32)  # noqa: E731
    return {"a": draw(4, 2), "b": draw(4), "steps": jnp.arange(COUNT)}


def member(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda x: x[i], tree)


def each(function: Any, *trees: Any) -> Any:
    """The results of a function for each model by itself, stacked."""
    results = [function(*(member(tree, i) for tree in trees)) for i in range(COUNT)]
    return jax.tree.map(lambda *xs: jnp.stack(xs), *results)


def make_step(tx: Any) -> Any:
    def loss(params: Any) -> Any:
        return (jnp.sin(params["a"]) * params["b"][:, None]).sum()

    def step(params: Any, state: Any) -> Any:
        grads = fo.grad(loss, state)(params)
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    return step


def trained(name: str) -> tuple[Any, Any, Any]:
    tx = fo.freezable(OPTIMIZERS[name], "a")
    params = make_params()
    return tx, *jax.vmap(make_step(tx))(params, jax.vmap(tx.init)(params))


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize(
    "name",
    [n if n == "adam" else pytest.param(n, marks=pytest.mark.exhaustive) for n in OPTIMIZERS],
)
def test_an_edit_under_vmap_equals_the_edits_of_each_model(name, edit):
    _, params, state = trained(name)
    edited = jax.vmap(EDITS[edit])(state, params)
    assert_same_bits(edited, each(EDITS[edit], state, params))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_edits_and_exports_under_vmap_equal_those_of_each_model(name):
    tx, params, state = trained(name)
    edit = lambda s, p: EDITS["rows"](EDITS["thaw"](s, p), p)  # noqa: E731
    state = jax.vmap(edit)(state, params)
    result = jax.vmap(make_step(tx))(params, state)
    expected = each(make_step(tx), params, state)
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)

    import_each = lambda p, e: fo.import_state(tx, p, e)  # noqa: E731
    stored = jax.tree.map(np.asarray, fo.export_state(state))
    imported = jax.vmap(import_each, in_axes=(0, AXES))(params, stored)
    assert_same_bits(imported, state)
    inside = jax.vmap(fo.export_state, out_axes=AXES)(state)
    assert_same_bits(jax.vmap(import_each, in_axes=(0, AXES))(params, inside), state)


def test_adopt_and_scheduled_work_under_vmap():
    params, inner = make_params(), optax.adam(0.1)
    adopt = lambda s, p: fo.adopt(fo.freezable(inner), s, p)  # noqa: E731
    plain = jax.vmap(inner.init)(params)
    assert_same_bits(jax.vmap(adopt)(plain, params), each(adopt, plain, params))

    tx = fo.scheduled(inner, fo.Phases({0: "a", 1: fo.nothing}))
    step = make_step(tx)
    two_steps = lambda p: step(*step(p, tx.init(p)))  # noqa: E731
    result, expected = jax.vmap(two_steps)(params), each(two_steps, params)
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), result, expected)
    outside = jax.vmap(tx.init)(params)
    with pytest.raises(ValueError, match="one more axis, of length 3, than that of one model"):
        fo.grad(lambda params: params["b"].sum(), outside)(params)
    with pytest.raises(ValueError, match="one more axis, of length 3, than that of one model"):
        tx.update(params, outside, params)


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_outside_of_vmap_names_the_axis_and_the_remedy(edit):
    _, params, state = trained("adam")
    one = member(params, 0)
    error = r"state has one more axis, of length 3, than that of one model, .* jax.vmap\(lambda"
    for other in (params, one):
        with pytest.raises(ValueError, match=error):
            EDITS[edit](state, other)
    with pytest.raises(ValueError, match="the params have one more axis, of length 3, than the s"):
        EDITS[edit](member(state, 0), params)


@pytest.mark.parametrize("edit", EDITS)
def test_without_counters_a_state_and_params_of_different_axes_are_told_apart(edit):
    _, params, state = trained("momentum")
    with pytest.raises(ValueError, match="state has one more axis, of length 3, than the params"):
        EDITS[edit](state, member(params, 0))
    with pytest.raises(ValueError, match="the params have one more axis, of length 3, than the s"):
        EDITS[edit](member(state, 0), params)
    if edit != "rows":  # these would be rows of the axis of models
        # Both stacked, each statistic is its own: the edit is that of each model.
        assert_same_bits(EDITS[edit](state, params), each(EDITS[edit], state, params))


def test_adopt_and_import_name_the_axis():
    tx, params, state = trained("adam")
    one, inner = member(params, 0), optax.adam(0.1)
    plain = jax.vmap(inner.init)(params)
    with pytest.raises(ValueError, match="the state has one more axis, of length 3"):
        fo.adopt(tx, plain, params)
    with pytest.raises(ValueError, match="params have one more axis, of length 3, so call adopt"):
        fo.adopt(tx, member(plain, 0), params)
    momentum = fo.freezable(optax.trace(0.9))
    with pytest.raises(ValueError, match="the state has one more axis, of length 3"):
        fo.adopt(momentum, jax.vmap(optax.trace(0.9).init)(params), one)

    exported = fo.export_state(state)
    for other in (params, one):
        with pytest.raises(ValueError, match=r"the export has one more axis, of length 3.*in_axes"):
            fo.import_state(tx, other, exported)
    with pytest.raises(ValueError, match="the params have one more axis, of length 3"):
        fo.import_state(tx, params, fo.export_state(member(state, 0)))


def test_a_state_that_mixes_leaves_is_still_told_from_one_of_many_models():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    mixing = optax.GradientTransformation(
        lambda params: optax.TraceState(jnp.zeros(sum(x.size for x in jax.tree.leaves(params)))),
        optax.identity().update,
    )
    with pytest.raises(ValueError, match=r"mixes the leaves .* '0/trace' has \[\(2,\)\]"):
        fo.thaw(fo.freezable(optax.chain(mixing), "a").init(params), params, "a")
