"""Leaves that are frozen in part: some rows of the leading axis.

The room holds `Rows` and the algebra of flags (a flag is a bool, or rows of a leaf); the functions
that take rows out of arrays and put them back, bit for bit; and the parts of a leaf, which keep
separate state. The selector `rows` is in `_select`, and edits of rows are in `_edit`.
"""
