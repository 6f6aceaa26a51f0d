"""Local files as documents: text, JSON, CSV and Parquet, each also as .gz or .zst.

Text, JSON and CSV are read here and not by the builders of `datasets`: those turn the CSV cell
`NA` into a null and the JSON string "2020-01-01" into a timestamp, and they cannot say which line
was broken.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from relora.errors import DataError

_READ_BYTES = 1 << 16


class Document(NamedTuple):
    """One text, and where it came from in words a user can follow (`notes.jsonl:17`)."""

    origin: str
    text: str


def require_readable(path: Path) -> None:
    """DataError unless this is a file of a kind that can be read."""
    _reader_of(path)


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


def read_file(path: Path, field: str) -> Iterator[Document]:
    """The documents of one file, decompressed; `field` names the column where there are columns.

    Raises DataError naming the file, and the line or row where there is one.
    """
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
        self._rest = memoryview(b"")  # a view, so that taking from its front copies nothing

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
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
                yield Document(origin, text_of(json.loads(text), field, origin))
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
        yield Document(origin, text_of(row, field, origin))


def _read_csv(file: BinaryIO, path: Path, field: str) -> Iterator[Document]:
    csv.field_size_limit(sys.maxsize)  # the default refuses a cell above 128 kB
    lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    rows = csv.reader(lines, strict=True)
    try:
        header = next(rows, [])
        require_field(field, header, str(path))
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
        require_field(field, table.schema_arrow.names, str(path))
        number = 0
        for batch in table.iter_batches(batch_size=1000, columns=[field]):
            for row in batch.to_pylist():
                origin = f"{path} row {number}"
                yield Document(origin, text_of(row, field, origin))
                number += 1
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: broken Parquet: {error}") from error


def require_field(field: str, columns: Iterable[str], origin: str) -> None:
    if field not in columns:
        raise DataError(
            f"{origin}: no column {field!r}; there are: {', '.join(map(str, columns)) or 'none'}. "
            "Name the one that holds the text by data.source.text_field"
        )


def text_of(row: Any, field: str, origin: str) -> str:
    """The text of one row, if it is text that UTF-8 can hold."""
    if not isinstance(row, dict):
        raise DataError(f"{origin}: a {type(row).__name__} where an object with {field!r} belongs")
    require_field(field, row, origin)
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
