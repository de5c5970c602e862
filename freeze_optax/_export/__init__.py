"""Optimizer states as plain arrays, and back.

This room holds `export_state` and `import_state`, the text that describes the exported arrays, and
the encoding of dtypes that NumPy does not have. Nothing here reads or writes a file.
"""
