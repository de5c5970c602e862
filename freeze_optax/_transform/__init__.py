"""Gradient transformations: `freezable` and `tie`.

Here live the two transformations; the update of cohorts, each with its own counters; and the
extra arguments of `update` as the inner transformation needs them. Edits of a state live in
`_edit`, and `scheduled`, which is made of such edits, lives there too.
"""
