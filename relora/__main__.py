"""`python -m relora`, which is also what the deepspeed launcher starts on every rank."""

import sys

from relora.cli import main

if __name__ == "__main__":
    sys.exit(main())
