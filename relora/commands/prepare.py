"""`relora prepare`: text → tokenizer → token shards."""

from __future__ import annotations

from pathlib import Path

from relora.config import Config
from relora.data.prepare import prepare_shards
from relora.data.transformers_tokenizer import require_agreement
from relora.files import exists
from relora.model import load_model_config


def prepare(config: Config, workers: int | None) -> int:
    """Make the token shards that the config's `data` section describes, if they are not there."""

    def check(tokenizer: Path) -> None:
        # A directory may come later, or lie on another machine; training checks again.
        if config.model.config or exists(config.model.pretrained or Path()):
            require_agreement(tokenizer, load_model_config(config.model))

    prepare_shards(config.data, seed=config.seed, workers=workers, check_tokenizer=check)
    return 0
