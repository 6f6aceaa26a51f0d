"""`relora prepare`: text → tokenizer → token shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from relora.config import load_config


def prepare(config: Path, overrides: Sequence[str], workers: int | None) -> int:
    """Make the token shards that the config's `data` section describes, if they are not there."""
    settings = load_config(config, overrides)

    from relora.data.prepare import prepare as prepare_shards

    prepare_shards(settings.data, seed=settings.seed, workers=workers)
    return 0
