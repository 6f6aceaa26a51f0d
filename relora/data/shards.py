"""Token shards: what `prepare` leaves behind and what training maps into memory.

    DIR/<name>-<fingerprint>/
        tokenizer/                      a transformers tokenizer directory
        train.bin, validation.bin       token ids, uint16 or uint32, every document followed by EOS
        index.json                      counts, hashes and where it all came from; written last

A directory without index.json is unfinished, whatever else lies in it.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from relora import files
from relora.data.config import DataConfig, settings_of
from relora.data.corpus import source_name
from relora.data.tokenizer import tokenizer_hash
from relora.errors import ConfigError, DataError

SHARD_FORMAT = 1  # raise it when the same settings would give other bytes
SPLITS = ("train", "validation")
_PARTS_SHOWN = 50


@dataclass(frozen=True)
class TokenShards:
    """Prepared data, opened. `train` and `validation` are one-dimensional memory maps of ids."""

    directory: Path
    tokenizer_dir: Path
    train: np.memmap
    validation: np.memmap
    index: dict[str, Any]
    vocab_size: int
    eos_id: int
    fingerprint: str  # sha256 over both shards' hashes and the tokenizer's


def shard_directory(config: DataConfig) -> Path:
    """Where the shards of these settings lie; other source or tokenizer settings, another place."""
    settings = {
        "format": SHARD_FORMAT,
        "source": settings_of(config.source),
        "tokenizer": settings_of(config.tokenizer),
        "validation_fraction": config.validation_fraction,
    }
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    stem = Path(source_name(config.source).split(", ")[0].split("*")[0]).name.split(".")[0]
    name = re.sub(r"[^A-Za-z0-9]+", "_", stem).strip("_")[:40] or "text"
    return config.dir / f"{name}-{fingerprint}"


def open_shards(config: DataConfig, *, verify: bool = False) -> TokenShards:
    """Map the shards of a config; `verify` also reads them through and compares their hashes.

    Raises ConfigError when they have not been prepared, DataError when they are not what their
    index says.
    """
    directory = shard_directory(config)
    if not files.is_file(directory / "index.json"):
        raise ConfigError(
            f"data: there are no token shards at {directory} for these source and tokenizer "
            "settings; run: relora prepare CONFIG"
        )
    index = read_index(directory)
    if verify:
        for split in SPLITS:
            _verify(directory / f"{split}.bin", index["splits"][split])
    hashes = [index["splits"][split]["sha256"] for split in SPLITS] + [index["tokenizer_sha256"]]
    with files.supplied(DataError, directory):
        maps = [np.memmap(directory / f"{s}.bin", dtype=index["dtype"], mode="r") for s in SPLITS]
    return TokenShards(
        directory=directory,
        tokenizer_dir=directory / "tokenizer",
        train=maps[0],
        validation=maps[1],
        index=index,
        vocab_size=index["vocab_size"],
        eos_id=index["eos_id"],
        fingerprint=hashlib.sha256("".join(hashes).encode()).hexdigest(),
    )


_Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 63)]


class _Split(BaseModel):
    documents: _Count
    tokens: Annotated[_Count, Field(ge=1)]
    bytes: _Count
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class _Made(BaseModel):
    settings: dict[str, Any]


class _Part(BaseModel):
    name: str
    files: _Count | None
    documents: _Count | None = None
    bytes: _Count | None = None


class _Index(BaseModel):
    """What index.json must have; `index_sha256`, where it is, vouches for all of it."""

    dtype: Literal["uint16", "uint32"]
    vocab_size: _Count
    eos_id: _Count
    max_token_id: _Count
    tokenizer_sha256: str
    splits: dict[Literal["train", "validation"], _Split] = Field(min_length=2)
    source: _Made
    tokenizer: _Made
    parts: list[_Part] = []


def read_index(directory: Path) -> dict[str, Any]:
    """index.json, if it makes sense and shards and tokenizer are as it says; else a DataError."""
    path = directory / "index.json"
    try:
        index = files.read_json(path, DataError)
    except DataError as error:
        raise _damaged(path, f"is broken ({str(error).removeprefix(f'{path}: ')})") from error
    if index.get("format") != SHARD_FORMAT:
        raise _damaged(
            path, f"has format {index.get('format')}, and this version reads {SHARD_FORMAT}"
        )
    try:
        _Index.model_validate(index)
    except ValidationError as error:
        first = error.errors()[0]
        what = ".".join(map(str, first["loc"]))
        raise _damaged(path, f"is broken ({what}: {first['msg']})") from error
    highest = max(index["max_token_id"], index["eos_id"])
    if highest >= index["vocab_size"]:
        raise _damaged(path, f"has token id {highest} in {index['vocab_size']} tokens")
    if index.get("index_sha256") not in (None, index_hash(index)):
        raise _damaged(path, "is not what prepare wrote")
    width = np.dtype(index["dtype"]).itemsize
    for split in SPLITS:
        _require_size(directory / f"{split}.bin", index["splits"][split]["tokens"] * width)
    tokenizer_dir = directory / "tokenizer"
    with files.supplied(DataError, tokenizer_dir):
        if not tokenizer_dir.is_dir() or tokenizer_hash(tokenizer_dir) != index["tokenizer_sha256"]:
            raise _damaged(tokenizer_dir, "is not the tokenizer these shards were made with")
    return index


def index_hash(index: dict[str, Any]) -> str:
    """sha256 over an index but for the hash itself."""
    rest = {key: value for key, value in index.items() if key != "index_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _require_size(shard: Path, expected: int) -> None:
    with files.supplied(DataError, shard):
        actual = shard.stat().st_size if shard.is_file() else None
    if actual is None:
        raise _damaged(shard, "is missing")
    if actual != expected:
        raise _damaged(shard, f"has {actual:,} bytes where its index says {expected:,}")


def describe_shards(index: dict[str, Any]) -> str:
    """Prepared data: a line for each part of the source (a wrong pattern is seen by what it gave),
    and one a split."""
    lines = []
    parts = index.get("parts", [])
    for part in parts[:_PARTS_SHOWN]:
        counts = [
            f"{part[what]:,} {what if part[what] != 1 else what[:-1]}"
            for what in ("documents", "files")
            if part.get(what) is not None
        ]
        if part.get("bytes") is not None:
            counts.append(f"{part['bytes'] / 1e6:.1f} MB")
        lines.append(f"{part['name']}: {', '.join(counts)}")
    if len(parts) > _PARTS_SHOWN:
        lines.append(f"… and {len(parts) - _PARTS_SHOWN:,} patterns more")
    for split in SPLITS:
        documents, tokens, size = (
            index["splits"][split][what] for what in ("documents", "tokens", "bytes")
        )
        lines.append(
            f"{split}: {documents:,} documents, {tokens:,} tokens ({size / 1e6:.1f} MB, "
            f"{size / max(1, tokens):.2f} bytes per token)"
        )
    return "\n".join(lines)


def _verify(shard: Path, counts: dict[str, Any]) -> None:
    with files.supplied(DataError, shard), shard.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != counts["sha256"]:
        raise _damaged(
            shard, f"has sha256 {actual[:12]}… where its index says {counts['sha256'][:12]}…"
        )


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path}: {what}; delete {path.parent} and run: relora prepare CONFIG")
