"""`import_state`: the inverse of `export_state`."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from freeze_optax._edit.freeze_thaw import check_mask, set_frozen
from freeze_optax._edit.fresh_state import abstract_init, init_leaves
from freeze_optax._edit.state_holders import only_state, params_of_state, replace_state
from freeze_optax._export.beside_params import is_sharded, place_beside, put_beside_namesake
from freeze_optax._export.encoded_subset import decoded_subset, shape_in
from freeze_optax._export.encoding import as_array, decode_leaf, describe_leaf, unpack_text
from freeze_optax._export.former_paths import with_present_paths
from freeze_optax._rows.parts import PartTable
from freeze_optax._rows.rows import Rows
from freeze_optax._rows.subset import Subset
from freeze_optax._select.specs import Spec
from freeze_optax._state.freeze_state import FreezeState, states_in
from freeze_optax._state.plan import DROPPED, Plan
from freeze_optax._state.shared_buffers import Group, collect_ties
from freeze_optax._transform.freezable import ignoring_specs
from freeze_optax._transform.inner_transformation import as_transformation
from freeze_optax._tree.batch_axis import extra_axis
from freeze_optax._tree.holes import is_hole
from freeze_optax._tree.kinds import can_train, is_array
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.lookahead import param_leaves
from freeze_optax._tree.memory import home_of
from freeze_optax._tree.messages import few_clauses, path_differences, quoted_list
from freeze_optax._tree.overwritten import optimized_params


def import_state(
    tx: optax.GradientTransformation,
    params: Any,
    exported: Mapping[str, Any],
    frozen: Spec | None = None,
) -> Any:
    """Makes the exported state again, with the plan that it had.

    A run continues with it bitwise as it would have without the export. Nothing in the export is
    evaluated, and all of it is checked before anything is built.

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
      tx: The transformation of the state. What it freezes at `init` has no effect here. For an
        export of more than an optimizer state (a `TrainState`, a dict of params and state), such a
        tree instead. Its leaves have no effect, and neither has what is frozen in it.
      params: The params that the state belongs to.
      exported: What `export_state` returned, with arrays from NumPy or JAX.
      frozen: What to freeze instead, as `set_frozen` would: leaves that train before and after keep
        their state, newly trained ones get fresh state. By default the leaves that are frozen in
        the export.

    Returns:
      The state, or the tree with it. Its statistics have the sharding of their parameters, and are
      in their memory; an array that `exported` has in host memory stays there. Counters that
      `exported` has on several other devices go to those of the parameters. A statistic that
      gradients of a wider dtype had widened keeps that dtype.

    Raises:
      ValueError: If the export is damaged, or is one of other params or of another transformation;
        the error names the paths on both sides. Also if `frozen` does not fit the params, or if one
        of two leaves that share a buffer would be frozen and the other not.
      TypeError: If `tx` is neither a transformation nor a tree with a `FreezeState`, or its state
        holds no `FreezeState`.
    """
    about = with_present_paths(unpack_text(exported), param_leaves(params))
    variables = params
    if about["paths"] != list(param_leaves(params).paths):
        params = optimized_params(params)
    like, groups = _tree_like(tx, params)
    params = params_of_state(like, params)
    plan = _plan(about, only_state("import_state", like).plan, params)
    leaves = param_leaves(params)
    state, home = _abstract_state(plan, params), home_of(leaves.values)
    template, in_state = Leaves(replace_state(like, state)), set(map(id, jax.tree.leaves(state)))
    values = iter(decoded_leaves(about["leaves"], exported.get("leaves"), template))
    param_by_path = dict(zip(leaves.paths, leaves.values, strict=True))

    def restored(path: str, new: Any, old: Any) -> Any:
        new = _as_before(new, old)
        if id(old) in in_state or is_sharded(old):  # `place_beside` is for the state
            return new
        # Beside the state: the count of a schedule around it, or the sums of `optax.MultiSteps`.
        return put_beside_namesake(new, path, param_by_path, home)

    tree = template.rebuild(
        x if is_hole(x) else restored(path, next(values), x)
        for path, x in zip(template.paths, template.values, strict=True)
    )
    tree = replace_state(tree, place_beside(only_state("import_state", tree), params))
    if frozen is not None:
        tree = set_frozen(tree, variables, frozen)
    plan = only_state("import_state", tree).plan
    for flags in [flags for _, flags in plan.schedule] or [plan.frozen]:
        check_mask(plan, leaves, plan.mask_of(flags), groups)
    return tree


def _tree_like(tx: Any, params: Any) -> tuple[Any, list[Group]]:
    """Returns a tree of the structure of the exported one, and the groups of each `tie` in it."""
    with collect_ties() as groups:
        if states_in(tx):
            plan = only_state("import_state", tx).plan
            plan.flags(param_leaves(params), "params")
            wanted = [cohort != DROPPED for cohort in plan.cohorts]
            abstract_init(lambda params: init_leaves(plan, params, wanted), params)
            return tx, groups
        with ignoring_specs():
            return abstract_init(as_transformation("import_state", tx).init, params), groups


def _as_before(new: Any, old: Any) -> Any:
    """Returns a new leaf with the kind and the sharding of the old one, which may be abstract."""
    if not is_array(old):
        return type(old)(new.item())
    if isinstance(old, np.ndarray | np.generic):
        return np.array(new) if isinstance(old, np.ndarray) else np.asarray(new)[()]
    return jax.device_put(new, old.sharding) if is_sharded(old) else new


def decoded_leaves(entries: list[dict[str, Any]], stored: Any, template: Leaves) -> list[Any]:
    """Returns the leaves of the state; raises ValueError if they are not those of the template."""
    arrays = {} if stored is None else stored  # some formats know no empty dict
    if not isinstance(arrays, Mapping):
        raise ValueError(
            f"the export is damaged: its 'leaves' is a {type(arrays).__name__}, not a dict"
        )
    pairs = zip(template.paths, template.values, strict=True)
    leaves = [(path, as_array(leaf, path)) for path, leaf in pairs if not is_hole(leaf)]
    if len(leaves) == len(entries):
        leaf_entries = zip(leaves, entries, strict=True)
        leaves = [(path, _widened(leaf, entry["dtype"])) for (path, leaf), entry in leaf_entries]
    if any(isinstance(x, Tracer) for x in arrays.values()):
        entries = _without_batch_axis(entries, [leaf for _, leaf in leaves])
    in_export = [(entry["path"], _description(entry)) for entry in entries]
    expected = [(path, _description(describe_leaf(leaf))) for path, leaf in leaves]
    if in_export != expected:
        place = _place_of_state(dict(in_export), dict(expected))
        if place is not None:
            others = [path for path, _ in in_export if not path.startswith(f"{place}/")]
            raise ValueError(
                f"the export is of a tree that holds the state at {place!r}, beside "
                f"{quoted_list(others)}; give such a tree in place of the transformation: "
                "fo.import_state(tree, params, exported)"
            )
        hint = _batch_axis(entries, [leaf for _, leaf in leaves])
        differences = _differences(dict(in_export), dict(expected))
        raise ValueError(
            f"the export is not of a state of this transformation: {differences}{hint}"
        )
    # In order, not by path: a key with a slash can make two leaves share one.
    return [
        decode_leaf(arrays.get(f"{i:06d}"), leaf, path) for i, (path, leaf) in enumerate(leaves)
    ]


def _without_batch_axis(entries: list[dict[str, Any]], leaves: list[Any]) -> list[dict[str, Any]]:
    """Returns the entries without the axis that all have where a state of many was exported."""
    if len(entries) != len(leaves):
        return entries
    pairs = [(tuple(e["shape"]), tuple(x.shape)) for e, x in zip(entries, leaves, strict=True)]
    if extra_axis(pairs) is None:
        return entries
    return [{**entry, "shape": entry["shape"][1:]} for entry in entries]


def _batch_axis(entries: list[dict[str, Any]], leaves: list[Any]) -> str:
    """Returns a clause for an error if one side is of one model, and the other of many."""
    pairs = [
        (tuple(entry["shape"]), tuple(leaf.shape))
        for entry, leaf in zip(entries, leaves, strict=False)
        if tuple(entry["shape"]) != tuple(leaf.shape)
    ]
    if len(entries) != len(leaves) or not pairs:
        return ""
    if (length := extra_axis(pairs)) is not None:
        return (
            f"; the export has one more axis, of length {length}, as the state of "
            "jax.vmap(tx.init) has; import it under jax.vmap too: jax.vmap(lambda p, exported: "
            'fo.import_state(tx, p, exported), in_axes=(0, {"about": None, "leaves": 0}))'
        )
    if (length := extra_axis((leaf, entry) for entry, leaf in pairs)) is not None:
        return (
            f"; the params have one more axis, of length {length}: import the state of each model "
            "under jax.vmap"
        )
    return ""


_WIDE = ("bfloat16", "float16", "float32", "float64", "complex64", "complex128")


def _widened(leaf: Any, name: str) -> Any:
    """Returns the leaf in the exported dtype if gradients of that dtype can widen it so."""
    # The name is looked up here, because NumPy would parse it, and evaluates a name with commas.
    if name not in _WIDE or not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf
    # Without its 64-bit mode jax gives the 32-bit dtype here; no 64-bit leaf can exist then.
    wider = jax.dtypes.canonicalize_dtype(name)
    try:
        with jax.numpy_dtype_promotion("standard"):
            is_wider = jnp.promote_types(leaf.dtype, wider) == wider != leaf.dtype
    except ValueError:  # jax does not promote floats of eight bits
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, wider) if is_wider else leaf


def _description(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns shape and dtype of an entry, and the kind of a PRNG key, for comparison."""
    key = entry.get("key")
    return (entry["shape"], entry["dtype"], *([] if key is None else [key]))


