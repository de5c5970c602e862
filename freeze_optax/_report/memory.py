"""The memory that the bytes of a summary are in: that of the device, or of the host."""

import dataclasses
import math
import numbers
import operator
from typing import Any

import jax
from rich.filesize import decimal

from freeze_optax._report.counts import Counts, leaf_bytes
from freeze_optax._tree.memory import memory_of

_PASSES = (1, 2)
"""How often a step may read a layer: in the forward pass alone, or in the backward pass too."""


def is_on_host(leaf: Any) -> bool:
    """Returns whether a leaf is in host memory.

    An abstract leaf is where its sharding says; without a kind of memory there, on the device. A
    NumPy array counts as on the device, as a jitted step gets it whole, as an array there.
    """
    if isinstance(leaf, jax.ShapeDtypeStruct):
        # A sharding on an abstract mesh may have no kind of memory.
        return getattr(leaf.sharding, "memory_kind", None) not in (None, "device")
    return memory_of(leaf) is not None


def bytes_on_host(tree: Any) -> int:
    """Returns the bytes of the leaves of a tree that are in host memory."""
    return sum(leaf_bytes(x) for x in jax.tree.leaves(tree) if is_on_host(x))


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class CountsByMemory(Counts):
    """Counts of params, with the memory that their bytes and those of their state are in."""

    # No field of `Summary` is public but those that the keys of `to_dict` name.
    _host_bytes: int = dataclasses.field(default=0, compare=False)
    _frozen_host_bytes: int = dataclasses.field(default=0, compare=False)

    @property
    def device_bytes(self) -> int:
        """The bytes of the params and of the optimizer state in device memory.

        The state counts if it is known. What a step makes (gradients, activations, the layers that
        it streams) does not count. A NumPy array, and an abstract one whose sharding names no kind
        of memory, counts as in device memory: a jitted step gets it there.

        Examples:
          >>> import jax.numpy as jnp
          >>> import optax
          >>> import freeze_optax as fo
          >>> params = {"encoder": jnp.ones(3), "head": jnp.ones(2)}
          >>> fo.summary(params, "encoder", optax.sgd(0.1, momentum=0.9)).device_bytes
          28
        """
        all_bytes = self.trainable_bytes + self.frozen_bytes + (self.state_bytes or 0)
        return all_bytes - self._host_bytes

    @property
    def host_bytes(self) -> int:
        """The bytes of the params and of the optimizer state in host memory.

        That is each kind of memory but `"device"`. Of an optimizer state, each array counts where
        it is. Of the state that an `optimizer` would make, the statistics of a parameter count
        where that is, as `init` places them.

        Examples:
          >>> import jax
          >>> import jax.numpy as jnp
          >>> import freeze_optax as fo
          >>> params = {"encoder": jnp.ones(3), "head": jnp.ones(2)}
          >>> host = params["encoder"].sharding.with_memory_kind("pinned_host")
          >>> params["encoder"] = jax.device_put(params["encoder"], host)
          >>> summary = fo.summary(params, "encoder")
          >>> summary
                                parameters      bytes   host memory
          ─────────────────────────────────────────────────────────
          encoder   frozen               3   12 bytes      12 bytes
          head      trainable            2    8 bytes       0 bytes
          <BLANKLINE>
          parameters: 20 bytes, of which 8 bytes train
          memory: 8 bytes on the device, 12 bytes on the host
          a step streams: at most 24 bytes, 12 bytes in each pass
          trainable: 2 of 5 parameters (40.00%)
          >>> summary.host_bytes, summary.device_bytes, summary.streamed_bytes
          (12, 8, 24)
        """
        return self._host_bytes

    @property
    def streamed_bytes(self) -> int:
        """The bytes that a step brings from host memory to the device, at most.

        These are the frozen params in host memory twice: the forward pass reads them, and so does
        the backward pass. It does not read layers below the lowest one that trains. So for these
        the number is twice too large.

        Examples:
          >>> import jax.numpy as jnp
          >>> import freeze_optax as fo
          >>> fo.summary({"encoder": jnp.ones(3), "head": jnp.ones(2)}, "encoder").streamed_bytes
          0
        """
        return _PASSES[-1] * self._frozen_host_bytes

    def least_seconds(self, bandwidth: float, passes: int = 2) -> float:
        """Returns the time that a step needs at least to bring frozen params from host memory.

        A step is no faster, however much it computes during the transfer. This holds if it reads
        them in as many passes as `passes` says.

        Examples:
          >>> import jax
          >>> import jax.numpy as jnp
          >>> import freeze_optax as fo
          >>> mesh = jax.sharding.Mesh(jax.devices()[:1], "x")
          >>> spec = jax.sharding.PartitionSpec()
          >>> host = jax.sharding.NamedSharding(mesh, spec, memory_kind="pinned_host")
          >>> base = jax.ShapeDtypeStruct((8_000_000_000,), jnp.bfloat16, sharding=host)
          >>> summary = fo.summary({"base": base, "head": jnp.ones(2)}, "base")
          >>> summary.least_seconds(64e9)  # PCIe 5 x16, nominal
          0.5
          >>> summary.least_seconds(64e9, passes=1)
          0.25

        Args:
          bandwidth: How many bytes per second the host sends to the device. For PCIe 5 with 16
            lanes this is nominally 64e9, for PCIe 4 32e9; a measured figure is lower. With several
            devices, the sum of theirs.
          passes: In how many passes a step reads these params: 2 if in the backward pass too; 1 if
            all of them are in layers below the lowest one that trains, or if the step brings them
            in once and keeps them.

        Returns:
          The time in seconds; 0 if no frozen params are in host memory.

        Raises:
          TypeError: If `bandwidth` is not a number, or `passes` is not an int.
          ValueError: If `bandwidth` is not positive and finite, or `passes` is neither 1 nor 2.
        """
        if isinstance(bandwidth, bool) or not isinstance(bandwidth, numbers.Real):
            raise TypeError(
                f"bandwidth is a number of bytes per second, such as 64e9, not {bandwidth!r}"
            )
        if not 0 < bandwidth < math.inf:
            raise ValueError(
                f"bandwidth is in bytes per second, positive and finite, not {bandwidth!r}"
            )
        if isinstance(passes, bool) or not hasattr(passes, "__index__"):
            raise TypeError(f"passes is the int 1 or 2, not {passes!r}")
        if operator.index(passes) not in _PASSES:
            raise ValueError(
                f"passes is 1 (the forward pass alone) or 2 (the backward pass too), not {passes!r}"
            )
        return operator.index(passes) * self._frozen_host_bytes / float(bandwidth)

    @property
    def _memory_notes(self) -> list[str]:
        """The lines below the table about memory, if anything is in host memory."""
        if not self._host_bytes:
            return []
        device, host = decimal(self.device_bytes), decimal(self._host_bytes)
        notes = [f"memory: {device} on the device, {host} on the host"]
        if self._frozen_host_bytes:
            once, twice = decimal(self._frozen_host_bytes), decimal(self.streamed_bytes)
            # Two lines, as a line that is longer than a narrow terminal would be broken.
            notes.append(f"a step streams: at most {twice}, {once} in each pass")
        return notes
