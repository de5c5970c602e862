"""So that `python -m freeze_optax` is the command line."""

from freeze_optax._cli import main

main()
