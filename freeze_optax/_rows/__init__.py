"""Leaves that are frozen in part: rows along one axis, or single elements.

The room holds `Subset`, of which `Rows` and `Elements` are the two kinds, and the algebra of flags
(a flag is a bool, or a subset of a leaf); the functions that take subsets out of arrays and put
them back, bit for bit; and the parts of a leaf, which keep separate state. The selectors are in
`_select`, and edits of parts are in `_edit`.
"""
