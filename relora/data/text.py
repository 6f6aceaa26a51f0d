"""Text on its way from a file to documents, in blocks, so that files may be of any size.

What is held at a time is one document, and none of more than `MAX_DOCUMENT` characters.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import zstandard

from relora import files
from relora.data.config import CutConfig
from relora.errors import DataError

MAX_DOCUMENT = 1 << 27  # characters of a row, or of what is cut out: 134 million
READ_BYTES = 1 << 16
_BLOCK = 1 << 20
_ZSTD_BYTES = 1 << 11  # zstd makes at most 32,768 times as much of them: 64 MiB
_STRETCH = 4096

_BLANK_LINES = re.compile(r"(?<=\n)(?:[ \t\r]*+\n)+")
_LEADING_BLANK_LINES = re.compile(r"(?:[ \t\r]*+\n)*")


class Document(NamedTuple):
    """One text, and where it came from in words a user can follow (`notes.jsonl:17`)."""

    origin: str
    text: str

    def blocks(self) -> Iterator[str]:
        """The text in stretches of some length."""
        return (self.text[at : at + _BLOCK] for at in range(0, len(self.text), _BLOCK))


class LongDocument(NamedTuple):
    """One text that is read from its file whenever it is needed, and never held."""

    origin: str
    blocks: Callable[[], Iterator[str]]


AnyDocument = Document | LongDocument


def digest_of(document: AnyDocument, size: int) -> bytes:
    """blake2b of a document's text in UTF-8, `size` bytes of it."""
    return digest_and_length(document, size)[0]


def digest_and_length(document: AnyDocument, size: int) -> tuple[bytes, int]:
    """`digest_of`, and how many bytes of UTF-8 the text is; read once."""
    digest = hashlib.blake2b(digest_size=size)
    length = 0
    for block in document.blocks():
        data = block.encode()
        digest.update(data)
        length += len(data)
    return digest.digest(), length


# --- bytes of a file to text ---


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
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
            yield _unpacked(cast(BinaryIO, raw), path.suffix.lower())
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path}: {cut_off}: {files.explain(error)}") from error


def _unpacked(raw: BinaryIO, suffix: str) -> BinaryIO:
    if suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if suffix == ".zst":
        return cast(BinaryIO, io.BufferedReader(_ChunkFile(_zst_chunks(raw)), READ_BYTES))
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


def decoded(file: BinaryIO, origin: str) -> Iterator[str]:
    """The text of a file in UTF-8, block by block.

    Raises DataError, naming `origin` and the place of the first byte that is no UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    place = 0
    data = b"first"
    while data:
        data = file.read(_BLOCK)
        before = len(decoder.getstate()[0])  # of a character that the last block broke off
        try:
            yield decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise DataError(f"{origin}: {undecodable(error, place - before)}") from error
        place += len(data)


def undecodable(error: UnicodeDecodeError, place: int = 0) -> str:
    """What is wrong with bytes that begin at `place` of a file."""
    return (
        f"not UTF-8 (byte 0x{error.object[error.start]:02x} at {place + error.start}: "
        f"{error.reason}); convert it, for example with iconv, or leave it out"
    )


# --- text cut up, wherever its blocks end ---


def cut_documents(blocks: Iterator[str], cut: CutConfig, origin: str) -> Iterator[str]:
    """Text cut into documents as `CutConfig` says; what is empty is none.

    Raises DataError, naming `origin`, for a document of more than `MAX_DOCUMENT` characters.
    """
    held = ""
    for block in blocks:
        *whole, held = _cut(held + block, cut)
        yield from filter(None, whole)
        if len(held) > MAX_DOCUMENT:
            raise DataError(
                f"{origin}: a document of more than {MAX_DOCUMENT:,} characters: data.source.cut "
                "finds nothing to cut at; name another separator, or a length by cut.characters"
            )
    if held.strip(" \t\r") if cut.blank_lines else held:
        yield held


def _cut(text: str, cut: CutConfig) -> list[str]:
    """Documents that are whole, and as the last what may go on."""
    if cut.separator is not None:
        return text.split(cut.separator)
    if cut.characters is not None:
        return list(_lengths(text, cut.characters, "\n "))
    leading = cast(re.Match[str], _LEADING_BLANK_LINES.match(text))
    return _BLANK_LINES.split(text[leading.end() :])


def stretches(documents: Iterator[AnyDocument]) -> Iterator[str]:
    """All text cut at line ends, else anywhere, into stretches of at most 4,096 characters."""
    for document in documents:
        held = ""
        for block in document.blocks():
            *whole, held = _lengths(held + block, _STRETCH, "\n")
            yield from whole
        if held:
            yield held


def _lengths(text: str, longest: int, marks: str) -> Iterator[str]:
    """Pieces of at most `longest` characters that end at the first of `marks` that there is."""
    start = 0
    while len(text) - start > longest:
        end = start + longest
        end = next((at for mark in marks if (at := text.rfind(mark, start, end) + 1)), end)
        yield text[start:end]
        start = end
    yield text[start:]
