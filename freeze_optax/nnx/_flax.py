"""The one import of Flax for NNX, with an error that names the extra, and its two modes."""

from typing import Any

try:
    from flax import nnx
except ImportError as error:
    raise ImportError("freeze_optax.nnx needs flax: pip install 'freeze_optax[flax]'") from error

__all__ = ["AS_GRAPH", "is_graph_mode", "nnx"]

# Flax 0.12.0 has no tree mode.
_HAS_TREE_MODE = hasattr(nnx, "set_graph_mode")

AS_GRAPH: dict[str, Any] = {"graph": True} if _HAS_TREE_MODE else {}
"""Arguments for functions that read a model. In both modes a graph has the paths of the tree, and
it may share Variables."""


def is_graph_mode() -> bool:
    """Returns whether the transforms of NNX take `nnx.DiffState`."""
    if not _HAS_TREE_MODE:
        return True
    return bool(nnx.set_graph_mode.current_value() and nnx.set_graph_updates.current_value())
