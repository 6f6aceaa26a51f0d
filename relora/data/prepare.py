"""Text to tokenizer to token shards: parallel, restartable, and the same bytes every time.

The corpus is cut into units of a few MB of whole documents. Each unit's tokens go to a part of
their own, named only when complete; a killed run finds the parts it made and goes on. At the end
the parts are strung together in order, and index.json is written last. So the result depends on
neither the number of workers nor on interruptions.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
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

from relora import files
from relora.cores import usable_cores
from relora.data import corpus
from relora.data.beginning import begin_ids
from relora.data.config import DataConfig
from relora.data.reuse import (
    Wanted,
    clear,
    describe_source,
    reuse_elsewhere,
    use_again,
    what_is_wrong,
    write_index,
)
from relora.data.shards import SHARD_FORMAT, SPLITS, describe_shards, shard_directory
from relora.data.tokenizer import (
    build_tokenizer,
    describe_tokenizer,
    load_tokenizer,
    tokenizer_hash,
)
from relora.data.units import Job, cut_units, make_part, make_parts, part_path, read_part
from relora.errors import DataError, UserError

_SAY_EVERY = 10  # seconds


def prepare_shards(
    config: DataConfig,
    *,
    seed: int = 0,
    workers: int | None = None,
    quiet: bool = False,
    check_tokenizer: Callable[[Path], object] | None = None,
) -> Path:
    """Make the token shards of a config, if they are not there yet, and return their directory.

    `seed` chooses the text a tokenizer is trained on where there is more than enough of it. What
    is prepared already stays, whatever the seed: runs that differ in it share their data.
    `workers` is the number of processes that tokenize, by default one per core. `check_tokenizer`
    is called with the tokenizer's directory before text is tokenized, and may raise. Raises
    DataError when the text or the tokenizer is unusable; then no index.json is left.
    """
    corpus.require_documents(config.source)
    made_from = {  # raises for a source that matches nothing, before anything is written
        "source": describe_source(config.source),
        "tokenizer": describe_tokenizer(config.tokenizer),
    }
    directory = shard_directory(config)
    wanted = Wanted(directory, config, made_from, quiet)
    with _writing(directory):
        if what_is_wrong(wanted) is None:  # perhaps where nobody can write
            return use_again(wanted)
        directory.mkdir(parents=True, exist_ok=True)
        with _alone_in(wanted):
            wrong = what_is_wrong(wanted)  # another prepare may have been at work meanwhile
            if wrong is None:
                return use_again(wanted)
            if wrong:
                wanted.say(f"prepared anew, because {wrong}")
            if reuse_elsewhere(wanted):
                return directory
            try:
                _start_or_go_on(wanted)
                if not (directory / "tokenizer").is_dir():
                    _make_tokenizer(wanted, seed)
                if check_tokenizer:
                    check_tokenizer(directory / "tokenizer")
                _prepare(wanted, seed, workers or usable_cores())
            except (UserError, OSError):
                if not (directory / "tokenizer").is_dir():  # nothing to go on with
                    _leave(directory)
                raise
    return directory


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """What the system has against writing, as a DataError."""
    try:
        yield
    except BrokenPipeError:  # that is about what is printed
        raise
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise DataError(
            f"cannot write token shards to {directory}: {files.explain(error)}{where}; make room, "
            "or name another place by data.dir"
        ) from error


@contextmanager
def _alone_in(wanted: Wanted) -> Iterator[None]:
    """Hold the directory's lock; the system frees it when this process ends, however it ends."""
    # Without waiting, whatever may stand there under that name.
    flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK
    with os.fdopen(os.open(wanted.directory / "lock", flags, 0o666), "rb") as lock:
        if not files.hold(lock):
            wanted.say(f"{wanted.directory}: another prepare is at work; waiting for it")
            files.hold(lock, wait=True)
        yield


def _leave(directory: Path) -> None:
    """Remove a directory that holds nothing but what prepare wrote."""
    clear(directory)
    (directory / "lock").unlink(missing_ok=True)
    if not any(directory.iterdir()):
        directory.rmdir()


def _start_or_go_on(wanted: Wanted) -> None:
    """Clear away what was made from something else; keep what a killed run may build on."""
    directory = wanted.directory
    for path in directory.glob("*.tmp"):  # of a killed run: this process holds the lock
        shutil.rmtree(path) if files.is_dir(path) else path.unlink()
    record, tokenizer = directory / "made_from.json", directory / "tokenizer"
    # An index that is still there is of other text, or damaged: then nothing is to be trusted.
    if files.exists(record) and not files.exists(directory / "index.json"):
        try:
            kept = files.read_json(record, DataError)
            sha256 = kept.pop("tokenizer_sha256", None)
            if kept == wanted.made_from:
                if sha256 == (tokenizer_hash(tokenizer) if files.is_dir(tokenizer) else None):
                    if sha256:
                        wanted.say(f"{directory}: going on with an unfinished prepare")
                    return
                wanted.say(f"{tokenizer}: is not as it was made; all is made anew")
        except DataError as error:
            wanted.say(f"{error}; all is made anew")
    clear(directory)
    files.write_json(record, wanted.made_from)


