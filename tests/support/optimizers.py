"""Every optimizer of optax, built with the few arguments that it insists on."""

import functools
import inspect
from collections.abc import Callable, Container
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from tests.support import sampling

# What an argument without a default is set to, by its name.
ARGUMENTS: dict[str, Any] = {
    "learning_rate": 0.1,
    "max_learning_rate": 0.1,
    "init_learning_rate": 0.1,
    "step_size": 0.1,
    "scale_factor": 0.5,
    "decay": 0.9,
    "optimism": 0.1,
    "eta": 0.01,
    "gamma": 0.55,
    "key": 7,
    "max_norm": 0.5,
    "max_delta": 0.05,
    "threshold": 0.05,
    "clipping": 0.05,
    "l2_norm_clip": 0.5,
    "noise_multiplier": 0.1,
    "max_backtracking_steps": 8,
    "max_linesearch_steps": 8,
    "step_size_fn": optax.linear_schedule(0.1, 0.01, 3),
    "max_consecutive_errors": 3,
}

# Transformations whose arguments are other transformations or functions.
WRAPPERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.1), 3),
    "chain": lambda: optax.chain(
        optax.clip_by_global_norm(0.5), optax.adam(0.1), optax.add_decayed_weights(-0.01)
    ),
    "conditionally_mask": lambda: optax.conditionally_mask(
        optax.adam(0.1), lambda step, **_: step % 2 == 0
    ),
    "conditionally_transform": lambda: optax.conditionally_transform(
        optax.adam(0.1), lambda step, **_: step % 2 == 0
    ),
    "flatten": lambda: optax.flatten(optax.adam(0.1)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(
        learning_rate=optax.linear_schedule(0.1, 0.01, 3)
    ),
    "inject_stateful_hyperparams": lambda: optax.inject_stateful_hyperparams(optax.adam)(
        learning_rate=0.1
    ),
    "masked": lambda: optax.masked(
        optax.adam(0.1), lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
    ),
    "named_chain": lambda: optax.named_chain(("clip", optax.clip(0.1)), ("adam", optax.adam(0.1))),
    "partition": lambda: optax.partition(
        {2: optax.adam(0.1), 1: optax.sgd(0.1, momentum=0.9)},
        lambda params: jax.tree.map(lambda x: x.ndim, params),
    ),
    "mechanize": lambda: optax.contrib.mechanize(optax.sgd(0.1)),
    "sam": lambda: optax.contrib.sam(
        optax.sgd(0.1), optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    ),
    "schedule_free": lambda: optax.contrib.schedule_free(optax.sgd(0.1), 0.1, b1=0.9),
    "split_real_and_imaginary": lambda: optax.contrib.split_real_and_imaginary(optax.adam(0.1)),
    # A name for each optimizer that takes another: gradient accumulation and the like.
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "galore": lambda: optax.contrib.galore(0.1, rank=2, update_proj_gap=2),
    "scale_by_galore": lambda: optax.contrib.scale_by_galore(rank=2, update_proj_gap=2),
}
WRAPPERS["multi_transform"] = WRAPPERS["partition"]

EXCLUDED: dict[str, str] = {
    "differentially_private_aggregate": "wants one gradient per example, with a leading axis",
    "_deprecated_differentially_private_aggregate": "as the one of optax.contrib",
    "dpsgd": "wants one gradient per example, with a leading axis",
    "_deprecated_dpsgd": "as the one of optax.contrib",
    "freeze": "takes a mask of the params: a way of freezing of its own",
    "selective_transform": "takes a mask of the params: a way of freezing of its own",
    "lookahead": "params are a pair; its own test in tests/transform/test_optimizers.py",
    "stateless": "wraps a function of the user's",
    "stateless_with_tree_map": "wraps a function of the user's",
    "measure_with_ema": "wraps a function of the user's",
    "snapshot": "wraps a function of the user's",
    "monitor": "wraps a function of the user's",
    "scale_by_muon": "without dimension numbers for every leaf its init fails, bare too",
    "with_extra_args_support": "a type conversion, no transformation of its own",
}


def names(module: Any) -> list[str]:
    """The functions of a module of optax that give a transformation."""
    return [
        name
        for name, value in inspect.getmembers(module, inspect.isfunction)
        if "GradientTransformation" in str(inspect.signature(value).return_annotation)
    ]


def build(module: Any, name: str) -> optax.GradientTransformationExtraArgs:
    """The transformation `module.name`."""
    if name in WRAPPERS:
        return optax.with_extra_args_support(WRAPPERS[name]())
    factory = getattr(module, name)
    arguments = {
        argument: ARGUMENTS[argument]
        for argument, parameter in inspect.signature(factory).parameters.items()
        # optax warns where no key is given, though it has a default.
        if parameter.default is inspect.Parameter.empty or argument == "key"
    }
    return optax.with_extra_args_support(factory(**arguments))


def extras(
    name: str, loss: Callable[[Any], jax.Array], value: jax.Array, grads: Any
) -> dict[str, Any]:
    """The extra arguments of `update` that the transformation asks for."""
    if name in ("lbfgs", "scale_by_backtracking_linesearch", "scale_by_zoom_linesearch"):
        return {"value": value, "grad": grads, "value_fn": loss}
    if name == "sam":
        return {}
    return {"value": value, "obj_fn": loss}


@functools.cache
def every() -> list[tuple[Any, str]]:
    """All transformations of optax and optax.contrib, less the excluded."""
    found = [(module, name) for module in (optax, optax.contrib) for name in names(module)]
    return [(optax, "MultiSteps")] + [pair for pair in found if pair[1] not in EXCLUDED]


# One of each kind: elementwise, factored, orthogonalised, with a norm over all leaves, noisy, with
# a line search, with extra arguments, with averages of the params, wrappers, and those whose state
# is not like the params.
KINDS = {
    *("adafactor", "adam", "chain", "flatten", "inject_hyperparams", "lbfgs", "masked", "muon"),
    *("noisy_sgd", "partition", "polyak_sgd", "schedule_free_adamw", "sgd", "MultiSteps"),
    *("apply_if_finite", "sam"),
}


# Those of them that our code treats otherwise: what is no leaf's, what sees whole leaves or all of
# them, what calls the loss, and what wraps others.
FEW_KINDS = {"adafactor", "chain", "lbfgs", "muon", "noisy_sgd", "partition", "schedule_free_adamw"}


def cases(pairs: list[tuple[Any, str]], always: Container[str] = KINDS) -> list[Any]:
    """The transformations as parameters of a test: all but one of each kind are exhaustive.

    They go through the same code of ours: what differs is optax's.
    """
    named = {f"{module.__name__}.{name}": (module, name) for module, name in pairs}
    return sampling.cases(named, [key for key, (_, name) in named.items() if name in always])


def complete() -> list[tuple[Any, str]]:
    """Those that are no part of others, as `scale_by_adam` is of Adam: half as many to compile."""
    return [(module, name) for module, name in every() if not name.startswith("scale_by_")]


def params() -> dict[str, dict[str, jax.Array]]:
    """Three layers; enough rows and columns for factored and orthogonalised updates."""
    keys = jax.random.split(jax.random.key(0), 6)
    return {
        layer: {
            "kernel": jax.random.normal(keys[2 * i], (6, 4)),
            "bias": jax.random.normal(keys[2 * i + 1], (4,)) * jnp.float32(0.1),
        }
        for i, layer in enumerate(("bottom", "middle", "top"))
    }
