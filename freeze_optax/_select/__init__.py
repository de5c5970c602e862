"""Selectors, specs and masks: how users say what is frozen.

This room holds the base class `Selector` with its algebra; the selectors by path, by leaf, by
module and by rows; the resolution of any spec to one flag for each leaf; and `mask` and `labels`.
Nothing here changes a tree or a state.
"""
