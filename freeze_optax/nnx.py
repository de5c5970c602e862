"""Flax NNX: freezing with the model at hand, and editing an optimizer in place.

An optimizer goes on with an exported state if that is what it starts with, as NNX keeps a state in
Variables of its own; its `step` is NNX's, and in no export (`optimizer.step[...] = step`).

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
    """The modules of an NNX model by path, so that selectors can ask for their type.

    The functions here that are given the model need no such table. `freezable` does inside an
    `nnx.Optimizer`, which hands it an `nnx.State`: variables without their modules. NNX's own
    filter `OfType(nnx.BatchNorm)` sees no modules either, and matches nothing.

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
      A dict from paths, `""` for the model itself, to the very modules; a shared module is under
      each of its paths. The params of a shared Variable are in an `nnx.State` once; the table
      knows their other paths, so that selectors find them by any.

    Raises:
      TypeError: If `module` is none of NNX.
    """
    if not isinstance(module, nnx.Module):
        raise TypeError(f"an NNX module is needed here, not a {type(module).__name__}")
    found: dict[str, nnx.Module] = {}
    paths: dict[int, list[str]] = {}
    for path, node in walk_nodes(module, _children):
        if isinstance(node, nnx.Module):
            found[path] = node
        elif is_variable(node):
            paths.setdefault(id(node), []).append(path)
    shared = [group for group in paths.values() if len(group) > 1]
    aliases: dict[str, str] = {}
    if shared:
        own = {path_text(entries) for entries, _ in nnx.to_flat_state(nnx.state(module))}
        for group in shared:
            kept = [path for path in group if path in own]
            aliases.update((path, kept[0]) for path in group if kept and path not in kept)
    return Modules(found, aliases)


def _children(node: Any) -> list[tuple[KeyPath, Any]] | None:
    # With `pytree=False` a class is a leaf to jax; its attributes are what its graph has.
    below = children_of(node)
    if below is None and isinstance(node, nnx.Pytree):
        return [((k,), v) for k, v in sorted(vars(node).items()) if not k.startswith("_pytree__")]
    return below


@final
class _OnModel(Selector):
    """A spec for the variables of a model, with what only the model tells: types and aliases."""

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
    """An NNX filter of the variables at some paths."""

    paths: frozenset[KeyPath]

    def __call__(self, path: KeyPath, value: Any) -> bool:
        del value
        return tuple(path) in self.paths

    def __repr__(self) -> str:
        return f"wrt({len(self.paths)} variables)"


def _trainable(leaves: Leaves, frozen: Sequence[Flag]) -> _Variables:
    # One that is frozen by rows has to be differentiated as a whole.
    flagged = nnx.to_flat_state(leaves.rebuild(flag is True for flag in frozen))
    flags = {tuple(path): Leaves(variable).values for path, variable in flagged}
    parts = [path for path, inside in flags.items() if any(inside) and not all(inside)]
    if parts:
        raise ValueError(
            f"NNX takes a Variable as a whole, but of {path_text(parts[0])!r} only some leaves are "
            "frozen; freeze all of them or none, or make a Variable of each"
        )
    return _Variables(frozenset(path for path, inside in flags.items() if not any(inside)))


def wrt(model: nnx.Module, where: Spec) -> Callable[[KeyPath, Any], bool]:
    """An NNX filter of the `nnx.Param`s of a model that are trainable: all but the selected ones.

    For `nnx.Optimizer(wrt=…)` with a plain optax transformation, and `nnx.DiffState(0, …)`. Such
    an optimizer can't thaw anything later; one of `freezable` with `wrt=nnx.Param` can.

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
      A hashable filter; two are equal if they let the same variables through. It holds paths, as
      resolved now, and goes on fitting the model while its variables stay where they are.

    Raises:
      ValueError: If the spec does not fit the params, or freezes a part of a Variable.
      IndexError: If it is one of the layers, by an index that is out of range.
      TypeError: If `model` is no NNX module.
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
    """As `nnx.value_and_grad`, but with no backward pass for frozen variables.

    What `fun` does to the other state of the model (BatchNorm statistics, RNG counts) reaches the
    model, as with NNX's own.

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
      fun: Takes the model first, and gives a real scalar; with `has_aux`, a pair of that and
        anything.
      frozen: What not to differentiate: any spec, see `freeze_optax.mask`, most safely the
        optimizer. Types are read from the model.
      has_aux: Whether `fun` gives a pair.

    Returns:
      A function of the arguments of `fun`, the model by position, that gives the pair of its value
      and the gradient, an `nnx.State` that `optimizer.update(model, grads)` takes: of the variables
      of the optimizer if `frozen` is one, else of all `nnx.Param`s, with zeros at the frozen ones.

    Raises:
      ValueError: If `frozen` is the state of `freeze_optax.scheduled`; when called, if the spec
        does not fit the params, or freezes some leaves of a tree in a Variable.
      IndexError: When called, if the spec is one of the layers, by an index that is out of range.
      TypeError: When called, if the first argument is no NNX module.
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
        both = nnx.value_and_grad(fun, argnums=argument, has_aux=has_aux)
        value, moved = both(model, *args, **kwargs)
        return value, _with_zeros(leaves, flags, moved)

    return value_and_grad_fn


def _filter_of(frozen: Spec) -> Any:
    """Which variables a gradient has: those of the optimizer, where there is one."""
    if isinstance(frozen, nnx.Optimizer):
        return frozen.wrt
    states = [] if isinstance(frozen, Selector | str) else states_in(frozen)
    if len(states) != 1:
        return nnx.Param
    nodes = nodes_of(states[0].plan.paths)  # for a Variable that holds a tree
    return lambda path, _: path_text(path) in nodes


def _with_zeros(leaves: Leaves, frozen: Sequence[Flag], moved: Any) -> Any:
    zeros, gradients = Zeros(), dict(nnx.to_flat_state(moved))
    whole = Leaves(
        nnx.from_flat_state(
            (path, gradients[path] if path in gradients else _zeros_like(variable, zeros))
            for path, variable in nnx.to_flat_state(leaves.tree)
        )
    )
    return whole.rebuild(
        scatter_rows(take_rows(x, ~flag), ~flag, 0.0) if isinstance(flag, Rows) else x
        for x, flag in zip(whole.values, frozen, strict=True)
    )


def _zeros_like(variable: Any, zeros: Zeros) -> Any:
    inside = Leaves(variable)
    return inside.fill_leaves(map(zeros.gradient, inside.values))


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
      fun: Takes the model first, and gives a real scalar; with `has_aux`, a pair of that and
        anything.
      frozen: What not to differentiate: any spec, see `freeze_optax.mask`.
      has_aux: Whether `fun` gives a pair.

    Returns:
      A function of the arguments of `fun` that gives the gradient; with `has_aux`, the pair of
      gradient and auxiliary value.

    Raises:
      ValueError, IndexError: As `value_and_grad`.
      TypeError: When called, if the first argument is no NNX module.
    """
    both = value_and_grad(fun, frozen, has_aux=has_aux)

    @functools.wraps(fun)
    def grad_fn(model: nnx.Module, /, *args: Any, **kwargs: Any) -> Any:
        value, grads = both(model, *args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return grad_fn


def freeze(
    optimizer: nnx.Optimizer[Any], model: nnx.Module, where: Spec, keep_state: bool = False
) -> None:
    """Freezes more variables, in place; as `freeze_optax.freeze`.

    Examples:
      >>> import optax
      >>> import freeze_optax as fo
      >>> from flax import nnx
      >>> from freeze_optax import nnx as fnnx
      >>> model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, fo.freezable(optax.adam(1e-3)), wrt=nnx.Param)
      >>> fnnx.freeze(optimizer, model, "kernel")

    Args:
      optimizer: One whose transformation is a `freezable`, or has one in it.
      model: The model that it is for.
      where: The variables to freeze: any spec, see `freeze_optax.mask`. Types are read from the
        model, and a shared variable goes by each of its paths.
      keep_state: Whether to park their state for `thaw` to go on with, rather than drop it.

    Raises:
      TypeError: If `optimizer` is none or holds no `FreezeState`, or `model` is no NNX module.
      ValueError, IndexError: As `freeze_optax.freeze`. Then nothing has changed.
    """
    _edit_in_place(_edit.freeze, optimizer, model, where, keep_state=keep_state)


def thaw(optimizer: nnx.Optimizer[Any], model: nnx.Module, where: Spec) -> None:
    """Trains variables again, in place; as `freeze_optax.thaw`.

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
      optimizer: One whose transformation is a `freezable`, or has one in it.
      model: The model that it is for.
      where: The variables to train: any spec, see `freeze_optax.mask`.

    Raises:
      TypeError: If `optimizer` is none or holds no `FreezeState`, or `model` is no NNX module.
      ValueError, IndexError: As `freeze_optax.thaw`. Then nothing has changed.
    """
    _edit_in_place(_edit.thaw, optimizer, model, where)


def set_frozen(
    optimizer: nnx.Optimizer[Any], model: nnx.Module, frozen: Spec, keep_state: bool = False
) -> None:
    """Freezes exactly these variables, in place; as `freeze_optax.set_frozen`.

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
      optimizer: One whose transformation is a `freezable`, or has one in it.
      model: The model that it is for.
      frozen: What is to be frozen: any spec, see `freeze_optax.mask`.
      keep_state: Whether to park the state of newly frozen variables rather than drop it.

    Raises:
      TypeError: If `optimizer` is none or holds no `FreezeState`, or `model` is no NNX module.
      ValueError, IndexError: As `freeze_optax.set_frozen`. Then nothing has changed.
    """
    _edit_in_place(_edit.set_frozen, optimizer, model, frozen, keep_state=keep_state)


def _edit_in_place(
    edit: Callable[..., Any], optimizer: Any, model: nnx.Module, where: Spec, **options: bool
) -> None:
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
