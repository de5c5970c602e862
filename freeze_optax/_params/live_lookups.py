"""Gradients of tables of which some rows train, without a gradient of the whole table.

The gradient of a lookup, `table[ids]`, is a table of zeros to which the rows of the cotangent are
added. If only some rows train, XLA still makes the whole table, and the rows are taken from it. So
here the backward pass is traced to a jaxpr, and what adds to the whole table is replaced by what
adds to the rows that train. All that is not understood stays as it is, and the rows are taken from
its result: the gradients are the same, bit for bit.

JAX's own way, references (`jax.vjp(…)[1].with_refs`), does not serve. A reference has the shape of
the table, and before JAX 0.12 a lookup makes the table of zeros even so. To replace the lookups in
the function itself was rejected: the function would have to be traced before it is differentiated.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Literal, Var, jaxpr_as_fun
from jax.lax import GatherScatterMode

from freeze_optax._rows.flags import Flag
from freeze_optax._rows.rows import Rows
from freeze_optax._rows.take_put import take_if_whole
from freeze_optax._tree.memory import memory_of

_NONE: Mapping[int, Rows] = {}
_CALLS = ("jit", "pjit", "checkpoint", "remat2", "cond", "scan")
"""Primitives that call jaxprs, and return what these return, in the same order."""
_MODES = (
    GatherScatterMode.FILL_OR_DROP,
    GatherScatterMode.PROMISE_IN_BOUNDS,
    GatherScatterMode.CLIP,
)


def whole_tables(values: Sequence[Any], frozen: Sequence[Flag]) -> list[Rows | None]:
    """Returns for each leaf the rows that train, if it goes to `value_and_grad_of_rows` as a whole.

    Outside of jit no leaf does. There, jaxprs that change with each call would be compiled anew.

    Args:
      values: The leaves.
      frozen: What is frozen of each.
    """
    none: list[Rows | None] = [None] * len(values)
    if not any(isinstance(flag, Rows) and not flag.axis for flag in frozen):
        return none
    pairs = list(zip(values, frozen, strict=True))
    has_real_numbers = all(
        flag is True or jnp.issubdtype(jax.dtypes.result_type(x), jnp.floating) for x, flag in pairs
    )
    # Under jit also new arrays are tracers; under vmap alone they are not.
    if not has_real_numbers or not isinstance(jnp.zeros(()), Tracer):
        return none
    return [
        ~flag if isinstance(flag, Rows) and not flag.axis and _is_plain(x) else None
        for x, flag in pairs
    ]


def _is_plain(leaf: Any) -> bool:
    """Returns whether a leaf is a matrix, or has more axes, on the device, and on no mesh."""
    if not isinstance(leaf, Tracer) or leaf.ndim < 2 or memory_of(leaf):
        return False
    sharding: Any = jax.typeof(leaf).sharding
    return sharding.mesh.empty


def value_and_grad_of_rows(
    fun: Callable[[list[Any]], Any], rows: Sequence[Rows | None], has_aux: bool
) -> Callable[[list[Any]], tuple[Any, list[Any]]]:
    """Differentiates `fun` as `jax.value_and_grad` does, but with respect to some rows of arrays.

    Args:
      fun: A function of a list of arrays.
      rows: For each array, the rows whose gradient to return; None for that of the whole array.
      has_aux: Whether `fun` returns a pair.
    """
    differentiate = jax.value_and_grad(fun, has_aux=has_aux)
    if not any(rows):
        return differentiate

    def value_and_grad_fn(arrays: list[Any]) -> tuple[Any, list[Any]]:
        value, pull_back, *aux = jax.vjp(fun, arrays, has_aux=has_aux)
        if not isinstance(value, jax.Array) or value.shape or not _is_real(value):
            value, gradients = differentiate(arrays)  # It may raise the error of JAX.
            return value, list(map(_rows_of, gradients, rows))
        one = jax.lax.full_like(value, 1)
        # Under jit it is one equation, so that what is not changed is not traced a second time.
        backward: Any = jax.make_jaxpr(jax.jit(lambda one: pull_back(one)))(one)  # noqa: PLW0108
        understood = _sums_of_lookups(backward.jaxpr, [i for i, some in enumerate(rows) if some])
        of_outputs = {i: some for i, some in enumerate(rows) if some and i in understood}
        backward = backward.replace(jaxpr=_of_rows(backward.jaxpr, of_outputs))
        gradients = list(map(_rows_of, jaxpr_as_fun(backward)(one), rows))
        return ((value, *aux) if has_aux else value), gradients

    return value_and_grad_fn


def _rows_of(gradient: Any, rows: Rows | None) -> Any:
    """Returns the rows of a gradient that may have these rows only."""
    return take_if_whole(gradient, rows) if rows else gradient


def _is_real(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _sums_of_lookups(jaxpr: Any, outputs: Iterable[int], given: int | None = None) -> set[int]:
    """Returns which outputs are sums of zeros and of the rows that lookups add, and nothing else.

    Args:
      jaxpr: The jaxpr.
      outputs: The indices of the outputs to look at.
      given: The index of an argument that is such a sum itself.
    """
    good, uses = set(outputs), _uses(jaxpr)
    sums: dict[Any, set[int]] = {}
    for i in outputs:
        sums.setdefault(jaxpr.outvars[i], set()).add(i)
    for eqn in reversed(jaxpr.eqns):
        for i, out in enumerate(eqn.outvars):
            if out in sums:
                of_outputs = sums.pop(out)
                summands = _summands(eqn, i, uses)
                if summands is None:
                    good -= of_outputs
                for k in summands or ():
                    sums.setdefault(eqn.invars[k], set()).update(of_outputs)
    if given is not None and uses[jaxpr.invars[given]] == 1:
        sums.pop(jaxpr.invars[given], None)
    return good.difference(*sums.values())


def _uses(jaxpr: Any) -> Counter[Any]:
    atoms = [*jaxpr.outvars, *(x for eqn in jaxpr.eqns for x in eqn.invars)]
    return Counter(x for x in atoms if not isinstance(x, Literal))


def _summands(eqn: Any, output: int, uses: Counter[Any]) -> Sequence[int] | None:
    """Returns which operands have to be sums of lookups, for an output to be one; None if none do.

    Args:
      eqn: The equation.
      output: The index of the output.
      uses: How often each variable is used.
    """
    out, name = eqn.outvars[output], eqn.primitive.name
    if name in _CALLS:
        return _summands_of_call(eqn, output) if uses[out] == 1 and not _is_placed(eqn) else None
    if name == "scatter-add" and _adds_to_rows(eqn):
        return (0,)
    if name == "broadcast_in_dim" and not eqn.invars[0].aval.shape:
        return ()
    if name in ("add_any", "add") and all(_is_like(x, out) for x in eqn.invars):
        return (0, 1)
    if name == "convert_element_type" and _is_like(eqn.invars[0], out):
        return (0,)
    return None


def _is_like(x: Any, other: Any) -> bool:
    return not isinstance(x, Literal) and x.aval.shape == other.aval.shape


def _is_placed(eqn: Any) -> bool:
    """Returns whether the user has said what sharding or layout an output of a call has."""
    shardings, layouts = (eqn.params.get(f"out_{name}", ()) for name in ("shardings", "layouts"))
    has_layout = any(layout is not None for layout in layouts)
    return has_layout or any(isinstance(x, jax.sharding.Sharding) for x in shardings)


def _summands_of_call(eqn: Any, output: int) -> Sequence[int] | None:
    jaxprs, first_carry = _jaxprs(eqn), None
    if eqn.primitive.name == "scan":
        (jaxpr,) = jaxprs
        if jaxpr.outvars[output].aval.shape != eqn.outvars[output].aval.shape:
            return None  # an output of each iteration, not the carry
        first_carry = _first_carry(eqn, jaxpr)
    given = None if first_carry is None else first_carry + output
    understood = all(_sums_of_lookups(jaxpr, [output], given) for jaxpr in jaxprs)
    return (() if given is None else (given,)) if understood else None


def _first_carry(eqn: Any, jaxpr: Any) -> int:
    """Returns the index of the first carry among the operands of a scan.

    It is told by the shapes, as the names of the parameters depend on the version of JAX. What is
    scanned over has one more axis outside than inside.
    """
    pairs = zip(eqn.outvars, jaxpr.outvars, strict=True)
    carries = sum(out.aval.ndim == inner.aval.ndim for out, inner in pairs)
    pairs = zip(eqn.invars, jaxpr.invars, strict=True)
    return sum(x.aval.ndim == inner.aval.ndim for x, inner in pairs) - carries


def _jaxprs(eqn: Any) -> list[Any]:
    jaxprs = eqn.params["branches"] if eqn.primitive.name == "cond" else (eqn.params["jaxpr"],)
    return [_opened(jaxpr) for jaxpr in jaxprs]


def _opened(jaxpr: Any) -> Any:
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def _of_rows(jaxpr: Any, outputs: Mapping[int, Rows], given: Mapping[int, Rows] = _NONE) -> Any:
    """Returns a jaxpr that returns only some rows of some outputs, which are sums of lookups.

    Args:
      jaxpr: The jaxpr.
      outputs: The rows, for the index of each output.
      given: The rows, for the index of each argument of which the new jaxpr is given rows alone.
    """
    uses = _uses(jaxpr)
    wanted: dict[Any, set[Rows]] = {}
    for i, rows in outputs.items():
        wanted.setdefault(jaxpr.outvars[i], set()).add(rows)
    for eqn in reversed(jaxpr.eqns):
        for i, out in enumerate(eqn.outvars):
            if out in wanted:
                for k in _summands(eqn, i, uses) or ():
                    wanted.setdefault(eqn.invars[k], set()).update(wanted[out])

    parts: dict[Any, Any] = {}
    invars = list(jaxpr.invars)
    for i, rows in given.items():
        invars[i] = _part(invars[i], rows)
        parts[jaxpr.invars[i], rows] = invars[i]
    eqns: list[Any] = []
    for eqn in jaxpr.eqns:
        of_outputs = {i: rows for i, x in enumerate(eqn.outvars) for rows in wanted.get(x, ())}
        if eqn.primitive.name in _CALLS and of_outputs:
            eqns.append(_call_of_rows(eqn, of_outputs, parts))
            continue
        eqns.append(eqn)
        for rows in wanted.get(eqn.outvars[0], ()) if eqn.outvars else ():
            summands = _summands(eqn, 0, uses) or ()
            operands = [parts[x, rows] if i in summands else x for i, x in enumerate(eqn.invars)]
            shapes = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in operands]
            function = jax.jit(functools.partial(_evaluate, eqn, rows))
            (new,) = jax.make_jaxpr(function)(*shapes).eqns
            eqns.append(new.replace(invars=operands))
            (parts[eqn.outvars[0], rows],) = new.outvars
    outvars = [parts[x, outputs[i]] if i in outputs else x for i, x in enumerate(jaxpr.outvars)]
    return jaxpr.replace(invars=invars, eqns=_used(eqns, outvars), outvars=outvars)


def _part(variable: Any, rows: Rows) -> Any:
    return Var(variable.aval.update(shape=(rows.count, *variable.aval.shape[1:])))


def _used(eqns: Sequence[Any], outvars: Sequence[Any]) -> list[Any]:
    used = {x for x in outvars if not isinstance(x, Literal)}
    kept: list[Any] = []
    for eqn in reversed(eqns):
        if eqn.effects or not used.isdisjoint(eqn.outvars):
            used.update(x for x in eqn.invars if not isinstance(x, Literal))
            kept.append(eqn)
    return kept[::-1]


def _call_of_rows(eqn: Any, outputs: Mapping[int, Rows], parts: dict[Any, Any]) -> Any:
    """Returns an equation whose jaxprs return only some rows of some outputs."""
    invars, outvars, given = list(eqn.invars), list(eqn.outvars), dict[int, Rows]()
    if eqn.primitive.name == "scan":
        first = _first_carry(eqn, *_jaxprs(eqn))
        given = {first + i: rows for i, rows in outputs.items()}
        for i, rows in given.items():
            invars[i] = parts[invars[i], rows]
    for i, rows in outputs.items():
        outvars[i] = _part(outvars[i], rows)
        parts[eqn.outvars[i], rows] = outvars[i]

    def changed(jaxpr: Any) -> Any:
        new = _of_rows(_opened(jaxpr), outputs, given)
        return jaxpr.replace(jaxpr=new) if isinstance(jaxpr, ClosedJaxpr) else new

    key = "branches" if eqn.primitive.name == "cond" else "jaxpr"
    jaxprs = eqn.params[key]
    new = tuple(map(changed, jaxprs)) if isinstance(jaxprs, tuple) else changed(jaxprs)
    return eqn.replace(invars=invars, params={**eqn.params, key: new}, outvars=outvars)


def _evaluate(eqn: Any, rows: Rows, *operands: Any) -> Any:
    """Computes some rows of what an equation makes, from these rows of its summands."""
    (out,), name = eqn.outvars, eqn.primitive.name
    if name == "scatter-add":
        return _add_to_rows(rows, eqn.params, *operands)
    if name == "broadcast_in_dim":
        return jnp.broadcast_to(operands[0], (rows.count, *out.aval.shape[1:]))
    if name == "convert_element_type":
        return jax.lax.convert_element_type(operands[0], out.aval.dtype)
    return jax.lax.add(*operands)


def _adds_to_rows(eqn: Any) -> bool:
    """Returns whether a `scatter-add` adds to single rows, whose indices it is given."""
    numbers, mode = eqn.params["dimension_numbers"], eqn.params["mode"]
    axes, dtype = numbers.scatter_dims_to_operand_dims, eqn.invars[1].aval.dtype
    return (
        mode in _MODES
        and 0 in axes
        and 0 in numbers.inserted_window_dims
        and 0 not in numbers.operand_batching_dims
        # The indices of the other axes would have to be clipped too.
        and (mode != GatherScatterMode.CLIP or len(axes) == 1)
        and dtype not in (np.uint32, np.uint64)
    )


def _add_to_rows(
    rows: Rows, params: dict[str, Any], part: Any, indices: Any, updates: Any
) -> jax.Array:
    numbers = params["dimension_numbers"]
    if indices.dtype.itemsize < 4:
        indices = indices.astype(np.int32)
    axis = numbers.scatter_dims_to_operand_dims.index(0)
    index = indices[..., axis]
    if params["mode"] == GatherScatterMode.CLIP:
        index = jnp.clip(index, 0, len(rows.mask) - 1)
    indices = indices.at[..., axis].set(_positions(index, rows))
    return jax.lax.scatter_add(part, indices, updates, numbers, mode=GatherScatterMode.FILL_OR_DROP)


def _positions(index: Any, rows: Rows) -> Any:
    """Returns the position of each row among some rows; past the end if it is none of them."""
    if rows.runs is None:
        positions = np.full(len(rows.mask), rows.count, index.dtype)
        positions[rows.indices] = np.arange(rows.count)
        known = (index >= 0) & (index < len(rows.mask))
        found = jnp.asarray(positions).at[index].get(mode="clip")
        return jnp.where(known, found, rows.count)
    position, count = jnp.full_like(index, rows.count), 0
    for first, stop in rows.runs:
        is_in_run = (index >= first) & (index < stop)
        position = jnp.where(is_in_run, index - (first - count), position)
        count += stop - first
    return position
