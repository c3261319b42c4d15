"""`python -m specdec_cli`, the same as the `specdec` command."""

from specdec_cli.main import main

main()
