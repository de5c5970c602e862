"""Flax NNX: freezing with the model at hand, and editing an optimizer in place.

NNX keeps a state in Variables of its own. So to continue with an exported state, let the optimizer
start with it. Its `step` belongs to NNX and is not exported: set `optimizer.step[...] = step`.

    >>> import optax
    >>> import freeze_optax as fo
    >>> from flax import nnx
    >>> model, tx = nnx.Linear(2, 2, rngs=nnx.Rngs(0)), fo.freezable(optax.adam(1e-3), "kernel")
    >>> exported = fo.export_state(nnx.Optimizer(model, tx, wrt=nnx.Param).opt_state)
    >>> resumed = tx._replace(init=lambda params: fo.import_state(tx, params, exported))
    >>> optimizer = nnx.Optimizer(model, resumed, wrt=nnx.Param)
    >>> optimizer.tx = tx  # which does not hold the export
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, final

from freeze_optax._edit import freeze_thaw as _edit
from freeze_optax._params.zeros import Zeros
from freeze_optax._rows.rows import Flag, Rows
from freeze_optax._rows.take_put import scatter_rows, take_rows
from freeze_optax._select.selector import Selector, nothing
from freeze_optax._select.specs import Spec, as_selector, resolve, schedules_in_spec
from freeze_optax._state.freeze_state import states_in
from freeze_optax._tree.key_paths import nodes_of, path_text
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.modules import KeyPath, Modules, children_of, walk_nodes
from freeze_optax._tree.variables import is_variable

try:
    from flax import nnx
except ImportError as error:
    raise ImportError("freeze_optax.nnx needs flax: pip install 'freeze_optax[flax]'") from error

__all__ = ["freeze", "grad", "modules", "set_frozen", "thaw", "value_and_grad", "wrt"]


def modules(module: nnx.Module, /) -> Modules:
    """Returns the modules of an NNX model by path, so that selectors can ask for their type.

    The functions of this module that take the model need no such table. `freezable` needs one
    inside an `nnx.Optimizer`, which passes it an `nnx.State`: variables without their modules. For
    the same reason NNX's own filter `OfType(nnx.BatchNorm)` matches nothing there.

    Examples:
      >>> import optax
      >>> import freeze_optax as fo
      >>> from flax import nnx
      >>> from freeze_optax import nnx as fnnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(2, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs))
      >>> table = fnnx.modules(model)
      >>> list(table)
      ['', 'layers', 'layers/0', 'layers/1']
      >>> tx = fo.freezable(optax.adam(1e-3), fo.of_type(nnx.BatchNorm, modules=table))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    Args:
      module: The model.

    Returns:
      A dict from paths to the module objects of the model, with `""` for the model itself. A shared
      module is under each of its paths. An `nnx.State` has the params of a shared Variable once, at
      one of its paths. The table knows the other paths too, so selectors find them by any path.

    Raises:
      TypeError: If `module` is not an NNX module.
    """
    if not isinstance(module, nnx.Module):
        raise TypeError(f"an NNX module is needed here, not a {type(module).__name__}")
    by_path: dict[str, nnx.Module] = {}
    paths: dict[int, list[str]] = {}
    for path, node in walk_nodes(module, _children):
        if isinstance(node, nnx.Module):
            by_path[path] = node
        elif is_variable(node):
            paths.setdefault(id(node), []).append(path)
    shared = [group for group in paths.values() if len(group) > 1]
    aliases: dict[str, str] = {}
    if shared:
        state_paths = {path_text(entries) for entries, _ in nnx.to_flat_state(nnx.state(module))}
        for group in shared:
            stored = [path for path in group if path in state_paths]
            aliases.update((path, stored[0]) for path in group if stored and path not in stored)
    return Modules(by_path, aliases)


def _children(node: Any) -> list[tuple[KeyPath, Any]] | None:
    # To jax an object of a class with `pytree=False` is a leaf. NNX looks into its attributes.
    below = children_of(node)
    if below is None and isinstance(node, nnx.Pytree):
        return [((k,), v) for k, v in sorted(vars(node).items()) if not k.startswith("_pytree__")]
    return below


@final
class _OnModel(Selector):
    """A spec for the variables of a model, with the modules and aliases that only the model has."""

    def __init__(self, spec: Spec, model: nnx.Module):
        self._selector, self._modules = as_selector(spec), modules(model)

    def flags(self, leaves: Leaves) -> Sequence[Flag]:
        table = self._modules
        return self._selector.flags(Leaves(leaves.tree, modules=table, aliases=table.aliases))

    def __repr__(self) -> str:
        return repr(self._selector)


@final
@dataclasses.dataclass(frozen=True)
class _Variables:
    """An NNX filter that matches the variables at some paths."""

    paths: frozenset[KeyPath]

    def __call__(self, path: KeyPath, value: Any) -> bool:
        del value
        return tuple(path) in self.paths

    def __repr__(self) -> str:
        return f"wrt({len(self.paths)} variables)"


def _trainable(leaves: Leaves, frozen: Sequence[Flag]) -> _Variables:
    """Returns the filter of the variables to differentiate, also those with some frozen rows."""
    flagged = nnx.to_flat_state(leaves.rebuild(flag is True for flag in frozen))
    flags = {tuple(path): Leaves(variable).values for path, variable in flagged}
    parts = [path for path, inner in flags.items() if any(inner) and not all(inner)]
    if parts:
        raise ValueError(
            f"NNX takes a Variable as a whole, but of {path_text(parts[0])!r} only some leaves are "
            "frozen; freeze all of them or none, or make a Variable of each"
        )
    return _Variables(frozenset(path for path, inner in flags.items() if not any(inner)))


def wrt(model: nnx.Module, where: Spec) -> Callable[[KeyPath, Any], bool]:
    """Returns an NNX filter of the trainable `nnx.Param`s of a model: all but the selected ones.

    It is for `nnx.Optimizer(wrt=…)` with a plain optax transformation, and for
    `nnx.DiffState(0, …)`. Such an optimizer cannot thaw anything later. An optimizer of `freezable`
    with `wrt=nnx.Param` can.

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

    Returns:
      A hashable filter. Two filters are equal if they match the same variables. A filter holds the
      paths that the spec selects now, so it is right as long as the variables keep their paths.

    Raises:
      ValueError: If the spec does not fit the params, or freezes a part of a Variable.
      IndexError: If `fo.layers(pattern)[i]` names a layer that does not exist.
      TypeError: If `model` is not an NNX module.
    """
    leaves = Leaves(nnx.state(model, nnx.Param))
    flags = resolve(_OnModel(where, model), leaves)
    for path, flag in zip(leaves.paths, flags, strict=True):
        if isinstance(flag, Rows):
            raise ValueError(
                f"NNX takes a Variable as a whole, but of {path!r} {flag!r} are frozen; give an "
                "optimizer of fo.freezable, with wrt=nnx.Param, that spec"
            )
    return _trainable(leaves, flags)


def value_and_grad(
    fun: Callable[..., Any], frozen: Spec, has_aux: bool = False
) -> Callable[..., Any]:
    """As `nnx.value_and_grad`, but without a backward pass for frozen variables.

    `fun` updates the other state of the model too (BatchNorm statistics, RNG counts), as with NNX.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import freeze_optax as fo
      >>> from flax import nnx
      >>> from freeze_optax import nnx as fnnx
      >>> model = nnx.Sequential(*(nnx.Linear(2, 2, rngs=nnx.Rngs(i)) for i in range(2)))
      >>> tx = fo.freezable(optax.adam(1e-3), "layers/0")
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> loss = lambda model, x: (model(x) ** 2).mean()
      >>> value, grads = fnnx.value_and_grad(loss, frozen=optimizer)(model, jnp.ones((1, 2)))
      >>> updates = optimizer.update(model, grads)

    Args:
      fun: Takes the model first and returns a real scalar; with `has_aux`, (scalar, anything).
      frozen: What not to differentiate: any spec, see `freeze_optax.mask`. It is safest to pass the
        optimizer. Types are read from the model.
      has_aux: Whether `fun` returns a pair.

    Returns:
      A function with the arguments of `fun`, the model by position. It returns the pair of the
      value of `fun` and the gradient, an `nnx.State` that `optimizer.update(model, grads)` takes.
      The gradient has the variables of the optimizer if `frozen` is one, else all `nnx.Param`s,
      with zeros at the frozen ones.

    Raises:
      ValueError: If `frozen` is the state of `freeze_optax.scheduled`. When called, if the spec
        does not fit the params, or freezes some leaves, but not all, of a tree in a Variable.
      IndexError: When called, if `fo.layers(pattern)[i]` names a layer that does not exist.
      TypeError: When called, if the first argument is not an NNX module.
    """
    if schedules_in_spec(frozen):
        raise ValueError(
            "with the state of fo.scheduled, what is frozen changes while the program runs; "
            "differentiate an nnx.State with fo.value_and_grad, which switches"
        )

    @functools.wraps(fun)
    def value_and_grad_fn(model: nnx.Module, /, *args: Any, **kwargs: Any) -> Any:
        leaves = Leaves(nnx.state(model, _filter_of(frozen)))
        is_bare = isinstance(frozen, nnx.Optimizer) and not states_in(frozen)
        flags = resolve(_OnModel(nothing if is_bare else frozen, model), leaves)
        argument = nnx.DiffState(0, _trainable(leaves, flags))
        value_and_trainable_grad = nnx.value_and_grad(fun, argnums=argument, has_aux=has_aux)
        value, gradient = value_and_trainable_grad(model, *args, **kwargs)
        return value, _with_zeros(leaves, flags, gradient)

    return value_and_grad_fn


def _filter_of(frozen: Spec) -> Any:
    """Returns a filter of the variables of a gradient: the optimizer's, if `frozen` is one."""
    if isinstance(frozen, nnx.Optimizer):
        return frozen.wrt
    states = [] if isinstance(frozen, Selector | str) else states_in(frozen)
    if len(states) != 1:
        return nnx.Param
    nodes = nodes_of(states[0].plan.paths)  # for a Variable that holds a tree
    return lambda path, _: path_text(path) in nodes


