"""No value of a trace is kept when the trace ends (`jax.checking_leaks`)."""

import jax
import jax.numpy as jnp
import optax
import pytest

import freeze_optax as fo

PARAMS = {"layers": {"w": jnp.full((3, 2, 2), 0.1)}, "head": jnp.ones(2)}
ON_HOST = fo.place(PARAMS, "layers")
X = jnp.ones((4, 2))
SOME = fo.rows("w", slice(0, 2))
TURNS = fo.rotating(optax.sgd(0.1), "layers", 1, 1, order="ascending")


def layer(h, weights):
    return jnp.tanh(h @ weights["w"]), None


def scanned(frozen=fo.everything, **kwargs):
    def loss(params, x):
        return (fo.scan(layer, x, params["layers"], frozen, **kwargs)[0] @ params["head"]).sum()

    return loss


def streamed_loop(params, x):
    # It closes over `x`, as a model does over a mask for its attention.
    one = fo.streamed(lambda weights: jnp.tanh(x @ weights["w"][0]))
    return (one(params["layers"]) @ params["head"]).sum()


def in_turns(params, x, **kwargs):
    def loss(params):
        h, _ = fo.scan(layer, x, params["layers"], **kwargs)
        return (h @ params["head"]).sum()

    return fo.value_and_grad(loss, TURNS.init(PARAMS))(params)[0]


def streamed_in_turns(params, x):
    return in_turns(params, x, stream=True)


CASES = {
    "scan": (scanned(), PARAMS),
    "scan of rows": (scanned(SOME), PARAMS),
    "streamed scan": (scanned(stream=True), ON_HOST),
    "streamed scan of rows": (scanned(SOME, stream=True), ON_HOST),
    "streamed": (streamed_loop, ON_HOST),
    "scan in turns": (in_turns, PARAMS),
    "streamed scan in turns": (streamed_in_turns, ON_HOST),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("grad", [False, True], ids=["value", "gradient"])
def test_a_loss_keeps_no_value_of_its_trace(name, grad):
    loss, params = CASES[name]

    def run(params, x):
        return jax.grad(loss, 1)(params, x) if grad else loss(params, x)

    with jax.checking_leaks():
        jax.jit(run).lower(params, X)


def test_the_check_sees_a_value_that_is_kept():
    kept = []

    def keeps(x):
        kept.append(x)
        return x

    with jax.checking_leaks(), pytest.raises(Exception, match="Leaked"):
        jax.jit(keeps).lower(X)
