"""`relora verify`: is a checkpoint as it was written?"""

from __future__ import annotations

from pathlib import Path

from relora.errors import CheckpointError
from relora.record.checkpoint import open_checkpoint_of
from relora.words import format_bytes


def verify(checkpoint: Path) -> int:
    """Hash every file of a checkpoint; names the first one that is not as its manifest says.

    Of a run directory the newest. Where an older one alone is sound, that is an error too, which
    says so.

    Raises:
        CheckpointError: it is not sound, or there is none.
    """
    opened, complaints = open_checkpoint_of(checkpoint)
    if complaints:
        raise CheckpointError(
            f"{'; '.join(complaints)}; the newest that is sound is {opened.directory}"
        )
    size = format_bytes(opened.bytes)
    print(f"{opened.directory}: sound; step {opened.step}, {size} in all")
    return 0
