"""Checkpoint files and the command line.

Here live the readers of headers, one for each format, which give names, shapes and dtypes and read
no array; the limits that protect them from crafted files; and the command `freeze-optax`. The
tables that the command prints come from `_report`.
"""
