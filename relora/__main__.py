"""`python -m relora`, which is also what the deepspeed launcher starts on every rank."""

import gc
import sys

from relora.cli import main
from relora.engine.launcher import decode_argument

if __name__ == "__main__":
    code = main(list(map(decode_argument, sys.argv[1:])))  # what reached another host unharmed
    gc.freeze()  # else the interpreter looks through a million objects once more before it ends
    sys.exit(code)
