"""The names, shapes and dtypes in a `.safetensors` file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from freeze_optax._files.abstract_arrays import MOST_AXES

# By name where JAX did not always have it. NumPy knows it from ml_dtypes, which JAX imports.
_SAFETENSORS: dict[str, Any] = {
    "BOOL": jnp.bool_,
    "U8": jnp.uint8,
    "U16": jnp.uint16,
    "U32": jnp.uint32,
    "U64": jnp.uint64,
    "I8": jnp.int8,
    "I16": jnp.int16,
    "I32": jnp.int32,
    "I64": jnp.int64,
    "F4": jnp.float4_e2m1fn,
    "F6_E2M3": "float6_e2m3fn",
    "F6_E3M2": "float6_e3m2fn",
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E4M3FNUZ": jnp.float8_e4m3fnuz,
    "F8_E5M2": jnp.float8_e5m2,
    "F8_E5M2FNUZ": jnp.float8_e5m2fnuz,
    "F8_E8M0": jnp.float8_e8m0fnu,
    "F16": jnp.float16,
    "BF16": jnp.bfloat16,
    "F32": jnp.float32,
    "F64": jnp.float64,
    "C64": jnp.complex64,
}


def read_safetensors_headers(file: Path) -> Iterator[tuple[str, Any]]:
    """Yields the arrays of a `.safetensors` file, abstract, with their names."""
    try:
        from safetensors import SafetensorError, safe_open  # noqa: PLC0415
    except ImportError as error:
        raise missing_package("safetensors") from error
    try:
        with safe_open(file, framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118
                array = opened.get_slice(name)
                dtype = array.get_dtype()
                if dtype not in _SAFETENSORS:
                    raise ValueError(f"{file} has {name!r} in the dtype {dtype}, not one of jax")
                shape = tuple(array.get_shape())
                if len(shape) > MOST_AXES:
                    raise ValueError(f"{file} has {name!r} of over {MOST_AXES} axes")
                yield name, jax.ShapeDtypeStruct(shape, np.dtype(_SAFETENSORS[dtype]))
    except SafetensorError as error:
        raise ValueError(f"{file} is not a valid .safetensors file: {error}") from error


def missing_package(package: str) -> ImportError:
    """Returns the error for a package of the extra `freeze_optax[cli]` that is missing."""
    return ImportError(
        f"this checkpoint is read with {package}; install it with: pip install 'freeze_optax[cli]'"
    )
