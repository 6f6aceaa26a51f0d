"""Plain text: whole files as documents, also such as no memory holds, and text cut into documents.

Whatever its length, text passes through here in blocks. What is held at a time is one document,
and none of more than `MAX_DOCUMENT` characters.
"""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from relora.data.config import CutConfig
from relora.errors import DataError

MAX_DOCUMENT = 1 << 27  # characters of a row, or of what is cut out: 134 million
_BLOCK = 1 << 20

_BLANK_LINES = re.compile(r"(?<=\n)(?:[ \t\r]*+\n)+")
_LEADING_BLANK_LINES = re.compile(r"(?:[ \t\r]*+\n)+")


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


def digest_of(document: Document | LongDocument, size: int) -> bytes:
    """blake2b of a document's text in UTF-8, `size` bytes of it."""
    digest = hashlib.blake2b(digest_size=size)
    for block in document.blocks():
        digest.update(block.encode())
    return digest.digest()


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
    if cut.blank_lines and not held.strip(" \t\r"):
        return
    if held:
        yield held


def _cut(text: str, cut: CutConfig) -> list[str]:
    """Documents that are whole, and as the last what may go on."""
    if cut.separator is not None:
        return text.split(cut.separator)
    if cut.characters is not None:
        return list(_lengths(text, cut.characters))
    return _BLANK_LINES.split(text[_leading(text) :])


def _leading(text: str) -> int:
    found = _LEADING_BLANK_LINES.match(text)
    return found.end() if found else 0


def _lengths(text: str, longest: int) -> Iterator[str]:
    """Pieces of at most `longest` characters that end at a line's end, else at a space."""
    start = 0
    while len(text) - start > longest:
        end = start + longest
        end = text.rfind("\n", start, end) + 1 or text.rfind(" ", start, end) + 1 or end
        yield text[start:end]
        start = end
    yield text[start:]
