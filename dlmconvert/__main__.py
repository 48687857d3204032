"""`python -m dlmconvert`: the same program as the `dlmconvert` command."""

from dlmconvert.cli.app import main

main()
