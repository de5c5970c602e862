"""`Convergence`: a policy that freezes what has converged."""

import dataclasses
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from freeze_optax._edit.phases import as_step
from freeze_optax._edit.state_holders import editable_state
from freeze_optax._policy.decision import Decision
from freeze_optax._policy.group_scores import (
    inclusive_quantile,
    joined_score,
    norms_of_training,
    scores_by_leaf,
)
from freeze_optax._report.scores import Score
from freeze_optax._rows.flags import Flag, flag_or
from freeze_optax._select.first_match import FirstMatch
from freeze_optax._select.selector import nothing
from freeze_optax._select.specs import Spec, as_selector, is_function, resolve
from freeze_optax._state.rotation import RotatingState
from freeze_optax._transform.scaling import is_real
from freeze_optax._tree.key_paths import natural_order
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.lookahead import param_leaves
from freeze_optax._tree.node_types import nodes_of_type


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Convergence:
    """Freezes what has converged: what has a small gradient, relative to its size.

    Every few steps it compares the norms of the gradients, averaged over the last steps, relative
    to the norms of the params. Where this number is below a threshold, or below that of most
    others, the params are frozen. The optimizer is measured:
    `fo.freezable(fo.measured(optimizer))`. A decision depends only on the step, the state and the
    params. So a run that was killed and resumed from a checkpoint decides the same.

    The order from input to output is that of AutoFreeze: only a prefix of the groups is frozen, so
    the backward pass gets shorter. From Liu et al., `AutoFreeze
    <https://arxiv.org/abs/2102.01386>`_, 2021, which freezes what is below a quantile; Wang et al.,
    `Egeria <https://arxiv.org/abs/2201.06227>`_, 2022, which waits with patience and thaws; and Lee
    et al., `Surgical Fine-Tuning <https://arxiv.org/abs/2210.11466>`_, 2022, which compares
    gradients relative to weights, to train where they are large.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import freeze_optax as fo
      >>> params = {"encoder": jnp.ones(4), "head": jnp.ones(4)}
      >>> tx = fo.freezable(fo.measured(optax.sgd(0.1)))
      >>> opt_state = tx.init(params)
      >>> policy = fo.Convergence(["encoder"], threshold=0.01, patience=2, every=5)
      >>> for step in range(6):
      ...     decision = policy.at(step, opt_state, params)
      ...     opt_state = fo.set_frozen(opt_state, params, decision)
      ...     grads = {"encoder": jnp.full(4, 1e-3), "head": jnp.ones(4)}
      ...     updates, opt_state = tx.update(grads, opt_state, params)
      ...     params = fo.apply_updates(params, updates, frozen=opt_state)
      >>> decision
      Decision(step 5: freezes 'encoder')

    Args:
      order: The groups, from the input of the model to its output: a list of specs, such as
        `["embed", "layers/0", "layers/1"]`. A group is frozen when it and all groups before it have
        converged. The norm of a group is the root of the sum of the squares of those of its leaves.
        Of a leaf that trains in part both norms are of this part. A leaf that several specs select
        is in the group of the first. A leaf that none selects, such as the head, is never frozen.
        With None each leaf is frozen for itself, which saves state and updates, and of the backward
        pass the gradient of the leaf alone.
      threshold: A group has converged when its score is below this number.
      quantile: In place of a threshold, a number from 0 to 1: a group has converged when its score
        is below this quantile of the scores of all groups that train. Not the last one, nor are
        equal scores, since none of them is below.
      patience: How many steps each leaf of a group has to be measured before the group can be
        frozen, 1 or more. A leaf that was thawed without a parked state counts from there.
      every: How many steps are between two decisions. Only a decision that changes something
        compiles the training step anew.
      frozen: What is always frozen: any spec, see `freeze_optax.mask`.
      floor: What is never frozen by the policy: any spec.
      probe: After how many steps all that the policy froze is thawed, and trains until it has
        converged again: a multiple of `every`. A frozen leaf has no gradient, so this is how the
        policy sees that it moves again. None: never.
      score: A function for what is compared, which takes the `Score` of a group and the norm of its
        params, and returns a number: the lower, the more it has converged. None: `score.gradient /
        norm`, and 0 where both are 0. A group whose number is NaN, or whose params are not finite,
        has not converged, nor has one of which a leaf is not measured.

    Raises:
      TypeError: If a number is none, or `order` is a text, or no list.
      ValueError: If there is neither a threshold nor a quantile, or both; if a number is out of its
        range; if `order` is empty; or if `probe` is no multiple of `every`.
    """

    order: Sequence[Spec] | None = None
    _: dataclasses.KW_ONLY
    threshold: float | None = None
    quantile: float | None = None
    patience: int = 20
    every: int = 100
    frozen: Spec = nothing
    floor: Spec = nothing
    probe: int | None = None
    score: Callable[[Score, float], Any] | None = None

    def __post_init__(self):
        if self.order is not None:
            _check_order(self.order)
        if (self.threshold is None) == (self.quantile is None):
            raise ValueError(
                "Convergence takes a threshold or a quantile, and not both: threshold=1e-3 freezes "
                "what has a gradient below a thousandth of its norm, quantile=0.5 the half with "
                "the smallest"
            )
        _check_number("threshold", self.threshold, math.inf)
        _check_number("quantile", self.quantile, 1)
        _check_count("patience", self.patience, 1)
        _check_count("every", self.every, 1)
        if self.probe is not None:
            _check_count("probe", self.probe, 1)
            if self.probe % self.every:
                multiple = math.ceil(self.probe / self.every) * self.every
                raise ValueError(
                    f"probe is {self.probe}, but decisions come every {self.every} steps; write a "
                    f"multiple, probe={multiple}"
                )
        if self.score is not None and not is_function(self.score):
            raise TypeError(f"score is a function of a Score and a norm, not {self.score!r}")

    def is_due(self, step: int) -> bool:
        """Returns whether a decision is due at a step; at all others nothing changes.

        Examples:
          >>> import freeze_optax as fo
          >>> policy = fo.Convergence(threshold=0.01, every=100)
          >>> [step for step in range(301) if policy.is_due(step)]
          [0, 100, 200, 300]

        Args:
          step: The number of steps taken before this one: an integer known outside of jit.

        Returns:
          True for each `every`-th step, and for the first, where only `frozen` is applied.

        Raises:
          TypeError: If the step is no integer, or is traced.
          ValueError: If it is negative.
        """
        number = as_step(step)
        if number < 0:
            raise ValueError(f"step {number} is negative; steps count from 0")
        return number % self.every == 0

    def most_changes(self, steps: int) -> int:
        """Returns how many decisions of a run change something at most.

        Each of them compiles the training step anew, after the first compilation. How many there
        were in a run, its decisions tell: count those that `changed`.

        Examples:
          >>> import freeze_optax as fo
          >>> layers = [f"layer_{i}" for i in range(12)]
          >>> fo.Convergence(layers, threshold=0.01, every=100).most_changes(1_000)
          9
          >>> fo.Convergence(layers, threshold=0.01, every=10).most_changes(1_000)
          12

        Args:
          steps: The number of steps of the run, from step 0 on.

        Returns:
          The number of decisions after the first step. If `order` is given and nothing is thawed
          again, at most the number of its groups.

        Raises:
          TypeError: If `steps` is no integer.
          ValueError: If it is negative.
        """
        _check_count("steps", steps, 0)
        decisions = max(operator.index(steps) - 1, 0) // self.every
        if self.order is None or self.probe is not None:
            return decisions
        return min(decisions, len(self.order))

    def at(self, step: int, state: Any, params: Any) -> Decision:
        """Returns what is frozen from a step on.

        Call it once before each step, and give `freeze_optax.set_frozen` what it returns. Where no
        decision is due, it reads nothing from the device.

        Examples:
          >>> import jax.numpy as jnp
          >>> import optax
          >>> import freeze_optax as fo
          >>> params = {"encoder": jnp.ones(4), "head": jnp.ones(4)}
          >>> opt_state = fo.freezable(fo.measured(optax.sgd(0.5)), "encoder").init(params)
          >>> policy = fo.Convergence(threshold=0.01)
          >>> decision = policy.at(1, opt_state, params)
          >>> decision.changed, decision(params)
          (False, {'encoder': True, 'head': False})

        Args:
          step: The number of steps taken before this one: an integer known outside of jit.
          state: The optimizer state, or any tree with one `FreezeState` in it, and in that one
            state of `freeze_optax.measured`.
          params: The params. For NNX write
            `policy.at(step, optimizer.opt_state, nnx.state(model, optimizer.wrt))`.

        Returns:
          A spec. Its attribute `changed` says whether it freezes or thaws a leaf, `froze` and
          `thawed` say which. What is frozen already stays so until the next probe, whoever froze
          it. `state` is unchanged.

        Raises:
          TypeError: If the step is no integer; if the state holds no `FreezeState`, or no state of
            `measured`; if it or the params are traced or abstract, and a decision is due; or if
            `score` returns no number.
          ValueError: If a spec of the policy does not fit the params, or selects in `order` or
            `floor` a part of a leaf; if the state is of other params, holds several `FreezeState`s
            or is that of `scheduled` or `rotating`; or if the norms are those of groups (`by`).
        """
        due = self.is_due(step)
        number = as_step(step)
        freeze_state = editable_state("Convergence.at", state)
        if nodes_of_type(RotatingState, state):
            raise ValueError(
                "Convergence.at was given a state of fo.rotating, whose layers take turns; give it "
                "one of fo.freezable, or let the turns decide what trains"
            )
        leaves = param_leaves(params)
        now = freeze_state.plan.flags(leaves, "params")
        after = self._frozen_after(number, state, leaves, now) if due else now
        return _decision(number, leaves, now, after)

    def _frozen_after(
        self, step: int, state: Any, leaves: Leaves, now: Sequence[Flag]
    ) -> Sequence[Flag]:
        """Returns what is frozen after a decision that is due."""
        always = resolve(self.frozen, leaves)
        columns = zip(always, now, map(np.shape, leaves.values), strict=True)
        thawed = [x if y is True else flag_or(x, y, shape) for x, y, shape in columns]
        # At step 0 too, so that a typo, or a state that is not measured, raises there.
        groups, by_leaf = self._groups(leaves, always), scores_by_leaf(state, leaves)
        if step == 0:
            return [y is True or x for x, y in zip(thawed, now, strict=True)]
        policy_froze = [a is True and b is not True for a, b in zip(now, always, strict=True)]
        if self.probe is not None and step % self.probe == 0 and any(policy_froze):
            return thawed
        after = [flag or x for flag, x in zip(policy_froze, thawed, strict=True)]
        training = [[i for i in group if after[i] is not True] for group in groups]
        norms = norms_of_training(leaves, now, training)
        for i in self._converged(training, self._numbers(training, by_leaf, norms)):
            after[i] = True
        return after

    def _groups(self, leaves: Leaves, always: Sequence[Flag]) -> list[list[int]]:
        """Returns the indices of the leaves of each group, of which each may be frozen."""
        floor = as_selector(self.floor).flags(leaves)
        may_freeze = [
            flag is not True and low is False for flag, low in zip(always, floor, strict=True)
        ]
        if self.order is None:
            return [[i] for i, flag in enumerate(may_freeze) if flag]
        rules = [(spec, group) for group, spec in enumerate(self.order)]
        winners = FirstMatch("Convergence", "group", rules).winners(leaves)
        return [
            [i for i, winner in enumerate(winners) if winner == group and may_freeze[i]]
            for _, group in rules
        ]

    def _numbers(
        self, groups: Sequence[Sequence[int]], by_leaf: dict[int, Score], norms: dict[int, float]
    ) -> list[float]:
        """Returns the number of each group that is compared; NaN if it is not known."""
        numbers = [math.nan] * len(groups)
        for number, group in enumerate(groups):
            if not group or not all(i in by_leaf for i in group):
                continue
            score = joined_score([by_leaf[i] for i in group])
            norm = math.hypot(*(norms[i] for i in group))
            # Infinite params have diverged, and any gradient is small beside them.
            if score.steps >= self.patience and math.isfinite(norm):
                numbers[number] = self._number(score, norm)
        return numbers

    def _number(self, score: Score, norm: float) -> float:
        number: Any = (self.score or _relative_gradient)(score, norm)
        if not is_real(number) or np.ndim(number):
            raise TypeError(
                f"the function `score` of Convergence returned {number!r} for {score} and the norm "
                f"{norm}, not a number; lower means that more has converged"
            )
        return float(number)

    def _converged(
        self, groups: Sequence[Sequence[int]], numbers: Sequence[float]
    ) -> Iterator[int]:
        """Yields the leaves of the groups that have converged."""
        limit: Any = self.threshold
        if self.quantile is not None:
            known = sorted(x for x in numbers if not math.isnan(x))
            limit = inclusive_quantile(known, self.quantile)
        for group, number in zip(groups, numbers, strict=True):
            if number < limit:
                yield from group
            elif group and self.order is not None:
                return

    def __repr__(self) -> str:
        limit = f"threshold={self.threshold}"
        if self.quantile is not None:
            limit = f"quantile={self.quantile}"
        order = "" if self.order is None else f"{list(self.order)!r}, "
        probe = "" if self.probe is None else f", probe={self.probe}"
        return f"Convergence({order}{limit}, patience={self.patience}, every={self.every}{probe})"