class _OtherParamsError(ValueError):
    """The export is whole, and of params of other shapes."""


def _part_table(
    parts: list[tuple[int, Any]] | None, leaves: list[Any], paths: Sequence[str]
) -> PartTable | None:
    """Returns the table of the parts; raises ValueError if they are not parts of these leaves."""
    if parts is None:
        return None
    numbers = [leaf for leaf, _ in parts]
    if all(subset is None for _, subset in parts):
        raise ValueError("its parts are whole leaves")
    if numbers != sorted(numbers) or set(numbers) != set(range(len(leaves))):
        raise ValueError(f"its parts are not, in order, those of {len(leaves)} leaves")
    for leaf, encoded in parts:
        _check_shape(paths[leaf], leaves[leaf], shape_in(encoded))
    table = PartTable((leaf, decoded_subset(encoded)) for leaf, encoded in parts)
    for path, leaf, parts_of_leaf in zip(paths, leaves, table.by_leaf, strict=True):
        subsets = [subset for i in parts_of_leaf if (subset := table.parts[i][1])]
        is_whole = len(parts_of_leaf) == 1 and not subsets
        if len(subsets) != len(parts_of_leaf) and not is_whole:
            raise ValueError(f"its parts of {path!r} are not those of one leaf")
        if subsets:
            _check_parts(path, leaf, subsets)
    return table


