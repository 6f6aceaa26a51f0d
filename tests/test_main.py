"""How a process of the command line ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

AT_THE_END = """
import atexit, sys, threading, time
from relora.__main__ import end_process
def late():
    time.sleep(0.3)
    print("thread")
threading.Thread(target=late).start()
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
from concurrent.futures import ThreadPoolExecutor
left_open = ThreadPoolExecutor(1)
left_open.submit(int).result()
atexit.register(print, "atexit")
class Aborts:
    def __del__(self):
        import os; os.abort()
sys.kept = Aborts()
{close}
end_process(5)
"""


@pytest.mark.parametrize("close", ["", "sys.stderr.close()"])
def test_a_process_ends_with_all_that_is_pythons_and_nothing_after_it(close: str) -> None:
    # What aborts when the interpreter takes everything down, as threads of C++ libraries did.
    code = AT_THE_END.format(close=close)
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert found.stdout.split() == ["thread", "atexit"]
    assert found.returncode == 5
