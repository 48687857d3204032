"""`python -m dlmconvert`: the same program as the `dlmconvert` command."""

from dlmconvert.cli.app import main

if __name__ == "__main__":  # processes that tokenise import this module again
    main()
