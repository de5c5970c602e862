"""How the tests compile: quickly, but where what XLA makes of a program is what is tested.

Nearly all of the time of the tests goes into compiling small programs that run once. With the quick
settings that takes less than half of the time.
"""

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
