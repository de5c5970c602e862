"""What the outputs of a traced function depend on, in one pass over its equations."""

from collections.abc import Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# Of all others, `dce_jaxpr` keeps all inputs where one output is used, also of `custom_jvp_call`.
_CALLS = ("jit", "call", "closed_call", "eval_jaxpr", "shard_map", "remat2", "checkpoint")


def depends_on(jaxpr: Jaxpr, marked: Sequence[bool]) -> list[bool]:
    """Returns for each output whether it depends on a marked input, or on an effect.

    What a callback returns (`io_callback`), say, may differ in a second call. To ask `dce_jaxpr`
    for the inputs of each output in turn was rejected: it took 7 % of the time of tracing. But
    nothing here is finer than what `dce_jaxpr` can divide.

    Args:
      jaxpr: The traced function.
      marked: For each of its inputs whether it is marked.
    """
    is_marked: dict[Any, bool] = dict(zip(jaxpr.invars, marked, strict=True))

    def read(x: Any) -> bool:
        return not isinstance(x, Literal) and is_marked.get(x, False)

    for eqn in jaxpr.eqns:
        outputs = _of_equation(eqn, list(map(read, eqn.invars)))
        is_marked.update(zip(eqn.outvars, outputs, strict=True))
    return list(map(read, jaxpr.outvars))


def _of_equation(eqn: Any, inputs: list[bool]) -> list[bool]:
    name, params = eqn.primitive.name, eqn.params
    if name in _CALLS:
        inner = [x for x in params.values() if _is_jaxpr(x)]
        if len(inner) == 1 and len(_opened(inner[0]).invars) == len(inputs):
            return depends_on(_opened(inner[0]), inputs)
    if name == "scan":
        return _of_scan(eqn, inputs)
    if name == "cond":
        index, *operands = inputs
        branches = [depends_on(_opened(branch), operands) for branch in params["branches"]]
        return [index or any(flags) for flags in zip(*branches, strict=True)]
    return [any(inputs) or has_effects(eqn)] * len(eqn.outvars)


def _of_scan(eqn: Any, inputs: list[bool]) -> list[bool]:
    body = _opened(eqn.params["jaxpr"])
    # The names of the parameters that tell these numbers differ between versions of JAX.
    rows = sum(map(_is_stack_of, eqn.invars, body.invars))
    carries = len(eqn.outvars) - sum(map(_is_stack_of, eqn.outvars, body.outvars))
    carry = slice(len(inputs) - rows - carries, len(inputs) - rows)
    while True:
        outputs = depends_on(body, inputs)
        new = [x or y for x, y in zip(inputs[carry], outputs, strict=False)]
        if new == inputs[carry]:
            return [*new, *outputs[carries:]]
        inputs = [*inputs[: carry.start], *new, *inputs[carry.stop :]]


def _is_stack_of(whole: Any, row: Any) -> bool:
    return whole.aval.ndim > row.aval.ndim


def has_effects(x: Any) -> bool:
    """Returns whether an equation or a jaxpr does more than compute: a callback does, say."""
    # A collective over an axis of a mesh has this effect, and only computes.
    return any(type(effect).__name__ != "NamedAxisEffect" for effect in x.effects)


def without_effects(jaxpr: Jaxpr) -> Jaxpr:
    """Returns a traced function whose equations are said to have no effects.

    `dce_jaxpr` keeps all that have. So it may drop them where no output depends on them.
    """
    if not has_effects(jaxpr):
        return jaxpr
    eqns = [
        eqn.replace(
            params={k: _value_without_effects(v) for k, v in eqn.params.items()},
            effects=frozenset(),
        )
        for eqn in jaxpr.eqns
    ]
    return jaxpr.replace(eqns=eqns, effects=frozenset())


def _value_without_effects(value: Any) -> Any:
    if isinstance(value, tuple) and any(map(_is_jaxpr, value)):
        return tuple(map(_value_without_effects, value))
    if isinstance(value, Jaxpr):
        return without_effects(value)
    if isinstance(value, ClosedJaxpr):
        return value.replace(jaxpr=without_effects(value.jaxpr))
    return value


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, Jaxpr | ClosedJaxpr)


def _opened(x: Any) -> Jaxpr:
    return x if isinstance(x, Jaxpr) else x.jaxpr
