"""Edits of an optimizer state: freeze, thaw, place, adopt, release and phases.

This room holds the edits that users call, `Phases` and `scheduled`. It also holds what they use:
the search for the one state in a tree (`state_holders`), the state that `init` makes for some
leaves alone (`fresh_state`), and the two steps of an edit, which are to split leaves into new parts
(`repartition`) and to change which parts are frozen (`transition`). The class of the state is in
`_state`.
"""
