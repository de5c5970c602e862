"""The gradient transformation that freezes leaves."""

import contextlib
import functools
import warnings
from collections.abc import Generator
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
import optax

from freeze_optax._params.zeros import Zeros
from freeze_optax._rows.elements import Elements
from freeze_optax._rows.flags import Flag
from freeze_optax._rows.parts import (
    axes_in_front,
    axes_in_front_of,
    is_hole_or_parts,
    join_parts,
    put_live,
)
from freeze_optax._rows.rows import Rows
from freeze_optax._rows.subset import Subset
from freeze_optax._rows.take_put import below_axes, put_among_zeros
from freeze_optax._select.selector import nothing
from freeze_optax._select.specs import Spec, as_selector, resolve, untrainable
from freeze_optax._state.context import PlanContext
from freeze_optax._state.freeze_state import FreezeState, ages_of_mapped_state
from freeze_optax._state.memories import init_in_memory, mixed_memories
from freeze_optax._state.plan import Plan
from freeze_optax._state.shared_buffers import check_ties
from freeze_optax._transform.chained import check_not_chained, remember_updates
from freeze_optax._transform.cohorts import update_cohorts
from freeze_optax._transform.elementwise import check_takes_elements
from freeze_optax._transform.example_axes import (
    Ranks,
    check_gradients_of_rows,
    leaf_of_gradient,
    leaf_ranks,
)
from freeze_optax._transform.extra_arguments import adapt_extra_arguments
from freeze_optax._transform.inner_transformation import as_transformation
from freeze_optax._transform.settled_structure import with_settled_structure
from freeze_optax._transform.stacked import check_kept_shapes, check_not_stacked, is_stacked
from freeze_optax._tree.holes import HOLE, is_hole, is_placeholder
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.lookahead import param_copies, param_leaves, rewrap_copies
from freeze_optax._tree.memory import is_memory_error
from freeze_optax._tree.messages import quoted_list


