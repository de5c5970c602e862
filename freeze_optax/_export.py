"""A state as plain arrays that any checkpointer stores, and back."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from freeze_optax._copies import leaves_of
from freeze_optax._cut import Cut
from freeze_optax._edit import (
    abstract_init,
    in_order,
    init_leaves,
    only_state,
    replace_state,
    set_frozen,
)
from freeze_optax._leaves import Leaves, is_hole
from freeze_optax._patterns import odd_paths, some
from freeze_optax._plan import DROPPED, Plan
from freeze_optax._rows import Rows, flag_of
from freeze_optax._selectors import Spec
from freeze_optax._state import FreezeState
from freeze_optax._storage import decode, encode

_FORMAT = "freeze_optax state, version 1"


def export_state(state: Any) -> dict[str, Any]:
    """Gives a state as a nested dict of string keys and arrays, for any checkpointer.

    There is no custom node in it and no hole, and no array without elements. Names that a file
    format might not like (keys with slashes, dots or quotes) stand in an array of their own.
    Typed PRNG keys go as their key data, and dtypes that NumPy lacks as their bits.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import freeze_optax as fo
      >>> params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
      >>> tx = fo.freezable(optax.sgd(0.1, momentum=0.9), "encoder")
      >>> exported = fo.export_state(tx.init(params))
      >>> exported["leaves"]
      {'000000': Array([0., 0.], dtype=float32)}
      >>> state = fo.import_state(tx, params, exported)

    Args:
      state: A `FreezeState`, or any tree that holds exactly one: the state of an `optax.chain`, or
        of `scheduled`.

    Returns:
      `{"about": uint8 array, "leaves": {number: array}}`. Arrays that are stored as they are are
      the very ones, sharded as they are.

    Raises:
      TypeError: If `state` holds no `FreezeState`.
      ValueError: If it holds several.
    """
    plan = only_state("export_state", state).plan
    entries, arrays = list[dict[str, Any]](), dict[str, Any]()
    leaves = Leaves(state)
    for path, leaf in zip(leaves.paths, leaves.values, strict=True):
        if is_hole(leaf):
            continue
        array, entry = encode(leaf)
        if array.size:  # Orbax stores no array without elements
            arrays[f"{len(entries):06d}"] = array
        entries.append({"path": path, **entry})
    about = {
        "format": _FORMAT,
        "paths": plan.paths,
        "frozen": plan.frozen,
        "cohorts": plan.cohorts,
        "schedule": plan.schedule,
        "parts": plan.cut and [(leaf, _encoded(rows)) for leaf, rows in plan.cut.parts],
        "leaves": entries,
    }
    return {"about": np.frombuffer(json.dumps(about).encode(), np.uint8), "leaves": arrays}


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
      The state, with its statistics sharded as their parameters.

    Raises:
      ValueError: If the export is damaged, or of other params or another transformation, naming
        the paths on both sides; or if `frozen` does not fit the params.
      TypeError: If the state of `tx` holds no `FreezeState`.
    """
    about = _read(exported)
    abstract = abstract_init(tx.init, params)
    plan = _plan(about, only_state("import_state", abstract).plan, params)
    template = Leaves(replace_state(abstract, _abstract_state(plan, params)))
    expected = [
        (path, (list(leaf.shape), str(leaf.dtype)))
        for path, leaf in zip(template.paths, template.values, strict=True)
        if not is_hole(leaf)
    ]
    given = [(entry["path"], (entry["shape"], entry["dtype"])) for entry in about["leaves"]]
    if given != expected:
        odd = _odd(dict(given), dict(expected))
        raise ValueError(f"the export is not of a state of this transformation: {odd}")
    arrays = exported.get("leaves") or {}
    # In order, not by path: a key with a slash can make two leaves share one.
    values = iter(
        [decode(arrays.get(f"{i:06d}"), entry) for i, entry in enumerate(about["leaves"])]
    )
    tree = template.rebuild(x if is_hole(x) else next(values) for x in template.values)
    placed = _place(only_state("import_state", tree), params)
    tree = replace_state(tree, placed)
    return tree if frozen is None else set_frozen(tree, params, frozen)


def _encoded(rows: Rows | None) -> Any:
    return rows and [len(rows.mask), np.packbits(rows.mask).tobytes().hex()]


def _decoded(rows: Any) -> Rows | None:
    if rows is None:
        return None
    count, bits = rows
    packed = np.frombuffer(bytes.fromhex(bits), np.uint8)
    if len(packed) != (count + 7) // 8:
        raise ValueError(f"{count} rows in {len(packed)} bytes")
    flag = flag_of(np.unpackbits(packed, count=count).astype(bool))
    if not isinstance(flag, Rows):
        raise TypeError("a part of all rows or none")
    return flag


