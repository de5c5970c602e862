"""Makes `python -m freeze_optax` run the command line."""

from freeze_optax._files.command_line import main

main()
