"""Pytrees of params: their leaves, key paths, globs and modules.

The room holds `Leaves`, which lists the leaves of a tree with their key paths as text; the kinds of
leaf; holes; NNX Variables; trees that hold the params twice (`optax.LookaheadParams`); globs over
key paths; the modules of a model by path; and the clauses of error messages. Nothing in this room
depends on what is frozen.
"""
