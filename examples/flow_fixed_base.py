"""Fits a normalizing flow of FlowJAX with its base held fixed by a spec, then thaws a part of it.

The base is Student's t distribution. FlowJAX holds params fixed by a wrapper in the model,
`paramax.non_trainable`, which stays for the whole fit. A spec leaves the model as it is, and the
optimizer's state says what is fixed. FlowJAX's own training step reads it there, unchanged.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import paramax
from flowjax.distributions import StudentT
from flowjax.flows import masked_autoregressive_flow
from flowjax.train import step
from flowjax.train.losses import MaximumLikelihoodLoss
from sklearn.datasets import load_diabetes
from tqdm import tqdm

import freeze_optax as fo

FIXED, FREED, RATE = 400, 200, 2e-3
DEGREES_OF_FREEDOM, LOCATION_AND_SCALE = "base_dist/base_dist", "base_dist/bijection"
LOSS = MaximumLikelihoodLoss()
TX = optax.chain(optax.clip_by_global_norm(5.0), optax.adam(RATE))


def serum():
    """Six measurements of the blood of 442 patients, standardised: rows to fit, rows to test."""
    values = load_diabetes(scaled=False).data[:, 4:]
    values = np.random.default_rng(0).permutation(values)
    fit = values[:342]
    return [jnp.asarray((x - fit.mean(0)) / fit.std(0), jnp.float32) for x in (fit, values[342:])]


def new_flow(width):
    freedom = jnp.full(width, 5.0)
    return masked_autoregressive_flow(
        jax.random.key(0), base_dist=StudentT(freedom), flow_layers=4, nn_width=24
    )


def split(flow):
    """Separates what trains from what does not, as FlowJAX does: by dtype, and by its wrapper."""
    is_wrapper = lambda x: isinstance(x, paramax.NonTrainable)  # noqa: E731
    return eqx.partition(flow, eqx.is_inexact_array, is_leaf=is_wrapper)


def train(params, state, static, rows, tx, steps):
    for _ in tqdm(range(steps)):
        params, state, _ = step(params, static, rows, optimizer=tx, opt_state=state, loss_fn=LOSS)
    return params, state


def log_likelihood(params, static, rows):
    return -float(LOSS(params, static, rows))


def gaussian_log_likelihood(fit, test):
    """That of the normal distribution with the mean and the covariance of `fit`, in NumPy."""
    fit, test = np.asarray(fit, np.float64), np.asarray(test, np.float64)
    covariance, centred = np.cov(fit.T, bias=True), test - fit.mean(0)
    squares = np.einsum("ni,ij,nj->n", centred, np.linalg.inv(covariance), centred)
    constant = np.linalg.slogdet(2 * np.pi * covariance)[1]
    return float(-(squares + constant).mean() / 2)


if __name__ == "__main__":
    rows, held_out = serum()
    flow = new_flow(rows.shape[1])
    params, static = split(flow)
    tx = fo.freezable(TX, "base_dist")
    fixed, state = train(params, tx.init(params), static, rows, tx, FIXED)
    state = fo.thaw(state, fixed, DEGREES_OF_FREEDOM)
    once, _ = train(fixed, state, static, rows, tx, 1)  # for the check at the end alone
    freed, state = train(fixed, state, static, rows, tx, FREED)

    print(fo.summary(freed, state, depth=2))
    log_likelihoods = {
        "normal distribution": gaussian_log_likelihood(rows, held_out),
        "flow, before": log_likelihood(params, static, held_out),
        "flow, base fixed": log_likelihood(fixed, static, held_out),
        "flow, degrees of freedom thawed": log_likelihood(freed, static, held_out),
    }
    print("log-likelihood of a row that was held out")
    for name, value in log_likelihoods.items():
        print(f"  {name:<32}{value:8.3f}")
    assert log_likelihoods["flow, base fixed"] > log_likelihoods["normal distribution"] + 1

    # The same bits as with FlowJAX's wrapper and no `freezable`.
    wrapped = eqx.tree_at(lambda x: x.base_dist, flow, replace_fn=paramax.non_trainable)
    by_wrapper, wrapper = split(wrapped)
    by_wrapper, _ = train(by_wrapper, TX.init(by_wrapper), wrapper, rows, TX, FIXED)
    fo.testing.assert_frozen(by_wrapper.bijection, fixed.bijection, fo.everything)
    fo.testing.assert_frozen(params, fixed, "base_dist")
    fo.testing.assert_frozen(params, freed, LOCATION_AND_SCALE)
    # A thawed leaf steps as with a new Adam, whose first step is its rate.
    before, after = (jax.tree.leaves(x.base_dist.base_dist) for x in (fixed, once))
    np.testing.assert_allclose(np.abs(after[0] - before[0]), RATE, rtol=1e-2)
