"""One unit of a corpus at a time: a few MB of documents to a part file of tokens.

A part is an .npz with the token ids of each split, their counts of documents and bytes, and a
digest of what it was made from. It gets its name only when it is complete, and one that a killed
run left behind is used only for the very same text and tokenizer.

A document of any length is encoded a stretch at a time, so that memory does not follow it: together
with some text before and after it, whose tokens are then dropped. Where they begin, the text around
the seam says, encoded by itself; both neighbours see that text, so no token is lost and none is
there twice. The ids are those of the whole document wherever what a tokenizer makes of a place
depends on no more than `CONTEXT` characters around it: for text in words, always. Else (4,096
characters without a word's end) the text is kept to the letter, and a token may end at a seam.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from relora import files
from relora.data.shards import SPLITS
from relora.data.text import AnyDocument, Document, digest_of
from relora.data.tokenizer import load_encoder, load_fast
from relora.errors import DataError

UNIT_CHARACTERS = 2_000_000  # about as many bytes; small enough for progress, large for a process
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


def pieces_of(document: AnyDocument) -> Iterator[Piece]:
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
    """A piece's own text, and its ids, an int64 array.

    `fast` is a `tokenizers.Tokenizer`, or None, and then `encode` encodes a stretch by itself.
    """
    if fast is None or not (piece.before or piece.after):
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
    starts = [*(start for start, _ in encoding.offsets), place]  # the last where there is none
    left = next(n for n, start in enumerate(starts) if start >= place)
    return _Cut(encoding.ids, left, starts[left])


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


# --- units ---


class Job(NamedTuple):
    """What every unit is tokenized with."""

    tokenizer_dir: Path
    tokenizer_sha256: str
    eos_id: int
    dtype: str
    validation_fraction: float
    begin_ids: tuple[int, ...] = ()  # what a document begins with


def cut_units(documents: Iterator[AnyDocument]) -> Iterator[list[Piece]]:
    """Documents, and stretches of long ones, in lots of about 2 MB."""
    unit: list[Piece] = []
    size = 0
    for document in documents:
        for piece in pieces_of(document):
            unit.append(piece)
            size += len(piece.text)
            if size >= UNIT_CHARACTERS:
                yield unit
                unit, size = [], 0
    if unit:
        yield unit


def make_parts(tasks: Iterator[tuple[Job, Path, list[Piece]]], workers: int) -> Iterator[int]:
    """`make_part` of each task in `workers` processes; results in order."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker)
    pending: deque[Future[int]] = deque()
    try:
        for task in tasks:
            pending.append(pool.submit(make_part, *task))
            if len(pending) > 2 * workers:  # bounds the text held in memory
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a process that tokenizes was killed, most likely for want of memory; run prepare "
            "again with fewer workers: it goes on where it was"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def part_path(directory: Path, number: int) -> Path:
    return directory / "parts" / f"{number:08d}.npz"


def _start_worker() -> None:
    """A worker leaves Ctrl-C to its parent, and dies with it even when that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@functools.lru_cache(maxsize=1)
def _encoders(directory: Path, sha256: str) -> tuple[Any, Callable[[str], list[int]]]:
    fast = load_fast(directory)
    return fast, load_encoder(directory, fast)


def make_part(job: Job, path: Path, pieces: list[Piece]) -> int:
    """Tokenize one unit into an .npz, unless it is there already; returns its bytes of text."""
    size = sum(len(piece.own.encode()) for piece in pieces)
    digest = _digest(job, pieces)
    if files.exists(path):
        try:
            if read_part(path)["digest"].tobytes() == digest:
                return size
        except DataError as error:
            print(f"{error}; it is made anew", flush=True)
    threshold = int(job.validation_fraction * 2**64)
    tokens: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    counts = np.zeros((len(SPLITS), 2), dtype=np.int64)  # documents, bytes
    begin, eos = np.array(job.begin_ids, dtype=np.int64), np.array([job.eos_id])
    fast, encode = _encoders(job.tokenizer_dir, job.tokenizer_sha256)
    for piece in pieces:
        text, ids = ids_of(piece, fast, encode)
        data = text.encode()
        # By content alone, so a document stays in its split whatever is added around it.
        draw = piece.draw or hashlib.blake2b(data, digest_size=DRAW_BYTES).digest()
        split = int(int.from_bytes(draw) < threshold)
        first, last = not piece.before, not piece.after
        tokens[SPLITS[split]] += [*[begin] * first, ids, *[eos] * last]
        counts[split] += first, len(data)
    arrays = {
        split: np.concatenate(lots or [eos[:0]]).astype(job.dtype) for split, lots in tokens.items()
    }
    arrays["counts"] = counts
    arrays["digest"] = np.frombuffer(digest, np.uint8)
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    return size


def _digest(job: Job, pieces: list[Piece]) -> bytes:
    digest = hashlib.sha256(repr(job[1:]).encode())
    for piece in pieces:
        data = piece.text.encode()
        digest.update(b"%d %d %d " % (len(data), piece.before, piece.after) + piece.draw)
        digest.update(data)
    return digest.digest()


def read_part(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a part: ids by split, `counts` (splits, 2) and `digest`; else a DataError."""
    try:
        with np.load(path) as part:
            return {name: part[name] for name in (*SPLITS, "counts", "digest")}
    except Exception as error:  # whatever a damaged zip file may raise
        raise DataError(f"{path}: is damaged ({files.explain(error)})") from error
