"""Local files as documents: text, JSON, CSV and Parquet, each also as .gz or .zst.

Text, JSON and CSV are read here and not by the builders of `datasets`: those turn the CSV cell
`NA` into a null and the JSON string "2020-01-01" into a timestamp, and they cannot say which line
was broken.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from relora import files
from relora.data.config import CutConfig
from relora.data.rows import read_csv, read_json, read_json_lines, require_field, text_of
from relora.data.text import Document, LongDocument, cut_documents, decoded
from relora.errors import DataError

TEXT = (".txt", ".md", ".py")
_READ_BYTES = 1 << 16
_ZSTD_BYTES = 1 << 11  # zstd makes at most 32,768 times as much of them: 64 MiB
_HELD_BYTES = 1 << 24  # a text file beyond that is read block by block, and more than once
_BATCH_BYTES = 1 << 26  # of a Parquet column at a time, as far as its footer tells


def kind_of(path: Path) -> str:
    """The suffix that says what is in a file, without that of its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def require_readable(path: Path) -> None:
    """DataError unless this is a plain file of a kind that can be read."""
    with files.supplied(DataError, path):
        mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise DataError(f"{path}: is a directory; name its files, for example {path}/**/*.txt")
    if not stat.S_ISREG(mode):
        raise DataError(f"{path}: is no plain file; write what it gives to one")
    if kind_of(path) not in (*TEXT, *_READERS):
        raise DataError(
            f"{path}: cannot tell what is in it; allowed are {', '.join((*TEXT, *_READERS))}, "
            "each also with .gz or .zst"
        )
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: cannot be read: Permission denied")


def read_file(
    path: Path, field: str, cut: CutConfig | None = None
) -> Iterator[Document | LongDocument]:
    """The documents of one file, decompressed; `field` names the column where there are columns.

    Raises DataError naming the file, and the line or row where there is one.
    """
    require_readable(path)
    kind = kind_of(path)
    if kind in TEXT:
        yield from _read_text(path, cut)
        return
    with _opened(path) as file:
        yield from _READERS[kind](file, path, field)


def _read_text(path: Path, cut: CutConfig | None) -> Iterator[Document | LongDocument]:
    if cut:
        for number, text in enumerate(cut_documents(_text_blocks(path), cut, str(path)), 1):
            yield Document(f"{path} document {number}", text)
        return
    with _opened(path) as file:
        head = file.read(_HELD_BYTES + 1)
        if len(head) <= _HELD_BYTES:
            text = "".join(decoded(cast(BinaryIO, io.BytesIO(head)), str(path)))
            yield Document(str(path), text)
            return
    yield LongDocument(str(path), lambda: _text_blocks(path))


def _text_blocks(path: Path) -> Iterator[str]:
    with _opened(path) as file:
        yield from decoded(file, str(path))


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The decompressed bytes of a plain file; what goes wrong with them as a DataError."""
    cut_off = "cannot be read to its end"
    try:
        # What was a plain file when it was listed may be a FIFO by now, and opening that waits.
        with (
            files.supplied(DataError, path, cut_off),
            os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as raw,
        ):
            if not stat.S_ISREG(os.fstat(raw.fileno()).st_mode):
                raise DataError(f"{path}: is no plain file any more")
            with _unpacked(cast(BinaryIO, raw), path) as file:
                yield file
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path}: {cut_off}: {files.explain(error)}") from error


def _unpacked(raw: BinaryIO, path: Path) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if path.suffix.lower() == ".zst":
        return cast(BinaryIO, io.BufferedReader(_ChunkFile(_zst_chunks(raw)), _READ_BYTES))
    return raw


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


def _zst_chunks(file: BinaryIO) -> Iterator[bytes]:
    """The frames of a .zst file; zstandard's own reader takes a cut-off file for a short one."""
    import zstandard

    frame = None
    data = file.read(_ZSTD_BYTES)
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
        data = data or file.read(_ZSTD_BYTES)
    if frame is not None:
        raise EOFError("the zstd data ends within a frame")


def _read_parquet(file: BinaryIO, path: Path, field: str) -> Iterator[Document]:
    if path.suffix.lower() not in (".gz", ".zst"):
        yield from _parquet_rows(file, path, field)
        return
    with tempfile.TemporaryFile() as unpacked:  # Parquet is read from its end: it needs seeking
        while block := file.read(1 << 20):
            unpacked.write(block)
        yield from _parquet_rows(cast(BinaryIO, unpacked), path, field)


def _parquet_rows(file: BinaryIO, path: Path, field: str) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        require_field(field, table.schema_arrow.names, str(path))
        number = 0
        for batch in table.iter_batches(batch_size=_batch_rows(table.metadata), columns=[field]):
            for row in batch.to_pylist():
                origin = f"{path} row {number}"
                yield Document(origin, text_of(row, field, origin))
                number += 1
    except DataError:
        raise
    except (pyarrow.ArrowException, MemoryError, LookupError, TypeError, ValueError) as error:
        raise DataError(f"{path}: broken Parquet: {files.explain(error)}") from error


def _batch_rows(metadata: Any) -> int:
    """How many rows to take at a time, by the size that the footer gives for them."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    largest = max((each.total_byte_size // max(1, each.num_rows) for each in groups), default=1)
    return min(1000, max(1, _BATCH_BYTES // max(1, largest)))


_READERS: dict[str, Callable[[BinaryIO, Path, str], Iterator[Document]]] = {
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": _read_parquet,
}
