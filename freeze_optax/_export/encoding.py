"""The two contents of an export: arrays of portable dtypes, and a text that describes them."""

import json
import reprlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, SingleDeviceSharding

from freeze_optax._export.encoded_subset import is_encoded_subset, is_former_form
from freeze_optax._tree.kinds import is_array, number_kind
from freeze_optax._tree.memory import memory_of, put_in_memory

FORMAT = "freeze_optax state, version 1"

FORMAT_WITH_ELEMENTS = "freeze_optax state, version 2"
"""The format of an export with rows of an inner axis, or elements; others stay as they were."""

Check = Callable[[Any], bool]


def _is(kind: type) -> Check:
    return lambda x: type(x) is kind  # for isinstance a bool is an int


def _list_of(is_item: Check) -> Check:
    return lambda x: type(x) is list and all(map(is_item, x))


def _pair_of(is_first: Check, is_second: Check) -> Check:
    return lambda x: type(x) is list and len(x) == 2 and is_first(x[0]) and is_second(x[1])


def _none_or(check: Check) -> Check:
    return lambda x: x is None or check(x)


_ENTRY: dict[str, Check] = {
    "path": _is(str),
    "shape": _list_of(_is(int)),
    "dtype": _is(str),
    "key": _none_or(_is(str)),
}


def _is_entry(x: Any) -> bool:
    return type(x) is dict and all(check(x.get(name)) for name, check in _ENTRY.items())


_LISTS: dict[str, tuple[Check, str]] = {
    "paths": (_is(str), "text"),
    "frozen": (_is(bool), "true or false"),
    "cohorts": (_is(int), "a whole number"),
    "schedule": (_pair_of(_is(int), _list_of(_is(bool))), "a step and a list of true and false"),
    "parts": (
        _pair_of(_is(int), _none_or(lambda x: is_encoded_subset(x, _is(int)))),
        "the number of a leaf and its rows",
    ),
    "leaves": (_is_entry, "a path, a shape and a dtype"),
}

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def pack_text(about: Mapping[str, Any]) -> np.ndarray:
    """Returns the description of the exported arrays as an array of bytes."""
    text = json.dumps({"format": _format_of(about), "sum": _checksum(about), **about})
    return np.frombuffer(text.encode(), np.uint8)


def _format_of(about: Mapping[str, Any]) -> str:
    is_former = all(is_former_form(subset) for _, subset in about["parts"] or ())
    return FORMAT if is_former else FORMAT_WITH_ELEMENTS


def _checksum(about: Mapping[str, Any]) -> int:
    """Returns a checksum of the description.

    It is needed because one changed digit, in the rows of a part say, can give another valid plan.
    """
    text = json.dumps([about[name] for name in _LISTS], sort_keys=True)
    return zlib.crc32(text.encode())


def unpack_text(exported: Any) -> dict[str, Any]:
    """Returns the description of the exported arrays, after checking the type of each entry.

    Args:
      exported: The export, or anything that a user passed for one.

    Raises:
      ValueError: If it is not an export, or is damaged. The error names what is wrong.
    """
    about = _description(exported)
    if about.get("format") not in (FORMAT, FORMAT_WITH_ELEMENTS):
        raise ValueError(
            "this is no export of fo.export_state that this version reads: its format is "
            f"{_SHORT.repr(about.get('format'))}, not {FORMAT!r}"
        )
    for name in _LISTS:
        _check_list(name, about)
    _check_lengths(about)
    if about["format"] != _format_of(about):
        raise ValueError(
            f"the export is damaged: its format is {about['format']!r}, and what it has of leaves "
            f"is of {_format_of(about)!r}"
        )
    if about.get("sum") != _checksum(about):
        raise ValueError(
            "the export is damaged: its 'about' was changed after the export; its checksum is "
            f"{_checksum(about)}, not {_SHORT.repr(about.get('sum'))}"
        )
    return about


