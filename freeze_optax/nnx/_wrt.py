"""NNX filters of the variables that train."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, final

from freeze_optax._rows.flags import Flag
from freeze_optax._rows.subset import Subset
from freeze_optax._select.by_variable import VariableFilter
from freeze_optax._select.specs import Spec, resolve
from freeze_optax._tree.key_paths import path_text
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.messages import quoted_list
from freeze_optax._tree.modules import KeyPath
from freeze_optax.nnx._flax import AS_GRAPH, nnx
from freeze_optax.nnx._modules import require_module
from freeze_optax.nnx._specs import OnModel


@final
@dataclasses.dataclass(frozen=True)
class TrainableVariables(VariableFilter):
    """An NNX filter that matches the variables at some paths."""

    paths: frozenset[KeyPath]

    def __call__(self, path: KeyPath, value: Any) -> bool:
        del value
        return tuple(path) in self.paths

    def __repr__(self) -> str:
        return f"wrt({len(self.paths)} variables)"


def trainable_filter(leaves: Leaves, frozen: Sequence[Flag]) -> TrainableVariables:
    """Returns the filter of the variables to differentiate, also those with some frozen rows."""
    flagged = nnx.to_flat_state(leaves.rebuild(flag is True for flag in frozen))
    flags = {tuple(path): Leaves(variable).values for path, variable in flagged}
    parts = [path for path, inner in flags.items() if any(inner) and not all(inner)]
    if parts:
        raise ValueError(
            f"NNX takes a Variable as a whole, but of {path_text(parts[0])!r} only some leaves are "
            "frozen; freeze all of them or none, or make a Variable of each"
        )
    return TrainableVariables(frozenset(path for path, inner in flags.items() if not any(inner)))


def variables_of(model: nnx.Module, wrt: Any) -> Any:
    """Returns the variables of a model that an NNX filter matches; raises if it matches none."""
    require_module(model)
    variables = nnx.state(model, wrt, **AS_GRAPH)
    if not nnx.to_flat_state(variables):
        kinds = {type(x).__name__: None for _, x in nnx.to_flat_state(nnx.state(model, **AS_GRAPH))}
        has = f"variables of the types {quoted_list(kinds)}" if kinds else "no variables"
        name = wrt.__name__ if isinstance(wrt, type) else repr(wrt)
        raise ValueError(
            f"no variable of this {type(model).__name__} is matched by wrt={name}; it has {has}; "
            "pass the type of those to train as wrt"
        )
    return variables


def wrt(model: nnx.Module, where: Spec, wrt: Any = nnx.Param) -> Callable[[KeyPath, Any], bool]:
    """Returns an NNX filter of the trainable variables of a model: all but the selected ones.

    It is for `nnx.Optimizer(wrt=…)` with a plain optax transformation, and for
    `nnx.DiffState(0, …)`. Such an optimizer cannot thaw anything later. An optimizer of
    `freeze_optax.freezable` with `wrt=nnx.Param` can.

    Examples:
      >>> import optax
      >>> from flax import nnx
      >>> from freeze_optax import nnx as fnnx
      >>> model = nnx.Sequential(*(nnx.Linear(2, 2, rngs=nnx.Rngs(i)) for i in range(2)))
      >>> trainable = fnnx.wrt(model, "layers/0")
      >>> optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=trainable)
      >>> loss = lambda model: model.layers[1].kernel.sum()
      >>> grads = nnx.grad(loss, argnums=nnx.DiffState(0, trainable))(model)
      >>> updates = optimizer.update(model, grads)

    Args:
      model: The model.
      where: What is frozen: any spec, see `freeze_optax.mask`. Types are read from the model.
      wrt: An NNX filter, a type of Variable for example: the variables to choose from.

    Returns:
      A hashable filter. Two filters are equal if they match the same variables. A filter holds the
      paths that the spec selects now, so it is right as long as the variables keep their paths.

    Raises:
      ValueError: If the spec does not fit the params, or freezes a part of a Variable; or if no
        variable of the model is matched by `wrt`. The error names the types that the model has.
      IndexError: If `fo.layers(pattern)[i]` names a layer that does not exist.
      TypeError: If `model` is not an NNX module.
    """
    leaves = Leaves(variables_of(model, wrt))
    flags = resolve(OnModel(where, model), leaves)
    for path, flag in zip(leaves.paths, flags, strict=True):
        if isinstance(flag, Subset):
            raise ValueError(
                f"NNX takes a Variable as a whole, but of {path!r} {flag!r} are frozen; give an "
                "optimizer of fo.freezable, with wrt=nnx.Param, that spec"
            )
    return trainable_filter(leaves, flags)
