"""How each way of freezing takes a training step.

A way is a function from a case to its `Parts`: what it starts from, its gradient and its update. It
takes and returns either the whole params or, as a partition does, the trainable part alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import freeze_optax as fo
from benchmarks.cases import Case


class Parts(NamedTuple):
    """One way of freezing, in one case.

    Attributes:
      params: What the step changes and returns.
      state: The state of the optimizer.
      rest: What it takes beside and does not return.
      grad: From params, state, rest and a batch to the loss and the gradients.
      update: From gradients, state and params to the params and the state after.
    """

    params: Any
    state: Any
    rest: Any
    grad: Callable[..., tuple[Any, Any]]
    update: Callable[..., tuple[Any, Any]]


class Stage(NamedTuple):
    """A function to jit, with abstract or concrete arguments, and those that may be donated."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    donated: tuple[int, ...]


def norm(tree: Any) -> jax.Array:
    # optax.global_norm became optax.tree.norm; this reads all the gradients in any version.
    return jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree)))


def in_cohorts(case: Case, state: Any, params: Any) -> Any:
    """The state after the trained layers were thawed one group after the other."""
    if case.cohorts == 1:
        return state
    flags = fo.mask(case.frozen, params)
    layers = [name for name, layer in flags.items() if not any(jax.tree.leaves(layer))]
    size = len(layers) // case.cohorts
    state = fo.freeze(state, params, layers[size:])
    for i in range(size, len(layers), size):
        state = fo.thaw(state, params, layers[i : i + size])
    return state


