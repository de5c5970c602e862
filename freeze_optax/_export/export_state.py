"""`export_state`: a state as plain arrays that any checkpointer stores."""

from typing import Any

import numpy as np

from freeze_optax._edit.state_holders import only_state
from freeze_optax._export.encoding import encode_leaf, pack_text
from freeze_optax._rows.rows import Rows
from freeze_optax._tree.holes import is_hole
from freeze_optax._tree.leaves import Leaves


def export_state(state: Any) -> dict[str, Any]:
    """Returns a state as a nested dict of string keys and arrays, for any checkpointer.

    The dict has no custom node, no hole and no array without elements. Names that a file format may
    refuse (keys with slashes, dots or quotes) are text in one of the arrays. Typed PRNG keys are
    stored as their key data, and dtypes that NumPy does not have as their bits.

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
      `{"about": uint8 array, "leaves": {number: array}}`. An array that needs no encoding is the
      same object as in `state`, with its sharding. `state` does not change.

    Raises:
      TypeError: If `state` holds no `FreezeState`.
      ValueError: If `state` holds several `FreezeState`s.
    """
    plan = only_state("export_state", state).plan
    entries, arrays = list[dict[str, Any]](), dict[str, Any]()
    leaves = Leaves(state)
    for path, leaf in zip(leaves.paths, leaves.values, strict=True):
        if is_hole(leaf):
            continue
        array, entry = encode_leaf(leaf)
        if array.size:  # Orbax stores no array without elements
            arrays[f"{len(entries):06d}"] = array
        entries.append({"path": path, **entry})
    about = {
        "paths": plan.paths,
        "frozen": plan.frozen,
        "cohorts": plan.cohorts,
        "schedule": plan.schedule,
        "parts": plan.part_table
        and [(leaf, encoded_rows(rows)) for leaf, rows in plan.part_table.parts],
        "leaves": entries,
    }
    return {"about": pack_text(about), "leaves": arrays}


def encoded_rows(rows: Rows | None) -> Any:
    """Returns rows as their count and a hex string of their bits; None for all rows."""
    return rows and [len(rows.mask), np.packbits(rows.mask).tobytes().hex()]
