"""One unit of a corpus at a time: a few MB of documents to a part file of tokens.

A document of more than `WHOLE_CHARACTERS` is tokenized in stretches, so that memory depends on
neither its length nor its file's. Each is encoded together with some text before and after it, of
which the tokens are then dropped, and begins at a space between two words where there is one. So
the ids are those of the whole document wherever its tokens depend on nothing farther away. Where
they do (a megabyte without a space), the text is still kept to the letter, and a token may end at
a seam.

A part is an .npz with the token ids of each split, their counts of documents and bytes, and a
digest of what it was made from. It gets its name only when it is complete, and one that a killed
run left behind is used only for the very same text and tokenizer.
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
from relora.data.text import Document, LongDocument, digest_of
from relora.data.tokenizer import encode_documents, load_encoder, load_fast
from relora.errors import DataError

UNIT_CHARACTERS = 2_000_000  # about as many bytes; small enough for progress, large for a process
WHOLE_CHARACTERS = 1_000_000  # takes an encoder 150 MB; a document beyond is encoded in stretches
STRETCH_CHARACTERS = 250_000
CONTEXT_CHARACTERS = 4096  # before and after a stretch
_SEAM_SEARCH = 16_384
_BETWEEN_WORDS = re.compile(r"[^\W\d_](?= [^\W\d_])")
_BETWEEN_LINES = re.compile(r"\n(?=\S)")
_DRAW_BYTES = 8


class Job(NamedTuple):
    """What every unit is tokenized with."""

    tokenizer_dir: Path
    tokenizer_sha256: str
    eos_id: int
    dtype: str
    validation_fraction: float
    begin_ids: tuple[int, ...] = ()  # what a document begins with


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


def cut_units(documents: Iterator[Document | LongDocument]) -> Iterator[list[Piece]]:
    """Documents, and stretches of long ones, in lots of about 2 MB."""
    unit: list[Piece] = []
    size = 0
    for document in documents:
        for piece in _pieces(document):
            unit.append(piece)
            size += len(piece.text)
            if size >= UNIT_CHARACTERS:
                yield unit
                unit, size = [], 0
    if unit:
        yield unit


def _pieces(document: Document | LongDocument) -> Iterator[Piece]:
    if isinstance(document, Document) and len(document.text) <= WHOLE_CHARACTERS:
        yield Piece(document.text)
        return
    draw = digest_of(document, _DRAW_BYTES)
    held, before = "", 0
    for block in document.blocks():
        held += block
        while len(held) > before + STRETCH_CHARACTERS + CONTEXT_CHARACTERS:
            end = _seam(held, before, before + STRETCH_CHARACTERS)
            yield Piece(held[: end + CONTEXT_CHARACTERS], before, CONTEXT_CHARACTERS, draw)
            before = min(end, CONTEXT_CHARACTERS)
            held = held[end - before :]
    yield Piece(held, before, 0, draw)


def _seam(text: str, start: int, most: int) -> int:
    """A place to cut, at most `most`: where no tokenizer that cuts at words has a token."""
    for pattern in (_BETWEEN_WORDS, _BETWEEN_LINES):
        found = pattern.finditer(text, max(start, most - _SEAM_SEARCH), most)
        if places := [match.end() for match in found]:
            return places[-1]
    return most


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


def part_path(parts: Path, number: int) -> Path:
    return parts / f"{number:08d}.npz"


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
def _encoder(directory: Path, sha256: str) -> Callable[[str], list[int]]:
    return load_encoder(directory)


@functools.lru_cache(maxsize=1)
def _fast(directory: Path, sha256: str) -> Any:
    return load_fast(directory)


def make_part(job: Job, path: Path, pieces: list[Piece]) -> int:
    """Tokenize one unit into an .npz, unless it is there already; returns its bytes of text.

    The part keeps a digest of what it was made from, so that one left by a killed run is used
    only for the very same text and tokenizer.
    """
    texts = [piece.own.encode() for piece in pieces]
    size = sum(map(len, texts))
    digest = _digest(job, pieces)
    if files.exists(path) and _is_sound(path, digest):
        return size
    threshold = int(job.validation_fraction * 2**64)
    tokens: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    counts = np.zeros((len(SPLITS), 2), dtype=np.int64)  # documents, bytes
    begin, eos = np.array(job.begin_ids, dtype=np.int64), np.array([job.eos_id])
    for piece, data, ids in zip(pieces, texts, _encode(job, pieces), strict=True):
        # By content alone, so a document stays in its split whatever is added around it.
        draw = piece.draw or hashlib.blake2b(data, digest_size=_DRAW_BYTES).digest()
        split = int(int.from_bytes(draw) < threshold)
        around = [] if piece.before else [begin], [] if piece.after else [eos]
        tokens[SPLITS[split]] += [*around[0], ids, *around[1]]
        counts[split] += not piece.before, len(data)
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


def _is_sound(path: Path, digest: bytes) -> bool:
    """Whether a part that was left by a killed run is whole, and of this text."""
    try:
        return read_part(path)["digest"].tobytes() == digest
    except DataError as error:
        print(f"{error}; it is made anew", flush=True)
        return False


def _encode(job: Job, pieces: list[Piece]) -> Iterator[np.ndarray]:
    """The ids of each piece's own text, as int64 arrays."""
    encoder = _encoder(job.tokenizer_dir, job.tokenizer_sha256)
    for piece in pieces:
        if piece.before or piece.after:
            ids = _ids_in_context(_fast(job.tokenizer_dir, job.tokenizer_sha256), piece)
            if ids is not None:
                yield ids
                continue
        yield encode_documents(encoder, [piece.own])[0]


def _ids_in_context(fast: Any, piece: Piece) -> np.ndarray | None:
    """The ids of a stretch as they are in its document; None if a token spans one of its ends."""
    if fast is None:
        return None
    encoding = fast.encode(piece.text, add_special_tokens=False)
    starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
    first, last = piece.before, len(piece.text) - piece.after
    inside = (starts >= first) & (ends <= last)
    if not (inside | (ends <= first) | (starts >= last)).all():
        return None
    return np.array(encoding.ids, dtype=np.int64)[inside]
