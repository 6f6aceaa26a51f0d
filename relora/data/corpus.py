"""Where text comes from: one stream of documents, in the same order every time.

Text reaches the tokenizer exactly as it was written: no newline is translated, nothing is
stripped, a BOM at the head of a text file stays a character. That is why local text, JSON and CSV
files are read here and not by the builders of `datasets`: those turn the CSV cell `NA` into a
null and the JSON string "2020-01-01" into a timestamp, and they cannot say which line was broken.
Hub data sets and `save_to_disk` directories do come through `datasets`.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import itertools
import json
import os
import platform
import sys
import sysconfig
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from relora.data.config import SourceConfig
from relora.errors import DataError

_NOT_SOURCE = {"site-packages", "dist-packages", "__pycache__"}
_READ_BYTES = 1 << 16


class Document(NamedTuple):
    """One text, and where it came from in words a user can follow (`notes.jsonl:17`)."""

    origin: str
    text: str


def iter_documents(source: SourceConfig) -> Iterator[Document]:
    """The documents of a source that are not empty, always in the same order.

    Raises DataError, naming the file and where possible the line or row, at the first document
    that cannot be read exactly, and at the end if there was none at all.
    """
    if source.builtin:
        documents = _standard_library()
    elif source.files:
        documents = itertools.chain.from_iterable(
            _read_file(path, source.text_field) for path in _matching_files(source.files)
        )
    else:
        documents = _read_dataset(source)
    found = False
    kept = (document for document in documents if document.text)
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
        root = _library_root()
        return [root / name for name in _library_names(root)]
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


def _library_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _library_names(root: Path) -> list[str]:
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_SOURCE]
        below = Path(folder).relative_to(root)
        names += [(below / name).as_posix() for name in files if name.endswith(".py")]
    if not names:
        raise DataError(
            f"data.source: this interpreter keeps no .py files under {root}; name files instead"
        )
    return sorted(names)


def _standard_library() -> Iterator[Document]:
    """Every module of the standard library that is UTF-8; its tests hold a few that are not."""
    root = _library_root()
    for name in _library_names(root):
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
            _reader_of(each)  # a file nobody can read is an error before anything is written
            found[each] = None
    return list(found)


def _reader_of(path: Path) -> Callable[[BinaryIO, Path, str], Iterator[Document]]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        suffixes.pop()
    if path.is_dir():
        raise DataError(f"{path}: is a directory; name its files, for example {path}/**/*.txt")
    if not suffixes or suffixes[-1] not in _READERS:
        raise DataError(
            f"{path}: cannot tell what is in it; allowed are {', '.join(_READERS)}, "
            "each also with .gz or .zst"
        )
    return _READERS[suffixes[-1]]


def _read_file(path: Path, field: str) -> Iterator[Document]:
    reader = _reader_of(path)
    try:
        with _open(path) as file:
            yield from reader(file, path, field)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {_undecodable(error)}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read to its end: {error}") from error


def _undecodable(error: UnicodeDecodeError) -> str:
    return (
        f"not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start}: {error.reason}); "
        "convert it, for example with iconv, or leave it out"
    )


def _open(path: Path) -> BinaryIO:
    """The decompressed bytes of a file."""
    if path.suffix.lower() == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix.lower() == ".zst":
        return cast(BinaryIO, io.BufferedReader(_ChunkFile(_zst_chunks(path)), _READ_BYTES))
    return path.open("rb")


class _ChunkFile(io.RawIOBase):
    """Chunks of bytes, read as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = chunk
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def _zst_chunks(path: Path) -> Iterator[bytes]:
    """The frames of a .zst file; zstandard's own reader takes a cut-off file for a short one."""
    import zstandard

    with path.open("rb") as file:
        frame = None
        data = file.read(_READ_BYTES)
        while data:
            # Corpora are often packed with a window beyond the default limit (`zstd --long=31`).
            frame = frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            try:
                yield frame.decompress(data)
            except zstandard.ZstdError as error:
                raise OSError(f"broken zstd data: {error}") from error
            data = b""
            if frame.eof:
                data, frame = frame.unused_data, None
            data = data or file.read(_READ_BYTES)
        if frame is not None:
            raise EOFError("the zstd data ends within a frame")


def _read_text(file: BinaryIO, path: Path, field: str) -> Iterator[Document]:
    yield Document(str(path), file.read().decode())


