"""Is this the text that shards were made from? Asked without tokenizing it again.

A source is described by its settings and by the names, sizes and times of its files. Names count
from the folder where a pattern begins, so that the description stays when a corpus is moved.
Where times alone differ (a copy, a fresh checkout) the text itself decides.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from relora import files
from relora.data import corpus
from relora.data.config import SourceConfig
from relora.errors import DataError


def settings_of(source: SourceConfig) -> dict[str, Any]:
    """The settings that name shards: those that are newer than shards only where they are used."""
    settings = source.model_dump(mode="json")
    if source.cut is None:
        del settings["cut"]
    return settings


def describe_source(source: SourceConfig) -> dict[str, Any]:
    """The settings plus, for local text, digests of all names and sizes and of all times, as JSON.

    Two descriptions differ when the text may. A hub data set is described by its settings alone:
    pin `revision` to be sure of it. Raises DataError for files that cannot be found or looked at.
    """
    described: dict[str, Any] = {"settings": settings_of(source)}
    if source.builtin:
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


def text_digest(source: SourceConfig) -> str:
    """sha256 over the digests of all documents, which are read for it."""
    tally = corpus.Tally()
    for _ in corpus.iter_documents(source, tally):
        pass
    return tally.sha256()


def source_changes(
    index: dict[str, Any], source: SourceConfig, now: dict[str, Any], text: Callable[[], str]
) -> list[str]:
    """In words, how a source differs from what the shards of `index` were made from.

    `now` describes the source, and `text` gives the digest of its text: asked where only times
    differ.
    """
    before = index["source"]
    found = [
        f"its source changed: {key} {before[key]} → {now.get(key)}"
        for key in ("settings", "python", "files", "bytes")
        if key in before and before[key] != now.get(key)
    ]
    if not found and "listing_sha256" in before:  # an index of before names were relative
        same = before["listing_sha256"] == _listing(source)
    else:  # of a local directory as `dataset`, such an index knows the settings alone
        same = bool(found) or "names_sha256" not in before or _same_text(index, now, text)
    return found if same else ["its source changed"]


def same_elsewhere(index: dict[str, Any], now: dict[str, Any], text: Callable[[], str]) -> bool:
    """Whether the shards of `index`, made under another name of the source, hold its very text."""
    before = dict(index["source"])
    if not now.get("files") or "names_sha256" not in before:
        return False
    unnamed = [
        {key: value for key, value in each["settings"].items() if key not in ("files", "saved")}
        for each in (before, now)
    ]
    same = all(before.get(key) == now.get(key) for key in ("python", "files", "bytes"))
    return same and unnamed[0] == unnamed[1] and _same_text(index, now, text)


def _same_text(index: dict[str, Any], now: dict[str, Any], text: Callable[[], str]) -> bool:
    before = index["source"]
    if before.get("names_sha256") != now.get("names_sha256"):
        return False
    if before.get("times_sha256") == now.get("times_sha256"):
        return True
    return bool(index.get("text_sha256") == text())


def _listing(source: SourceConfig) -> str:
    """The digest of absolute paths, sizes and times that older shards describe their source by."""
    listing = hashlib.sha256()
    for path in _in_old_order(source):
        status = _stat(path)
        listing.update(os.fsencode(path.absolute()))
        listing.update(f"\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return listing.hexdigest()


def _in_old_order(source: SourceConfig) -> Iterator[Path]:
    for part in (corpus.source_files(source) or {}).values():
        paths = [path for _, path in part]
        yield from sorted(paths) if source.saved else paths


def _stat(path: Path) -> os.stat_result:
    with files.supplied(DataError, path):
        return path.stat()
