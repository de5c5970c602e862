"""`layerwise`: factors that decay from the last layer to the first."""

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, final

import numpy as np

from freeze_optax._select.by_path import Layers, layers
from freeze_optax._select.dotted import Dotted, dotted_leaves
from freeze_optax._select.selector import Path, Selector
from freeze_optax._transform.scaling import LARGEST, is_real
from freeze_optax._tree.key_paths import ancestors
from freeze_optax._tree.leaves import Leaves


@final
class LayerFactors:
    """The factor of each leaf below some layers: a power of `decay`, by the rank of its layer.

    Args:
      patterns: The layers, from the lowest to the highest.
      decay: The factor from one layer to the one below it.
      is_dotted: Whether the patterns are for paths in which dots separate components too.
    """

    def __init__(self, patterns: Sequence[Layers], decay: float, is_dotted: bool):
        self._patterns, self._decay = patterns, decay
        self._is_dotted = is_dotted

    def of_leaves(self, leaves: Leaves) -> list[float]:
        """Returns a factor for each leaf; that of a leaf in no layer has no meaning.

        Raises:
          ValueError: If a layer is in another one, naming both.
        """
        leaves = dotted_leaves(leaves) if self._is_dotted else leaves
        nodes = [node for pattern in self._patterns for node in pattern.nodes(leaves)]
        rank = {node: i for i, node in enumerate(nodes)}
        _check_apart(nodes)
        _check_finite(self._decay, nodes)
        factors = [1.0] * len(leaves.paths)
        for path, i in leaves.all_paths():
            for node in ancestors(path):
                if node in rank:
                    factors[i] = self._decay ** (len(nodes) - 1 - rank[node])
        return factors

    def __repr__(self) -> str:
        return f"{self._decay} for each layer below the last"


def _check_apart(nodes: Sequence[str]) -> None:
    present = set(nodes)
    for i, node in enumerate(nodes):
        above = [other for other in ancestors(node) if other in present and other != node]
        if above or node in nodes[:i]:
            other = above[0] if above else node
            raise ValueError(
                f"fo.layerwise has {node!r} as a layer, and {other!r} too, so its leaves are in "
                "two layers; give patterns whose nodes are apart"
            )


def _check_finite(decay: float, nodes: Sequence[str]) -> None:
    steps = len(nodes) - 1
    if decay > 1 and steps * math.log(decay) >= math.log(LARGEST):
        raise ValueError(
            f"fo.layerwise gives {nodes[0]!r}, the lowest of {len(nodes)} layers, the factor "
            f"{decay} ** {steps}, but a factor is a finite number, 0 or more"
        )


def layerwise(
    pattern: "str | Layers | Sequence[str | Layers]", decay: float
) -> list[tuple[Selector, Any]]:
    """Returns rules for `rates`: the last layer has factor 1, each layer below it `decay` times.

    Layer-wise decay of the learning rate: of three layers and decay 0.5 the factors are 0.25, 0.5
    and 1. Layers are in natural order (`layer_2` before `layer_10`).

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import freeze_optax as fo
      >>> params = {"embed": 1.0, "layer_0": 1.0, "layer_1": 1.0, "head": 1.0}
      >>> tx = fo.rates(fo.layerwise(["embed", "layer_*", "head"], 0.5))
      >>> updates, _ = tx.update(params, tx.init(params))
      >>> {name: float(update) for name, update in sorted(updates.items())}
      {'embed': 0.125, 'head': 1.0, 'layer_0': 0.25, 'layer_1': 0.5}
      >>> tx = fo.rates([("embed", 0.0), *fo.layerwise("layer_*", 0.5)])

    Args:
      pattern: A glob that names the layers, as for `freeze_optax.layers`; or layers of it,
        `fo.layers("layer_*")[4:]`; or a list of these, from the lowest to the highest, as
        `["embed", "layer_*", "head"]`. Layers that are stacked in one leaf have one factor. In a
        flat dict with dots in its names each is inside of `freeze_optax.dotted`:
        `fo.dotted("encoder/layer/*")`.
      decay: The factor from one layer to the one below it: a finite number, 0 or more.

    Returns:
      A list with one pair, of a selector and its factors. Join it with other rules:
      `[("embed", 0.01), *fo.layerwise("layer_*", 0.9)]`. `rates` raises ValueError if a pattern
      names no node, if one layer is in another, or if a factor would not be finite.

    Raises:
      TypeError: If `decay` is no number, or a pattern is neither a string nor `fo.layers(…)`.
      ValueError: If `decay` is negative or not finite, if there is no pattern, or if some patterns
        are dotted and others are not.

    Source: ULMFiT (arXiv 1801.06146), whose factor from layer to layer is 1 / 2.6; ELECTRA (arXiv
    2003.10555) and BEiT (arXiv 2106.08254), which have it for all layers and the embeddings.
    """
    if not (is_real(decay) and np.ndim(decay) == 0):
        raise TypeError(f"fo.layerwise takes a number for its decay, not {decay!r}")
    if not (math.isfinite(decay) and decay >= 0):
        raise ValueError(
            f"the decay of fo.layerwise is a finite number, 0 or more, not {decay!r}; 0.9 makes "
            "each layer learn at 0.9 of the rate of the one above it"
        )
    # A selector is no sequence, but may be passed by mistake.
    listed: Any = pattern if isinstance(pattern, list | tuple) else [pattern]
    parts = list(map(_as_layers, listed))
    if not parts:
        raise ValueError("fo.layerwise needs a pattern: fo.layerwise('layer_*', 0.9)")
    dotted = {isinstance(part, Dotted) for part in listed}
    if len(dotted) > 1:
        plain = next(part for part in listed if not isinstance(part, Dotted))
        raise ValueError(
            f"fo.layerwise has dotted patterns, and {plain!r}, which is not; write "
            f"fo.dotted({plain!r})"
        )
    selector: Selector = functools.reduce(operator.or_, parts)
    (is_dotted,) = dotted
    factors = LayerFactors(parts, float(decay), is_dotted)
    return [(Dotted(selector) if is_dotted else selector, factors)]


def _as_layers(pattern: Any) -> Layers:
    if isinstance(pattern, Dotted):
        inner = pattern.selector
        if isinstance(inner, Path) and len(inner.patterns) == 1:
            return layers(*inner.patterns)
        return _as_layers(inner)
    if isinstance(pattern, Layers):
        return pattern
    if isinstance(pattern, str):
        return layers(pattern)
    raise TypeError(
        f"fo.layerwise takes globs or fo.layers(…), not {pattern!r}; it has to know which layer "
        "comes first"
    )
