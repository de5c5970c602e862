"""`LayerStack`: a leaf of stacked layers, of which those that train are known as values."""

import contextlib
from collections.abc import Generator
from contextvars import ContextVar
from typing import Any, NoReturn, final

import jax

from freeze_optax._tree.key_paths import Transparent


@final
@jax.tree_util.register_pytree_with_keys_class
class LayerStack(Transparent):
    """A leaf of a stack in the params that a loss gets, while its layers take turns.

    Only `freeze_optax.scan` knows which layers it has to differentiate.

    Attributes:
      whole: The whole leaf, a constant.
      live: The layers that train, which are differentiated.
      rows: Their indices.
      path: The key path of the leaf. Static.
      axis: The axis of the layers. Static.
    """

    def __init__(self, whole: Any, live: Any, rows: Any, path: str, axis: int):
        self.whole, self.live, self.rows, self.path, self.axis = whole, live, rows, path, axis

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[str, int]]:
        key = jax.tree_util.GetAttrKey
        children = [(key(name), getattr(self, name)) for name in ("whole", "live", "rows")]
        return children, (self.path, self.axis)

    @classmethod
    def tree_unflatten(cls, static: tuple[str, int], children: Any) -> "LayerStack":
        whole, live, rows = children
        return cls(whole, live, rows, *static)

    @property
    def shape(self) -> Any:
        """The shape of the whole leaf."""
        return self.whole.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the leaf."""
        return self.whole.dtype

    @property
    def ndim(self) -> int:
        """The number of axes of the leaf."""
        return self.whole.ndim

    def _raise(self, *_: Any) -> NoReturn:
        raise TypeError(
            f"the layers of {self.path!r} take turns (fo.rotating), so a loss can't compute with "
            "the leaf; hand the layers to fo.scan, which knows those that train: "
            "fo.scan(f, carry, layers)"
        )

    __getitem__ = __iter__ = __len__ = __array__ = __jax_array__ = _raise
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __matmul__ = __rmatmul__ = _raise
    __truediv__ = __rtruediv__ = __pow__ = __neg__ = __float__ = _raise
    astype = reshape = sum = mean = _raise


def is_layer_stack(x: Any) -> bool:
    """Returns whether `x` is a leaf of a stack whose layers take turns."""
    return isinstance(x, LayerStack)


_scanned: ContextVar[set[str] | None] = ContextVar("_scanned", default=None)


def report_scanned(stack: LayerStack) -> None:
    """Notes for the enclosing `collect_scanned` that `freeze_optax.scan` has a stack."""
    paths = _scanned.get()
    if paths is not None:
        paths.add(stack.path)


@contextlib.contextmanager
def collect_scanned() -> Generator[set[str], None, None]:
    """Collects the paths of the stacks that `freeze_optax.scan` gets inside the `with` block."""
    paths = set[str]()
    token = _scanned.set(paths)
    try:
        yield paths
    finally:
        _scanned.reset(token)
