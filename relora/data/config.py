"""The `data` section: where the text comes from and how it becomes tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from relora.section import Section


class SourceConfig(Section):
    """Exactly one of `builtin`, `files`, `dataset` and `saved` names the text.

    `source: python` in the file is short for `{builtin: python}`: the standard library's source
    code of the interpreter that runs; `python_packages` adds that of the packages it has.
    """

    builtin: Literal["python", "python_packages"] | None = None
    files: list[str] | None = None  # paths and globs
    dataset: str | None = None  # a Hugging Face dataset by name
    saved: Path | None = None  # a directory written by datasets' save_to_disk

    text_field: str = "text"  # the column that holds the text, where there are columns
    config: str | None = None  # `dataset` only: its configuration
    split: str = "train"  # `dataset` and `saved` only
    revision: str | None = None  # `dataset` only
    streaming: bool = True  # `dataset` only
    max_documents: int | None = Field(default=None, ge=1)
    deduplicate: bool = False  # drop a document whose whole text has come before

    @model_validator(mode="after")
    def _exactly_one(self) -> SourceConfig:
        kinds = ("builtin", "files", "dataset", "saved")
        given = [kind for kind in kinds if getattr(self, kind)]
        if len(given) != 1:
            raise ValueError(
                f"name exactly one of {', '.join(kinds)}; given: {', '.join(given) or 'none'}"
            )
        only_dataset = self.changed("config", "revision", "streaming")
        if only_dataset and not self.dataset:
            raise ValueError(f"{', '.join(only_dataset)} would do nothing without dataset")
        if self.changed("split") and not (self.dataset or self.saved):
            raise ValueError("split would do nothing without dataset or saved")
        return self


class TokenizerConfig(Section):
    """Train a sentencepiece model (`train`, `vocab_size`) or take an existing one (`path`)."""

    train: Literal["bpe", "unigram"] | None = None
    vocab_size: int | None = Field(default=None, ge=300, le=2**31 - 1)
    # `train` only: how much text of the corpus sentencepiece sees
    training_megabytes: float = Field(default=20.0, gt=0)
    path: str | None = None  # a .model file, a transformers tokenizer directory, or a hub name

    @model_validator(mode="after")
    def _train_or_path(self) -> TokenizerConfig:
        if (self.train is None) == (self.path is None):
            raise ValueError("give either train (bpe or unigram) with vocab_size, or path")
        if self.train and self.vocab_size is None:
            raise ValueError("train needs vocab_size, for example 32100")
        if self.path and self.changed("vocab_size", "training_megabytes"):
            raise ValueError("vocab_size and training_megabytes would do nothing beside path")
        return self


class DataConfig(Section):
    """From text to batches. Shards go to `dir/<fingerprint of source and tokenizer settings>`."""

    source: SourceConfig
    tokenizer: TokenizerConfig
    sequence_length: int = Field(ge=8)  # tokens
    dir: Path = Path("data")
    validation_fraction: float = Field(default=0.01, gt=0, lt=0.5)  # share of the documents
    num_workers: int = Field(default=0, ge=0)  # loader processes per rank; 0 reads in the loop

    @field_validator("source", mode="before")
    @classmethod
    def _shorthand(cls, value: object) -> object:
        return {"builtin": value} if isinstance(value, str) else value