def _check_list(name: str, about: dict[str, Any]) -> None:
    """Raises ValueError if an entry of the description is not a list of the right items."""
    check, wanted = _LISTS[name]
    items = about.get(name, ...)
    if name == "parts" and items is None:
        return
    if type(items) is not list:
        shown = "missing" if items is ... else _SHORT.repr(items)
        raise ValueError(f"the export is damaged: its {name!r} is {shown}, not a list")
    for i, item in enumerate(items):
        if not check(item):
            shown = _SHORT.repr(item)
            raise ValueError(
                f"the export is damaged: its {name!r} has {shown} at {i}, not {wanted}"
            )


def _description(exported: Any) -> dict[str, Any]:
    """Returns the description in an export, parsed from JSON but not yet checked."""
    try:
        if not isinstance(exported, Mapping):
            raise TypeError(f"it is a {type(exported).__name__}")
        encoded = np.asarray(exported["about"])
        if encoded.dtype.kind not in "iu":
            raise TypeError(f"it is of the dtype {encoded.dtype}")
        about = json.loads(encoded.astype(np.uint8).tobytes())
        if not isinstance(about, dict):
            raise TypeError(f"it says {_SHORT.repr(about)}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"this is no export of fo.export_state, or damaged: its 'about' can't be read "
            f"({type(error).__name__}: {error}); a state that was stored as it is, restore onto a "
            "state with the same plan"
        ) from error
    return about


def _check_lengths(about: dict[str, Any]) -> None:
    """Raises ValueError if the flags are not as many as the parts of the leaves."""
    parts = about["paths" if about["parts"] is None else "parts"]
    flags = [(name, about[name]) for name in ("frozen", "cohorts")]
    for name, values in (*flags, *(("schedule", flags) for _, flags in about["schedule"])):
        if len(values) != len(parts):
            raise ValueError(
                f"the export is damaged: its {name!r} is for {len(values):,} parts of leaves, and "
                f"there are {len(parts):,}"
            )


def describe_leaf(leaf: Any) -> dict[str, Any]:
    """Returns the shape and dtype of a leaf, and the implementation of a typed PRNG key."""
    entry = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    return {**entry, "key": str(_key_impl(leaf))} if _is_key(leaf) else entry


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(leaf: Any) -> Any:
    """Returns the implementation of a typed PRNG key, abstract or not."""
    impls: list[Any] = []
    # jax.random.key_impl takes traced keys, but no abstract ones.
    jax.eval_shape(lambda key: impls.append(jax.random.key_impl(key)), leaf)
    return impls[0]


def as_array(leaf: Any, path: str) -> Any:
    """Returns a leaf as an array: itself, or a Python number as JAX makes an array of it.

    Args:
      leaf: The leaf.
      path: Its path.

    Raises:
      TypeError: If it is neither an array nor a number. The error names the path.
    """
    if is_array(leaf):
        return leaf
    if number_kind(leaf) == "other":
        raise TypeError(
            f"an export holds arrays and numbers, but the leaf at {path!r} is a "
            f"{type(leaf).__name__}; export the optimizer state without it"
        )
    return jnp.asarray(leaf)


def encode_leaf(leaf: Any, path: str) -> tuple[Any, dict[str, Any]]:
    """Returns a leaf as an array of a dtype that NumPy knows, and its description.

    Args:
      leaf: An array or a Python number.
      path: The path of the leaf.

    Returns:
      The leaf itself if it needs no encoding, else its bits; and its shape and dtype.

    Raises:
      TypeError: As `as_array`.
    """
    # A user may have set a Python number. It gets the dtype that the next update would give it.
    array = as_array(leaf, path)
    entry = describe_leaf(array)
    if isinstance(array, jax.ShapeDtypeStruct):  # of the target of a restore, say
        return _encode_abstract(array, path), entry
    if _is_key(array):
        return jax.random.key_data(array), entry
    stored = _stored_dtype(array.dtype)
    if stored == array.dtype:
        return array, entry
    if jnp.issubdtype(array.dtype, jnp.integer):
        return array.astype(stored), entry
    bits = jax.lax.bitcast_convert_type(array, f"uint{jnp.finfo(array.dtype).bits}")
    return bits.astype(stored), entry


