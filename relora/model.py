"""Build the transformer: from a config JSON with weights that depend on the seed alone, or from a
checkpoint directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from relora.errors import ConfigError
from relora.section import Section

if TYPE_CHECKING:
    pass


class ModelConfig(Section):
    """Exactly one of `config` (a transformers config JSON: from scratch) and `pretrained`.

    `pretrained` is a directory that transformers can load (an export, say), a run directory or
    one of its checkpoints: continued pretraining.
    """

    config: Path | None = None
    pretrained: Path | None = None
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _exactly_one(self) -> ModelConfig:
        if (self.config is None) == (self.pretrained is None):
            raise ValueError("give either config (a JSON file) or pretrained (a directory)")
        return self


def read_model_json(path: Path) -> dict[str, Any]:
    """The transformers config JSON at `path`, as plain values.

    Raises:
        ConfigError: no such file, no JSON, or no `model_type` in it.
    """
    if not path.is_file():
        raise ConfigError(f"model.config: {path}: no such file (looked from {Path.cwd()})")
    try:
        values = json.loads(path.read_text(encoding="utf8"))
    except ValueError as error:
        raise ConfigError(f"model.config: {path}: not valid JSON: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise ConfigError(f'model.config: {path}: needs a "model_type", such as "llama"')
    return values
