"""The selector that reads dots in names as separators."""

from collections.abc import Sequence
from typing import final

from freeze_optax._rows.flags import Flag
from freeze_optax._select.selector import Selector
from freeze_optax._select.specs import Spec, as_selector
from freeze_optax._tree.leaves import Leaves


@final
class Dotted(Selector):
    """Selects what a spec selects where dots separate the components of a path, as slashes do."""

    def __init__(self, spec: Spec):
        self._selector = as_selector(spec)

    @property
    def selector(self) -> Selector:
        """The selector of the spec, for paths with slashes."""
        return self._selector

    @property
    def is_by_path(self) -> bool:
        return self._selector.is_by_path

    def flags(self, leaves: Leaves) -> Sequence[Flag]:
        return self._selector.flags(dotted_leaves(leaves))

    def __repr__(self) -> str:
        return f"dotted({self._selector!r})"


def dotted_leaves(leaves: Leaves) -> Leaves:
    """Returns the leaves with dots as separators; raises if two leaves then have one path."""
    dotted = leaves.dotted()
    first: dict[str, str] = {}
    for path, stored in zip(dotted.paths, leaves.as_stored.paths, strict=True):
        if first.setdefault(path, stored) != stored:
            raise ValueError(
                f"with dots as separators {first[path]!r} and {stored!r} are one path, {path!r}; "
                "select by the names as they are, without fo.dotted"
            )
    return dotted


def dotted(spec: Spec) -> Selector:
    """Reads dots in the names of a tree as separators, for the paths that a spec matches.

    A checkpoint of PyTorch is one flat dict with names such as `model.layers.0.mlp.weight`. To a
    spec each name is a single component. Inside `dotted` it is `model/layers/0/mlp/weight`. So a
    pattern can name a layer, and it is the pattern that the command line takes for that file. The
    params stay the flat dict that they are.

    Examples:
      >>> import freeze_optax as fo
      >>> params = {"layers.0.bias": 1.0, "layers.0.weight": 2.0, "layers.1.weight": 3.0}
      >>> fo.mask(fo.dotted("layers/0"), params)
      {'layers.0.bias': True, 'layers.0.weight': True, 'layers.1.weight': False}
      >>> fo.dotted(fo.layers("layers/*")[:-1] | fo.path("**/weight"))(params)
      {'layers.0.bias': True, 'layers.0.weight': True, 'layers.1.weight': True}

    Args:
      spec: Any spec, see `freeze_optax.mask`. All of its patterns, regular expressions, predicates
        and masks meet the paths with slashes. Patterns are written with slashes too, as dots stand
        for ranges there (`{0..9}`).

    Returns:
      The selector. As `frozen` of `freeze_optax.summary` it makes the table nested too. Applied to
      a tree, it raises ValueError if two leaves have the same path with dots as separators; and all
      that the spec raises.

    Raises:
      TypeError: If `spec` is a transformation.
      ValueError: If `spec` is a tree that holds more than one `FreezeState`.
    """
    return Dotted(spec)
