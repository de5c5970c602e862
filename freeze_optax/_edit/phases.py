"""`Phases`: what is frozen from each step on, as data."""

import bisect
import operator
from collections.abc import Mapping
from typing import Any

from freeze_optax._rows.flags import Flag
from freeze_optax._select.specs import Spec, resolve
from freeze_optax._tree.leaves import Leaves


class Phases:
    """Maps first steps to specs: from each of these steps on, its spec says what is frozen.

    This is a schedule of gradual unfreezing, as data. What is frozen at a step depends only on the
    step. So a loop that calls `state = fo.set_frozen(state, params, phases.at(step))` can be
    interrupted and resumed at any step. Gradual unfreezing is from Howard and Ruder, `Universal
    Language Model Fine-tuning for Text Classification <https://arxiv.org/abs/1801.06146>`_, 2018.

    Examples:
      >>> import freeze_optax as fo
      >>> phases = fo.Phases({0: "encoder", 500: "encoder/layer_{0..9}", 1000: fo.nothing})
      >>> phases.at(499)
      'encoder'
      >>> phases.at(500)
      'encoder/layer_{0..9}'

    Args:
      specs: A mapping from the first step of each phase, counted from 0, to a spec; see
        `freeze_optax.mask`.

    Attributes:
      starts: The first step of each phase, in ascending order.
      specs: The spec of each phase, in the same order.

    Raises:
      ValueError: If there is no phase, or a phase begins before step 0.
      TypeError: If `specs` is not a mapping, or a step is not an integer.
    """

    def __init__(self, specs: Mapping[int, Spec]):
        if not isinstance(specs, Mapping):
            raise TypeError(
                "Phases takes a dict of first steps and specs, as {0: 'encoder', 500: fo.nothing}, "
                f"not a {type(specs).__name__}"
            )
        if not specs:
            raise ValueError(
                "Phases needs a phase; to freeze nothing write Phases({0: fo.nothing})"
            )
        steps = {as_step(step): spec for step, spec in specs.items()}
        self.starts: tuple[int, ...] = tuple(sorted(steps))
        self.specs: tuple[Spec, ...] = tuple(steps[start] for start in self.starts)
        if self.starts[0] < 0:
            raise ValueError(f"a phase begins at step {self.starts[0]}; steps count from 0")

    def at(self, step: int) -> Spec:
        """Returns the spec of the phase that contains a step.

        Examples:
          >>> import freeze_optax as fo
          >>> phases = fo.Phases({0: "encoder", 500: fo.nothing})
          >>> [phases.at(step) for step in (0, 499, 500)]
          ['encoder', 'encoder', nothing]

        Args:
          step: The number of steps taken before this one: an integer, or an array that holds one,
            outside of jit.

        Returns:
          The spec object that `Phases` was given.

        Raises:
          ValueError: If the step is before the first phase.
          TypeError: If the step is not an integer, or is traced. Under jit use
            `freeze_optax.scheduled`.
        """
        index = bisect.bisect_right(self.starts, as_step(step)) - 1
        if index < 0:
            raise ValueError(
                f"step {step} is before the first phase, which begins at {self.starts[0]}"
            )
        return self.specs[index]

    def validate(self, params: Any) -> None:
        """Resolves the specs of all phases, so that a typo in any of them raises at once.

        Examples:
          >>> import freeze_optax as fo
          >>> phases = fo.Phases({0: "encoder", 500: "encoder/layer_0"})
          >>> phases.validate({"encoder": {"layer_1": 1.0}})
          Traceback (most recent call last):
          ValueError: in the phase from step 500 on: pattern 'encoder/layer_0' selects no leaf; ...

        Args:
          params: The params. Leaves may be abstract (`jax.ShapeDtypeStruct`).

        Raises:
          ValueError: If a spec does not fit the params. The error names the phase.
          IndexError: If `fo.layers(pattern)[i]` names a layer that does not exist.
          TypeError: If a mask among the specs holds anything but bools.
        """
        self.resolve(Leaves(params))

    def resolve(self, leaves: Leaves) -> tuple[tuple[Flag, ...], ...]:
        """Returns the frozen flags of the leaves in each phase; raises as `validate` does."""
        flags: list[tuple[Flag, ...]] = []
        for start, spec in zip(self.starts, self.specs, strict=True):
            try:
                flags.append(tuple(resolve(spec, leaves)))
            except Exception as error:
                phase = f"in the phase from step {start} on"
                if type(error) in (ValueError, TypeError, IndexError):
                    raise type(error)(f"{phase}: {error}") from error
                error.add_note(phase)  # jax's errors take more than a text
                raise
        return tuple(flags)

    def __repr__(self) -> str:
        return f"Phases({dict(zip(self.starts, self.specs, strict=True))!r})"


def as_step(step: Any) -> int:
    """Returns a step as an `int`; raises TypeError for anything but a known integer."""
    try:
        return operator.index(step)
    except TypeError:
        raise TypeError(
            f"a step is an integer known outside of jit, not {step!r}; inside a compiled loop "
            "use fo.scheduled(inner, phases)"
        ) from None
