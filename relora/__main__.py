"""`relora`, and `python -m relora`, which the deepspeed launcher starts on every rank."""

import atexit
import contextlib
import os
import sys
import threading
from typing import NoReturn

from relora.cli import main
from relora.engine.launcher import decode_argument


def entry() -> NoReturn:
    """The command of this process's arguments, and its exit code."""
    code = main(list(map(decode_argument, sys.argv[1:])))  # what reached another host unharmed
    end_process(code)


def end_process(code: int) -> NoReturn:
    """End this process as Python does, but for what comes after Python.

    Threads of libraries still wait while C++ takes down what they use: a rank whose run was
    finished and saved was seen to abort there, which made a lost rank of it. And the interpreter
    would look through a million objects once more.
    """
    # Joins threads, once idle ones of a pool have been told that no more work comes: a pool that an
    # error left open would wait for ever.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed by whoever read them
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    entry()