def _cut(parts: Any, leaves: list[Any]) -> Cut | None:
    """The parts again, which have to be parts of these leaves."""
    if parts is None:
        return None
    cut = Cut((int(leaf), _decoded(rows)) for leaf, rows in parts)
    if [leaf for leaf, _ in cut.parts] != [i for i, own in enumerate(cut.by_leaf) for _ in own]:
        raise ValueError("its parts are in disorder")
    for leaf, own in zip(leaves, cut.by_leaf, strict=True):
        masks = [rows.mask for i in own if (rows := cut.parts[i][1])]
        shape = getattr(leaf, "shape", ())[:1]
        is_whole = len(own) == 1 and not masks
        if any(mask.shape != shape for mask in masks) or (len(masks) != len(own) and not is_whole):
            raise ValueError(f"its rows are not those of a leaf of shape {shape}")
        if masks and np.sum(masks, axis=0).max() > 1:
            raise ValueError("two of its parts have one row")
    return cut


def _read(exported: Any) -> dict[str, Any]:
    try:
        text = np.asarray(exported["about"]).astype(np.uint8).tobytes()
        about = json.loads(text)
        parts = about["paths"] if about["parts"] is None else about["parts"]
        ok = about["format"] == _FORMAT and len(parts) == len(about["frozen"])
        ok = ok and len(parts) == len(about["cohorts"])
        ok = ok and all({"path", "shape", "dtype"} <= set(entry) for entry in about["leaves"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"this is no export of fo.export_state, or damaged: its 'about' can't be read "
            f"({type(error).__name__}: {error})"
        ) from error
    if not ok:
        raise ValueError(
            f"this is no export of fo.export_state that this version reads: format "
            f"{about.get('format')!r}, not {_FORMAT!r}"
        )
    return about


def _plan(about: dict[str, Any], own: Plan, params: Any) -> Plan:
    paths = tuple(about["paths"])
    if paths != own.paths:
        raise ValueError(
            "the export is of other params: "
            + odd_paths(paths, own.paths, "in it", "in the params")
        )
    frozen = tuple(bool(flag) for flag in about["frozen"])
    cohorts = tuple(int(cohort) for cohort in about["cohorts"])
    schedule = tuple((start, tuple(flags)) for start, flags in about["schedule"])
    try:
        leaves = leaves_of(params)
        cut = _cut(about["parts"], in_order(own, leaves, leaves.values))
    except (TypeError, ValueError, IndexError, OverflowError) as error:
        raise ValueError(f"the export is damaged: {error}") from error
    if schedule != own.schedule or (schedule and cut != own.cut):
        raise ValueError("the export is of other phases than those of the transformation")
    present = sorted(set(cohorts) - {DROPPED})
    live = [i for i, flag in enumerate(frozen) if not flag]
    if present != list(range(len(present))) or any(cohorts[i] == DROPPED for i in live):
        raise ValueError("the export is damaged: its cohorts and frozen flags do not agree")
    return own if schedule else Plan(own.paths, frozen, cohorts, own.origin, cut=cut)


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


def _place(state: FreezeState, params: Any) -> FreezeState:
    """The state with the statistics of each sharded param on the same devices."""
    leaves = leaves_of(params)
    values = in_order(state.plan, leaves, leaves.values)
    if not any(isinstance(x, jax.Array) and len(x.sharding.device_set) > 1 for x in values):
        return state
    layout, cut = state.plan.layout, state.plan.cut

    def beside(x: Any, param: Any) -> Any:
        return jax.device_put(x, param.sharding) if x.shape == param.shape else x

    pairs = zip(layout.owners, layout.places(state.inner), strict=True)
    placed = [
        jax.tree.map(
            lambda x, leaf=cut.parts[owner][0] if cut else owner: beside(x, values[leaf]), place
        )
        if owner >= 0
        else place
        for owner, place in pairs
    ]
    return FreezeState(layout.rebuild(placed), state.ages, state.plan)


def _odd(given: dict[str, Any], expected: dict[str, Any]) -> str:
    if given.keys() != expected.keys() or given == expected:
        return odd_paths(tuple(given), tuple(expected), "in the export", "in the state to be")
    differing = [path for path, what in given.items() if what != expected[path]]
    return some([f"{path!r} is {given[path]}, not {expected[path]}" for path in differing])
