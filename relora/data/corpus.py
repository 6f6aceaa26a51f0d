"""Where text comes from: one stream of documents, in the same order every time.

Text reaches the tokenizer exactly as it was written: no newline is translated, nothing is
stripped, a BOM at the head of a text file stays a character.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from relora import files
from relora.data.config import SourceConfig
from relora.data.english import english_files
from relora.data.globs import files_below, matching_files, root_of
from relora.data.readers import (
    PACKED,
    TEXT,
    read_file,
    require_field,
    require_readable,
    suffix_of,
    text_of,
)
from relora.data.text import AnyDocument, Document, digest_and_length
from relora.errors import DataError
from relora.hub import why_offline

_PACKAGES = frozenset(("site-packages", "dist-packages"))  # the folders that hold them


@dataclass
class Tally:
    """What was read of a source: documents and bytes of text of each of its parts, and a sha256
    over the digests of all documents, one after the other."""

    documents: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    text: Any = field(default_factory=hashlib.sha256)


def iter_documents(source: SourceConfig, tally: Tally | None = None) -> Iterator[AnyDocument]:
    """The documents of a source that are not empty, always in the same order.

    To deduplicate, each text once, where it first stands; about 100 bytes of memory a document.
    What is read is counted in `tally`. Raises DataError, naming the file and where possible the
    line or row, at the first document that cannot be read exactly, and at the end if there was
    none at all.
    """
    found = 0
    seen: set[bytes] = set()
    for part, document in _documents(source):
        if isinstance(document, Document) and not document.text:
            continue
        digest, length = b"", 0
        if source.deduplicate or tally:
            digest, length = digest_and_length(document, 16)
        if source.deduplicate:
            if digest in seen:
                continue
            seen.add(digest)
        if tally:
            tally.documents[part] += 1
            tally.bytes[part] += length
            tally.text.update(digest)
        yield document
        found += 1
        if found == source.max_documents:
            return
    if not found:
        raise DataError(f"data.source: {source_name(source)} holds no text: no document at all")


def _documents(source: SourceConfig) -> Iterator[tuple[str, AnyDocument]]:
    """Each document with its part of the source: a pattern, a package of prose, or all of it."""
    if source.files or source.builtin == "english":
        for part, named in (source_files(source) or {}).items():
            for _, path in named:
                for document in read_file(path, source.text_field, source.cut):
                    yield part, document
        return
    rows = _python_modules(source.builtin) if source.builtin else _read_dataset(source)
    for row in rows:
        yield source_name(source), row


def source_name(source: SourceConfig) -> str:
    """What to call the source in one line."""
    if source.files:
        return ", ".join(source.files)
    return str(source.builtin or source.dataset or source.saved)


def source_files(source: SourceConfig) -> dict[str, list[tuple[str, Path]]] | None:
    """The local files a source reads, by its parts, in reading order, each with its name.

    That is its name below the folder where the part's pattern begins, so that it stays when all
    is moved. None for a data set from the hub.
    """
    if source.builtin == "english":
        return english_files()
    if source.builtin:
        return {source_name(source): _python_files(source.builtin)}
    if source.files:
        return {
            pattern: [
                (path.name if path == root else os.path.relpath(path, root), path) for path in paths
            ]
            for pattern, paths in matching(source.files).items()
            for root in [root_of(pattern)]
        }
    folder = source.saved.expanduser() if source.saved else Path(str(source.dataset))
    if not files.is_dir(folder):
        return None if source.dataset else {source_name(source): []}
    return {source_name(source): [(name, folder / name) for name in files_below(folder)]}


def require_documents(source: SourceConfig) -> None:
    """DataError for a source that can only be one document, and for a cut of what is no text."""
    if not source.files:
        return
    paths = [path for part in matching(source.files).values() for path in part]
    texts = [path for path in paths if suffix_of(path) in TEXT]
    if source.cut and not texts:
        raise DataError(
            f"data.source.cut: would do nothing: none of the {len(paths)} files is text "
            f"({', '.join(TEXT)}); leave it out"
        )
    if len(paths) == len(texts) == 1 and not source.cut:
        raise DataError(
            f"{paths[0]}: a text file is one document, and training and validation need one each; "
            "cut it: data.source.cut=blank_lines at blank lines, "
            "'data.source.cut.separator=\"\\n\"' where a line ends or at any other text, "
            "data.source.cut.characters=10000 by length; or name more files"
        )


def part_counts(source: SourceConfig, tally: Tally | None = None) -> list[dict[str, Any]]:
    """Each part of a source, such as a pattern: its name, files, and documents if counted.

    Also bytes of text where packages make up the source, which differ between machines.
    """
    parts = source_files(source)
    names: dict[str, int | None] = (
        {source_name(source): None}
        if parts is None
        else {name: len(part) for name, part in parts.items()}
    )
    counts: list[dict[str, Any]] = []
    for name, count in names.items():
        counts.append({"name": name, "files": count})
        if tally:
            counts[-1]["documents"] = tally.documents[name]
            if source.builtin:
                counts[-1]["bytes"] = tally.bytes[name]
    return counts


def text_bytes(source: SourceConfig) -> int | None:
    """About how many bytes of text there are, for a progress bar; None where nobody knows."""
    parts = source_files(source)
    if parts is None or not (source.files or source.builtin) or source.max_documents:
        return None
    paths = [path for part in parts.values() for _, path in part]
    if any(path.suffix.lower() in (*PACKED, ".parquet") for path in paths):
        return None
    with files.supplied(DataError, "data.source"):
        return sum(path.stat().st_size for path in paths)


def matching(patterns: list[str]) -> dict[str, list[Path]]:
    """The files that paths and patterns name: pattern by pattern, sorted within, none twice.

    Raises DataError for a pattern that names nothing, and for a file that nobody can read: before
    anything is written.
    """
    found: dict[str, list[Path]] = {}
    seen: set[str] = set()
    for pattern in patterns:
        named = matching_files(pattern)
        for path in named.values():
            require_readable(path)
        found.setdefault(pattern, []).extend(named[real] for real in named if real not in seen)
        seen |= named.keys()
    return found


def _python_files(which: str) -> list[tuple[str, Path]]:
    """Every .py file of the standard library, then of the packages, with its name below these."""
    roots = [Path(sysconfig.get_path("stdlib"))]
    if which == "python_packages":
        entries = [Path(entry) for entry in dict.fromkeys(sys.path)]
        roots += [each for each in entries if each.name in _PACKAGES and files.is_dir(each)]
    found = [
        (name, root / name)
        for root in roots
        for name in files_below(root, _PACKAGES)
        if name.endswith(".py")
    ]
    if not found:
        raise DataError(
            f"data.source: this interpreter keeps no .py files under {roots[0]}; name files instead"
        )
    return found


def _python_modules(which: str) -> Iterator[Document]:
    """Every module that is UTF-8; the tests of the standard library hold a few that are not."""
    for name, path in _python_files(which):
        with files.supplied(DataError, path):
            content = path.read_bytes()
        try:
            yield Document(name, content.decode())
        except UnicodeDecodeError:
            continue


def _read_dataset(source: SourceConfig) -> Iterator[Document]:
    """A hub data set or a `save_to_disk` directory; code that comes with a data set never runs."""
    name = source_name(source)
    rows = _load_dataset(source, name)
    if rows.column_names is not None:
        require_field(source.text_field, rows.column_names, name)
        rows = rows.select_columns([source.text_field])
    numbered = enumerate(rows)
    while True:
        with _whatever_it_raises(name):
            item = next(numbered, None)
        if item is None:
            return
        origin = f"{name} {source.split} row {item[0]}"
        yield Document(origin, text_of(item[1], source.text_field, origin))


def _load_dataset(source: SourceConfig, name: str) -> Any:
    """A `datasets.Dataset` or `IterableDataset`: one split."""
    import datasets  # seconds, and most sources do without

    if source.dataset and not files.exists(Path(source.dataset)) and (why := why_offline()):
        cached = not source.streaming and why.endswith("is set")
        if not cached:
            raise DataError(
                f"data set {name}: {why}; a copy made by save_to_disk is read from data.source."
                "saved, and one in the cache with HF_HUB_OFFLINE=1 and streaming: false"
            )
    with _whatever_it_raises(name):
        if source.dataset:
            return datasets.load_dataset(
                source.dataset,
                source.config,
                split=source.split,
                revision=source.revision,
                streaming=source.streaming,
            )
        found = datasets.load_from_disk(str(Path(source.saved or "").expanduser()))
    if not isinstance(found, datasets.DatasetDict):
        if source.changed("split"):
            raise DataError(f"{name}: holds one data set without splits; leave out source.split")
        return found
    if source.split not in found:
        raise DataError(f"{name}: no split {source.split!r}; there are: {', '.join(found)}")
    return found[source.split]


@contextmanager
def _whatever_it_raises(name: str) -> Iterator[None]:
    """The network's, the hub's or a builder's errors as a DataError."""
    try:
        yield
    except Exception as error:
        what = f"{type(error).__name__}: {files.explain(error)}"
        raise DataError(f"data set {name}: {what}") from error
