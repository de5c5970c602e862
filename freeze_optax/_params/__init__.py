"""Functions of params: split, merge, set, differentiate and update.

This room holds `partition` and `merge`, `hold`, `assign`, `grad` and `value_and_grad`,
`apply_updates`, `scan`, and the zeros that stand for frozen gradients and updates. Nothing here
makes or edits an optimizer state.
"""
