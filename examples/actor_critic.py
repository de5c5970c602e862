"""Trains an actor and a critic on one encoder, with an optimizer each and a target network.

All of training is one `lax.scan`, over environments and seeds at once, in the style of PureJaxRL.
No optimizer trains the target critic, which follows the critic. The task is to balance a pole.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

import freeze_optax as fo

SEEDS, ENVIRONMENTS, STEPS, UPDATES = 4, 32, 16, 500
DISCOUNT, LAMBDA, FOLLOW, LIMIT = 0.99, 0.95, 0.05, 200
ADAM, TRAINS = optax.adam(2e-3), {"actor": ["encoder", "actor"], "critic": ["critic"]}
OPTIMIZERS = {
    "actor": fo.freezable(ADAM, ["critic", "target"]),
    "critic": fo.freezable(ADAM, ~fo.path("critic")),
}


def move(state, action):
    """Moves the cart by a fiftieth of a second; an episode ends when it or the pole is too far."""
    x, speed, angle, turn, age = state
    push = jnp.where(action == 1, 10.0, -10.0) + 0.05 * turn**2 * jnp.sin(angle)
    pull = 9.8 * jnp.sin(angle) - jnp.cos(angle) * push / 1.1
    spin = pull / (0.5 * (4 / 3 - 0.1 * jnp.cos(angle) ** 2 / 1.1))
    along = push / 1.1 - 0.05 * spin * jnp.cos(angle) / 1.1
    moved = x + 0.02 * speed, speed + 0.02 * along, angle + 0.02 * turn, turn + 0.02 * spin
    return jnp.stack([*moved, age + 1])


def restart(key):
    return jnp.append(jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05), 0.0)


def new_params(key):
    shapes = {"hidden": (4, 64), "features": (64, 64), "actor": (64, 2), "critic": (64, 1)}
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    drawn = {x: jax.random.normal(keys[x], shape) / 8 for x, shape in shapes.items()}
    encoder = {x: drawn.pop(x) for x in ("hidden", "features")}
    return {"encoder": encoder, **drawn, "target": jnp.copy(drawn["critic"])}


def encode(params, states):
    x = jnp.tanh(states[..., :4] * jnp.array([1.0, 1.0, 5.0, 1.0]) @ params["encoder"]["hidden"])
    return jnp.tanh(x @ params["encoder"]["features"])


def value(params, states, critic):
    return (encode(params, states) @ params[critic])[..., 0]


def rollout(params, states, key):
    """Acts for some steps; returns the last states, and what happened."""

    def step(states, key):
        keys = jax.random.split(key, 1 + ENVIRONMENTS)
        actions = jax.random.categorical(keys[0], encode(params, states) @ params["actor"])
        after = jax.vmap(move)(states, actions)
        fell = (jnp.abs(after[:, 0]) > 2.4) | (jnp.abs(after[:, 2]) > 0.21)
        over = fell | (after[:, 4] >= LIMIT)
        next_states = jnp.where(over[:, None], jax.vmap(restart)(keys[1:]), after)
        seen = {"state": states, "action": actions, "after": after, "fell": fell, "over": over}
        return next_states, seen

    states, seen = jax.lax.scan(step, states, jax.random.split(key, STEPS))
    return states, {**seen, "returns": returns_of(params, seen)}


def returns_of(params, seen):
    """Averages over returns of one to all steps, with the target critic after the last one."""
    ahead = value(params, seen["after"], "target")

    def step(later, x):
        mixed = jnp.where(x["over"], x["ahead"], (1 - LAMBDA) * x["ahead"] + LAMBDA * later)
        total = 1 + DISCOUNT * jnp.where(x["fell"], 0.0, mixed)
        return total, total

    return jax.lax.scan(step, ahead[-1], {**seen, "ahead": ahead}, reverse=True)[1]


def actor_loss(params, seen):
    log_choices = jax.nn.log_softmax(encode(params, seen["state"]) @ params["actor"])
    gain = jax.lax.stop_gradient(seen["returns"] - value(params, seen["state"], "critic"))
    chosen = jnp.take_along_axis(log_choices, seen["action"][..., None], -1)[..., 0]
    entropy = -(jnp.exp(log_choices) * log_choices).sum(-1)
    return -(chosen * (gain - gain.mean()) / (gain.std() + 1e-6) + 0.01 * entropy).mean()


LOSSES = {
    "actor": actor_loss,
    "critic": lambda p, x: ((value(p, x["state"], "critic") - x["returns"]) ** 2).mean(),
}


def update(carry, key):
    params, opt_states, states = carry
    states, seen = rollout(params, states, key)
    for name, tx in OPTIMIZERS.items():
        grads = fo.grad(LOSSES[name], frozen=opt_states[name])(params, seen)
        updates, state = tx.update(grads, opt_states[name], params)
        params = fo.apply_updates(params, updates, frozen=state)
        opt_states = {**opt_states, name: state}
    target = optax.incremental_update(params["critic"], params["target"], FOLLOW)
    length = (seen["after"][..., 4] * seen["over"]).sum() / jnp.maximum(seen["over"].sum(), 1)
    return ({**params, "target": target}, opt_states, states), length


def begin(key):
    params = new_params(key)
    opt_states = {name: tx.init(params) for name, tx in OPTIMIZERS.items()}
    return params, opt_states, jax.vmap(restart)(jax.random.split(key, ENVIRONMENTS))


@functools.partial(jax.jit, static_argnums=1)
def train(keys, show):
    def of_all_seeds(carry, keys):
        jax.debug.callback(show)
        return jax.vmap(update)(carry, keys)

    each = jax.vmap(lambda key: jax.random.split(key, UPDATES), out_axes=1)(keys)
    return jax.lax.scan(of_all_seeds, jax.vmap(begin)(keys), each)


def check(params, states, key):
    """Compares a step of each optimizer with Adam on the subtrees that it trains, bit for bit."""
    _, seen = rollout(params, states, key)
    for name, tx in OPTIMIZERS.items():
        opt_state, part = tx.init(params), {x: params[x] for x in TRAINS[name]}
        grads = fo.grad(LOSSES[name], frozen=opt_state)(params, seen)
        ours = fo.apply_updates(params, tx.update(grads, opt_state, params)[0], frozen=opt_state)
        grads = jax.grad(lambda x, f=LOSSES[name]: f({**params, **x}, seen))(part)
        by_hand = optax.apply_updates(part, ADAM.update(grads, ADAM.init(part))[0])
        fo.testing.assert_frozen({**params, **by_hand}, ours, fo.everything)


if __name__ == "__main__":
    keys = jax.random.split(jax.random.key(0), SEEDS)
    check(*begin(keys[0])[::2], keys[1])
    with tqdm(total=UPDATES) as bar:
        (params, opt_states, _), lengths = jax.block_until_ready(train(keys, bar.update))
    params, opt_states = jax.tree.map(lambda x: x[0], (params, opt_states))
    print(fo.summary(params, opt_states["actor"], depth=1))
    print("steps of an episode, by seed:", lengths[:20].mean(0), "to", lengths[-20:].mean(0))
    assert lengths[-20:].mean() > 2 * lengths[:20].mean()
