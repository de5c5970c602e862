"""Gradient transformations: `freezable` and `tie`.

This room holds the two transformations; the update of cohorts, each with its own counters; and the
extra arguments of `update` as the inner transformation needs them. Edits of a state are in `_edit`,
and so is `scheduled`, which is made of such edits.
"""
