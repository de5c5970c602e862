"""Rules from specs to values, of which the first that selects a leaf counts."""

from collections.abc import Mapping, Sequence
from typing import Any, final

from freeze_optax._rows.subset import Subset
from freeze_optax._select.selector import Selector
from freeze_optax._select.specs import as_selector
from freeze_optax._tree.holes import is_hole
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.messages import quoted_list


@final
class FirstMatch:
    """A table of rules: for each leaf, the first rule whose spec selects it.

    Args:
      name: The name of the public function that got the rules, for errors.
      what: What a spec is mapped to, for errors: `"factor"` or `"label"`.
      rules: A mapping from spec to value, or a list of pairs.

    Raises:
      TypeError: If the rules are neither a mapping nor pairs.

    Attributes:
      selectors: The selector of each rule.
      values: The value of each rule.
    """

    def __init__(self, name: str, what: str, rules: Any):
        self._name, self._what = name, what
        pairs = list(rules.items()) if isinstance(rules, Mapping) else _pairs(name, what, rules)
        self.selectors: list[Selector] = [as_selector(spec) for spec, _ in pairs]
        self.values: list[Any] = [value for _, value in pairs]

    def winners(self, leaves: Leaves) -> list[int | None]:
        """Returns for each leaf, or hole, the index of the rule that it goes by; None for none.

        Args:
          leaves: The leaves of the params. If some are holes, a rule may win nothing, because a
            selector that reads leaves (`freeze_optax.where`) does not see what is in a hole.

        Raises:
          ValueError: If a rule wins no leaf, or if it selects a part of one.
        """
        is_complete = not any(map(is_hole, leaves.values))
        winners: list[int | None] = [None] * len(leaves.values)
        for rule, selector in enumerate(self.selectors):
            try:
                flags = selector.flags(leaves)
            except ValueError as error:
                raise ValueError(f"{self._rule(rule)} does not fit: {error}") from error
            for i, flag in enumerate(flags):
                if isinstance(flag, Subset):
                    raise ValueError(
                        f"{self._rule(rule)} selects a part of {leaves.paths[i]!r} ({flag!r}), but "
                        f"a {self._what} is for a whole leaf; select the leaf, as what is frozen "
                        "of it gets no update"
                    )
            selected = [i for i, flag in enumerate(flags) if flag]
            won = [i for i in selected if winners[i] is None]
            if is_complete and not won:
                self._raise_without_leaf(rule, selected, winners, leaves)
            for i in won:
                winners[i] = rule
        return winners

    def check_all_have_one(self, winners: Sequence[int | None], leaves: Leaves) -> None:
        """Raises ValueError if a leaf has no rule, naming such leaves; a hole needs none."""
        triples = zip(leaves.paths, leaves.values, winners, strict=True)
        missing = [path for path, leaf, rule in triples if rule is None and not is_hole(leaf)]
        if missing:
            raise ValueError(
                f"no rule of fo.{self._name} selects {quoted_list(missing)}, and the default is "
                f"None; add a rule for what remains, (fo.everything, …), or give a default "
                f"{self._what}"
            )

    def _raise_without_leaf(
        self, rule: int, selected: list[int], winners: list[int | None], leaves: Leaves
    ) -> None:
        if not selected:
            raise ValueError(f"{self._rule(rule)} selects no leaf; remove it, or mend its spec")
        earlier = sorted({winner for i in selected if (winner := winners[i]) is not None})
        paths = quoted_list(leaves.paths[i] for i in selected)
        raise ValueError(
            f"{self._rule(rule)} wins no leaf: all that it selects ({paths}) goes by "
            f"{' and '.join(map(self._rule, earlier))} before it, and the first rule that selects "
            "a leaf counts; put the narrower rule first"
        )

    def _rule(self, rule: int) -> str:
        return f"rule {rule + 1} of fo.{self._name}, {self.selectors[rule]!r},"

    def __repr__(self) -> str:
        pairs = zip(self.selectors, self.values, strict=True)
        return f"{{{', '.join(f'{selector!r}: {value!r}' for selector, value in pairs)}}}"


def _pairs(name: str, what: str, rules: Any) -> list[tuple[Any, Any]]:
    """Returns the rules as pairs, or raises TypeError if they are none."""
    is_list = isinstance(rules, Sequence) and not isinstance(rules, str)
    wrong = (rule for rule in rules if not _is_pair(rule)) if is_list else iter([rules])
    for rule in wrong:
        raise TypeError(
            f"fo.{name} takes rules, a mapping from spec to {what} or a list of pairs, as "
            f"[('encoder', …), (fo.everything, …)], but got {rule!r}"
        )
    return [(spec, value) for spec, value in rules]


def _is_pair(rule: Any) -> bool:
    return isinstance(rule, tuple | list) and len(rule) == 2
