"""Optimizer states as plain arrays, and back.

Here live `export_state` and `import_state`, the text that describes the arrays, and the encoding of
dtypes that NumPy lacks. Nothing here reads or writes a file.
"""
