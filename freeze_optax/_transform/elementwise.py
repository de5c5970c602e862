"""Refuses single elements where the optimizer computes along the axes of a leaf.

Of a leaf in elements the inner transformation gets a vector. Adam does not mind. Muon, factored
Adafactor or SM3 would take the vector for another kind of leaf, and train it in another way,
without a word. No transformation says which kind it is, so it is shown each leaf twice, as it is
and as a vector: its state and the operations of its update must not differ but in shapes.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax

from freeze_optax._rows.elements import Elements
from freeze_optax._state.plan import Plan
from freeze_optax._tree.holes import HOLE
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.lookahead import param_copies, param_leaves, rewrap_copies
from freeze_optax._tree.messages import quoted_list

Shape = tuple[int, ...]


def check_takes_elements(plan: Plan, params: Any) -> None:
    """Raises ValueError if a leaf is in elements, and the optimizer computes along its axes.

    Args:
      plan: The plan. Nothing is checked if its transformation is lost (see `PlanContext.init`).
      params: The params.
    """
    table, inner = plan.part_table, plan.context.inner
    if table is None or inner is None:
        return
    split = {leaf for leaf, subset in table.parts if isinstance(subset, Elements)}
    if not split:
        return
    leaves = param_leaves(params)
    values = plan.in_plan_order(leaves, leaves.values)
    shapes = {i: jax.ShapeDtypeStruct(values[i].shape, values[i].dtype) for i in sorted(split)}
    as_whole, as_vector = _abstract(plan, shapes, False), _abstract(plan, shapes, True)
    # Adam's own update refuses the strict mode of dtype promotion.
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("ignore")
        states = [jax.eval_shape(inner.init, tree) for tree in (as_whole, as_vector)]
        reason = _difference(states[0], states[1])
        for group in _alike(plan, shapes) if not reason else ():
            reason = reason or _difference_of_updates(plan, inner, group)
    if reason:
        raise ValueError(
            f"{quoted_list([plan.paths[i] for i in shapes])} would train in single elements, "
            f"which the optimizer gets as a vector, but {reason}; choose rows (fo.rows), or for "
            "these leaves an optimizer that treats each element alone, such as optax.adamw, with "
            "masks by path"
        )


def _abstract(plan: Plan, shapes: dict[int, jax.ShapeDtypeStruct], as_vector: bool) -> Any:
    """Returns params, in the containers that `init` saw, of these leaves alone."""
    values: list[Any] = [HOLE] * len(plan.paths)
    for i, leaf in shapes.items():
        shape = (math.prod(leaf.shape),) if as_vector else leaf.shape
        values[i] = jax.ShapeDtypeStruct(shape, leaf.dtype)
    skeleton = plan.context.skeleton
    copies = [Leaves(copy).rebuild(values) for copy in param_copies(skeleton)]
    return rewrap_copies(skeleton, copies)


def _alike(
    plan: Plan, shapes: dict[int, jax.ShapeDtypeStruct]
) -> Iterator[dict[int, jax.ShapeDtypeStruct]]:
    """Yields one leaf of each kind: of one shape and dtype, with statistics at the same places."""
    try:
        layout = plan.context.layout(None)
    except ValueError:  # a state that can't be edited has no layout
        yield shapes
        return
    places: dict[int, list[Any]] = {i: [] for i in shapes}
    for prefix, owner in zip(layout.prefixes, layout.owners, strict=True):
        if owner in places:
            places[owner].append(prefix)
    kinds = {(x.shape, str(x.dtype), tuple(places[i])): i for i, x in reversed(shapes.items())}
    for i in kinds.values():
        yield {i: shapes[i]}


def _difference(whole: Any, vector: Any) -> str:
    """Says how the state of whole leaves differs from that of vectors; empty if only in shapes."""
    of_whole, of_vector = Leaves(whole), Leaves(vector)
    if of_whole.treedef != of_vector.treedef:
        return f"its state ({type(whole).__name__}) is another one for a vector"
    entries = zip(of_whole.paths, of_whole.values, of_vector.values, strict=True)
    for path, a, b in entries:
        shape, flat = getattr(a, "shape", ()), getattr(b, "shape", ())
        kept = len(flat) - 1  # axes of its own, in front of those of the leaf, as L-BFGS has
        if shape != flat and flat != (*shape[:kept], math.prod(shape[kept:])):
            return f"its state has {shape} at {path!r} for the whole leaf, and {flat} for a vector"
    return ""


def _difference_of_updates(plan: Plan, inner: Any, shapes: dict[int, Any]) -> str:
    """Says that an update computes along axes; empty if not, or if it needs more arguments."""
    # An aggregator of gradients of single examples computes along their axis, which is in front.
    if any(_is_alike(plan, inner, shapes, examples) for examples in ((), (2,))):
        return ""
    return (
        "its update computes along the axes of a leaf, or has a mask that depends on their number"
    )


def _is_alike(plan: Plan, inner: Any, shapes: dict[int, Any], examples: Shape) -> bool:
    """Returns whether an update does the same with whole leaves as with vectors.

    Args:
      plan: The plan.
      inner: The transformation.
      shapes: The leaves.
      examples: The axes of examples of the gradients. With some, an update that keeps them is not
        alike: it takes them for axes of the leaf.
    """
    signatures: list[list[Any]] = []
    for as_vector in (False, True):
        params = _abstract(plan, shapes, as_vector)
        grads = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*examples, *x.shape), x.dtype), param_copies(params)[0]
        )

        def update(grads: Any, params: Any) -> Any:
            return inner.update(grads, inner.init(params), params)[0]

        try:
            made = jax.make_jaxpr(update, return_shape=True)(grads, params)
        except Exception:  # noqa: BLE001  (a line search wants the loss, for example)
            return not examples
        jaxpr, updates = made
        pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=False)
        if examples and any(a.shape != b.shape for a, b in pairs):
            return False
        signatures.append(list(_operations(jaxpr.jaxpr, len(examples))))
    return signatures[0] == signatures[1]


_ALONG_AXES = {"axes", "axis", "dimension", "dimensions", "permutation"}
"""The params of primitives that treat the axes of an array in different ways."""

# What differs between an array and the vector of its elements even where nothing depends on it.
_RESHAPING = {"reshape", "squeeze", "broadcast_in_dim", "expand_dims", "copy", "slice"}


def _operations(jaxpr: Any, examples: int = 0) -> Iterator[tuple[Any, ...]]:
    """Yields the operations of a jaxpr, those along axes with the axes of a leaf that they treat.

    Args:
      jaxpr: The jaxpr.
      examples: The number of axes of examples, in front of those of a leaf.
    """
    for equation in jaxpr.eqns:
        inner = list(_jaxprs(equation.params.values()))
        if inner:
            for one in inner:
                yield from _operations(one, examples)
            continue
        name, first = equation.primitive.name, equation.invars[0] if equation.invars else None
        # What gives one number reads all of an array, or numbers: the index of each axis, say.
        if name in _RESHAPING or all(x.aval.shape == () for x in equation.outvars):
            continue
        rank = len(getattr(getattr(first, "aval", None), "shape", ()))
        axes: tuple[int, ...] | None = equation.params.get("axes")
        if examples and axes is not None and set(axes) <= {*range(examples)}:
            yield name, "examples"
        elif examples and axes is not None and set(axes) >= {*range(examples, rank)}:
            yield name, "leaf"
        else:
            is_along_axes = name == "dot_general" or not _ALONG_AXES.isdisjoint(equation.params)
            yield (name, rank) if is_along_axes else (name,)


def _jaxprs(params: Iterable[Any]) -> Iterator[Any]:
    for param in params:
        many: Sequence[Any] = param if isinstance(param, tuple | list) else (param,)
        for one in many:
            jaxpr = getattr(one, "jaxpr", one)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr
