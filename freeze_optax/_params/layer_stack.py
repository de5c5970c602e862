"""`LayerStack`: a leaf of stacked layers, of which those that train are known as values."""

import contextlib
from collections.abc import Generator
from contextvars import ContextVar
from typing import Any, NoReturn, final

import jax
import jax.numpy as jnp

from freeze_optax._rows.rows_by_value import RowsByValue
from freeze_optax._tree.key_paths import Transparent


@final
@jax.tree_util.register_pytree_with_keys_class
class LayerStack(Transparent):
    """A leaf of a stack in the params that a loss gets, while its layers take turns.

    Only `freeze_optax.scan` knows which layers it has to differentiate. A loss may have its leaves
    in hand, though: to add a penalty on all weights, say. So a sum over them is that over the whole
    leaf, with its gradient, and what would mix up the layers is an error of JAX.

    Attributes:
      whole: The whole leaf. Its cotangent goes to the layers that train.
      live: Zeros in place of the layers that train, with respect to which a loss is differentiated.
      tokens: The indices of these layers, as typed PRNG keys: JAX does not compute with those, nor
        slice a scalar.
      path: The key path of the leaf. Static.
      axis: The axis of the layers. Static.
      length: The number of layers. Static.
    """

    def __init__(self, whole: Any, live: Any, tokens: Any, path: str, axis: int, length: int):
        self.whole, self.live, self.tokens = whole, live, tokens
        self.path, self.axis, self.length = path, axis, length

    @classmethod
    def of_turn(
        cls, whole: Any, live: Any, rows: RowsByValue, tokens: Any, path: str
    ) -> "LayerStack":
        """Returns the stack for the layers that train now.

        Args:
          whole: The whole leaf.
          live: Zeros, like the layers that train.
          rows: These layers.
          tokens: Their indices, as `row_tokens` gives them.
          path: The key path of the leaf.
        """
        linked = _link(whole, live, rows)
        return cls(linked, live, tokens, path, rows.axis, rows.length)

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[str, int, int]]:
        key = jax.tree_util.GetAttrKey
        children = [(key(name), getattr(self, name)) for name in ("whole", "live", "tokens")]
        return children, (self.path, self.axis, self.length)

    @classmethod
    def tree_unflatten(cls, static: tuple[str, int, int], children: Any) -> "LayerStack":
        whole, live, tokens = children
        return cls(whole, live, tokens, *static)

    @property
    def rows(self) -> jax.Array:
        """The indices of the layers that train, an int32 vector in ascending order."""
        bits = [jax.random.key_data(token)[0] for token in self.tokens]
        return jnp.stack(bits).astype(jnp.int32)

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


def row_tokens(rows: jax.Array) -> tuple[jax.Array, ...]:
    """Returns indices of layers as the `LayerStack`s that share them have them."""
    bits = jnp.asarray(rows).astype(jnp.uint32)
    keys = jax.random.wrap_key_data(
        jnp.stack([bits, jnp.zeros_like(bits)], axis=1), impl="threefry2x32"
    )
    return tuple(keys[i] for i in range(bits.shape[0]))


def _link(whole: Any, live: Any, rows: RowsByValue) -> Any:
    """Returns the whole leaf, whose cotangent is one of the layers that train."""
    # What `backward` closes over lives as long as the program, so it may hold no value of a trace.
    length, axis = rows.length, rows.axis

    @jax.custom_vjp
    def link(whole: Any, live: Any, indices: Any) -> Any:
        del live, indices
        return whole

    def forward(whole: Any, live: Any, indices: Any) -> Any:
        return whole.value, (live.value, indices.value)

    def backward(saved: Any, cotangent: Any) -> Any:
        live, indices = saved
        if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
            # Zeros like the whole leaf may be in host memory, and would be brought to the device.
            return None, jnp.zeros_like(live), None
        return None, RowsByValue(indices, length, axis).take(cotangent), None

    link.defvjp(forward, backward, symbolic_zeros=True)
    return link(whole, live, rows.indices)


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