def _with_zeros(leaves: Leaves, frozen: Sequence[Flag], gradient: Any) -> Any:
    """Returns the gradient with zeros at all frozen variables and rows."""
    zeros, by_path = Zeros(), dict(nnx.to_flat_state(gradient))
    complete = Leaves(
        nnx.from_flat_state(
            (path, by_path[path] if path in by_path else _zeros_like(variable, zeros))
            for path, variable in nnx.to_flat_state(leaves.tree)
        )
    )
    return complete.rebuild(
        scatter_rows(take_rows(x, ~flag), ~flag, 0.0) if isinstance(flag, Rows) else x
        for x, flag in zip(complete.values, frozen, strict=True)
    )


def _zeros_like(variable: Any, zeros: Zeros) -> Any:
    """Returns a variable with zeros in the place of its leaves, for a gradient."""
    leaves = Leaves(variable)
    return leaves.fill_leaves(map(zeros.gradient, leaves.values))


def grad(fun: Callable[..., Any], frozen: Spec, has_aux: bool = False) -> Callable[..., Any]:
    """As `value_and_grad`, without the value.

    Examples:
      >>> from flax import nnx
      >>> from freeze_optax import nnx as fnnx
      >>> model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
      >>> grads = fnnx.grad(lambda model: model.bias.sum() ** 2, frozen="kernel")(model)
      >>> grads["kernel"][...].any()
      Array(False, dtype=bool)

    Args:
      fun: As for `value_and_grad`.
      frozen: As for `value_and_grad`.
      has_aux: As for `value_and_grad`.

    Returns:
      A function with the arguments of `fun` that returns the gradient; with `has_aux`, the pair of
      the gradient and the auxiliary value.

    Raises:
      TypeError, ValueError, IndexError: As for `value_and_grad`.
    """
    with_value = value_and_grad(fun, frozen, has_aux=has_aux)

    @functools.wraps(fun)
    def grad_fn(model: nnx.Module, /, *args: Any, **kwargs: Any) -> Any:
        value, grads = with_value(model, *args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return grad_fn


def freeze(
    optimizer: nnx.Optimizer[Any], model: nnx.Module, where: Spec, keep_state: bool = False
) -> None:
    """Freezes more variables, in place, as `freeze_optax.freeze` does for a state.

    Examples:
      >>> import optax
      >>> import freeze_optax as fo
      >>> from flax import nnx
      >>> from freeze_optax import nnx as fnnx
      >>> model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, fo.freezable(optax.adam(1e-3)), wrt=nnx.Param)
      >>> fnnx.freeze(optimizer, model, "kernel")

    Args:
      optimizer: An optimizer whose transformation is a `freezable`, or contains one.
      model: The model that the optimizer updates.
      where: The variables to freeze: any spec, see `freeze_optax.mask`. Types are read from the
        model. A shared variable can be named by each of its paths.
      keep_state: Whether to park the state of these variables for `thaw`. If False, it is dropped.

    Raises:
      TypeError: If `optimizer` is not an `nnx.Optimizer` or holds no `FreezeState`, or `model` is
        not an NNX module.
      ValueError, IndexError: As `freeze_optax.freeze`. After an error the optimizer is unchanged.
    """
    _edit_in_place(_edit.freeze, optimizer, model, where, keep_state=keep_state)


def thaw(optimizer: nnx.Optimizer[Any], model: nnx.Module, where: Spec) -> None:
    """Trains variables again, in place, as `freeze_optax.thaw` does for a state.

    Examples:
      >>> import optax
      >>> import freeze_optax as fo
      >>> from flax import nnx
      >>> from freeze_optax import nnx as fnnx
      >>> model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
      >>> tx = fo.freezable(optax.adam(1e-3), "kernel")
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> fnnx.thaw(optimizer, model, "kernel")

    Args:
      optimizer: As for `freeze`.
      model: As for `freeze`.
      where: The variables to train: any spec, as for `freeze`.

    Raises:
      TypeError, ValueError, IndexError: As for `freeze`.
    """
    _edit_in_place(_edit.thaw, optimizer, model, where)


def set_frozen(
    optimizer: nnx.Optimizer[Any], model: nnx.Module, frozen: Spec, keep_state: bool = False
) -> None:
    """Freezes exactly these variables, in place, as `freeze_optax.set_frozen` does for a state.

    Examples:
      >>> import optax
      >>> import freeze_optax as fo
      >>> from flax import nnx
      >>> from freeze_optax import nnx as fnnx
      >>> model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
      >>> tx = fo.freezable(optax.adam(1e-3), "kernel")
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> fnnx.set_frozen(optimizer, model, "bias")

    Args:
      optimizer: As for `freeze`.
      model: As for `freeze`.
      frozen: The variables that are frozen afterwards: any spec, as for `freeze`.
      keep_state: As for `freeze`, for the variables that this call freezes.

    Raises:
      TypeError, ValueError, IndexError: As for `freeze`.
    """
    _edit_in_place(_edit.set_frozen, optimizer, model, frozen, keep_state=keep_state)


def _edit_in_place(
    edit: Callable[..., Any], optimizer: Any, model: nnx.Module, where: Spec, **options: bool
) -> None:
    """Puts the edited state into the optimizer; an edit that raises leaves it unchanged."""
    if not isinstance(optimizer, nnx.Optimizer):
        name = edit.__name__
        raise TypeError(
            f"nnx.{name} takes an nnx.Optimizer first, not a {type(optimizer).__name__}: "
            f"{name}(optimizer, model, ...)"
        )
    selector = _OnModel(where, model)
    state, params = optimizer.opt_state, nnx.state(model, optimizer.wrt)
    edited = edit(state, params, selector, **options)
    if edited is not state:
        optimizer.opt_state = nnx.data(edited)
