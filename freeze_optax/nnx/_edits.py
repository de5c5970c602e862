"""Edits of an `nnx.Optimizer` in place."""

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import jax

from freeze_optax._edit import freeze_thaw as _edit
from freeze_optax._edit.adjust import adjust as adjust_state
from freeze_optax._select.specs import Spec
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.variables import is_variable, unwrap_variable
from freeze_optax.nnx._flax import AS_GRAPH, nnx
from freeze_optax.nnx._specs import OnModel
from freeze_optax.nnx._step_counts import check_current, renew_step_count


def freeze(
    optimizer: nnx.Optimizer[Any], model: nnx.Module, where: Spec, keep_state: bool = False
) -> None:
    """Freezes more variables, in place, as `freeze_optax.freeze` does for a state.

    `nnx.jit` follows the edit. What stored the optimizer before does not, and raises when it is
    used: call `nnx.cached_partial` again after an edit, and take `optimizer.step` again.

    Examples:
      >>> import optax
      >>> import freeze_optax as fo
      >>> from flax import nnx
      >>> from freeze_optax import nnx as fnnx
      >>> model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, fo.freezable(optax.adam(1e-3)), wrt=nnx.Param)
      >>> fnnx.freeze(optimizer, model, "kernel")

    Args:
      optimizer: An optimizer whose transformation is a `freeze_optax.freezable`, or contains one.
      model: The model that the optimizer updates.
      where: The variables to freeze: any spec, see `freeze_optax.mask`. Types are read from the
        model. A shared variable can be named by each of its paths.
      keep_state: Whether to park the state of these variables for `thaw`. If False, it is dropped.

    Raises:
      TypeError: If `optimizer` is not an `nnx.Optimizer` or holds no `freeze_optax.FreezeState`, or
        `model` is not an NNX module.
      ValueError, IndexError: As `freeze_optax.freeze`. ValueError also if the optimizer is a stored
        copy, and another edit has changed the original. After an error the optimizer is unchanged.
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


def adjust(optimizer: nnx.Optimizer[Any], model: nnx.Module, where: Spec, factor: Any) -> None:
    """Sets the factors of these variables, in place, as `freeze_optax.adjust` does for a state.

    What stored the optimizer before, `nnx.cached_partial` say, follows too, as no plan changes.

    Examples:
      >>> import optax
      >>> import freeze_optax as fo
      >>> from flax import nnx
      >>> from freeze_optax import nnx as fnnx
      >>> model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
      >>> tx = fo.freezable(optax.chain(optax.adam(1e-3), fo.rates({"kernel": 0.1})))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> fnnx.adjust(optimizer, model, "kernel", 0.5)

    Args:
      optimizer: An optimizer with one `freeze_optax.rates` in its transformation.
      model: The model that the optimizer updates.
      where: The variables: any spec, as for `freeze`.
      factor: A finite number, 0 or more, as for `freeze_optax.adjust`.

    Raises:
      TypeError: If `optimizer` is not an `nnx.Optimizer` or holds no state of
        `freeze_optax.rates`, if `model` is not an NNX module, or if `factor` is no number.
      ValueError, IndexError: As `freeze_optax.adjust`. ValueError also if the optimizer is a stored
        copy, and another edit has changed the original. After an error the optimizer is unchanged.
    """
    check_optimizer("adjust", optimizer)
    state, params = optimizer.opt_state, nnx.state(model, optimizer.wrt, **AS_GRAPH)
    selector = OnModel(where, model)
    with _explaining_wrt(selector, model, params):
        edited = adjust_state(state, params, selector, factor)
    pairs = zip(*(jax.tree.leaves(x, is_leaf=is_variable) for x in (state, edited)), strict=True)
    for old, new in pairs:
        value = unwrap_variable(new)
        if is_variable(old) and value is not unwrap_variable(old):
            old[...] = value


def _edit_in_place(
    edit: Callable[..., Any], optimizer: Any, model: nnx.Module, where: Spec, **options: bool
) -> None:
    """Puts the edited state into the optimizer; an edit that raises leaves it unchanged."""
    check_optimizer(edit.__name__, optimizer)
    selector = OnModel(where, model)
    state, params = optimizer.opt_state, nnx.state(model, optimizer.wrt, **AS_GRAPH)
    with _explaining_wrt(selector, model, params):
        edited = edit(state, params, selector, **options)
    if edited is not state:
        optimizer.opt_state = nnx.data(edited)
        renew_step_count(optimizer)


@contextlib.contextmanager
def _explaining_wrt(selector: OnModel, model: nnx.Module, params: Any) -> Generator[None]:
    """Adds to an error that the model has what a spec names, where the optimizer has it not."""
    try:
        yield
    except (ValueError, IndexError) as error:
        whole = nnx.state(model, nnx.Param, **AS_GRAPH)
        if _fits(selector, params) or not _fits(selector, whole):
            raise
        kind = IndexError if isinstance(error, IndexError) else ValueError
        raise kind(
            f"{error}; the model has it among its nnx.Params, but the wrt of the optimizer leaves "
            "it out: make one with nnx.Optimizer(model, tx, wrt=nnx.Param), and freeze by a spec"
        ) from error


def _fits(selector: OnModel, tree: Any) -> bool:
    try:
        selector.flags(Leaves(tree))
    except Exception:  # noqa: BLE001 (of a predicate, say)
        return False
    return True


def check_optimizer(name: str, optimizer: Any) -> None:
    """Raises unless `optimizer` is an `nnx.Optimizer`, and no stale copy of one."""
    if not isinstance(optimizer, nnx.Optimizer):
        raise TypeError(
            f"nnx.{name} takes an nnx.Optimizer first, not a {type(optimizer).__name__}: "
            f"{name}(optimizer, model, ...)"
        )
    check_current(optimizer)
