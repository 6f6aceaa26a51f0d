"""Where text comes from: one stream of documents, in the same order every time.

Text reaches the tokenizer exactly as it was written: no newline is translated, nothing is
stripped, a BOM at the head of a text file stays a character.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import platform
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from relora.data.config import SourceConfig
from relora.data.files import Document, read_file, require_field, require_readable, text_of
from relora.errors import DataError

_PACKAGES = {"site-packages", "dist-packages"}  # the folders that hold them


def iter_documents(source: SourceConfig) -> Iterator[Document]:
    """The documents of a source that are not empty, always in the same order.

    Raises DataError, naming the file and where possible the line or row, at the first document
    that cannot be read exactly, and at the end if there was none at all.
    """
    if source.builtin:
        documents = _python_modules(source.builtin)
    elif source.files:
        documents = itertools.chain.from_iterable(
            read_file(path, source.text_field) for path in _matching_files(source.files)
        )
    else:
        documents = _read_dataset(source)
    found = False
    kept: Iterator[Document] = (document for document in documents if document.text)
    if source.deduplicate:
        kept = _without_repeats(kept)
    for document in itertools.islice(kept, source.max_documents):
        found = True
        yield document
    if not found:
        raise DataError(f"data.source: {source_name(source)} holds no text: no document at all")


def source_name(source: SourceConfig) -> str:
    """What to call the source in one line."""
    if source.files:
        return ", ".join(source.files)
    return str(source.builtin or source.dataset or source.saved)


def source_files(source: SourceConfig) -> list[Path] | None:
    """The local files a source reads, in reading order; None for a data set from the hub."""
    if source.builtin:
        return [root / name for root, name in _python_files(source.builtin)]
    if source.files:
        return _matching_files(source.files)
    if source.saved:
        return sorted(path for path in source.saved.rglob("*") if path.is_file())
    return None


def describe_source(source: SourceConfig) -> dict[str, Any]:
    """The settings plus, for local text, a digest of all names, sizes and times, as JSON.

    Two descriptions differ when the text may. A hub data set is described by its settings alone:
    pin `revision` to be sure of it.
    """
    described: dict[str, Any] = {"settings": source.model_dump(mode="json")}
    if source.builtin:
        described["python"] = platform.python_version()
    files = source_files(source)
    if files is not None:
        stats = [(path, path.stat()) for path in files]
        listing = hashlib.sha256()
        for path, stat in stats:
            listing.update(f"{path.absolute()}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        described["files"] = len(files)
        described["bytes"] = sum(stat.st_size for _, stat in stats)
        described["listing_sha256"] = listing.hexdigest()
    return described


def text_bytes(source: SourceConfig) -> int | None:
    """About how many bytes of text there are, for a progress bar; None where nobody knows."""
    files = source_files(source)
    if files is None or source.saved or source.max_documents:
        return None
    if any(path.suffix.lower() in (".gz", ".zst", ".parquet") for path in files):
        return None
    return sum(path.stat().st_size for path in files)


def _without_repeats(documents: Iterable[Document]) -> Iterator[Document]:
    """Each text once, where it first stands; about 100 bytes of memory a document."""
    seen: set[bytes] = set()
    for document in documents:
        digest = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            yield document


def _python_files(which: str) -> list[tuple[Path, str]]:
    """(root, name below it) of every .py file of the standard library, then of the packages."""
    roots = [Path(sysconfig.get_path("stdlib"))]
    if which == "python_packages":
        roots += [Path(entry) for entry in dict.fromkeys(sys.path) if Path(entry).name in _PACKAGES]
    found = []
    for root in roots:
        names = []
        for folder, folders, files in os.walk(root):
            folders[:] = [name for name in folders if name not in _PACKAGES]
            below = Path(folder).relative_to(root)
            names += [(below / name).as_posix() for name in files if name.endswith(".py")]
        found += [(root, name) for name in sorted(names)]
    if not found:
        raise DataError(
            f"data.source: this interpreter keeps no .py files under {roots[0]}; name files instead"
        )
    return found


def _python_modules(which: str) -> Iterator[Document]:
    """Every module that is UTF-8; the tests of the standard library hold a few that are not."""
    for root, name in _python_files(which):
        try:
            yield Document(name, (root / name).read_bytes().decode())
        except UnicodeDecodeError:
            continue


def _matching_files(patterns: list[str]) -> list[Path]:
    """The files that paths and globs name: pattern by pattern, sorted within each, none twice."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        fixed = list(itertools.takewhile(lambda part: not set(part) & set("*?["), path.parts))
        if len(fixed) == len(path.parts):
            matches = [path] if path.exists() else []
        else:
            below = "/".join(path.parts[len(fixed) :])
            matches = sorted(each for each in Path(*fixed).glob(below) if each.is_file())
        if not matches:
            raise DataError(
                f"data.source.files: {pattern!r} matches no file (looked from {Path.cwd()})"
            )
        for each in matches:
            require_readable(each)  # a file nobody can read is an error before anything is written
            found[each] = None
    return list(found)


def _read_dataset(source: SourceConfig) -> Iterator[Document]:
    """A hub data set or a `save_to_disk` directory; code that comes with a data set never runs."""
    name = source_name(source)
    rows = _load_dataset(source)
    if rows.column_names is not None:
        require_field(source.text_field, rows.column_names, name)
        rows = rows.select_columns([source.text_field])
    numbered = enumerate(rows)
    while True:
        try:
            item = next(numbered, None)
        except Exception as error:  # whatever the network, the hub or a builder may raise
            raise DataError(f"data set {name}: {type(error).__name__}: {error}") from error
        if item is None:
            return
        origin = f"{name} {source.split} row {item[0]}"
        yield Document(origin, text_of(item[1], source.text_field, origin))


def _load_dataset(source: SourceConfig) -> Any:
    """A `datasets.Dataset` or `IterableDataset`: one split."""
    import datasets

    name = source_name(source)
    try:
        if source.dataset:
            return datasets.load_dataset(
                source.dataset,
                source.config,
                split=source.split,
                revision=source.revision,
                streaming=source.streaming,
            )
        found = datasets.load_from_disk(str(source.saved))
    except Exception as error:  # see above
        raise DataError(f"data set {name}: {type(error).__name__}: {error}") from error
    if not isinstance(found, datasets.DatasetDict):
        if source.changed("split"):
            raise DataError(f"{name}: holds one data set without splits; leave out source.split")
        return found
    if source.split not in found:
        raise DataError(f"{name}: no split {source.split!r}; there are: {', '.join(found)}")
    return found[source.split]
