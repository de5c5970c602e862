"""Checkpoint files and the command line.

This room holds the readers of headers, one for each format. They return names, shapes and dtypes
and read no array. It also holds the limits that protect the readers from crafted files, and the
command `freeze-optax`. `_report` makes the tables that the command prints.
"""
