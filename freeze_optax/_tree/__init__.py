"""Pytrees of params: their leaves, key paths, globs and modules.

Here live `Leaves`, which lists the leaves of a tree with their key paths as text; the kinds of
leaf and the holes between them; NNX Variables; trees that hold the params twice
(`optax.LookaheadParams`); globs over key paths; the modules of a model by path; and the clauses of
error messages. Nothing here knows what is frozen.
"""
