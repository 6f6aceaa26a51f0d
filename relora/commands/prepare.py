"""`relora prepare`: text → tokenizer → token shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from relora.load import load_config


def prepare(config: Path, overrides: Sequence[str], workers: int | None) -> int:
    """Make the token shards that the config's `data` section describes, if they are not there."""
    settings = load_config(config, overrides)

    from relora import files
    from relora.data.prepare import prepare as prepare_shards
    from relora.data.transformers_tokenizer import require_agreement
    from relora.model import load_model_config

    def check(tokenizer: Path) -> None:
        # A directory may come later, or lie on another machine; training checks again.
        if settings.model.config or files.exists(settings.model.pretrained or Path()):
            require_agreement(tokenizer, load_model_config(settings.model))

    prepare_shards(settings.data, seed=settings.seed, workers=workers, check_tokenizer=check)
    return 0