def drop_in(case: Case) -> Parts:
    params, tx = case.params(), case.around(fo.freezable(case.inner, case.frozen))

    def grad(params: Any, state: Any, _: Any, batch: Any) -> Any:
        value_and_grad = fo.value_and_grad(case.loss, frozen=state, holes=case.holes)
        return value_and_grad(params, batch)

    def update(grads: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    # What is around the freezing keeps nothing where it is shown a hole.
    state = tx.init(fo.partition(params, case.frozen)[0] if case.holes else params)
    return Parts(params, in_cohorts(case, state, params), (), grad, update)


def partition_style(case: Case) -> Parts:
    params, tx = case.params(), case.around(fo.freezable(case.inner, case.frozen))
    trainable, rest = fo.partition(params, case.frozen)

    def grad(trainable: Any, _: Any, rest: Any, batch: Any) -> Any:
        of_trainable = lambda trainable: case.loss(fo.merge(trainable, rest), batch)  # noqa: E731
        return jax.value_and_grad(of_trainable)(trainable)

    def update(grads: Any, state: Any, trainable: Any) -> Any:
        updates, state = tx.update(grads, state, trainable)
        return fo.apply_updates(trainable, updates), state

    return Parts(trainable, in_cohorts(case, tx.init(trainable), params), rest, grad, update)


def by_hand(case: Case, whole: bool) -> Parts:
    """Two flat lists, and an optimizer that never hears of the second."""
    params, tx = case.params(), case.around(case.inner)
    flags = jax.tree.leaves(fo.mask(case.frozen, params))
    leaves, treedef = jax.tree.flatten(params)
    trainable = [x for x, flag in zip(leaves, flags, strict=True) if not flag]
    still = [x for x, flag in zip(leaves, flags, strict=True) if flag]

    def grad(params: Any, _: Any, rest: Any, batch: Any) -> Any:
        trainable, still = params if whole else (params, rest)

        def of_trainable(trainable: Any) -> Any:
            a, b = iter(trainable), iter(still)
            merged = treedef.unflatten([next(b) if flag else next(a) for flag in flags])
            return case.loss(merged, batch)

        return jax.value_and_grad(of_trainable)(trainable)

    def update(grads: Any, state: Any, params: Any) -> Any:
        trainable, still = params if whole else (params, ())
        updates, state = tx.update(grads, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        return (trainable, still) if whole else trainable, state

    start, rest = ((trainable, still), ()) if whole else (trainable, still)
    return Parts(start, tx.init(trainable), rest, grad, update)


def with_optax(case: Case, freezing: Callable[[Any], optax.GradientTransformation]) -> Parts:
    """The step of optax's documentation, which differentiates everything."""
    params = case.params()
    tx = case.around(freezing(fo.mask(case.frozen, params)))

    def grad(params: Any, _state: Any, _rest: Any, batch: Any) -> Any:
        return jax.value_and_grad(case.loss)(params, batch)

    def update(grads: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Parts(params, tx.init(params), (), grad, update)


def optax_partition(case: Case) -> Parts:
    def freezing(mask: Any) -> optax.GradientTransformation:
        labels = jax.tree.map(lambda flag: "frozen" if flag else "trainable", mask)
        groups = {"frozen": optax.set_to_zero(), "trainable": case.inner}
        return optax.partition(groups, labels)

    return with_optax(case, freezing)


def selective_transform(case: Case) -> Parts:
    return with_optax(case, lambda mask: optax.selective_transform(case.inner, freeze_mask=mask))


def chain_freeze(case: Case) -> Parts:
    return with_optax(case, lambda mask: optax.chain(case.inner, optax.freeze(mask)))


def equinox(case: Case) -> Parts:
    """As in Equinox's example of a frozen layer."""
    params, tx = case.params(), case.around(case.inner)
    trains = jax.tree.map(lambda flag: not flag, fo.mask(case.frozen, params))

    def grad(params: Any, _state: Any, _rest: Any, batch: Any) -> Any:
        trainable, still = eqx.partition(params, trains)
        of_trainable = lambda trainable: case.loss(eqx.combine(trainable, still), batch)  # noqa: E731
        return eqx.filter_value_and_grad(of_trainable)(trainable)

    def update(grads: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(grads, state, eqx.filter(params, trains))
        return eqx.apply_updates(params, updates), state

    return Parts(params, tx.init(eqx.filter(params, trains)), (), grad, update)


def nnx_wrt(case: Case) -> Parts:
    """An `nnx.Optimizer` and a gradient of the variables that train."""

    class Node(nnx.Module):
        def __init__(self, tree: dict[str, Any]):
            for key, x in tree.items():
                setattr(self, key, Node(x) if isinstance(x, dict) else nnx.Param(x))

    def as_dict(node: Any) -> Any:
        pairs = ((key, x) for key, x in vars(node).items() if isinstance(x, Node | nnx.Variable))
        return {key: as_dict(x) if isinstance(x, Node) else x[...] for key, x in pairs}

    params = case.params()
    flags = jax.tree.leaves_with_path(fo.mask(case.frozen, params))
    trains = {tuple(entry.key for entry in path) for path, flag in flags if not flag}
    wrt = lambda path, x: isinstance(x, nnx.Variable) and tuple(path) in trains  # noqa: E731

    model = Node(params)
    optimizer = nnx.Optimizer(model, case.around(case.inner), wrt=wrt)
    (model_def, model_state), (optimizer_def, state) = nnx.split(model), nnx.split(optimizer)

    def grad(params: Any, _state: Any, _rest: Any, batch: Any) -> Any:
        of_model = lambda model: case.loss(as_dict(model), batch)  # noqa: E731
        argnums = nnx.DiffState(0, wrt)
        return nnx.value_and_grad(of_model, argnums=argnums)(nnx.merge(model_def, params))

    def update(grads: Any, state: Any, params: Any) -> Any:
        model, optimizer = nnx.merge(model_def, params), nnx.merge(optimizer_def, state)
        optimizer.update(model, grads)
        return nnx.state(model), nnx.state(optimizer)

    return Parts(model_state, state, (), grad, update)


class Way(NamedTuple):
    """A way of freezing.

    Attributes:
      parts: From a case to what it does.
      whole: Whether its step returns the whole params.
      cohorts: Whether each leaf can have a step count of its own.
    """

    parts: Callable[[Case], Parts]
    whole: bool = True
    cohorts: bool = False


DROP_IN, PARTITION_STYLE = "freeze_optax", "freeze_optax, partition style"
BY_HAND, BY_HAND_PART = "split by hand", "split by hand, part returned"
WAYS = {
    BY_HAND: Way(lambda case: by_hand(case, whole=True), cohorts=True),
    DROP_IN: Way(drop_in, cohorts=True),
    "optax.partition": Way(optax_partition),
    "optax.selective_transform": Way(selective_transform),
    "chain(…, optax.freeze)": Way(chain_freeze),
    "Equinox partition": Way(equinox),
    "nnx.Optimizer(wrt=…)": Way(nnx_wrt),
    BY_HAND_PART: Way(lambda case: by_hand(case, whole=False), whole=False, cohorts=True),
    PARTITION_STYLE: Way(partition_style, whole=False, cohorts=True),
}


def stages(case: Case, parts: Parts) -> list[Stage]:
    """What is jitted: one step, or the gradients and the update."""

    def logged(value: Any, grads: Any) -> Any:
        return norm(grads) if case.log_norm else value

    def step(params: Any, state: Any, rest: Any, batch: Any) -> Any:
        value, grads = parts.grad(params, state, rest, batch)
        params, state = parts.update(grads, state, params)
        return params, state, value, logged(value, grads)

    # Donated arguments come back in the order in which they went in: JAX pairs buffers by shape, in
    # order, and XLA copies those that it can't leave in place.
    def update(params: Any, state: Any, grads: Any) -> Any:
        return parts.update(grads, state, params)

    args = parts.params, parts.state, parts.rest, case.batch()
    if not case.apart:
        return [Stage(step, args, (0, 1))]
    _, grads = jax.eval_shape(parts.grad, *args)
    return [
        Stage(parts.grad, args, ()),
        Stage(update, (parts.params, parts.state, grads), (0, 1)),
    ]
