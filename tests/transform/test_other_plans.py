"""States that a checkpointer filled from those of another plan: `update` says so."""

import jax
import jax.numpy as jnp
import optax
import pytest

import freeze_optax as fo

PARAMS = {"a": jnp.ones(2), "b": jnp.ones(3), "c": jnp.ones(3)}
TX = fo.freezable(optax.adam(0.1), ["a", "b"])

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(params=[False, True], ids=["eager", "jit"])
def update(request):
    return jax.jit(TX.update) if request.param else TX.update


def test_none_in_the_place_of_moments_is_named(update):
    state = fo.thaw(TX.init(PARAMS), PARAMS, "b")
    adam, *rest = state.inner
    lost = adam._replace(mu={**adam.mu, "b": None}, nu={**adam.nu, "b": None})
    broken = fo.FreezeState((lost, *rest), state.ages, state.plan)
    with pytest.raises(ValueError, match="None at '0/mu/b', '0/nu/b', where its plan has"):
        update(PARAMS, broken, PARAMS)


def test_counters_of_more_or_fewer_cohorts_are_an_error(update):
    two = fo.thaw(TX.init(PARAMS), PARAMS, ["a", "b"])
    three = fo.thaw(fo.thaw(TX.init(PARAMS), PARAMS, "a"), PARAMS, "b")
    for state, ages, counts in [(two, three.ages, "3 .* has 2"), (three, two.ages, "2 .* has 3")]:
        broken = fo.FreezeState(state.inner, ages, state.plan)
        with pytest.raises(ValueError, match=f"the counters of {counts}; it was restored"):
            update(PARAMS, broken, PARAMS)


def test_the_words_of_an_optimizer_that_keeps_none_by_itself_come_first():
    def init(params):
        return jax.tree.map(lambda x: jnp.zeros_like(x) if x.size > 2 else None, params)

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("give me the params")
        return updates, state

    tx = fo.freezable(optax.GradientTransformation(init, update))
    with pytest.raises(ValueError, match=r"^give me the params; the state has None at 'a'"):
        tx.update(PARAMS, tx.init(PARAMS))
