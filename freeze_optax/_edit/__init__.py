"""Edits of an optimizer state: freeze, thaw, adopt, release, and phases.

Here live the edits that users call; the search for the one state in a tree; the two steps of an
edit (new parts of a leaf, then another frozen set); the state that `init` gives to some leaves
alone; and `Phases` and `scheduled`. The state itself lives in `_state`.
"""
