"""Local files as documents: text, JSON, CSV and Parquet, each also as .gz or .zst.

One row at a time is held. Text, JSON and CSV are not read by the builders of `datasets`: those turn
the CSV cell `NA` into a null and the JSON string "2020-01-01" into a timestamp, and they cannot say
which line was broken.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from relora import files
from relora.data.config import CutConfig
from relora.data.text import (
    MAX_DOCUMENT,
    READ_BYTES,
    AnyDocument,
    Document,
    LongDocument,
    cut_documents,
    decoded,
    opened,
    undecodable,
)
from relora.errors import DataError

TEXT = (".txt", ".md", ".py")
PACKED = (".gz", ".zst")
_HELD_BYTES = 1 << 24  # a text file beyond that is read block by block, and more than once
_BATCH_BYTES = 1 << 26  # of a Parquet column at a time, as far as its footer tells
_SPACES = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


def suffix_of(path: Path) -> str:
    """The suffix that says what is in a file, without that of its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
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
    if suffix_of(path) not in (*TEXT, *_READERS):
        raise DataError(
            f"{path}: cannot tell what is in it; allowed are {', '.join((*TEXT, *_READERS))}, "
            "each also with .gz or .zst"
        )
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: cannot be read: Permission denied")


def read_file(path: Path, field: str, cut: CutConfig | None = None) -> Iterator[AnyDocument]:
    """The documents of one file, decompressed; `field` names the column where there are columns.

    Raises DataError naming the file, and the line or row where there is one.
    """
    require_readable(path)
    kind = suffix_of(path)
    if kind not in TEXT:
        with opened(path) as file:
            yield from _READERS[kind](file, path, field)
    elif cut:
        for number, text in enumerate(cut_documents(_text_blocks(path), cut, str(path)), 1):
            yield Document(f"{path} document {number}", text)
    else:
        yield _read_text(path)


def _read_text(path: Path) -> AnyDocument:
    with opened(path) as file:
        head = file.read(_HELD_BYTES + 1)
    if len(head) > _HELD_BYTES:
        return LongDocument(str(path), lambda: _text_blocks(path))
    return Document(str(path), "".join(decoded(io.BytesIO(head), str(path))))


def _text_blocks(path: Path) -> Iterator[str]:
    with opened(path) as file:
        yield from decoded(file, str(path))


# --- rows ---


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
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{origin}: {field!r} holds a lone surrogate (U+{ord(text[error.start]):04X} at "
            f"character {error.start}), which is no text; mend or drop the row"
        ) from error
    return text


def _require_length(length: int, origin: str) -> None:
    if length > MAX_DOCUMENT:
        raise DataError(
            f"{origin}: longer than {MAX_DOCUMENT:,} bytes, the limit for a row; split the text "
            "among rows, or write it to a text file, which may be of any size"
        )


def _json_fault(error: Exception) -> str:
    # json's own ValueError tells how to raise Python's limit on digits, which users cannot.
    plain = isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError)
    return "a whole number of more than 4,300 digits" if plain else str(error)


def _read_json_lines(file: BinaryIO, path: Path, field: str) -> Iterator[Document]:
    for number, line in enumerate(iter(lambda: file.readline(MAX_DOCUMENT + 1), b""), 1):
        origin = f"{path}:{number}"
        _require_length(len(line), origin)
        try:
            # A BOM at the head of the file belongs to the file, not to a text in it.
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{origin}: {undecodable(error)}") from error
        del line  # a long row is held often enough
        if text.strip():
            yield Document(origin, text_of(_parsed(text, origin), field, origin))


def _parsed(text: str, origin: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin}: not a JSON object on one line: {_json_fault(error)}") from error


