"""The optimizer state and its static metadata.

The room holds `FreezeState`; `Plan`, which is what a spec resolved to; `PlanContext`, which all
plans of one state share; `Layout`, which separates statistics, counters and clocks in an inner
state; and the functions that find leaves with one buffer. The functions that make, update and edit
a state are in `_transform` and `_edit`.
"""