def _make_tokenizer(wanted: Wanted, seed: int) -> None:
    began = time.monotonic()
    config, directory = wanted.config, wanted.directory
    with files.making(directory / "tokenizer") as temporary:
        documents = functools.partial(corpus.iter_documents, config.source)
        build_tokenizer(config.tokenizer, documents, temporary, seed)
    record = {**wanted.made_from, "tokenizer_sha256": tokenizer_hash(directory / "tokenizer")}
    files.write_json(directory / "made_from.json", record)
    kind = config.tokenizer.train or config.tokenizer.path
    wanted.say(f"tokenizer: {kind}, {time.monotonic() - began:.1f} s")


def _prepare(wanted: Wanted, seed: int, workers: int) -> None:
    began = time.monotonic()
    config, directory = wanted.config, wanted.directory
    tokenizer = load_tokenizer(directory / "tokenizer")
    vocab_size = max(tokenizer.get_vocab().values()) + 1  # ids may have gaps
    job = Job(
        tokenizer_dir=directory / "tokenizer",
        tokenizer_sha256=tokenizer_hash(directory / "tokenizer"),
        eos_id=int(tokenizer.eos_token_id),
        dtype="uint16" if vocab_size <= 1 << 16 else "uint32",
        validation_fraction=config.validation_fraction,
        begin_ids=tuple(begin_ids(tokenizer)),
    )
    (directory / "parts").mkdir(exist_ok=True)
    tally = corpus.Tally()
    count = _tokenize(wanted, job, tally, workers)
    _require_unchanged(wanted)
    splits, max_token_id = _join(directory, count, job)
    index = {
        "format": SHARD_FORMAT,
        "dtype": job.dtype,
        "vocab_size": vocab_size,
        "eos_id": job.eos_id,
        "max_token_id": max_token_id,
        "tokenizer_sha256": job.tokenizer_sha256,
        "splits": splits,
        "validation_fraction": config.validation_fraction,
        "tokenizer_seed": seed,
        "parts": corpus.part_counts(config.source, tally),
        "text_sha256": tally.text.hexdigest(),
        **({"begin_ids": job.begin_ids} if job.begin_ids else {}),
        **wanted.made_from,
    }
    write_index(directory, index)
    shutil.rmtree(directory / "parts")
    wanted.say(f"{describe_shards(index)}\n{directory}: done, {time.monotonic() - began:.1f} s")


def _tokenize(wanted: Wanted, job: Job, tally: corpus.Tally, workers: int) -> int:
    """Make every part that is missing, counting documents in `tally`; returns how many parts."""
    source = wanted.config.source
    units = cut_units(corpus.iter_documents(source, tally))
    first = list(itertools.islice(units, 2))
    if len(first) < 2:  # not worth the start of a process
        workers = 1
    numbered = enumerate(itertools.chain(first, units))
    tasks = ((job, part_path(wanted.directory, n), pieces) for n, pieces in numbered)
    results = itertools.starmap(make_part, tasks) if workers == 1 else make_parts(tasks, workers)
    return _watch(results, corpus.text_bytes(source), wanted.quiet)


def _watch(sizes: Iterator[int], total: int | None, quiet: bool) -> int:
    """Run through units, given by their bytes, showing rate and time left; returns their number.

    A live bar on a terminal, elsewhere a line every ten seconds.
    """
    count, said = 0, time.monotonic()
    live = sys.stderr.isatty() and not quiet
    how = {"file": sys.stderr} if live else {"file": io.StringIO(), "ncols": 0, "mininterval": 10}
    with tqdm(total=total, desc="tokenize", unit="B", unit_scale=True, **how) as bar:
        for size in sizes:
            count += 1
            bar.update(size)
            if time.monotonic() - said > _SAY_EVERY and not live and not quiet:
                print(bar, flush=True)
                said = time.monotonic()
    return count


def _require_unchanged(wanted: Wanted) -> None:
    """DataError if the source is no longer what it was before it was read."""
    source, before = wanted.config.source, wanted.made_from["source"]
    now = describe_source(source)
    if now != before:
        # The tokenizer may be of either text.
        (wanted.directory / "made_from.json").unlink(missing_ok=True)
        raise DataError(
            f"data.source: {corpus.source_name(source)} changed while it was read (files "
            f"{before['files']} → {now['files']}, bytes {before['bytes']} → {now['bytes']}, or "
            "what is in them); nothing of it was kept; run prepare again when nobody writes there"
        )


def _join(directory: Path, count: int, job: Job) -> tuple[dict[str, dict[str, Any]], int]:
    """String the parts together; returns each split's counts and hash, and the highest id."""
    splits: dict[str, dict[str, Any]] = {}
    max_token_id = 0
    for number_of_split, split in enumerate(SPLITS):
        totals = np.zeros(2, dtype=np.int64)
        digest = hashlib.sha256()
        tokens = 0
        with files.replacing(directory / f"{split}.bin") as temporary:
            with temporary.open("wb") as file:
                for number in range(count):
                    part = read_part(part_path(directory, number))
                    ids = part[split]
                    totals += part["counts"][number_of_split]
                    tokens += len(ids)
                    max_token_id = max(max_token_id, int(ids.max(initial=0)))
                    digest.update(ids.data)
                    file.write(ids.data)
            if tokens == 0:
                raise DataError(
                    f"data.validation_fraction: at {job.validation_fraction} no document of this "
                    f"source fell into the {split} split; documents are split whole, so give more "
                    "of them (one a file, or one a row), cut text files into more documents by "
                    "data.source.cut, or take another fraction"
                )
        splits[split] = {
            "documents": int(totals[0]),
            "tokens": tokens,
            "bytes": int(totals[1]),
            "sha256": digest.hexdigest(),
        }
    return splits, max_token_id
