"""Leaves that are frozen in part: some rows of the leading axis.

Here live `Rows` and the algebra of flags (a bool, or the rows of a leaf); the functions that take
rows out of arrays and put them back, bit for bit; and the parts of a leaf that keep state apart
from each other. The selector `rows` lives in `_select`, edits of rows in `_edit`.
"""