def _relative_gradient(score: Score, norm: float) -> float:
    return score.gradient / norm if norm else score.gradient and math.inf


def _decision(step: int, leaves: Leaves, now: Sequence[Flag], after: Sequence[Flag]) -> Decision:
    paths, shapes = leaves.paths, map(np.shape, leaves.values)
    changes = [
        (path, flag_or(a, b, shape) == b)
        for path, a, b, shape in zip(paths, now, after, shapes, strict=True)
        if a != b
    ]
    froze = sorted((path for path, frozen in changes if frozen), key=natural_order)
    thawed = sorted((path for path, frozen in changes if not frozen), key=natural_order)
    return Decision(step, dict(zip(paths, after, strict=True)), froze, thawed)


def _check_order(order: Any) -> None:
    if isinstance(order, str) or not isinstance(order, Sequence):
        hint = f"; write [{order!r}]" if isinstance(order, str) else ""
        raise TypeError(f"order is a list of specs from input to output, not {order!r}{hint}")
    if not order:
        raise ValueError(
            "order is an empty list, so nothing would ever be frozen; give it specs, or None to "
            "freeze leaf by leaf"
        )


def _check_number(name: str, number: Any, most: float) -> None:
    if number is None:
        return
    if not is_real(number) or np.ndim(number):
        raise TypeError(f"the {name} of Convergence is a number, not {number!r}")
    if not 0 <= number <= most:
        limits = "0 or more" if most == math.inf else f"from 0 to {most}"
        raise ValueError(f"the {name} of Convergence is {limits}, not {number!r}")


def _check_count(name: str, number: Any, least: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int | np.integer):
        raise TypeError(f"{name} is a number of steps, an integer, not {number!r}")
    if number < least:
        raise ValueError(f"{name} is {number}, but it is {least} or more steps")
