"""`relora verify`: is a checkpoint as it was written?"""

from __future__ import annotations

from pathlib import Path

from relora.runtime.metrics import format_bytes


def verify(checkpoint: Path) -> int:
    """Hash every file of a checkpoint; names the first one that is not as its manifest says."""
    from relora.runtime.checkpoint import Checkpoint, newest_checkpoint

    directory = newest_checkpoint(checkpoint)
    opened = Checkpoint(directory, thorough=True)
    size = sum(file.stat().st_size for file in directory.iterdir())
    print(f"{directory}: sound; step {opened.step}, {format_bytes(size)} in all")
    return 0
