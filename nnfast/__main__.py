"""`python -m nnfast`: the `nnfast` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
