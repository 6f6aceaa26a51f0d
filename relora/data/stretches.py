"""A document of any length to token ids, a stretch at a time, so that memory does not follow it.

A stretch is encoded together with some text before and after it, whose tokens are then dropped.
Where they begin, the text around the seam says, encoded by itself; both neighbours see that text,
so no token is lost and none is there twice. The ids are those of the whole document wherever what
a tokenizer makes of a place depends on no more than `CONTEXT` characters around it: for text in
words, always. Else (4,096 characters without a word's end) the text is kept to the letter, and a
token may end at a seam.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from relora.data.text import Document, LongDocument, digest_of

WHOLE = 1_000_000  # characters; takes an encoder 150 MB; what is longer is encoded in stretches
STRETCH = 250_000
CONTEXT = 4096  # characters before and after a stretch
DRAW_BYTES = 8
_AGREEMENT = 16  # tokens at the seam that must be the same in the stretch and around the seam
_SEAM_SEARCH = 4096
_BETWEEN_WORDS = re.compile(r"[^\W\d_](?= [^\W\d_])")


class Piece(NamedTuple):
    """A document, or a stretch of one, with `before` and `after` characters of its neighbours."""

    text: str
    before: int = 0  # 0: here the document begins
    after: int = 0  # 0: here it ends
    draw: bytes = b""  # of a whole document, which a stretch does not know

    @property
    def own(self) -> str:
        """The text without its neighbours'."""
        return self.text[self.before : len(self.text) - self.after]


def pieces_of(document: Document | LongDocument) -> Iterator[Piece]:
    """A document, or the stretches of a long one."""
    if isinstance(document, Document) and len(document.text) <= WHOLE:
        yield Piece(document.text)
        return
    draw = digest_of(document, DRAW_BYTES)
    held, before = "", 0
    for block in document.blocks():
        held += block
        while len(held) > before + STRETCH + CONTEXT:
            end = _seam(held, before + STRETCH)
            yield Piece(held[: end + CONTEXT], before, CONTEXT, draw)
            held, before = held[end - CONTEXT :], CONTEXT
    yield Piece(held, before, 0, draw)


def _seam(text: str, most: int) -> int:
    """A place to cut, at most `most`: before a space between two words, where there is one.

    It helps tokenizers that do not tell where their tokens stand.
    """
    found = [match.end() for match in _BETWEEN_WORDS.finditer(text, most - _SEAM_SEARCH, most)]
    return found[-1] if found else most


class _Cut(NamedTuple):
    """Where a text around a seam is cut: its ids, how many are before the cut, and where it is."""

    ids: list[int]
    left: int
    place: int


def ids_of(piece: Piece, fast: Any, encode: Callable[[str], list[int]]) -> tuple[str, np.ndarray]:
    """A stretch's own text, and its ids, an int64 array.

    `fast` is a `tokenizers.Tokenizer`, or None, and then `encode` encodes the stretch by itself.
    """
    if fast is None:
        return piece.own, np.array(encode(piece.own), dtype=np.int64)
    text = piece.text
    head = _cut(fast, text[: 2 * piece.before], piece.before) if piece.before else None
    tail = _cut(fast, text[-2 * piece.after :], piece.after) if piece.after else None
    start = head.place if head else 0
    end = len(text) - 2 * piece.after + tail.place if tail else len(text)
    for with_head, with_tail in ((head, tail), (head, None), (None, tail), (None, None)):
        part = text[0 if with_head else start : len(text) if with_tail else end]
        ids = fast.encode_batch_fast([part], add_special_tokens=False)[0].ids
        if (own := _between(ids, with_head, with_tail)) is not None:
            return text[start:end], np.array(own, dtype=np.int64)
    raise AssertionError("the last way needs no agreement")


def _cut(fast: Any, text: str, place: int) -> _Cut:
    """The first start of a token from `place` on, in a text around a seam."""
    encoding = fast.encode(text, add_special_tokens=False)
    starts = [start for start, _ in encoding.offsets]
    left = next((n for n, start in enumerate(starts) if start >= place), len(starts))
    there = left < len(starts)
    return _Cut(encoding.ids, left, starts[left] if there else place)


def _between(ids: list[int], head: _Cut | None, tail: _Cut | None) -> list[int] | None:
    """The ids between two cuts; None if what surrounds them is not what stands around the cuts."""
    first, last = 0, len(ids)
    if head:
        first = head.left
        if ids[: first + _AGREEMENT] != head.ids[: first + _AGREEMENT]:
            return None
    if tail:
        right = len(tail.ids) - tail.left
        last -= right
        if ids[max(0, last - _AGREEMENT) :] != tail.ids[max(0, tail.left - _AGREEMENT) :]:
            return None
    return ids[first:last]
