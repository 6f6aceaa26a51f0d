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
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from relora.data.config import DataConfig
from relora.data.corpus import source_name
from relora.data.tokenizer import tokenizer_hash
from relora.errors import ConfigError, DataError

FORMAT = 1  # raise it when the same settings would give other bytes
SPLITS = ("train", "validation")


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
        "format": FORMAT,
        "source": config.source.model_dump(mode="json"),
        "tokenizer": config.tokenizer.model_dump(mode="json"),
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
    if not (directory / "index.json").is_file():
        raise ConfigError(
            f"data: there are no token shards at {directory} for these source and tokenizer "
            "settings; run: relora prepare CONFIG"
        )
    index = read_index(directory)
    if verify:
        for split in SPLITS:
            _verify(directory / f"{split}.bin", index["splits"][split])
    hashes = [index["splits"][split]["sha256"] for split in SPLITS] + [index["tokenizer_sha256"]]
    maps = [
        np.memmap(directory / f"{split}.bin", dtype=index["dtype"], mode="r") for split in SPLITS
    ]
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


def read_index(directory: Path) -> dict[str, Any]:
    """index.json, if it makes sense and shards and tokenizer are as it says; else a DataError."""
    path = directory / "index.json"
    try:
        index = json.loads(path.read_bytes())
        if index["format"] != FORMAT:
            raise _damaged(path, f"has format {index['format']}, and this version reads {FORMAT}")
        width = {"uint16": 2, "uint32": 4}[index["dtype"]]
        sizes = {split: index["splits"][split]["tokens"] * width for split in SPLITS}
        if not 0 <= index["max_token_id"] < index["vocab_size"]:
            raise _damaged(
                path, f"has token id {index['max_token_id']} in {index['vocab_size']} tokens"
            )
        _ = index["eos_id"], index["tokenizer_sha256"], index["source"], index["tokenizer"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise _damaged(path, f"is broken ({type(error).__name__}: {error})") from error
    for split, expected in sizes.items():
        shard = directory / f"{split}.bin"
        actual = shard.stat().st_size if shard.is_file() else None
        if actual is None:
            raise _damaged(shard, "is missing")
        if actual != expected:
            raise _damaged(shard, f"has {actual:,} bytes where its index says {expected:,}")
    tokenizer_dir = directory / "tokenizer"
    if not tokenizer_dir.is_dir() or tokenizer_hash(tokenizer_dir) != index["tokenizer_sha256"]:
        raise _damaged(tokenizer_dir, "is not the tokenizer these shards were made with")
    return index


def describe(index: dict[str, Any]) -> str:
    """Prepared data in one line a split."""
    lines = []
    for split in SPLITS:
        counts = index["splits"][split]
        lines.append(
            f"{split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens "
            f"({counts['bytes'] / 1e6:.1f} MB, "
            f"{counts['bytes'] / max(1, counts['tokens']):.2f} bytes per token)"
        )
    return "\n".join(lines)


def publish(temporary: Path, final: Path) -> None:
    """Give a finished file or directory its name, so that a crash leaves all of it or nothing."""
    for path in temporary.iterdir() if temporary.is_dir() else [temporary]:
        _sync(path)
    temporary.replace(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _verify(shard: Path, counts: dict[str, Any]) -> None:
    with shard.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != counts["sha256"]:
        raise _damaged(
            shard, f"has sha256 {actual[:12]}… where its index says {counts['sha256'][:12]}…"
        )


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path}: {what}; delete {path.parent} and run: relora prepare CONFIG")
