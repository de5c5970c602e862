"""`groups`: a label function by rules, of which the first that selects a leaf counts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from freeze_optax._select.first_match import FirstMatch
from freeze_optax._select.specs import Spec
from freeze_optax._tree.holes import is_placeholder
from freeze_optax._tree.leaves import Leaves


def groups(
    rules: Mapping[Any, Any] | Sequence[tuple[Spec, Any]], default: Any = None
) -> Callable[[Any], Any]:
    """Returns a function that labels each leaf by the first rule that selects it.

    `optax.partition` takes it for its labels, so one table gives several optimizers and a frozen
    group. `freeze_optax.labelled` takes it too: `fo.labelled(fo.groups(rules), "frozen")` is the
    frozen group as a spec.

    Examples:
      >>> import optax
      >>> import freeze_optax as fo
      >>> params = {"embed": 1.0, "body": {"kernel": 2.0, "bias": 3.0}, "head": 4.0}
      >>> groups = fo.groups({"embed": "frozen", "**/bias": "plain", fo.everything: "decayed"})
      >>> groups(params)
      {'body': {'bias': 'plain', 'kernel': 'decayed'}, 'embed': 'frozen', 'head': 'decayed'}
      >>> inner = optax.partition(
      ...     {"plain": optax.adam(1e-3), "decayed": optax.adamw(1e-3)},
      ...     groups,
      ... )
      >>> tx = fo.freezable(inner, frozen=fo.labelled(groups, "frozen"))

    Args:
      rules: A mapping from spec to label, or a list of pairs. A label is any hashable value but
        None. A spec is any that `freeze_optax.mask` takes; it selects whole leaves.
      default: The label of leaves that no rule selects. If None, such a leaf is an error.

    Returns:
      A function of a tree. It returns the tree with a label at each leaf; holes stay. It raises
      ValueError if a rule wins no leaf, because it selects none or because earlier rules select all
      of them; if it selects a part of a leaf; or if a leaf has no label. Among holes a rule may win
      nothing.

    Raises:
      TypeError: If `rules` are neither a mapping nor pairs, or if a label is None.
    """
    table = FirstMatch("groups", "label", rules)
    for selector, label in zip(table.selectors, table.values, strict=True):
        if label is None:
            raise TypeError(
                f"fo.groups has None for {selector!r}, but None is no label; name the group, "
                "'frozen' say, and freeze it: fo.freezable(inner, fo.labelled(groups, 'frozen'))"
            )

    def label_leaves(tree: Any) -> Any:
        if is_placeholder(tree):
            return tree
        leaves = Leaves(tree)
        winners = table.winners(leaves)
        if default is None:
            table.check_all_have_one(winners, leaves)
        return leaves.fill_leaves(
            default if rule is None else table.values[rule] for rule in winners
        )

    return label_leaves
