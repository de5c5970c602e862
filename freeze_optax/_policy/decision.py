"""`Decision`: what a policy freezes at a step, as a spec."""

from collections.abc import Mapping, Sequence
from typing import final

from freeze_optax._rows.flags import Flag
from freeze_optax._select.selector import Selector
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.messages import path_differences, quoted_list


@final
class Decision(Selector):
    """What is frozen from a step on: the spec that `Convergence.at` returns.

    Pass it to `freeze_optax.set_frozen`. It selects leaves by their paths, so it fits any tree with
    the paths of the params.

    Attributes:
      step: The step of the decision.
      froze: The paths of the leaves that it freezes and that trained before, in natural order.
      thawed: The paths of the leaves that it trains and that were frozen before, in natural order.
    """

    def __init__(
        self, step: int, frozen: Mapping[str, Flag], froze: Sequence[str], thawed: Sequence[str]
    ):
        self.step, self.froze, self.thawed = step, tuple(froze), tuple(thawed)
        self._frozen = dict(frozen)

    @property
    def changed(self) -> bool:
        """Whether it freezes or thaws a leaf, so that the next step is compiled anew."""
        return bool(self.froze or self.thawed)

    def flags(self, leaves: Leaves) -> list[Flag]:
        if sorted(leaves.paths) != sorted(self._frozen):
            raise ValueError(
                f"{self!r} is of other params: "
                + path_differences(
                    tuple(leaves.paths), tuple(self._frozen), "in the tree", "in the decision"
                )
            )
        return [self._frozen[path] for path in leaves.paths]

    def __repr__(self) -> str:
        clauses = [
            f"{verb} {quoted_list(paths, 3)}"
            for verb, paths in (("freezes", self.froze), ("thaws", self.thawed))
            if paths
        ]
        return f"Decision(step {self.step}: {', '.join(clauses) or 'no change'})"
