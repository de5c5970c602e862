"""So that `python -m freeze_optax` is the command line."""

from freeze_optax._files.command_line import main

main()
