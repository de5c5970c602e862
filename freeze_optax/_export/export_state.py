"""`export_state`: a state as plain arrays that any checkpointer stores."""

from typing import Any

from freeze_optax._edit.state_holders import only_state
from freeze_optax._export.encoded_subset import encoded_subset
from freeze_optax._export.encoding import encode_leaf, pack_text
from freeze_optax._state.freeze_state import FreezeState, states_in
from freeze_optax._state.plan import Plan
from freeze_optax._tree.holes import is_hole
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.modules import children_of
from freeze_optax._tree.variables import is_nnx_object


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
      state: A `FreezeState`, or any tree of arrays and numbers that holds exactly one: the state of
        an `optax.chain`, or of `scheduled`; a `TrainState`; a dict of params and state.
        `import_state` gives the same tree back.

    Returns:
      `{"about": uint8 array, "leaves": {number: array}}`. An array that needs no encoding is the
      same object as in `state`, with its sharding. `state` does not change.

    Raises:
      TypeError: If `state` holds no `FreezeState`; if it is an object of NNX; or if a leaf is
        neither an array nor a number.
      ValueError: If `state` holds several `FreezeState`s.
    """
    plan = only_state("export_state", state).plan
    _check_holders(state)
    entries, arrays = list[dict[str, Any]](), dict[str, Any]()
    leaves = Leaves(state)
    for path, leaf in zip(leaves.paths, leaves.values, strict=True):
        if is_hole(leaf):
            continue
        array, entry = encode_leaf(leaf, path)
        if array.size:  # Orbax stores no array without elements
            arrays[f"{len(entries):06d}"] = array
        entries.append({"path": path, **entry})
    return {"about": pack_text({**described_plan(plan), "leaves": entries}), "leaves": arrays}


def described_plan(plan: Plan) -> dict[str, Any]:
    """Returns a plan as the entries that the text of an export has of it."""
    return {
        "paths": plan.paths,
        "frozen": plan.frozen,
        "cohorts": plan.cohorts,
        "schedule": plan.schedule,
        "parts": plan.part_table
        and [(leaf, encoded_subset(subset)) for leaf, subset in plan.part_table.parts],
    }


def _check_holders(tree: Any) -> None:
    """Raises TypeError if the `FreezeState` of a tree is in an object of NNX."""
    node = tree
    while not isinstance(node, FreezeState):
        if is_nnx_object(node):
            raise TypeError(
                f"export_state was given an object of Flax NNX ({type(node).__name__}), whose "
                "Variables only NNX can make again; export its state alone, for an nnx.Optimizer "
                "fo.export_state(optimizer.opt_state); docs/how-to/flax-nnx.md shows how one goes "
                "on with it"
            )
        node = next(child for _, child in children_of(node) or () if states_in(child))
