"""Specs for the variables of a model."""

from collections.abc import Sequence
from typing import final

from freeze_optax._rows.flags import Flag
from freeze_optax._select.selector import Selector
from freeze_optax._select.specs import Spec, as_selector
from freeze_optax._tree.leaves import Leaves
from freeze_optax.nnx._flax import nnx
from freeze_optax.nnx._modules import modules


@final
class OnModel(Selector):
    """A spec for the variables of a model, with the modules and aliases that only the model has."""

    def __init__(self, spec: Spec, model: nnx.Module):
        self._selector, self._modules = as_selector(spec), modules(model)

    def flags(self, leaves: Leaves) -> Sequence[Flag]:
        table = self._modules
        return self._selector.flags(Leaves(leaves.tree, modules=table, aliases=table.aliases))

    def __repr__(self) -> str:
        return repr(self._selector)