def _check_shape(path: str, leaf: Any, shape: tuple[int, ...] | None) -> None:
    """Raises _OtherParamsError if elements are of a leaf of another shape."""
    if shape is not None and shape != getattr(leaf, "shape", ()):
        raise _other_shape(path, f"elements of the shape {shape}", leaf)


def _other_shape(path: str, has: str, leaf: Any) -> _OtherParamsError:
    return _OtherParamsError(
        f"{path!r} has {has} in it, and is {_short_type(leaf)} in the params; pass the params "
        "of the export, and for these ones make a state with init"
    )


def _check_parts(path: str, leaf: Any, subsets: list[Subset]) -> None:
    """Raises ValueError if subsets of a leaf do not fit each other, or the leaf."""
    rows = [one for one in subsets if isinstance(one, Rows)]
    shape = getattr(leaf, "shape", ())
    # Rows along two axes have elements in common.
    is_mixed = len({(one.axis, len(one.mask)) for one in rows}) > 1
    misfit = next((one for one in rows if not one.fits(shape)), None)
    if is_mixed or (misfit and len(rows) < len(subsets)):
        raise ValueError(f"its parts of {path!r} are not those of one leaf")
    if misfit:
        raise _other_shape(path, f"{len(misfit.mask):,} rows", leaf)
    all_rows = len(rows) == len(subsets)
    masks = [one.mask for one in rows] if all_rows else [one.mask_of(shape) for one in subsets]
    if np.sum(masks, axis=0).max() > 1:
        raise ValueError("two of its parts have one row, or element")