def _read_json_lines(file: BinaryIO, path: Path, field: str) -> Iterator[Document]:
    for number, line in enumerate(file, 1):
        origin = f"{path}:{number}"
        try:
            # A BOM at the head of the file belongs to the file, not to a text in it.
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if text.strip():
                yield Document(origin, _text_of(json.loads(text), field, origin))
        except UnicodeDecodeError as error:
            raise DataError(f"{origin}: {_undecodable(error)}") from error
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{origin}: not a JSON object on one line: {error}") from error


def _read_json(file: BinaryIO, path: Path, field: str) -> Iterator[Document]:
    """A list of objects, or (as C4 ships it) one object a line under the name .json."""
    reader = io.BufferedReader(cast(io.RawIOBase, file), _READ_BYTES)
    head = reader.peek(_READ_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head.startswith(b"["):
        yield from _read_json_lines(cast(BinaryIO, reader), path, field)
        return
    try:
        rows = json.loads(reader.read().decode("utf-8-sig"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}: broken JSON: {error}") from error
    for number, row in enumerate(rows):
        origin = f"{path} item {number}"
        yield Document(origin, _text_of(row, field, origin))


def _read_csv(file: BinaryIO, path: Path, field: str) -> Iterator[Document]:
    csv.field_size_limit(sys.maxsize)  # the default refuses a cell above 128 kB
    lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    rows = csv.reader(lines, strict=True)
    try:
        header = next(rows, [])
        _require_field(field, header, str(path))
        column = header.index(field)
        for row in rows:
            origin = f"{path}:{rows.line_num}"
            if row and len(row) != len(header):
                raise DataError(f"{origin}: {len(row)} cells in a table of {len(header)} columns")
            if row:
                yield Document(origin, row[column])
    except csv.Error as error:
        raise DataError(f"{path}:{rows.line_num}: broken CSV: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: after line {rows.line_num}: {_undecodable(error)}") from error


def _read_parquet(file: BinaryIO, path: Path, field: str) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    if path.suffix.lower() in (".gz", ".zst"):  # Parquet is read from its end: it needs seeking
        with tempfile.TemporaryFile() as unpacked:
            while block := file.read(1 << 20):
                unpacked.write(block)
            yield from _read_parquet(cast(BinaryIO, unpacked), path.with_suffix(""), field)
        return
    try:
        table = parquet.ParquetFile(file)
        _require_field(field, table.schema_arrow.names, str(path))
        number = 0
        for batch in table.iter_batches(batch_size=1000, columns=[field]):
            for row in batch.to_pylist():
                origin = f"{path} row {number}"
                yield Document(origin, _text_of(row, field, origin))
                number += 1
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: broken Parquet: {error}") from error


def _read_dataset(source: SourceConfig) -> Iterator[Document]:
    """A hub data set or a `save_to_disk` directory; code that comes with a data set never runs."""
    name = source_name(source)
    rows = _load_dataset(source)
    if rows.column_names is not None:
        _require_field(source.text_field, rows.column_names, name)
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
        yield Document(origin, _text_of(item[1], source.text_field, origin))


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
        if "split" in source.model_fields_set:
            raise DataError(f"{name}: holds one data set without splits; leave out source.split")
        return found
    if source.split not in found:
        raise DataError(f"{name}: no split {source.split!r}; there are: {', '.join(found)}")
    return found[source.split]


def _require_field(field: str, columns: Iterable[str], origin: str) -> None:
    if field not in columns:
        raise DataError(
            f"{origin}: no column {field!r}; there are: {', '.join(map(str, columns)) or 'none'}. "
            "Name the one that holds the text by data.source.text_field"
        )


def _text_of(row: Any, field: str, origin: str) -> str:
    """The text of one row, if it is text that UTF-8 can hold."""
    if not isinstance(row, dict):
        raise DataError(f"{origin}: a {type(row).__name__} where an object with {field!r} belongs")
    _require_field(field, row, origin)
    text = row[field]
    if not isinstance(text, str):
        raise DataError(f"{origin}: {field!r} is a {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{origin}: {field!r} holds a lone surrogate (U+{ord(text[error.start]):04X} at "
            f"character {error.start}), which is no text; mend or drop the row"
        ) from error
    return text


_READERS: dict[str, Callable[[BinaryIO, Path, str], Iterator[Document]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".py": _read_text,
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
