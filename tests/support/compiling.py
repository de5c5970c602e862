"""How the tests compile: quickly, but where what XLA makes of a program is what is tested.

Nearly all of the time of the tests goes into compiling small programs that run once. With the quick
settings that takes less than half of the time.
"""

import importlib
import mmap
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