def _read_json(file: BinaryIO, path: Path, field: str) -> Iterator[Document]:
    """A list of objects, or (as C4 ships it) one object a line under the name .json."""
    reader = io.BufferedReader(cast(io.RawIOBase, file), READ_BYTES)
    head = reader.peek(READ_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head.startswith(b"["):
        yield from _read_json_lines(cast(BinaryIO, reader), path, field)
        return
    for number, row in enumerate(_JsonList(decoded(cast(BinaryIO, reader), str(path)), path)):
        origin = f"{path} item {number}"
        yield Document(origin, text_of(row, field, origin))


def first_object(file: BinaryIO, path: Path) -> dict[str, Any]:
    """The first row of JSON lines or of a JSON list; DataError if it is no object."""
    row: Any = None
    reader = io.BufferedReader(cast(io.RawIOBase, file), READ_BYTES)
    if reader.peek(READ_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        row = next(iter(_JsonList(decoded(cast(BinaryIO, reader), str(path)), path)), None)
    elif line := next((line for line in reader if line.strip()), b""):
        row = _parsed(line.decode("utf-8-sig", "replace"), str(path))
    if not isinstance(row, dict):
        raise DataError(f'{path}: begins with no JSON object, such as {{"text": …}}')
    return row


class _JsonList:
    """The items of a JSON list, one at a time: what is held is one of them and a block."""

    def __init__(self, blocks: Iterator[str], path: Path) -> None:
        self.blocks, self.path = blocks, path
        self.held = next(blocks).removeprefix("\ufeff")
        self.at = 0

    def __iter__(self) -> Iterator[Any]:
        self._next_mark()  # the [ that there is
        mark = self._next_mark()
        if mark != "]":
            self.at -= len(mark)
            mark = ","  # as it were: an item is next
        while mark == ",":
            yield self._item()
            mark = self._next_mark()
        if mark != "]":
            raise DataError(f"{self.path}: broken JSON: the list does not go on with , or ]")
        if self._next_mark():
            raise DataError(f"{self.path}: broken JSON: more text after the list")

    def _next_mark(self) -> str:
        """The next character that is no space, taken; "" at the end."""
        while True:
            self.at = cast(re.Match[str], _SPACES.match(self.held, self.at)).end()
            if self.at < len(self.held):
                self.at += 1
                return self.held[self.at - 1]
            if not self._read(1):
                return ""

    def _item(self) -> Any:
        if self._next_mark():
            self.at -= 1
        while True:
            fault: Exception = EOFError("the list does not end")
            try:
                item, end = _DECODER.raw_decode(self.held, self.at)
                if end < len(self.held):  # else a number may go on in the next block
                    self.at = end
                    return item
            except (ValueError, RecursionError) as error:
                fault = error
            _require_length(len(self.held) - self.at, f"{self.path}: an item, or broken JSON")
            incomplete = isinstance(fault, EOFError | json.JSONDecodeError)
            if not incomplete or not self._read(len(self.held) - self.at + 1):
                raise DataError(f"{self.path}: broken JSON: {_json_fault(fault)}") from fault

    def _read(self, wanted: int) -> bool:
        """Read at least so many characters more, as far as there are any."""
        parts, found = [self.held[self.at :]], 0
        while found < wanted and (block := next(self.blocks, None)) is not None:
            parts.append(block)
            found += len(block)
        self.held, self.at = "".join(parts), 0
        return found > 0


def _read_csv(file: BinaryIO, path: Path, field: str) -> Iterator[Document]:
    csv.field_size_limit(MAX_DOCUMENT)  # the default refuses a cell above 128 kB
    lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    rows = csv.reader(_short_lines(lines, path), strict=True)
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
        raise DataError(f"{path}:{rows.line_num}: broken CSV: {files.explain(error)}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: after line {rows.line_num}: {undecodable(error)}") from error


def _short_lines(lines: io.TextIOWrapper, path: Path) -> Iterator[str]:
    while line := lines.readline(MAX_DOCUMENT + 1):
        _require_length(len(line), f"{path}: a line")
        yield line


def _read_parquet(file: BinaryIO, path: Path, field: str) -> Iterator[Document]:
    if path.suffix.lower() not in PACKED:
        yield from _parquet_rows(file, path, field)
        return
    with tempfile.TemporaryFile() as unpacked:  # Parquet is read from its end: it needs seeking
        shutil.copyfileobj(file, unpacked)
        yield from _parquet_rows(cast(BinaryIO, unpacked), path, field)


def _parquet_rows(file: BinaryIO, path: Path, field: str) -> Iterator[Document]:
    from pyarrow import ArrowException, parquet  # 40 MB in each process, for this format alone

    try:
        table = parquet.ParquetFile(file)
        require_field(field, table.schema_arrow.names, str(path))
        groups = [table.metadata.row_group(n) for n in range(table.metadata.num_row_groups)]
        largest = max((g.total_byte_size // max(1, g.num_rows) for g in groups), default=1)
        at_a_time = min(1000, max(1, _BATCH_BYTES // max(1, largest)))
        number = 0
        for batch in table.iter_batches(batch_size=at_a_time, columns=[field]):
            for row in batch.to_pylist():
                origin = f"{path} row {number}"
                yield Document(origin, text_of(row, field, origin))
                number += 1
    except DataError:
        raise
    except (ArrowException, MemoryError, LookupError, TypeError, ValueError) as error:
        raise DataError(f"{path}: broken Parquet: {files.explain(error)}") from error


_READERS: dict[str, Callable[[BinaryIO, Path, str], Iterator[Document]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
