"""What a config names and is not here: said before anything is prepared or trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from relora.data.config import DataConfig
from relora.data.corpus import matching
from relora.errors import DataError
from relora.files import exists
from relora.hub import is_hub_name


def absent_parts(data: DataConfig) -> Iterator[str]:
    """One sentence about each file, pattern or folder of text or tokenizer that is not there."""
    for pattern in data.source.files or []:
        try:
            matching([pattern])
        except DataError as error:
            yield str(error)
    saved, path = data.source.saved, data.tokenizer.path
    if saved is not None and not exists(saved.expanduser()):
        yield f"data.source.saved: no such directory {saved} (looked from {Path.cwd()})"
    fetched = path is not None and is_hub_name(path) and not path.endswith(".model")
    if path is not None and not fetched and not exists(Path(path).expanduser()):
        yield f"data.tokenizer.path: {path} is not here (looked from {Path.cwd()})"
