"""Reports: what is frozen, and what that saves.

This room holds the counts of leaves, the bytes of an optimizer state, the outline of a tree with
repeated layers folded, the plot, and `summary`. Nothing here computes with arrays, so leaves may be
abstract.
"""
