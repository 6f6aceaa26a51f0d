"""One unit of a corpus at a time: a few MB of documents to a part file of tokens.

A part is an .npz with the token ids of each split, their counts of documents and bytes, and a
digest of what it was made from. It gets its name only when it is complete, and one that a killed
run left behind is used only for the very same text and tokenizer.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
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
from relora.data.stretches import DRAW_BYTES, Piece, ids_of, pieces_of
from relora.data.text import Document, LongDocument
from relora.data.tokenizer import encode_documents, load_encoder, load_fast
from relora.errors import DataError

UNIT_CHARACTERS = 2_000_000  # about as many bytes; small enough for progress, large for a process


class Job(NamedTuple):
    """What every unit is tokenized with."""

    tokenizer_dir: Path
    tokenizer_sha256: str
    eos_id: int
    dtype: str
    validation_fraction: float
    begin_ids: tuple[int, ...] = ()  # what a document begins with


def cut_units(documents: Iterator[Document | LongDocument]) -> Iterator[list[Piece]]:
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
    size = sum(len(piece.own.encode()) for piece in pieces)
    digest = _digest(job, pieces)
    if files.exists(path) and _is_sound(path, digest):
        return size
    threshold = int(job.validation_fraction * 2**64)
    tokens: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    counts = np.zeros((len(SPLITS), 2), dtype=np.int64)  # documents, bytes
    begin, eos = np.array(job.begin_ids, dtype=np.int64), np.array([job.eos_id])
    for piece, (text, ids) in zip(pieces, _encode(job, pieces), strict=True):
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


def _is_sound(path: Path, digest: bytes) -> bool:
    """Whether a part that was left by a killed run is whole, and of this text."""
    try:
        return read_part(path)["digest"].tobytes() == digest
    except DataError as error:
        print(f"{error}; it is made anew", flush=True)
        return False


def _encode(job: Job, pieces: list[Piece]) -> Iterator[tuple[str, np.ndarray]]:
    """Each piece's own text and its ids, as int64 arrays."""
    encoder = _encoder(job.tokenizer_dir, job.tokenizer_sha256)
    for piece in pieces:
        if piece.before or piece.after:
            yield ids_of(piece, _fast(job.tokenizer_dir, job.tokenizer_sha256), encoder)
        else:
            yield piece.text, encode_documents(encoder, [piece.text])[0]
