"""A subset of a leaf as it stands in the text of an export."""

import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from freeze_optax._rows.elements import Elements
from freeze_optax._rows.flags import flag_from_mask, flag_from_vector
from freeze_optax._rows.rows import Rows
from freeze_optax._rows.subset import Subset


def encoded_subset(subset: Subset | None) -> Any:
    """Returns a subset as lists, numbers and text; None for the whole leaf.

    Rows of the leading axis are `[count, bits]`, as in the first version of the format; of another
    axis `[count, bits, axis]`. Elements are `[shape, bits]`, with compressed bits.
    """
    if isinstance(subset, Rows):
        bits = np.packbits(subset.mask).tobytes().hex()
        return [len(subset.mask), bits, *([subset.axis] if subset.axis else [])]
    if isinstance(subset, Elements):
        return [list(subset.shape), zlib.compress(subset.bits.tobytes()).hex()]
    return None


def is_former_form(encoded: Any) -> bool:
    """Returns whether the first version of the format has this encoded subset too."""
    return encoded is None or (len(encoded) == 2 and type(encoded[0]) is int)


def is_encoded_subset(x: Any, is_int: Callable[[Any], bool]) -> bool:
    """Returns whether a value from a file is of the types of an encoded subset."""
    if type(x) is not list or len(x) not in (2, 3) or type(x[1]) is not str:
        return False
    if type(x[0]) is list:
        return len(x) == 2 and all(map(is_int, x[0]))
    return all(map(is_int, (x[0], *x[2:])))


def decoded_subset(encoded: Any) -> Subset | None:
    """Returns the subset that `encoded_subset` encoded; raises ValueError if it is damaged.

    Args:
      encoded: The value from a file, of the types of an encoded subset. If it has elements, the
        shape of their leaf is one that the leaf has.
    """
    if encoded is None:
        return None
    length, text, *axis = encoded
    packed = bytes.fromhex(text)
    if type(length) is list:
        return _elements(length, packed)
    if any(a < 1 for a in axis):
        raise ValueError(f"rows along axis {axis[0]}")
    if length < 0 or len(packed) != (length + 7) // 8:
        raise ValueError(f"{length} rows in {len(packed)} bytes")
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=length)
    flag = flag_from_vector(bits.astype(bool), *axis)
    if not isinstance(flag, Rows):
        raise ValueError("a part of all rows or none")
    return flag


def _elements(shape: list[int], packed: bytes) -> Elements:
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"elements of a leaf of shape {shape}")
    size = math.prod(shape)
    # No more than fits is unpacked, as a few bytes may stand for very many.
    stream = zlib.decompressobj()
    try:
        bits = stream.decompress(packed, (size + 7) // 8 + 1)
    except zlib.error as error:
        raise ValueError(f"its elements can't be unpacked ({error})") from error
    if len(bits) != (size + 7) // 8 or not stream.eof or stream.unused_data:
        raise ValueError(f"{size} elements in {len(bits)} bytes")
    mask = np.unpackbits(np.frombuffer(bits, np.uint8), count=size).astype(bool)
    flag = flag_from_mask(mask.reshape(shape))
    if not isinstance(flag, Elements):
        raise ValueError("elements that are rows, or all or none")
    return flag


def shape_in(encoded: Any) -> tuple[int, ...] | None:
    """Returns the shape of the leaf of encoded elements; None for rows and for a whole leaf.

    It is compared with that of the leaf before the elements are decoded, as a few bytes may stand
    for more elements than the memory holds.
    """
    return tuple(encoded[0]) if encoded and type(encoded[0]) is list else None


def described_subset(subset: Subset | None) -> str:
    """Returns the first few of the rows, or the number of the elements, as a clause."""
    if subset is None:
        return ""
    if isinstance(subset, Rows):
        shown = list(map(str, subset.indices[:5]))
        more = subset.count - len(shown)
        where = f" along axis {subset.axis}" if subset.axis else ""
        return f" in the rows {', '.join(shown)}{f' and {more} more' if more > 0 else ''}{where}"
    return f" in {subset!r}"
