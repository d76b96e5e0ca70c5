"""Run the command `motet` as `python -m motet`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
