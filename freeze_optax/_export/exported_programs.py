"""`register_for_jax_export`: programs that `jax.export` stores may take and return states."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import optax
from jax import export

from freeze_optax._export.encoded_subset import decoded_subset, encoded_subset
from freeze_optax._export.encoding import pack_text, unpack_text
from freeze_optax._export.export_state import described_plan
from freeze_optax._rows.parts import Parts, PartTable
from freeze_optax._state.context import PlanContext
from freeze_optax._state.freeze_state import FreezeState, ScheduledState
from freeze_optax._state.measured_state import MeasuredState
from freeze_optax._state.plan import Plan
from freeze_optax._state.rates_state import RatesState
from freeze_optax._state.rotation import RotatingState, Rotation
from freeze_optax._transform.since_thaw import SinceThawState

_OUR_TUPLES = ScheduledState, RotatingState, RatesState, SinceThawState, MeasuredState
_TRANSFORMATIONS = optax.GradientTransformation, optax.GradientTransformationExtraArgs


def register_for_jax_export() -> None:
    """Lets `jax.export` store programs that take or return states of this library and of optax.

    Call it once in the process that stores a step, and once in each that loads it. `jax.export`
    stores the structure of what a program takes and returns, and needs to be told how to store each
    type in it. This registers `FreezeState` with its plan, the other states of this library, and
    the states of optax, which are named tuples that optax leaves unregistered. A type that is
    registered already stays as it is, so a second call does nothing.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import freeze_optax as fo
      >>> fo.register_for_jax_export()
      >>> params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
      >>> tx = fo.freezable(optax.adam(0.1), "encoder")
      >>> def step(params, state):
      ...     updates, state = tx.update(params, state, params)
      ...     return fo.apply_updates(params, updates, frozen=state), state
      >>> stored = jax.export.export(jax.jit(step))(params, tx.init(params)).serialize()
      >>> loaded = jax.export.deserialize(stored)
      >>> params, state = loaded.call(params, tx.init(params))
      >>> fo.mask(state, params)
      {'encoder': True, 'head': False}

    The program is for what was frozen when it was stored. A state with another plan is refused by
    `jax.export`, as params of another structure are. A state that a loaded program returns holds no
    transformation, like one that was unpickled: `fo.export_state` stores it, `update` of the
    transformation takes it, and after that it can be edited.
    """
    _register(
        FreezeState, "freeze_optax.FreezeState", serialize=_encoded_plan, deserialize=_decoded_plan
    )
    _register(Parts, "freeze_optax.Parts", serialize=_encoded_parts, deserialize=_decoded_parts)
    for kind in _OUR_TUPLES:
        _register(kind, f"freeze_optax.{kind.__name__}")
    for kind in _tuples_of_optax():
        _register(kind, f"optax.{kind.__name__}")


def _register(kind: type[Any], name: str, serialize: Any = None, deserialize: Any = None) -> None:
    try:
        if serialize is None:
            export.register_namedtuple_serialization(kind, serialized_name=name)
        else:
            export.register_pytree_node_serialization(
                kind,
                serialized_name=name,
                serialize_auxdata=serialize,
                deserialize_auxdata=deserialize,
            )
    except ValueError as error:
        if "Duplicate serialization registration" not in str(error):
            raise


def _tuples_of_optax() -> Iterator[Any]:
    """Yields the types of the states of optax, those of `optax.contrib` if it was imported."""
    modules = [module for name, module in list(sys.modules.items()) if _is_of_optax(name)]
    found = {x for module in modules for x in vars(module).values() if isinstance(x, type)}
    for kind in sorted(found, key=lambda kind: kind.__qualname__):
        is_named_tuple = issubclass(kind, tuple) and hasattr(kind, "_fields")
        if is_named_tuple and _is_of_optax(kind.__module__) and kind not in _TRANSFORMATIONS:
            yield kind


def _is_of_optax(module: str) -> bool:
    return module == "optax" or module.startswith("optax.")


def _encoded_plan(plan: Plan) -> bytes:
    about = {
        **described_plan(plan),
        "leaves": [],
        "kinds": plan.leaf_kinds,
        "rotation": plan.rotation and dataclasses.asdict(plan.rotation),
    }
    return pack_text(about).tobytes()


def _decoded_plan(data: bytes) -> Plan:
    about = unpack_text({"about": np.frombuffer(data, np.uint8)})
    kinds, rotation, parts = about["kinds"], about["rotation"], about["parts"]
    return Plan(
        tuple(about["paths"]),
        tuple(about["frozen"]),
        tuple(about["cohorts"]),
        PlanContext.without_transformation(tuple(kind and tuple(kind) for kind in kinds)),
        tuple((step, tuple(frozen)) for step, frozen in about["schedule"]),
        parts and PartTable((leaf, decoded_subset(subset)) for leaf, subset in parts),
        rotation and Rotation(**{name: _as_tuples(x) for name, x in rotation.items()}),
    )


def _as_tuples(x: Any) -> Any:
    return tuple(map(_as_tuples, x)) if isinstance(x, list) else x


def _encoded_parts(static: tuple[Any, ...]) -> bytes:
    subsets, mesh_axes = static
    return json.dumps([[encoded_subset(x) for x in subsets], mesh_axes]).encode()


def _decoded_parts(data: bytes) -> tuple[Any, ...]:
    subsets, mesh_axes = json.loads(data)
    return tuple(map(decoded_subset, subsets)), _as_tuples(mesh_axes)
