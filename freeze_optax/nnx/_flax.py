"""The one import of Flax for NNX, with an error that names the extra."""

try:
    from flax import nnx
except ImportError as error:
    raise ImportError("freeze_optax.nnx needs flax: pip install 'freeze_optax[flax]'") from error

__all__ = ["nnx"]
