"""A state as plain arrays that any checkpointer stores, and back."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from freeze_optax._edit.freeze_thaw import check_mask, set_frozen
from freeze_optax._edit.fresh_state import abstract_init, init_leaves
from freeze_optax._edit.state_holders import only_state, replace_state
from freeze_optax._export.encoding import decode_leaf, describe_leaf, unpack_text
from freeze_optax._rows.parts import PartTable
from freeze_optax._rows.rows import Rows, flag_from_vector
from freeze_optax._select.specs import Spec
from freeze_optax._state.freeze_state import FreezeState
from freeze_optax._state.plan import DROPPED, Plan
from freeze_optax._state.shared_buffers import collect_ties
from freeze_optax._transform.freezable import ignoring_specs
from freeze_optax._transform.inner_transformation import as_transformation
from freeze_optax._tree.holes import is_hole
from freeze_optax._tree.kinds import can_train, is_array
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.lookahead import param_leaves
from freeze_optax._tree.messages import few_clauses, path_differences
from freeze_optax._tree.variables import is_variable, rewrap_variable, unwrap_variable


def import_state(
    tx: optax.GradientTransformation,
    params: Any,
    exported: Mapping[str, Any],
    frozen: Spec | None = None,
) -> Any:
    """Makes the state again that was exported, with the plan that it had.

    A run goes on with it bitwise as it would have. Nothing in the export is evaluated, and all of
    it is checked before anything is built.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import freeze_optax as fo
      >>> params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
      >>> tx = fo.freezable(optax.adam(0.1), "encoder")
      >>> exported = fo.export_state(tx.init(params))
      >>> state = fo.import_state(tx, params, exported, frozen=fo.nothing)
      >>> fo.mask(state, params)
      {'encoder': False, 'head': False}

    Args:
      tx: The transformation; what it freezes at `init` does not count here.
      params: The params that the state is for.
      exported: What `export_state` gave, its arrays from NumPy or JAX.
      frozen: What to freeze in its stead, as `set_frozen` would: surviving leaves keep their
        state, the rest start afresh. By default what was frozen in the export.

    Returns:
      The state, with its statistics sharded as their parameters. One that gradients of a wider
      dtype had widened stays so.

    Raises:
      ValueError: If the export is damaged, or of other params or another transformation, naming
        the paths on both sides; if `frozen` does not fit the params; or if one of two leaves that
        share a buffer would be frozen and the other not.
      TypeError: If `tx` is no transformation, or its state holds no `FreezeState`.
    """
    about = unpack_text(exported)
    with ignoring_specs(), collect_ties() as groups:
        abstract = abstract_init(as_transformation("import_state", tx).init, params)
    plan = _plan(about, only_state("import_state", abstract).plan, params)
    template = Leaves(replace_state(abstract, _abstract_state(plan, params)))
    values = iter(_decoded_leaves(about["leaves"], exported.get("leaves"), template))
    tree = template.rebuild(x if is_hole(x) else next(values) for x in template.values)
    tree = replace_state(tree, _place(only_state("import_state", tree), params))
    if frozen is not None:
        tree = set_frozen(tree, params, frozen)
    plan, leaves = only_state("import_state", tree).plan, param_leaves(params)
    for flags in [flags for _, flags in plan.schedule] or [plan.frozen]:
        check_mask(plan, leaves, plan.mask_of(flags), groups)
    return tree


def _decoded_leaves(entries: list[dict[str, Any]], given: Any, template: Leaves) -> list[Any]:
    """The leaves of the state, which have to be those of a template."""
    arrays = {} if given is None else given  # some formats know no empty dict
    if not isinstance(arrays, Mapping):
        raise ValueError(
            f"the export is damaged: its 'leaves' is a {type(arrays).__name__}, not a dict"
        )
    pairs = zip(template.paths, template.values, strict=True)
    leaves = [(path, leaf) for path, leaf in pairs if not is_hole(leaf)]
    if len(leaves) == len(entries):
        both = zip(leaves, entries, strict=True)
        leaves = [(path, _widened(leaf, entry["dtype"])) for (path, leaf), entry in both]
    found = [(entry["path"], _description(entry)) for entry in entries]
    expected = [(path, _description(describe_leaf(leaf))) for path, leaf in leaves]
    if found != expected:
        odd = _differences(dict(found), dict(expected))
        raise ValueError(f"the export is not of a state of this transformation: {odd}")
    # In order, not by path: a key with a slash can make two leaves share one.
    return [
        decode_leaf(arrays.get(f"{i:06d}"), leaf, path) for i, (path, leaf) in enumerate(leaves)
    ]


_WIDE = ("bfloat16", "float16", "float32", "float64", "complex64", "complex128")


def _widened(leaf: Any, name: str) -> Any:
    """The leaf in a wider float, as gradients in one make it of what `init` gave."""
    # What the export says is looked up: NumPy would parse it, as code where it has commas.
    if name not in _WIDE or not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf
    # Where jax is without 64 bits this is another, and there can be no such leaf.
    wider = jax.dtypes.canonicalize_dtype(name)
    try:
        with jax.numpy_dtype_promotion("standard"):
            is_wider = jnp.promote_types(leaf.dtype, wider) == wider != leaf.dtype
    except ValueError:  # to jax floats of eight bits widen to nothing
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, wider) if is_wider else leaf


def _description(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    key = entry.get("key")
    return (entry["shape"], entry["dtype"], *([] if key is None else [key]))


def _decoded_rows(rows: Any) -> Rows | None:
    if rows is None:
        return None
    count, bits = rows
    packed = np.frombuffer(bytes.fromhex(bits), np.uint8)
    if count < 0 or len(packed) != (count + 7) // 8:
        raise ValueError(f"{count} rows in {len(packed)} bytes")
    flag = flag_from_vector(np.unpackbits(packed, count=count).astype(bool))
    if not isinstance(flag, Rows):
        raise ValueError("a part of all rows or none")
    return flag


def _part_table(parts: Any, leaves: list[Any]) -> PartTable | None:
    """The parts again, which have to be parts of these leaves."""
    if parts is None:
        return None
    numbers = [leaf for leaf, _ in parts]
    if all(rows is None for _, rows in parts):
        raise ValueError("its parts are whole leaves")
    if numbers != sorted(numbers) or set(numbers) != set(range(len(leaves))):
        raise ValueError(f"its parts are not, in order, those of {len(leaves)} leaves")
    table = PartTable((leaf, _decoded_rows(rows)) for leaf, rows in parts)
    for leaf, own in zip(leaves, table.by_leaf, strict=True):
        masks = [rows.mask for i in own if (rows := table.parts[i][1])]
        shape = getattr(leaf, "shape", ())[:1]
        is_whole = len(own) == 1 and not masks
        if any(mask.shape != shape for mask in masks) or (len(masks) != len(own) and not is_whole):
            raise ValueError(f"its rows are not those of a leaf of shape {shape}")
        if masks and np.sum(masks, axis=0).max() > 1:
            raise ValueError("two of its parts have one row")
    return table


def _plan(about: dict[str, Any], own: Plan, params: Any) -> Plan:
    paths = tuple(about["paths"])
    if paths != own.paths:
        raise ValueError(
            "the export is of other params: "
            + path_differences(paths, own.paths, "in it", "in the params")
        )
    frozen, cohorts = tuple(about["frozen"]), tuple(about["cohorts"])
    schedule = tuple((start, tuple(flags)) for start, flags in about["schedule"])
    try:
        leaves = param_leaves(params).values
        table = _part_table(about["parts"], leaves)
    except ValueError as error:
        raise ValueError(f"the export is damaged: {error}") from error
    plan = Plan(own.paths, frozen, cohorts, own.context, schedule, table)
    if schedule != own.schedule or (schedule and plan != own):
        raise ValueError("the export is of other phases than those of the transformation")
    if schedule:
        return own
    _check_trainable(plan, leaves)
    if not _can_be(plan):
        raise ValueError("the export is damaged: its cohorts and frozen flags do not agree")
    return plan


def _owners(plan: Plan) -> Iterable[int]:
    """For each part the index of its leaf."""
    return (
        [leaf for leaf, _ in plan.part_table.parts] if plan.part_table else range(len(plan.cohorts))
    )


def _can_be(plan: Plan) -> bool:
    """Whether some edits of a state come to this plan, which is not that of phases."""
    parts = zip(plan.cohorts, _owners(plan), plan.frozen, strict=True)
    kept = [part for part in parts if part[0] != DROPPED or not part[2]]
    cohorts, leaves = {part[0] for part in kept}, {part[1] for part in kept}
    if cohorts != set(range(len(cohorts))):
        return False
    if len(cohorts) < 2 and len(leaves) == len(kept) and not plan.parked:
        return True
    if not plan.layout.counters:
        return len(cohorts) < 2
    # Parts have cohorts of their own where their counters differ, or stand still.
    alike = {(cohort, frozen) for cohort, _, frozen in kept}
    return len(alike) == len(cohorts) and len(set(kept)) == len(kept)


def _check_trainable(plan: Plan, leaves: list[Any]) -> None:
    """Raises where a leaf that trains in an export, or is parked, can't be trained any more."""
    for cohort, leaf in zip(plan.cohorts, _owners(plan), strict=True):
        if cohort != DROPPED and not can_train(leaves[leaf]):
            raise ValueError(
                f"the export is of other params: {plan.paths[leaf]!r} trains in it, or is parked, "
                f"but is {_kind(leaves[leaf])} in the params, which can't be trained; pass the "
                "params that go with it"
            )


