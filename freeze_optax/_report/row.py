"""A row of a summary: the counts of one subtree."""

import dataclasses

from freeze_optax._report.counts import Counts, Status
from freeze_optax._report.factors import Factors
from freeze_optax._report.outline import Line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row(Counts):
    """The counts of one subtree of the params in a `freeze_optax.Summary`.

    Its `state_bytes` are those of the statistics of the subtree, without counters and clocks.

    Examples:
      >>> import jax.numpy as jnp
      >>> import freeze_optax as fo
      >>> params = {"layer_0": jnp.ones(3), "layer_1": jnp.ones(3), "head": jnp.ones(2)}
      >>> [(row.path, row.status, row.total) for row in fo.summary(params, "layer_*").rows]
      [('head', 'trainable', 2), ('layer_{0..1}', 'frozen', 6)]

    Attributes:
      path: The key path of the subtree; if repeated layers are folded, a glob that matches them
        all.
      status: `"trainable"`, `"frozen"` or `"partial"`.
      same_as: The path of the leaf that this one shares its buffer with. That leaf counts for both.
      factors: The different factors of what trains in it, in order, see `freeze_optax.rates`. Empty
        if they are not known, or if there are none.
      host_bytes: The bytes of the subtree in host memory, of its params and of their statistics.
      total, trainable, frozen: As for `freeze_optax.Summary`.
      trainable_bytes, frozen_bytes, state_bytes, saved_bytes: As for `freeze_optax.Summary`.
    """

    path: str
    status: Status
    same_as: str = ""
    factors: Factors = ()
    host_bytes: int = 0


def row_of_line(line: Line) -> Row:
    """Returns the row of a node of the outline."""
    counts = line.counts
    return Row(
        **counts.to_dict(),
        path=line.path,
        status=counts.status,
        same_as=line.node.same_as,
        factors=counts.factors,
        host_bytes=counts.host_bytes,
    )
