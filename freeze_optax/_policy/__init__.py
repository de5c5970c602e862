"""Policies: what is frozen next, from what was measured.

This room holds the decisions and the rules that make them. A rule reads a state and changes none:
`_edit` makes the edits, `_transform` measures, and `_report` shows what was measured.
"""