def _kind(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}" if is_array(leaf) else f"a {type(leaf).__name__}"


def _abstract_state(plan: Plan, params: Any) -> FreezeState:
    wanted = [cohort != DROPPED for cohort in plan.cohorts]
    inner = abstract_init(lambda params: init_leaves(plan, params, wanted), params)
    rows = max(plan.cohorts, default=0)
    if rows < 1:
        return FreezeState(inner, (), plan)
    layout = plan.layout
    places = layout.places(inner)
    counters = [places[place] for place in layout.counters]
    ages = tuple(jax.ShapeDtypeStruct((rows, *x.shape), x.dtype) for x in counters)
    return FreezeState(inner, ages, plan)


def _is_sharded(x: Any) -> bool:
    return isinstance(x, jax.Array) and len(x.sharding.device_set) > 1


def _place(state: FreezeState, params: Any) -> FreezeState:
    """The state with the statistics of each param beside it, as `init` makes them.

    That is on the same devices, and in an NNX Variable of the same kind, if it stands in one.
    """
    leaves = param_leaves(params)
    boxes = Leaves(leaves.tree, stop=lambda x: is_hole(x) or is_variable(x)).values
    boxes = state.plan.in_own_order(
        leaves, boxes if len(boxes) == len(leaves.values) else leaves.values
    )
    if not any(is_variable(box) or _is_sharded(box) for box in boxes):
        return state  # of a transformation, it may be, that mixes the leaves
    layout, table = state.plan.layout, state.plan.part_table

    def beside(x: Any, param: Any) -> Any:
        fits = _is_sharded(param) and x.shape == param.shape
        return jax.device_put(x, param.sharding) if fits else x

    def placed(place: Any, owner: int) -> Any:
        if owner < 0:
            return place
        box = boxes[table.parts[owner][0] if table else owner]
        return rewrap_variable(box, jax.tree.map(lambda x: beside(x, unwrap_variable(box)), place))

    pairs = zip(layout.places(state.inner), layout.owners, strict=True)
    return FreezeState(layout.rebuild([placed(*pair) for pair in pairs]), state.ages, state.plan)


def _differences(given: dict[str, Any], expected: dict[str, Any]) -> str:
    if given.keys() != expected.keys() or given == expected:
        return path_differences(
            tuple(given), tuple(expected), "in the export", "in the state to be"
        )
    differing = [path for path, what in given.items() if what != expected[path]]
    return few_clauses([f"{path!r} is {given[path]}, not {expected[path]}" for path in differing])
