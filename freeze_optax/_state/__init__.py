"""The optimizer state and its static metadata.

Here live `FreezeState`; the `Plan`, which is what a spec resolved to; the context that all plans of
one state share; the layout of an inner state, which tells statistics, counters and clocks apart;
and the leaves that share a buffer. The functions that make, update and edit a state live in
`_transform` and `_edit`.
"""
