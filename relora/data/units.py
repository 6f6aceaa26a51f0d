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
from typing import NamedTuple

import numpy as np

from relora.data.corpus import Document
from relora.data.shards import SPLITS, publish
from relora.data.tokenizer import encode_documents, load_encoder
from relora.errors import DataError

UNIT_CHARACTERS = 2_000_000  # about as many bytes; small enough for progress, large for a process


class Job(NamedTuple):
    """What every unit is tokenized with."""

    tokenizer_dir: Path
    tokenizer_sha256: str
    eos_id: int
    dtype: str
    validation_fraction: float


def cut_units(documents: Iterator[Document]) -> Iterator[list[str]]:
    """Whole documents in lots of about 2 MB."""
    unit: list[str] = []
    size = 0
    for document in documents:
        unit.append(document.text)
        size += len(document.text)
        if size >= UNIT_CHARACTERS:
            yield unit
            unit, size = [], 0
    if unit:
        yield unit


def make_parts(tasks: Iterator[tuple[Job, Path, list[str]]], workers: int) -> Iterator[int]:
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


def make_part(job: Job, path: Path, texts: list[str]) -> int:
    """Tokenize one unit into an .npz, unless it is there already; returns its bytes of text.

    The part keeps a digest of what it was made from, so that one left by a killed run is used
    only for the very same text and tokenizer.
    """
    encoded = [text.encode() for text in texts]
    size = sum(map(len, encoded))
    digest = hashlib.sha256(repr(job[1:]).encode())
    for data in encoded:
        digest.update(b"%d " % len(data))
        digest.update(data)
    if path.is_file():
        with np.load(path) as part:
            if part["digest"].tobytes() == digest.digest():
                return size
    threshold = int(job.validation_fraction * 2**64)
    tokens: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    counts = np.zeros((len(SPLITS), 2), dtype=np.int64)  # documents, bytes
    eos = np.array([job.eos_id])
    for data, ids in zip(
        encoded,
        encode_documents(_encoder(job.tokenizer_dir, job.tokenizer_sha256), texts),
        strict=True,
    ):
        # By content alone, so a document stays in its split whatever is added around it.
        draw = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())
        split = int(draw < threshold)
        tokens[SPLITS[split]] += [ids, eos]
        counts[split] += 1, len(data)
    arrays = {
        split: np.concatenate(lots or [eos[:0]]).astype(job.dtype) for split, lots in tokens.items()
    }
    arrays["counts"] = counts
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    with temporary.open("wb") as file:
        arrays["digest"] = np.frombuffer(digest.digest(), np.uint8)
        np.savez(file, allow_pickle=False, **arrays)
    publish(temporary, path)
    return size
