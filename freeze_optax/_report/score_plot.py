"""`plot_scores`: what `measured` has measured, as lines over the steps."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from freeze_optax._report.scores import Score, Scores
from freeze_optax._state.measured_state import MEASURES
from freeze_optax._tree.key_paths import natural_order
from freeze_optax._tree.messages import printable, quoted_list

_MOST_LINES = 12
_SIZE = (8.0, 4.5)
_LONGEST = 40


def plot_scores(history: Mapping[int, Scores], what: str = "gradient", ax: Any = None) -> Any:
    """Draws a measure over the steps, with a line for each leaf, or for each subtree of many.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import freeze_optax as fo
      >>> params = {"body": jnp.ones(4), "head": jnp.ones(4)}
      >>> tx = fo.freezable(fo.measured(optax.adam(0.1)))
      >>> state, history = tx.init(params), {}
      >>> for step in range(3):
      ...     updates, state = tx.update(params, state, params)
      ...     history[step] = fo.scores(state)
      >>> axes = fo.plot_scores(history, "update")
      >>> [line.get_label() for line in axes.lines]
      ['body', 'head']

    Args:
      history: A mapping from step to the scores at that step.
      what: `"gradient"`, `"update"`, `"gradient_change"` or `"update_change"`.
      ax: The matplotlib axes to draw into; None for new ones.

    Returns:
      The axes. If there are more than twelve leaves, a line is of a subtree, or of several ones
      that follow each other in natural order: the root of the sum of the squares of its leaves,
      which of norms is the norm of all. A line has a gap where nothing of it trains.

    Raises:
      ImportError: If matplotlib, the extra `freeze_optax[plot]`, is not installed.
      TypeError: If `history` is no mapping from step to `Scores`.
      ValueError: If `what` is none of these, or the history is empty.
    """
    if what not in MEASURES:
        raise ValueError(
            f"fo.plot_scores was given {what!r}, which is no measure; write one of "
            f"{quoted_list(MEASURES)}"
        )
    _check_history(history)
    try:
        from matplotlib import pyplot as plt  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            "plot_scores needs matplotlib; install it with: pip install 'freeze_optax[plot]'"
        ) from error
    steps = sorted(history)
    paths = dict.fromkeys(path for step in steps for path in history[step])
    lines = _lines(sorted(paths, key=natural_order))
    if ax is None:
        _, ax = plt.subplots(figsize=_SIZE, layout="constrained")
    # From dark to light in natural order, so that deep and shallow layers can be told apart.
    colours = plt.get_cmap("viridis")
    is_positive = False
    for i, (name, members) in enumerate(lines.items()):
        values = [_joined(members, history[step], what) for step in steps]
        is_positive = is_positive or any(x > 0 for x in values)
        label = name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"
        colour = colours(0.92 * i / max(len(lines) - 1, 1))
        marker = "o" if len(steps) == 1 else None
        ax.plot(steps, values, label=label, color=colour, marker=marker)
    if is_positive:
        ax.set_yscale("log")
    ax.set(xlabel="step", ylabel=what.replace("_", " "))
    if lines:
        legend = ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return ax


def _check_history(history: Any) -> None:
    is_mapping = isinstance(history, Mapping)
    if not is_mapping or not all(isinstance(x, Mapping) for x in history.values()):
        raise TypeError(
            f"fo.plot_scores takes a mapping from step to scores, not a {type(history).__name__}"
            f"{' of something else' if is_mapping else ''}; in the loop write "
            "history[step] = fo.scores(state)"
        )
    if not history:
        raise ValueError("fo.plot_scores was given an empty history; it needs scores of a step")


def _joined(paths: Iterable[str], scores: Mapping[str, Score], what: str) -> float:
    """Returns a measure of several leaves at one step; NaN if none of them has it."""
    values = [getattr(scores[path], what) for path in paths if path in scores]
    known = [x for x in values if not math.isnan(x)]
    return math.hypot(*known) if known else math.nan


def _lines(paths: Sequence[str]) -> dict[str, Sequence[str]]:
    """Returns the paths of each line by its name: as deep in the tree as few enough lines go."""
    deepest = max((path.count("/") + 1 for path in paths), default=0)
    groups: dict[str, list[str]] = {}
    for depth in range(deepest, 0, -1):
        groups = {}
        for path in paths:
            groups.setdefault("/".join(path.split("/")[:depth]), []).append(path)
        if len(groups) <= _MOST_LINES:
            break
    names = list(groups)
    lines: dict[str, Sequence[str]] = {}
    # Even one component may have too many names: so many that follow each other share a line.
    count = min(len(names), _MOST_LINES)
    for i in range(count):
        own = names[i * len(names) // count : (i + 1) * len(names) // count]
        label = " … ".join(dict.fromkeys(map(printable, (own[0], own[-1]))))
        lines[label] = [path for name in own for path in groups[name]]
    return lines