def _plan(about: dict[str, Any], initial_plan: Plan, params: Any) -> Plan:
    """Returns the exported plan; raises ValueError unless it is a plan for these params."""
    paths = tuple(about["paths"])
    if paths != initial_plan.paths:
        raise ValueError(
            "the export is of other params: "
            + path_differences(paths, initial_plan.paths, "in it", "in the params")
        )
    frozen, cohorts = tuple(about["frozen"]), tuple(about["cohorts"])
    schedule = tuple((start, tuple(flags)) for start, flags in about["schedule"])
    try:
        leaves = param_leaves(params).values
        table = _part_table(about["parts"], leaves, paths)
    except _OtherParamsError as error:
        raise ValueError(f"the export is of other params: {error}") from None
    except ValueError as error:
        raise ValueError(f"the export is damaged: {error}") from error
    context, rotation = initial_plan.context, initial_plan.rotation
    plan = Plan(initial_plan.paths, frozen, cohorts, context, schedule, table, rotation)
    if schedule != initial_plan.schedule or (schedule and plan != initial_plan):
        raise ValueError("the export is of other phases than those of the transformation")
    if schedule:
        return initial_plan
    _check_trainable(plan, leaves)
    if not _is_possible(plan):
        raise ValueError("the export is damaged: its cohorts and frozen flags do not agree")
    return plan


def _is_possible(plan: Plan) -> bool:
    """Whether edits of a state can lead to this plan, which is not one of phases."""
    parts = zip(plan.cohorts, plan.leaf_of_part, plan.frozen, strict=True)
    with_state = [part for part in parts if part[0] != DROPPED or not part[2]]
    cohorts, leaves = {part[0] for part in with_state}, {part[1] for part in with_state}
    if cohorts != set(range(len(cohorts))):
        return False
    if len(cohorts) < 2 and len(leaves) == len(with_state) and not plan.parked:
        return True
    if not plan.layout.counters:
        return len(cohorts) < 2
    # A part has a cohort of its own if its counters differ from those of the others, or are parked.
    kinds = {(cohort, frozen) for cohort, _, frozen in with_state}
    return len(kinds) == len(cohorts) and len(set(with_state)) == len(with_state)


def _check_trainable(plan: Plan, leaves: list[Any]) -> None:
    """Raises ValueError if a leaf with state in the export cannot be trained in the params."""
    for cohort, leaf in zip(plan.cohorts, plan.leaf_of_part, strict=True):
        if cohort != DROPPED and not can_train(leaves[leaf]):
            raise ValueError(
                f"the export is of other params: {plan.paths[leaf]!r} trains in it, or is parked, "
                f"but is {_short_type(leaves[leaf])} in the params, which can't be trained; pass "
                "the params of the export"
            )


def _short_type(leaf: Any) -> str:
    """Returns the dtype and shape of an array, or the type of anything else, for an error."""
    return f"{leaf.dtype}{list(leaf.shape)}" if is_array(leaf) else f"a {type(leaf).__name__}"


def _abstract_state(plan: Plan, params: Any) -> FreezeState:
    """Returns a state with this plan, as shapes."""
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


def _place_of_state(exported: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """Returns the path of a node of an export that has all the expected leaves, if there is one."""
    first, entry = next(iter(expected.items()), ("", None))
    for path, other in exported.items():
        place = path.removesuffix(f"/{first}")
        if place != path and other == entry:
            below = {f"{place}/{name}": x for name, x in expected.items()}
            if below.items() <= exported.items():
                return place
    return None


def _differences(exported: dict[str, Any], expected: dict[str, Any]) -> str:
    """Describes how the leaves of an export differ from those of the state."""
    if exported.keys() != expected.keys() or exported == expected:
        return path_differences(
            tuple(exported), tuple(expected), "in the export", "in the state to be"
        )
    differing_paths = [path for path, entry in exported.items() if entry != expected[path]]
    clauses = few_clauses(
        [f"{path!r} is {exported[path]}, not {expected[path]}" for path in differing_paths]
    )
    if all(exported[path][1:] == expected[path][1:] for path in differing_paths):
        clauses += "; only shapes differ: if the params have changed, pass those of the export"
    return clauses
