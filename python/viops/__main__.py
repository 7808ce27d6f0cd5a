"""`python -m viops`: demo, info, doctor and bench."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
