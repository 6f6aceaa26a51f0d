"""Text to tokenizer to token shards: parallel, restartable, and the same bytes every time.

The corpus is cut into units of a few MB of whole documents. Each unit's tokens go to a part of
their own, named only when complete; a killed run finds the parts it made and goes on. At the end
the parts are strung together in order, and index.json is written last. So the result depends on
neither the number of workers nor on interruptions.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from relora.data import corpus
from relora.data.config import DataConfig
from relora.data.shards import FORMAT, SPLITS, describe, publish, read_index, shard_directory
from relora.data.tokenizer import (
    build_tokenizer,
    describe_tokenizer,
    load_tokenizer,
    tokenizer_hash,
)
from relora.data.units import Job, cut_units, make_part, make_parts, part_path
from relora.errors import DataError

Say = Callable[[str], None]
_SAY_EVERY = 10  # seconds


def prepare(
    config: DataConfig, *, seed: int = 0, workers: int | None = None, quiet: bool = False
) -> Path:
    """Make the token shards of a config, if they are not there yet, and return their directory.

    `seed` chooses the text a tokenizer is trained on where there is more than enough of it. What
    is prepared already stays, whatever the seed: runs that differ in it share their data.
    `workers` is the number of processes that tokenize, by default one per core. Raises DataError
    when the text or the tokenizer is unusable; then no index.json is left.
    """
    say = _say(quiet)
    made_from = {  # raises for a source that matches nothing, before anything is written
        "source": corpus.describe_source(config.source),
        "tokenizer": describe_tokenizer(config.tokenizer),
    }
    directory = shard_directory(config)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _alone_in(directory, say):
            if not _is_complete(directory, made_from, say):
                try:
                    _prepare(config, directory, made_from, seed, workers or _cores(), quiet)
                except DataError:
                    if not (directory / "tokenizer").is_dir():  # nothing to go on with
                        shutil.rmtree(directory)
                    raise
    except OSError as error:
        raise DataError(f"cannot write token shards to {directory}: {error}") from error
    return directory


def _prepare(
    config: DataConfig,
    directory: Path,
    made_from: dict[str, Any],
    seed: int,
    workers: int,
    quiet: bool,
) -> None:
    say = _say(quiet)
    _start_or_go_on(directory, made_from, say)
    began = time.monotonic()
    if not (directory / "tokenizer").is_dir():
        _make_tokenizer(config, directory, seed)
        say(
            f"tokenizer: {config.tokenizer.train or config.tokenizer.path}, "
            f"{time.monotonic() - began:.1f} s"
        )
    tokenizer = load_tokenizer(directory / "tokenizer")
    vocab_size = max(tokenizer.get_vocab().values()) + 1  # ids may have gaps
    job = Job(
        tokenizer_dir=directory / "tokenizer",
        tokenizer_sha256=tokenizer_hash(directory / "tokenizer"),
        eos_id=int(tokenizer.eos_token_id),
        dtype="uint16" if vocab_size <= 1 << 16 else "uint32",
        validation_fraction=config.validation_fraction,
    )
    began = time.monotonic()
    parts = directory / "parts"
    parts.mkdir(exist_ok=True)
    count = _tokenize(config, job, parts, workers, quiet)
    splits, max_token_id = _join(directory, parts, count, job)
    index = {
        "format": FORMAT,
        "dtype": job.dtype,
        "vocab_size": vocab_size,
        "eos_id": job.eos_id,
        "max_token_id": max_token_id,
        "tokenizer_sha256": job.tokenizer_sha256,
        "splits": splits,
        "validation_fraction": config.validation_fraction,
        "tokenizer_seed": seed,
        **made_from,
    }
    _write_json(directory / "index.json", index)
    shutil.rmtree(parts)
    say(f"{describe(index)}\n{directory}: done, {time.monotonic() - began:.1f} s")


def _say(quiet: bool) -> Say:
    return (lambda message: None) if quiet else functools.partial(print, flush=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


@contextmanager
def _alone_in(directory: Path, say: Say) -> Iterator[None]:
    """Hold the directory's lock; the system frees it when this process ends, however it ends."""
    with (directory / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{directory}: another prepare is at work; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_complete(directory: Path, made_from: dict[str, Any], say: Say) -> bool:
    if not (directory / "index.json").is_file():
        return False
    try:
        index = read_index(directory)
    except DataError as error:
        say(f"prepared anew, because {error}")
        (directory / "made_from.json").unlink(missing_ok=True)  # trust nothing in there
        return False
    if changes := _changes(index, made_from):
        say(f"prepared anew, because {changes}")
        return False
    shutil.rmtree(directory / "parts", ignore_errors=True)  # killed between index and clean-up
    say(f"{directory}: prepared already\n{describe(index)}")
    return True


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """In words, how the text or tokenizer differs from what a directory was made from."""
    found = []
    for what in ("source", "tokenizer"):
        for key in sorted({*before[what], *now[what]}):
            old, new = before[what].get(key), now[what].get(key)
            if old != new:
                short = key.endswith("sha256")
                found.append(f"its {what} changed" + ("" if short else f": {key} {old} → {new}"))
    return ", ".join(dict.fromkeys(found))


def _start_or_go_on(directory: Path, made_from: dict[str, Any], say: Say) -> None:
    """Clear away what was made from something else; keep what a killed run may build on."""
    (directory / "index.json").unlink(missing_ok=True)
    record = directory / "made_from.json"
    if record.is_file() and json.loads(record.read_bytes()) == made_from:
        if (directory / "tokenizer").is_dir():
            say(f"{directory}: going on with an unfinished prepare")
        return
    for name in ("tokenizer", "parts"):
        shutil.rmtree(directory / name, ignore_errors=True)
    for split in SPLITS:
        (directory / f"{split}.bin").unlink(missing_ok=True)
    _write_json(record, made_from)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    publish(temporary, path)


def _make_tokenizer(config: DataConfig, directory: Path, seed: int) -> None:
    temporary = directory / "tokenizer.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    build_tokenizer(config.tokenizer, lambda: corpus.iter_documents(config.source), temporary, seed)
    publish(temporary, directory / "tokenizer")


def _tokenize(config: DataConfig, job: Job, parts: Path, workers: int, quiet: bool) -> int:
    """Make every part that is missing; returns how many there are."""
    units = cut_units(corpus.iter_documents(config.source))
    first = list(itertools.islice(units, 2))
    if len(first) < 2:  # not worth the start of a process
        workers = 1
    tasks = (
        (job, part_path(parts, n), texts) for n, texts in enumerate(itertools.chain(first, units))
    )
    results = itertools.starmap(make_part, tasks) if workers == 1 else make_parts(tasks, workers)
    return _watch(results, corpus.text_bytes(config.source), quiet)


def _watch(sizes: Iterator[int], total: int | None, quiet: bool) -> int:
    """Run through units, given by their bytes, showing rate and time left; returns their number.

    A live bar on a terminal, elsewhere a line every ten seconds.
    """
    count = done = 0
    began = said = time.monotonic()
    live = sys.stderr.isatty() and not quiet
    with tqdm(total=total, desc="tokenize", unit="B", unit_scale=True, disable=not live) as bar:
        for size in sizes:
            count += 1
            done += size
            bar.update(size)
            now = time.monotonic()
            if now - said > _SAY_EVERY and not live and not quiet:
                meter = tqdm.format_meter(done, total, now - began, 0, unit="B", unit_scale=True)
                print(f"tokenize: {meter}", flush=True)
                said = now
    return count


def _join(
    directory: Path, parts: Path, count: int, job: Job
) -> tuple[dict[str, dict[str, Any]], int]:
    """String the parts together; returns each split's counts and hash, and the highest id."""
    splits: dict[str, dict[str, Any]] = {}
    max_token_id = 0
    for number_of_split, split in enumerate(SPLITS):
        totals = np.zeros(2, dtype=np.int64)
        digest = hashlib.sha256()
        tokens = 0
        temporary = directory / f"{split}.tmp"
        with temporary.open("wb") as file:
            for number in range(count):
                with np.load(part_path(parts, number)) as part:
                    ids = part[split]
                    totals += part["counts"][number_of_split]
                tokens += len(ids)
                max_token_id = max(max_token_id, int(ids.max(initial=0)))
                digest.update(ids.data)
                file.write(ids.data)
        if tokens == 0:
            raise DataError(
                f"data.validation_fraction: at {job.validation_fraction} no document of this "
                f"source fell into the {split} split; documents are split whole, so give more of "
                "them (one a file, or one a row) or another fraction"
            )
        publish(temporary, directory / f"{split}.bin")
        splits[split] = {
            "documents": int(totals[0]),
            "tokens": tokens,
            "bytes": int(totals[1]),
            "sha256": digest.hexdigest(),
        }
    return splits, max_token_id