def freezable(
    inner: optax.GradientTransformation, frozen: Spec = nothing
) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` on the trainable leaves alone; frozen leaves keep no state and never change.

    Every bit of a frozen leaf stays, under any `inner` and whatever its gradient holds (NaN,
    infinities, None, float0, a hole). A trainable leaf gets the update that `inner` gives on a tree
    of the trainable leaves alone: a frozen leaf does not count in a norm, does not decay and has no
    moments.

    `init` resolves what is frozen, and keeps it in the state as static metadata. So `jax.jit`
    retraces when it changes, and only then. An optimizer does not update BatchNorm statistics and
    the like; to freeze those, see `freeze_optax.hold`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import freeze_optax as fo
      >>> params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
      >>> tx = fo.freezable(optax.adamw(0.1), frozen="encoder")
      >>> opt_state = tx.init(params)
      >>> optax.tree_utils.tree_get(opt_state, "mu")
      {'encoder': MaskedNode(), 'head': Array([0., 0.], dtype=float32)}
      >>> @jax.jit
      ... def step(params, opt_state):
      ...     loss = lambda params: (params["encoder"] * params["head"]).sum()
      ...     grads = fo.grad(loss, frozen=opt_state)(params)
      ...     updates, opt_state = tx.update(grads, opt_state, params)
      ...     return fo.apply_updates(params, updates, frozen=opt_state), opt_state
      >>> params, opt_state = step(params, opt_state)
      >>> params["encoder"]
      Array([1., 1.], dtype=float32)

    Args:
      inner: Any optax transformation: an optimizer, or a chain with clipping and decay.
      frozen: Which leaves are frozen: any spec, see `freeze_optax.mask`.

    Returns:
      A transformation whose state is a `FreezeState`.

      `init` raises ValueError if the spec does not fit the params, or if it freezes one of two
      leaves that share a buffer and not the other (see `freeze_optax.tie`). It raises IndexError
      and TypeError as `freeze_optax.mask`. It warns if nothing is left to train.

      `update` gives zeros at frozen leaves, or a hole where the gradient has a hole. The zeros are
      negative, as the sum of any number and -0.0 is that number, also for zeros of either sign. So
      `optax.apply_updates` keeps frozen leaves too, with one exception: on a CPU it flushes
      subnormal numbers in eager mode, and in a jitted function that gets the updates as an
      argument. `freeze_optax.apply_updates` does not flush them. In a jitted step that makes the
      updates and applies them neither function does, as XLA's optimiser leaves the addition of
      -0.0 out. Integers and bools get zeros of their own dtype. PRNG keys and leaves that are not
      arrays get float32 zeros, but nothing can be added to these leaves: if the params have some,
      use `freeze_optax.apply_updates`.

      Extra arguments of `update` reach `inner`. A tree like the params has holes at the frozen
      leaves there. A callable that takes params (the `value_fn` of a line search) gets whole
      params.

      `update` raises ValueError if the gradients, the state or the params are of different params,
      or if the gradient of a trainable leaf is a hole or None; or, in a chain, if another
      `freezable` before this one freezes all that this one trains. It raises TypeError if the state
      is not a `FreezeState`.

    Raises:
      TypeError: If `inner` is not a transformation.
    """
    inner = with_settled_structure(as_transformation("freezable", inner))
    selector = as_selector(frozen)

    def init_fn(params: optax.Params) -> Any:
        if is_placeholder(params):
            return FreezeState(inner.init(params), ages_of_mapped_state(), Plan.unknown())
        leaves = param_leaves(params)
        flags = untrainable(leaves) if _take_specs_ignored() else resolve(selector, leaves)
        check_ties(leaves, flags)
        if all(flag is True for flag in flags):
            warnings.warn(
                f"freezable({selector!r}): all {len(flags)} leaves are frozen, nothing is left to "
                "train",
                stacklevel=2,
            )
        plan = Plan.from_flags(leaves.paths, flags, PlanContext(inner, params, leaves))
        check_takes_elements(plan, params)
        live_params = plan.drop_frozen_params(params, leaves)
        return FreezeState(init_in_memory(plan, live_params, params), (), plan)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        plan = _plan_of(state)
        grads = plan.align(updates, "gradient")
        _check_no_missing(grads, plan)
        check_not_chained(grads, plan)
        copies = [plan.align(copy, "params") for copy in param_copies(params)]
        ranks = leaf_ranks(plan, copies[0] if copies else None)
        if plan.part_table is not None:
            check_gradients_of_rows(plan, grads, ranks, copies[0] if copies else None)
        live_grads = plan.drop_frozen(grads, ranks=ranks, like=copies[0] if copies else None)
        live_params = rewrap_copies(params, [plan.drop_frozen(copy) for copy in copies])
        reference = copies[0] if copies else grads
        plan.context.recover_inner(inner, params if copies else updates, reference)
        inner_extra = _adapt_extra(extra, plan, reference, ranks, has_params=bool(copies))

        def run(inner_state: Any) -> tuple[Any, Any]:
            try:
                return inner.update(live_grads, inner_state, live_params, **inner_extra)
            except (ValueError, TypeError) as error:
                _explain_memories(error, live_grads, inner_state, live_params)
                _explain_missing(error, inner_state, plan)
                check_not_stacked(plan, inner_state)
                raise

        before = state if is_stacked(plan, reference) else None
        live_updates, state = update_cohorts(run, state)
        if before is not None:
            check_kept_shapes(before, state)
        full_updates = [
            _with_frozen_updates(
                grads, leaves, Leaves(copy, stop=is_hole_or_parts).values, plan, ranks
            )
            for copy, leaves in zip(param_copies(live_updates), copies or [None], strict=True)
        ]
        return rewrap_copies(live_updates, full_updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


_specs_ignored = ContextVar("_specs_ignored", default=False)


@contextlib.contextmanager
def ignoring_specs() -> Generator[None, None, None]:
    """Makes `init`, in this context, freeze only the leaves that can't be trained.

    Callers already know the plan of the state. The spec may not fit any more, or may read values
    that an abstract `init` does not have.
    """
    token = _specs_ignored.set(True)
    try:
        yield
    finally:
        _specs_ignored.reset(token)


def _take_specs_ignored() -> bool:
    """Whether to ignore the spec; resets the context, so that only one `init` ignores its spec."""
    # A `freezable` inside this one must read its spec, as that decides which state it makes.
    is_ignored = _specs_ignored.get()
    _specs_ignored.set(False)
    return is_ignored


def _plan_of(state: Any) -> Plan:
    """Returns the plan of a state, or raises if it is not a `FreezeState`."""
    if not isinstance(state, FreezeState):
        raise TypeError(
            f"update was given a {type(state).__name__} for its state, not the FreezeState that "
            "init gives; the order is update(gradients, state, params)"
        )
    return state.plan


def _check_no_missing(grads: Leaves, plan: Plan) -> None:
    """Raises if a trainable leaf has no gradient."""
    missing = [
        path
        for path, grad, flag in zip(plan.paths, grads.values, plan.mask, strict=True)
        if flag is not True and (grad is None or is_hole(grad))
    ]
    if missing:
        raise ValueError(
            f"no gradient at {quoted_list(missing)}, which the optimizer state has as trainable; "
            "differentiate with fo.value_and_grad(loss, frozen=opt_state), or freeze these leaves"
        )


def _explain_memories(error: Exception, grads: Any, state: Any, params: Any) -> None:
    """Raises, with the paths, if an error of JAX is about arrays in different memories."""
    if is_memory_error(error):
        trees = {"gradient": grads, "state": state, "params": params}
        clause = mixed_memories({name: tree for name, tree in trees.items() if tree is not None})
        if clause:
            raise ValueError(f"the update mixes memories: {clause}") from error


def _explain_missing(error: Exception, inner_state: Any, plan: Plan) -> None:
    """Raises, with the paths, if the state has None where the plan has statistics."""
    try:
        layout = plan.layout
        pairs = list(zip(layout.paths, layout.places(inner_state), strict=True))
    except ValueError:  # it can't be edited, or is of another structure
        return
    missing = [path for path, x in pairs if x is None]
    if missing:
        # The optimizer may keep None there by itself, so its own words come first.
        raise ValueError(
            f"{error}; the state has None at {quoted_list(missing)}, where its plan has "
            "statistics: if it was restored onto a state of another plan, make that with the edits "
            "that the stored one had, or store fo.export_state(state), which has the plan"
        ) from error


def _with_frozen_updates(
    grads: Leaves, params: Leaves | None, live: list[Any], plan: Plan, ranks: Ranks
) -> Any:
    """Returns the updates of the live leaves with zeros or holes at the frozen leaves.

    Args:
      grads: The gradients.
      params: The params, or None where `update` got no params.
      live: The updates that `inner` gave for the live leaves, with holes or parts.
      plan: What is frozen.
      ranks: The ranks of the leaves.
    """
    zeros, kinds = Zeros(), plan.leaf_kinds

    def frozen_update(i: int, grad: Any, param: Any) -> Any:
        if is_hole(grad):
            return HOLE
        leaf = leaf_of_gradient(grad, ranks[i], kinds[i]) if is_hole(param) else param
        return None if leaf is None else zeros.update(leaf)

    def update(i: int, grad: Any, param: Any, live_update: Any, frozen: Flag) -> Any:
        if frozen is True:
            return frozen_update(i, grad, param)
        leaf_rank = ranks[i]
        leaf = grad if is_hole(param) else param
        if not isinstance(frozen, Subset):
            return join_parts(live_update, leaf_rank, leaf)
        trained = ~frozen
        if trained.is_compact(np.shape(grad)[axes_in_front(grad, leaf_rank) :]):
            return join_parts(live_update, leaf_rank, grad)
        compact = join_parts(live_update, leaf_rank)
        # The inner transformation may keep the axes of examples, or reduce them.
        in_front = axes_in_front_of(compact, trained, leaf_rank)
        if not in_front:
            return put_among_zeros(compact, trained, -0.0, leaf)
        scatter = functools.partial(put_among_zeros, subset=trained, fill=-0.0)
        return below_axes(scatter, in_front, compact)

    param_values = [HOLE] * len(grads.values) if params is None else params.values
    columns = zip(grads.values, param_values, live, plan.mask, strict=True)
    values = [update(i, *column) for i, column in enumerate(columns)]
    remember_updates(values, plan.mask)
    return grads.rebuild(values)


def _adapt_extra(
    extra: dict[str, Any], plan: Plan, reference: Leaves, ranks: Ranks, has_params: bool
) -> dict[str, Any]:
    """Returns the extra arguments as `inner` needs them, without the frozen leaves.

    Args:
      extra: The extra arguments that `update` got.
      plan: What is frozen.
      reference: The params, or the gradients where `update` got no params.
      ranks: The ranks of the leaves.
      has_params: Whether `reference` is the params.
    """

    def is_like_params(value: Any) -> bool:
        leaves = Leaves(value, stop=is_hole_or_parts)
        if not plan.knows_structure(leaves):
            return False
        if jax.tree_util.treedef_is_leaf(leaves.treedef):
            # If the params are one bare array, every scalar has their structure.
            (frozen,) = plan.mask
            if not isinstance(frozen, Subset):
                return False
            return frozen.fits(np.shape(value)) or (~frozen).is_compact(np.shape(value))
        return all(map(_may_stand_for, leaves.values, reference.values, plan.mask, ranks))

    def drop(value: Any) -> Any:
        return plan.drop_frozen(Leaves(value), numbers=True, ranks=ranks, like=reference)

    def fill_holes(value: Any) -> Any:
        leaves = Leaves(value, stop=is_hole_or_parts)
        if plan.part_table is None and not any(map(is_hole, leaves.values)):
            return value
        if not has_params:
            raise ValueError(
                "a function needs whole params, but update was not given any; call "
                "update(gradients, state, params, ...)"
            )
        triples = zip(leaves.values, reference.values, plan.mask, strict=True)
        return leaves.rebuild(
            put_live(p, ~flag, x)
            if isinstance(flag, Subset)
            else p
            if is_hole(x)
            else join_parts(x)
            for x, p, flag in triples
        )

    def to_inner(_: str, value: Any) -> Any:
        return drop(value)

    return adapt_extra_arguments(extra, is_like_params, to_inner, fill_holes, drop)


def _may_stand_for(x: Any, leaf: Any, frozen: Flag, leaf_rank: int | None) -> bool:
    """Whether `x` may belong to `leaf`, by its shape; a batch may have the same keys as the params.

    `x` may consist of what trains alone, and a number may stand for a whole leaf. `leaf` is a param
    or a gradient, which may have axes of examples in front.
    """
    if x is None or leaf is None or is_hole_or_parts(x) or is_hole(leaf):
        return True
    shape, leaf_shape = np.shape(x), np.shape(leaf)
    if not shape:
        return True
    if isinstance(frozen, Elements):
        in_front = leaf_shape[: axes_in_front(leaf, leaf_rank)]
        forms = frozen.shape, (~frozen).compact_shape(frozen.shape)
        return any(shape in (form, (*in_front, *form)) for form in forms)
    count = axes_in_front(leaf, leaf_rank)
    if isinstance(frozen, Rows):
        # Of the rows, `x` may have all or those that train, whichever the leaf has.
        axis = frozen.axis
        without_rows = _without_axis(leaf_shape, count + axis)
        if _without_axis(shape, count + axis) == without_rows:
            return True
        return _without_axis(shape, axis) == without_rows[count:]
    return shape in (leaf_shape, leaf_shape[count:])


def _without_axis(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])
