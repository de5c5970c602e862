"""Exported states to break, and what `import_state` may do with a broken one."""

import functools
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import freeze_optax as fo

OURS = re.compile(r"the export is |this is no export of fo\.export_state")
"""How each refusal begins, so that an error out of Python, NumPy or jax is told from it."""

TOLD = ("format", "paths", "frozen", "cohorts", "schedule", "parts", "leaves")
"""What the text in an export says of a state."""

ADAM = optax.scale_by_adam()
NOISY = optax.chain(optax.add_noise(0.01, 0.55, key=jax.random.key(7)), ADAM)
PHASES = fo.Phases({0: ["b"], 3: fo.nothing})


class Case(NamedTuple):
    """A state, and what it was exported as.

    Attributes:
      tx: Its transformation.
      params: Its params.
      state: The state.
      exported: The export, its arrays of NumPy.
    """

    tx: optax.GradientTransformation
    params: Any
    state: Any
    exported: dict[str, Any]

    @property
    def about(self) -> dict[str, Any]:
        """What the text in the export says of the state."""
        about = about_of(self.exported)
        return {key: about[key] for key in TOLD}


def _cohorts() -> tuple[Any, Any, Any]:
    """Three leaves of two cohorts, one of them parked, and a typed key."""
    params = {"a": jnp.ones(2), "b": jnp.ones(2), "c/d": jnp.ones(3)}
    tx = fo.freezable(NOISY, "b")
    state = fo.thaw(tx.init(params), params, "b")
    return tx, params, fo.freeze(state, params, "b", keep_state=True)


def _rows() -> tuple[Any, Any, Any]:
    """A leaf in two parts, and one without elements."""
    params = {"e": jnp.ones((8, 2)), "none": jnp.ones((0, 2))}
    tx = fo.freezable(ADAM, fo.rows("e", [0, 1, 2, 4]))
    return tx, params, fo.thaw(tx.init(params), params, fo.rows("e", [1]))


def _phases() -> tuple[Any, Any, Any]:
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = fo.scheduled(ADAM, PHASES)
    return tx, params, tx.init(params)


def _stateless() -> tuple[Any, Any, Any]:
    params = {"a": jnp.ones(2), "b": jnp.ones(2), "n": jnp.arange(2)}
    tx = fo.freezable(optax.sgd(0.1), "a")
    return tx, params, tx.init(params)


def _small() -> tuple[Any, Any, Any]:
    params = {"w": jnp.ones(2)}
    tx = fo.freezable(optax.trace(0.9))
    return tx, params, tx.init(params)


MAKERS = {
    "cohorts": _cohorts,
    "rows": _rows,
    "phases": _phases,
    "stateless": _stateless,
    "small": _small,
}


@functools.cache
def case(name: str) -> Case:
    """One of the states, no two of its numbers alike; not to be changed."""
    tx, params, state = MAKERS[name]()
    leaves, structure = jax.tree.flatten(state)
    state = jax.tree.unflatten(structure, [_distinct(i, x) for i, x in enumerate(leaves)])
    exported = fo.export_state(state)
    arrays = {name: np.asarray(array) for name, array in exported["leaves"].items()}
    return Case(tx, params, state, {**exported, "leaves": arrays})


def _distinct(i: int, leaf: Any) -> Any:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    numbers = 1 + 100 * i + np.arange(leaf.size).reshape(leaf.shape)
    return jnp.asarray(numbers.astype(leaf.dtype))


def about_of(exported: Any) -> Any:
    return json.loads(np.asarray(exported["about"]).tobytes())


def packed(text: str | bytes) -> np.ndarray:
    return np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8)


def sealed(about: Any) -> Any:
    """A text with the checksum that is right for it, as whoever means harm writes it."""
    if not isinstance(about, dict):
        return about
    lists = json.dumps([about.get(name) for name in TOLD[1:]], sort_keys=True)
    return {**about, "sum": zlib.crc32(lists.encode())}


def telling(exported: dict[str, Any], about: Any) -> dict[str, Any]:
    """The export with another text."""
    return {**exported, "about": packed(json.dumps(sealed(about)))}


def places(tree: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys of everything in a tree of dicts and lists, at any level."""
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield (*above, key)
        yield from places(tree[key], (*above, key))


def at(tree: Any, place: tuple[Any, ...]) -> Any:
    return functools.reduce(lambda node, key: node[key], place, tree)


def without(tree: Any, place: Sequence[Any]) -> Any:
    """The tree without what stands at a place."""
    first, *rest = place
    new = tree.copy()
    if rest:
        new[first] = without(tree[first], rest)
    else:
        del new[first]
    return new


def replaced(tree: Any, place: Sequence[Any], value: Any) -> Any:
    """The tree with something else at a place, which may be new in a dict."""
    if not place:
        return value
    first, *rest = place
    new = tree.copy()
    new[first] = replaced(tree[first], rest, value) if rest else value
    return new


def bits(array: Any) -> tuple[Any, ...]:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return (str(array.dtype), *bits(jax.random.key_data(array)))
    return (array.dtype, array.shape, np.asarray(array).tobytes())


def _says(given: Any, about: Any) -> bool:
    """Whether a text says what another does, and maybe more."""
    if isinstance(about, dict):
        return isinstance(given, dict) and all(
            k in given and _says(given[k], about[k]) for k in about
        )
    if isinstance(about, list):
        same = isinstance(given, list) and len(given) == len(about)
        return same and all(map(_says, given, about))
    return bool(given == about)


def _says_the_same(again: dict[str, Any], exported: dict[str, Any]) -> bool:
    arrays, told = exported.get("leaves", {}), about_of(again)
    told = {key: told[key] for key in TOLD}
    return _says(about_of(exported), told) and all(
        bits(array) == bits(np.asarray(arrays[name])) for name, array in again["leaves"].items()
    )


def _verdict(case: Case, exported: Any, may_be_read: bool) -> str:
    try:
        state = fo.import_state(case.tx, case.params, exported)
    except ValueError as error:
        said = str(error)
        return "" if OURS.match(said) and "\n" not in said else f"said: {error!r}"
    except Exception as error:  # noqa: BLE001
        return f"raised: {error!r}"
    if not may_be_read:
        return "read it"
    return "" if _says_the_same(fo.export_state(state), exported) else "read something else"


def odd_exports(
    case: Case, versions: Iterable[tuple[Any, Any]], may_be_read: bool = True
) -> dict[Any, str]:
    """What goes wrong with versions of an export, by their names.

    Right is that a version is refused in one sentence of ours, or that the state exports again as
    what was read; and that the params stay what they were.

    Args:
      case: The state that was exported.
      versions: Pairs of a name and a version.
      may_be_read: Whether a version may be read at all.
    """
    leaves = jax.tree.leaves(case.params)
    before = [bits(leaf) for leaf in leaves]
    odd = {name: _verdict(case, version, may_be_read) for name, version in versions}
    assert odd
    after = jax.tree.leaves(case.params)
    assert all(a is b for a, b in zip(leaves, after, strict=True))
    assert [bits(leaf) for leaf in after] == before
    return {name: what for name, what in odd.items() if what}
