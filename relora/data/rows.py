"""Rows as documents: JSON lines, JSON lists and CSV, of which one row at a time is held."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from relora.data.text import MAX_DOCUMENT, Document, decoded, undecodable
from relora.errors import DataError
from relora.files import explain

_READ_BYTES = 1 << 16
_SPACES = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


def read_json_lines(file: BinaryIO, path: Path, field: str) -> Iterator[Document]:
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


def _json_fault(error: Exception) -> str:
    # json's own ValueError tells how to raise Python's limit on digits, which users cannot.
    plain = isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError)
    return "a whole number of more than 4,300 digits" if plain else str(error)


def _require_length(length: int, origin: str) -> None:
    if length > MAX_DOCUMENT:
        raise DataError(
            f"{origin}: longer than {MAX_DOCUMENT:,} bytes, the limit for a row; split the text "
            "among rows, or write it to a text file, which may be of any size"
        )


def read_json(file: BinaryIO, path: Path, field: str) -> Iterator[Document]:
    """A list of objects, or (as C4 ships it) one object a line under the name .json."""
    reader = io.BufferedReader(cast(io.RawIOBase, file), _READ_BYTES)
    head = reader.peek(_READ_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head.startswith(b"["):
        yield from read_json_lines(cast(BinaryIO, reader), path, field)
        return
    for number, row in enumerate(_JsonList(decoded(cast(BinaryIO, reader), str(path)), path)):
        origin = f"{path} item {number}"
        yield Document(origin, text_of(row, field, origin))


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
            yield self._item()
        while mark != "]":
            mark = self._next_mark()
            if mark == ",":
                yield self._item()
            elif mark != "]":
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
            fault: Exception | None = None
            try:
                item, end = _DECODER.raw_decode(self.held, self.at)
                if end < len(self.held):  # else a number may go on in the next block
                    self.at = end
                    return item
            except (ValueError, RecursionError) as error:
                fault = error
            _require_length(len(self.held) - self.at, f"{self.path}: an item, or broken JSON")
            incomplete = fault is None or isinstance(fault, json.JSONDecodeError)
            if incomplete and self._read(len(self.held) - self.at + 1):
                continue
            if fault is None:
                raise DataError(f"{self.path}: broken JSON: the list does not end")
            raise DataError(f"{self.path}: broken JSON: {_json_fault(fault)}") from fault

    def _read(self, wanted: int) -> bool:
        """Read at least so many characters more, as far as there are any."""
        parts, found = [self.held[self.at :]], 0
        while found < wanted and (block := next(self.blocks, None)) is not None:
            parts.append(block)
            found += len(block)
        self.held, self.at = "".join(parts), 0
        return found > 0


def _short_lines(lines: io.TextIOWrapper, path: Path) -> Iterator[str]:
    while line := lines.readline(MAX_DOCUMENT + 1):
        _require_length(len(line), f"{path}: a line")
        yield line


def read_csv(file: BinaryIO, path: Path, field: str) -> Iterator[Document]:
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
        raise DataError(f"{path}:{rows.line_num}: broken CSV: {explain(error)}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: after line {rows.line_num}: {undecodable(error)}") from error


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
    if not text.isascii():
        _require_no_surrogate(text, field, origin)
    return text


def _require_no_surrogate(text: str, field: str, origin: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{origin}: {field!r} holds a lone surrogate (U+{ord(text[error.start]):04X} at "
            f"character {error.start}), which is no text; mend or drop the row"
        ) from error
