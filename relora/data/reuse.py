"""What is prepared already is not prepared again: not where its text was moved, copied or renamed,
and not on a medium that nobody can write to.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from relora import files
from relora.data import corpus
from relora.data.config import DataConfig
from relora.data.identity import same_elsewhere, source_changes
from relora.data.shards import SPLITS, describe, index_hash, read_index
from relora.errors import DataError

Say = Callable[[str], None]


def what_is_wrong(
    directory: Path, config: DataConfig, made_from: dict[str, Any], text: Callable[[], str]
) -> str | None:
    """Why a directory does not hold whole shards of this text and tokenizer; None if it does.

    "" where nothing has been finished. Nothing is written; `text` gives the digest of the text,
    and is asked where its files have other times.
    """
    if not files.is_file(directory / "index.json"):
        return ""
    try:
        index = read_index(directory)
    except DataError as error:
        return str(error)
    changes = source_changes(index, config.source, made_from["source"], text)
    changes += _tokenizer_changes(index["tokenizer"], made_from["tokenizer"])
    return ", ".join(changes) or None


def use_again(directory: Path, config: DataConfig, made_from: dict[str, Any], say: Say) -> None:
    """Say what a complete directory holds; tidy it where that is possible."""
    index = read_index(directory)
    if os.access(directory, os.W_OK):
        shutil.rmtree(directory / "parts", ignore_errors=True)  # killed between index and clean-up
        if "names_sha256" in index["source"] and index["source"] != made_from["source"]:
            write_index(directory, {**index, **made_from})  # or it would be read each time
    counted = index if "parts" in index else {**index, "parts": corpus.part_counts(config.source)}
    say(f"{directory}: prepared already\n{describe(counted)}")


def write_index(directory: Path, index: dict[str, Any]) -> None:
    """index.json, which says that a directory is complete."""
    files.write_json(directory / "index.json", {**index, "index_sha256": index_hash(index)})


def take_over(
    directory: Path,
    config: DataConfig,
    made_from: dict[str, Any],
    text: Callable[[], str],
    say: Say,
) -> bool:
    """Fill a directory with shards of the same text that were made under another name of it.

    The shards are hard links where the file system has these, so the other directory may go.
    """
    for other in sorted(config.dir.iterdir()):
        if other == directory or not files.is_file(other / "index.json"):
            continue
        try:
            index = read_index(other)
        except DataError:  # it is nobody's business here what is wrong with it
            continue
        if (
            index.get("validation_fraction") == config.validation_fraction
            and not _tokenizer_changes(index["tokenizer"], made_from["tokenizer"])
            and same_elsewhere(index, made_from["source"], text)
        ):
            clear(directory)
            for split in SPLITS:
                _link(other / f"{split}.bin", directory / f"{split}.bin")
            with files.making(directory / "tokenizer") as folder:
                shutil.copytree(other / "tokenizer", folder, dirs_exist_ok=True)
            index = {**index, **made_from, "parts": _renamed(index, config)}
            write_index(directory, index)
            say(f"{directory}: the same text and tokenizer as {other}, taken from there")
            say(describe(index))
            return True
    return False


def clear(directory: Path) -> None:
    """Remove what prepare writes, and no more."""
    for name in ("tokenizer", "parts"):
        if files.is_dir(directory / name):
            shutil.rmtree(directory / name)
    for name in ("index.json", "made_from.json", *(f"{split}.bin" for split in SPLITS)):
        (directory / name).unlink(missing_ok=True)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links, or with too many to this file
        shutil.copyfile(source, target)


def _renamed(index: dict[str, Any], config: DataConfig) -> list[dict[str, Any]]:
    """The counts of each part of a source, under the names that it has now."""
    now = corpus.part_counts(config.source)
    before = index.get("parts", [])
    if [part["files"] for part in before] != [part["files"] for part in now]:
        return now
    return [{**old, **new} for old, new in zip(before, now, strict=True)]


def _tokenizer_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In words, how tokenizers differ; one of equal content may lie elsewhere."""
    old, new = ({**each["settings"], "path": None} for each in (before, now))
    if before.get("sha256") != now.get("sha256"):
        return ["its tokenizer changed"]
    named = before["settings"].get("path") == now["settings"].get("path")
    if old == new and (named or "sha256" in now):
        return []
    return [f"its tokenizer changed: settings {before['settings']} → {now['settings']}"]
