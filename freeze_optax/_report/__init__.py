"""Reports: what is frozen, and what that saves.

Here live the counts of leaves, the bytes of an optimizer state, the outline of a tree with repeated
layers folded, the picture, and `summary`. Nothing here computes with arrays: leaves may be
abstract.
"""
