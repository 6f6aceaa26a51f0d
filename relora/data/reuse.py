"""What is prepared already is not prepared again: not where its text was moved, copied or renamed,
and not on a medium that nobody can write to.

A source is described by its settings and by the names, sizes and times of its files. Names count
from the folder where a pattern begins, so that the description stays when a corpus is moved.
Where times alone differ (a copy, a fresh checkout) the text itself decides.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relora import files
from relora.data import corpus
from relora.data.config import DataConfig, SourceConfig, settings_of
from relora.data.shards import SPLITS, describe_shards, index_hash, read_index
from relora.errors import DataError


@dataclass(frozen=True)
class Wanted:
    """What is to lie where, and whether to tell of it."""

    directory: Path
    config: DataConfig
    made_from: dict[str, Any]  # descriptions of "source" and "tokenizer"
    quiet: bool

    def say(self, message: str) -> None:
        """Tell who waits."""
        if not self.quiet:
            print(message, flush=True)

    @functools.cached_property
    def text_sha256(self) -> str:
        """Of the source's text, which is read for it: asked where only times differ."""
        self.say(
            f"{corpus.source_name(self.config.source)}: names and sizes are those of prepared "
            "text, and times are not; reading it to compare"
        )
        tally = corpus.Tally()
        for _ in corpus.iter_documents(self.config.source, tally):
            pass
        return str(tally.text.hexdigest())


def describe_source(source: SourceConfig) -> dict[str, Any]:
    """The settings plus, for local text, digests of all names and sizes and of all times, as JSON.

    Two descriptions differ when the text may. A hub data set is described by its settings alone:
    pin `revision` to be sure of it. Raises DataError for files that cannot be found or looked at.
    """
    described: dict[str, Any] = {"settings": settings_of(source)}
    if source.builtin in ("python", "python_packages"):
        described["python"] = platform.python_version()
    parts = corpus.source_files(source)
    if parts is None:
        return described
    names, times = hashlib.sha256(), hashlib.sha256()
    count = size = 0
    for number, part in enumerate(parts.values()):
        for name, path in part:
            status = _stat(path)
            names.update(b"%d %s\0%d\0" % (number, os.fsencode(name), status.st_size))
            times.update(b"%d\0" % status.st_mtime_ns)
            count += 1
            size += status.st_size
    return {
        **described,
        "files": count,
        "bytes": size,
        "names_sha256": names.hexdigest(),
        "times_sha256": times.hexdigest(),
    }


def what_is_wrong(wanted: Wanted) -> str | None:
    """Why a directory does not hold whole shards of this text and tokenizer; None if it does.

    "" where nothing has been finished. Nothing is written.
    """
    if not files.is_file(wanted.directory / "index.json"):
        return ""
    try:
        index = read_index(wanted.directory)
    except DataError as error:
        return str(error)
    changes = _tokenizer_changes(index["tokenizer"], wanted.made_from["tokenizer"])
    return ", ".join(_source_changes(index, wanted) + changes) or None


def use_again(wanted: Wanted) -> Path:
    """Say what a complete directory holds; tidy it where that is possible."""
    directory, made_from = wanted.directory, wanted.made_from
    index = read_index(directory)
    if os.access(directory, os.W_OK):
        shutil.rmtree(directory / "parts", ignore_errors=True)  # killed between index and clean-up
        if "names_sha256" in index["source"] and index["source"] != made_from["source"]:
            write_index(directory, {**index, **made_from})  # or it would be read each time
    counted = {"parts": index.get("parts") or corpus.part_counts(wanted.config.source)}
    wanted.say(f"{directory}: prepared already\n{describe_shards({**index, **counted})}")
    return directory


def reuse_elsewhere(wanted: Wanted) -> bool:
    """Fill a directory with shards of the same text that were made under another name of it.

    The shards are hard links where the file system has these, so the other directory may go.
    """
    directory, config, made_from = wanted.directory, wanted.config, wanted.made_from
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
            and _same_elsewhere(index, wanted)
        ):
            clear(directory)
            for split in SPLITS:
                _link(other / f"{split}.bin", directory / f"{split}.bin")
            with files.making(directory / "tokenizer") as folder:
                shutil.copytree(other / "tokenizer", folder, dirs_exist_ok=True)
            index = {**index, **made_from, "parts": _renamed(index, config)}
            write_index(directory, index)
            wanted.say(f"{directory}: the same text and tokenizer as {other}, taken from there")
            wanted.say(describe_shards(index))
            return True
    return False


def write_index(directory: Path, index: dict[str, Any]) -> None:
    """index.json, which says that a directory is complete."""
    files.write_json(directory / "index.json", {**index, "index_sha256": index_hash(index)})


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


# --- whether it is the same ---


def _tokenizer_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In words, how tokenizers differ; one of equal content may lie elsewhere."""
    old, new = ({**each["settings"], "path": None} for each in (before, now))
    if before.get("sha256") != now.get("sha256"):
        return ["its tokenizer changed"]
    named = before["settings"].get("path") == now["settings"].get("path")
    if old == new and (named or "sha256" in now):
        return []
    return [f"its tokenizer changed: settings {before['settings']} → {now['settings']}"]


def _source_changes(index: dict[str, Any], wanted: Wanted) -> list[str]:
    """In words, how a source differs from what the shards of `index` were made from."""
    before, now = index["source"], wanted.made_from["source"]
    found = [
        f"its source changed: {key} {before[key]} → {now.get(key)}"
        for key in ("settings", "python", "files", "bytes")
        if key in before and before[key] != now.get(key)
    ]
    if found:
        return found
    same = True  # a local directory as `dataset` was once described by its settings alone
    if "listing_sha256" in before:  # an index of before names were relative
        same = before["listing_sha256"] == _listing(wanted.config.source)
    elif "names_sha256" in before:
        same = _same_text(index, wanted)
    return [] if same else ["its source changed"]


def _same_elsewhere(index: dict[str, Any], wanted: Wanted) -> bool:
    """Whether the shards of `index`, made under another name of the source, hold its very text."""
    before, now = index["source"], wanted.made_from["source"]
    if not now.get("files") or "names_sha256" not in before:
        return False
    unnamed = [
        {key: value for key, value in each["settings"].items() if key not in ("files", "saved")}
        for each in (before, now)
    ]
    same = all(before.get(key) == now.get(key) for key in ("python", "files", "bytes"))
    return same and unnamed[0] == unnamed[1] and _same_text(index, wanted)


def _same_text(index: dict[str, Any], wanted: Wanted) -> bool:
    before, now = index["source"], wanted.made_from["source"]
    if before.get("names_sha256") != now.get("names_sha256"):
        return False
    if before.get("times_sha256") == now.get("times_sha256"):
        return True
    return bool(index.get("text_sha256") == wanted.text_sha256)


def _listing(source: SourceConfig) -> str:
    """The digest of absolute paths, sizes and times that older shards describe their source by."""
    listing = hashlib.sha256()
    for part in (corpus.source_files(source) or {}).values():
        paths = [path for _, path in part]
        for path in sorted(paths) if source.saved else paths:
            status = _stat(path)
            listing.update(os.fsencode(path.absolute()))
            listing.update(f"\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return listing.hexdigest()


def _stat(path: Path) -> os.stat_result:
    with files.supplied(DataError, path):
        return path.stat()