def _encode_abstract(leaf: jax.ShapeDtypeStruct, path: str) -> jax.ShapeDtypeStruct:
    """Returns the form of an encoded leaf, with the sharding of the leaf."""
    plain = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    encoded = jax.eval_shape(lambda x: encode_leaf(x, path)[0], plain)
    # The words of a key are one more axis, of which these two say nothing.
    fits_any_rank = isinstance(leaf.sharding, NamedSharding | SingleDeviceSharding)
    is_of_rank = len(encoded.shape) == len(leaf.shape)
    sharding = leaf.sharding if fits_any_rank or is_of_rank else None
    return jax.ShapeDtypeStruct(encoded.shape, encoded.dtype, sharding=sharding)


def decode_leaf(array: Any, leaf: Any, path: str) -> Any:
    """Returns the leaf that an array encodes.

    Args:
      array: The stored array, from NumPy or JAX. It is ignored if the leaf has no elements.
      leaf: The abstract leaf (`jax.ShapeDtypeStruct`) that the result must match.
      path: The path of the leaf.

    Returns:
      The leaf. It is on no particular device, unless the array is sharded over several devices, or
      is in host memory: then it stays there.

    Raises:
      ValueError: If the array does not encode such a leaf. The error names the path.
    """
    is_key = _is_key(leaf)
    encoded = jax.eval_shape(jax.random.key_data, leaf) if is_key else leaf
    shape, stored = encoded.shape, _stored_dtype(encoded.dtype)
    if 0 in shape:
        array = np.zeros(shape, stored)
    is_from_numpy = isinstance(array, np.ndarray | np.generic)
    is_array_type = is_from_numpy or isinstance(array, jax.Array)
    if not is_array_type or array.shape != shape or array.dtype != stored:
        shown = f"{array.dtype}{list(array.shape)}" if is_array_type else type(array).__name__
        raise ValueError(f"the export is damaged: {path!r} is {shown}, not {stored}{list(shape)}")
    if not is_key and jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
        return np.asarray(array)  # of 64 bits, which only NumPy holds now
    is_traced = isinstance(array, Tracer)  # under jax.vmap
    home = None
    if isinstance(array, jax.Array) and not is_traced and memory_of(array):
        home = array.sharding
    if not is_traced and (is_from_numpy or len(array.sharding.device_set) == 1):
        array = jnp.asarray(np.asarray(array))
    decoded = array if is_key else _from_bits(put_in_memory(array, None), leaf.dtype)
    decoded = jax.device_put(decoded, home) if home else decoded
    return jax.random.wrap_key_data(decoded, impl=_key_impl(leaf)) if is_key else decoded


def _from_bits(array: jax.Array, dtype: Any) -> jax.Array:
    """Returns an array that was stored as its bits in its own dtype again."""
    if array.dtype == dtype:
        return array
    if jnp.issubdtype(dtype, jnp.integer):
        return array.astype(dtype)
    bits = array.astype(f"uint{jnp.finfo(dtype).bits}")
    return jax.lax.bitcast_convert_type(bits, dtype)


def _stored_dtype(dtype: Any) -> np.dtype[Any]:
    """Returns the dtype that an array is stored with: its own, or that of its bits."""
    if dtype.kind in "biufc" and dtype.isbuiltin == 1:
        return dtype
    if jnp.issubdtype(dtype, jnp.integer):
        return np.dtype(np.int8 if jnp.issubdtype(dtype, jnp.signedinteger) else np.uint8)
    return np.dtype(f"uint{max(8, jnp.finfo(dtype).bits)}")
