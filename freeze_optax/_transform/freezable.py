"""The gradient transformation."""

import contextlib
import warnings
from collections.abc import Generator
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
import optax

from freeze_optax._params.zeros import Zeros
from freeze_optax._rows.parts import is_hole_or_parts, join_parts, put_live_rows
from freeze_optax._rows.rows import Flag, Rows
from freeze_optax._rows.take_put import scatter_rows
from freeze_optax._select.selector import nothing
from freeze_optax._select.specs import Spec, as_selector, resolve
from freeze_optax._state.context import PlanContext
from freeze_optax._state.freeze_state import AnyAges, FreezeState
from freeze_optax._state.plan import Plan
from freeze_optax._state.shared_buffers import check_ties
from freeze_optax._transform.cohorts import update_cohorts
from freeze_optax._transform.extra_arguments import adapt_extra_arguments
from freeze_optax._transform.inner_transformation import as_transformation
from freeze_optax._tree.holes import HOLE, is_hole, is_placeholder
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.lookahead import param_copies, param_leaves, rewrap_copies
from freeze_optax._tree.messages import quoted_list


def freezable(
    inner: optax.GradientTransformation, frozen: Spec = nothing
) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` on the trainable leaves alone; frozen ones keep no state and never change.

    Under any `inner`, every bit of a frozen leaf stays, whatever its gradient holds (NaN,
    infinities, None, float0, a hole), and a trainable leaf is updated as by `inner` on a
    tree that has no other leaves: no frozen leaf counts in a norm, decays, or is given moments.

    What is frozen is settled at `init` and travels in the state as static metadata: `jax.jit`
    retraces when it changes, and only then. BatchNorm statistics and the like are not the
    optimizer's; to keep those, see `freeze_optax.hold`.

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
      frozen: What is frozen: any spec, see `freeze_optax.mask`.

    Returns:
      A transformation whose state is a `FreezeState`.

      `init` raises ValueError if the spec does not fit the params, or freezes one of two leaves
      that share a buffer (see `freeze_optax.tie`), and IndexError and TypeError as
      `freeze_optax.mask`; it warns if nothing is left to train.

      `update` gives zeros at frozen leaves, or a hole where a hole came in. The zeros are
      negative: -0.0 is what leaves every number as it is when added, the sign of zeros too, so
      `optax.apply_updates` is safe; only in eager mode on a CPU does it flush subnormal
      numbers, which `freeze_optax.apply_updates`, and either under jit, do not. PRNG keys and
      what is no array, to which nothing can be added, get zeros of dtype `jax.dtypes.float0`:
      where such are among the params, use `freeze_optax.apply_updates`.

      Extra arguments reach `inner`: one shaped like the params with holes at frozen leaves, and
      a callable that takes params (the `value_fn` of a line search) is handed whole ones.

      `update` raises ValueError if gradients, state or params are of different params, or if a
      trainable leaf has a hole or None for a gradient, and TypeError for a state of another kind.

    Raises:
      TypeError: If `inner` is no transformation.
    """
    inner = as_transformation("freezable", inner)
    selector = as_selector(frozen)

    def init_fn(params: optax.Params) -> Any:
        if is_placeholder(params):
            return FreezeState(inner.init(params), AnyAges(), Plan.unknown())
        leaves = param_leaves(params)
        flags = resolve(nothing if _is_ignored() else selector, leaves)
        check_ties(leaves, flags)
        if all(flag is True for flag in flags):
            warnings.warn(
                f"freezable({selector!r}): all {len(flags)} leaves are frozen, nothing is left to "
                "train",
                stacklevel=2,
            )
        plan = Plan.from_flags(leaves.paths, flags, PlanContext(inner, params, leaves))
        return FreezeState(inner.init(plan.drop_frozen_params(params, leaves)), (), plan)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        plan = _plan_of(state)
        grads = plan.align(updates, "gradient")
        _check_whole(grads, plan)
        whole = [plan.align(copy, "params") for copy in param_copies(params)]
        live_grads = plan.drop_frozen(grads)
        live_params = rewrap_copies(params, [plan.drop_frozen(copy) for copy in whole])
        known = whole[0] if whole else grads
        plan.context.recover_inner(inner, params if whole else updates, known)
        own = _for_inner(extra, plan, known, has_params=bool(whole))

        def run(inner_state: Any) -> tuple[Any, Any]:
            return inner.update(live_grads, inner_state, live_params, **own)

        moved, state = update_cohorts(run, state)
        steps = [
            _with_zeros(grads, still, Leaves(copy, stop=is_hole_or_parts).values, plan)
            for copy, still in zip(param_copies(moved), whole or [grads], strict=True)
        ]
        return rewrap_copies(moved, steps), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


_specs_ignored = ContextVar("_specs_ignored", default=False)


@contextlib.contextmanager
def ignoring_specs() -> Generator[None, None, None]:
    """Where `init` freezes nothing but what can't be trained, for states whose plan is known.

    The spec may not fit any more, or read values that an abstract `init` has not.
    """
    token = _specs_ignored.set(True)
    try:
        yield
    finally:
        _specs_ignored.reset(token)


def _is_ignored() -> bool:
    # Of one transformation: the spec of another inside it decides what state that one makes.
    is_ignored = _specs_ignored.get()
    _specs_ignored.set(False)
    return is_ignored


def _plan_of(state: Any) -> Plan:
    if not isinstance(state, FreezeState):
        raise TypeError(
            f"update was given a {type(state).__name__} for its state, not the FreezeState that "
            "init gives; the order is update(gradients, state, params)"
        )
    return state.plan


def _check_whole(grads: Leaves, plan: Plan) -> None:
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


def _with_zeros(grads: Leaves, still: Leaves, moved: list[Any], plan: Plan) -> Any:
    zeros = Zeros()

    def frozen_update(grad: Any, param: Any) -> Any:
        if is_hole(grad):
            return HOLE
        leaf = grad if is_hole(param) else param
        return None if leaf is None else zeros.update(leaf)

    def update(grad: Any, param: Any, moved: Any, frozen: bool | Rows) -> Any:
        if frozen is True:
            return frozen_update(grad, param)
        rows = join_parts(moved)
        if frozen is False:
            return rows
        return rows if np.shape(grad)[:1] == rows.shape[:1] else scatter_rows(rows, ~frozen, -0.0)

    rows = zip(grads.values, still.values, moved, plan.mask, strict=True)
    return grads.rebuild(update(*row) for row in rows)


def _for_inner(
    extra: dict[str, Any], plan: Plan, known: Leaves, has_params: bool
) -> dict[str, Any]:
    """Extra arguments as `inner` should see them: without the frozen leaves.

    Args:
      extra: What `update` was given.
      plan: What is frozen.
      known: The params, or the gradients where there are none.
      has_params: Which of the two.
    """

    def is_like_params(value: Any) -> bool:
        leaves = Leaves(value, stop=is_hole_or_parts)
        if not plan.knows_structure(leaves):
            return False
        if jax.tree_util.treedef_is_leaf(leaves.treedef):
            # Every scalar has the structure of params that are one bare array.
            (frozen,) = plan.mask
            return isinstance(frozen, Rows) and np.ndim(value) > 0 and frozen.fits(value, True)
        return all(map(_may_stand_for, leaves.values, known.values, plan.mask))

    def drop(value: Any) -> Any:
        return plan.drop_frozen(Leaves(value), numbers=True)

    def whole(value: Any) -> Any:
        leaves = Leaves(value, stop=is_hole_or_parts)
        if plan.part_table is None and not any(map(is_hole, leaves.values)):
            return value
        if not has_params:
            raise ValueError(
                "a function needs whole params, but update was not given any; call "
                "update(gradients, state, params, ...)"
            )
        triples = zip(leaves.values, known.values, plan.mask, strict=True)
        return leaves.rebuild(
            put_live_rows(p, ~flag, x)
            if isinstance(flag, Rows)
            else p
            if is_hole(x)
            else join_parts(x)
            for x, p, flag in triples
        )

    return adapt_extra_arguments(extra, is_like_params, lambda _, value: drop(value), whole, drop)


def _may_stand_for(x: Any, leaf: Any, frozen: Flag) -> bool:
    """Whether `x` may be of the same params as `leaf`, and not of a batch with the same keys.

    The rows that train may be there alone, and a number may stand for a whole leaf.
    """
    if x is None or leaf is None or is_hole_or_parts(x) or is_hole(leaf):
        return True
    rows = slice(1 if isinstance(frozen, Rows) else 0, None)
    return np.ndim(x) == 0 or np.shape(x)[rows] == np.shape(leaf)[rows]
