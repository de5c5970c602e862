"""How the tests compile: quickly, but where what XLA makes of a program is what is tested.

Nearly all of the time of the tests goes into compiling small programs that run once. With the quick
settings that takes less than half of the time.
"""

import importlib
import mmap
import os
import tempfile
from pathlib import Path
from typing import Any

import jaxlib


def _is_flag(name: str) -> bool:
    """Whether the XLA of this jaxlib has a flag: at an unknown one it ends the process.

    A flag is a string of C in the library, with a zero byte at its end. Names of flags that were
    removed (`xla_cpu_use_fusion_emitters` in jaxlib 0.12) are there too, but without that byte.
    """
    for library in Path(jaxlib.__file__).parent.rglob("*.so*"):
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as x:
            if x.find(name.encode() + b"\0") >= 0:
                return True
    return False


# For each flag of XLA the quick setting, and the one that it has without the flag.
_SETTINGS: dict[str, tuple[Any, Any]] = {
    "xla_backend_optimization_level": (0, 3),
    "xla_llvm_disable_expensive_passes": (True, False),
    "xla_cpu_use_fusion_emitters": (False, True),
    "xla_cpu_parallel_codegen_split_count": (1, 32),
}
_KNOWN = {name: settings for name, settings in _SETTINGS.items() if _is_flag(name)}
QUICK_FLAGS = " ".join(f"--{name}={str(x).lower()}" for name, (x, _) in _KNOWN.items())
"""For the environment variable XLA_FLAGS."""
OPTIMISED = tuple((name, optimised) for name, (_, optimised) in _KNOWN.items())
"""For `compiler_options`: as users compile."""


class SharedContext:
    """Lowers all programs in one context of MLIR, until `renew`.

    jax makes one for each program. To load the dialects takes 6 ms, a fifth of all that a small
    program takes, and memory that does not come back. This replaces a private function of jax: a
    version that has no such function makes its contexts as before.
    """

    def __init__(self) -> None:
        self._context: Any = None
        self._mlir: Any = importlib.import_module("jax._src.interpreters.mlir")
        self._make: Any = getattr(self._mlir, "make_ir_context", None)
        if self._make is not None:
            self._mlir.make_ir_context = self._shared

    def _shared(self) -> Any:
        if self._context is None:
            self._context = self._make()
        # A primitive may compute values while it is lowered, as those of lineax do: their programs
        # would be put into the one that is being made.
        elif self._mlir.ir.Context.current is not None:
            return self._make()
        return self._context

    def renew(self) -> None:
        """Lets go of the context, and so of every constant that it keeps."""
        self._context = None


class ProgramFolder:
    """Compiled programs as files of a folder, which all workers of a run share.

    jax has such a class. But it does not write a file in one piece, so that another worker may
    read a half.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def get(self, key: str) -> bytes | None:
        """The program of this key, if it is there."""
        try:
            return (self._path / key).read_bytes()
        except FileNotFoundError:
            return None

    def put(self, key: str, value: bytes) -> None:
        """Stores a program for all workers."""
        piece = self._path / f"{key}.{os.getpid()}"
        piece.write_bytes(value)
        piece.replace(self._path / key)


def share_programs(folder: str) -> None:
    """Keeps compiled programs in a folder for the run, as many tests compile the same ones.

    This replaces a private function of jax. With a version that has no such function, each process
    has a folder of its own.
    """
    cache: Any = importlib.import_module("jax._src.compilation_cache")
    if hasattr(cache, "get_file_cache"):
        cache.get_file_cache = lambda path: (ProgramFolder(path), path)
    else:
        folder = tempfile.mkdtemp(dir=folder)
    jax: Any = importlib.import_module("jax")  # the flags must be set before it starts
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
