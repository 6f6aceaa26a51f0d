"""Write checkpoints, while training waits or beside it, and remove old ones.

A save has two halves. The first copies what this rank owns to host memory and hands it to a thread,
which writes, syncs and hashes the rank's file. The second, in the main thread and on all ranks
together, waits for the threads, asks how it went, and lets rank 0 commit: manifest, sync, rename.
Training may go on in between. A directory counts as a checkpoint once it bears its final name; what
a killed save leaves behind is called `step_*.tmp` and is cleared by the next one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from relora.engine.distributed import Ranks
from relora.engine.state import EngineState
from relora.errors import CheckpointError
from relora.files import beside, replacing, sync, write_json
from relora.record.checkpoint import complete_checkpoints
from relora.record.layout import (
    CHECKPOINT_STATE,
    LEFTOVER_OF_SAVES,
    MANIFEST,
    RunDirectory,
    rank_file,
    step_of,
)
from relora.record.manifest import CheckpointState, FileRecord, Manifest, describe_file


class Saving:
    """A checkpoint under way: what goes into it is fixed, and this rank's file is being written.

    Making one is collective. The engine's state may change as soon as it is made. It takes host
    memory for this rank's share of the checkpoint until the file is written.

    Args:
        state: what state.json shall hold.

    Raises:
        CheckpointError: the directory cannot be made (every rank raises).
    """

    def __init__(
        self, run_dir: Path, views: EngineState, state: CheckpointState, ranks: Ranks
    ) -> None:
        self.step, self._state = state.step, state
        self.ranks = ranks
        self.seconds = 0.0  # that writing took
        self.final = RunDirectory(run_dir).checkpoint(self.step)
        # Of this process: a rank that outlived an earlier one may still write into its own.
        self.temporary = beside(self.final)
        self._files: dict[str, FileRecord] = {}
        self._problem: str | None = None
        self._bug: BaseException | None = None
        problem = None
        if ranks.is_main:
            try:
                _make_clear(self.temporary)
            except OSError as error:
                problem = str(error)
        # No rank writes before there is a directory.
        self.temporary, problem = ranks.share((self.temporary, problem))
        self._raise_any([problem])
        # Copies, also on a CPU, where `.to` would give the very tensor that training goes on with.
        pieces = {
            f"{name}|{kind}|{start}": torch.empty(part.shape, dtype=torch.float32).copy_(part)
            for name, kind, start, part in _own_pieces(views, ranks)
        }
        self._writer = threading.Thread(target=self._write, args=(pieces,), name="checkpoint")
        self._writer.start()

    @property
    def written(self) -> bool:
        """Whether this rank's file is written, or failed to be; `finish` tells which."""
        return not self._writer.is_alive()

    def finish(
        self, keep: int, is_milestone: Callable[[int], bool], abandoned: Sequence[Path] = ()
    ) -> None:
        """Wait for all files, make them a checkpoint, remove older ones. Collective.

        Args:
            keep: how many of the newest stay, milestones not counted.
            is_milestone: whether the checkpoint of a step stays for ever.
            abandoned: checkpoints to remove: those that were damaged and passed over, or that the
                run went back to before. Counted as kept, they would drive out what is wanted.

        Raises:
            CheckpointError: a rank could not write (disk full, say); nothing of it is left behind
                and the earlier ones are as they were (every rank raises).
        """
        self._writer.join()
        reports = self.ranks.gather((self._problem, self._files))
        if self._bug is not None:
            raise self._bug
        problems = [problem for problem, _ in reports]
        if not any(problems):  # the same on all ranks
            if self.ranks.is_main:
                files = {name: file for _, files in reports for name, file in files.items()}
                problems = [self._commit(files)]
            problems = self.ranks.share(problems)
        if any(problems):
            self._remove()
        elif self.ranks.is_main:
            with contextlib.suppress(OSError):  # the next save tries again
                retire(self.final, keep, is_milestone, abandoned)
        self._raise_any(problems)

    def drop(self) -> None:
        """Give it up, as far as this rank can: the others may be gone. Not collective."""
        self._writer.join()
        self._remove()

    def _write(self, pieces: dict[str, Tensor]) -> None:
        """The thread. torch, safetensors, hashlib and fsync let the others run meanwhile."""
        began = time.perf_counter()
        path = self.temporary / rank_file(self.ranks.rank)
        try:
            with replacing(path) as temporary:
                save_file(pieces, temporary, metadata={"step": str(self.step)})
            self._files = {path.name: describe_file(path)}
        except (OSError, SafetensorError) as error:
            self._problem = f"rank {self.ranks.rank}: {error}"
        except BaseException as error:  # a bug, to be raised where it is heard
            self._bug, self._problem = error, f"rank {self.ranks.rank}: {error!r}"
        self.seconds = time.perf_counter() - began

    def _commit(self, files: dict[str, FileRecord]) -> str | None:
        """Make the directory a checkpoint; what kept rank 0 from it, if anything did."""
        try:
            state = self.temporary / CHECKPOINT_STATE
            write_json(state, self._state.model_dump(mode="json"))
            files = {state.name: describe_file(state), **files}
            write_json(self.temporary / MANIFEST, Manifest(files=files).model_dump())
            sync(self.temporary)
            if os.path.lexists(self.final):  # the run went back to before it
                _discard(self.final)
            self.temporary.rename(self.final)
            sync(self.final.parent)
        except OSError as error:
            return str(error)
        return None

    def _remove(self) -> None:
        if self.ranks.is_main:
            shutil.rmtree(self.temporary, ignore_errors=True)

    def _raise_any(self, problems: list[str | None]) -> None:
        found = [problem for problem in problems if problem]
        if found:
            raise CheckpointError(
                f"{self.final}: could not be written: {'; '.join(found)}; earlier checkpoints are "
                "intact; free some space or choose another run_dir, and run the same command again"
            )


def checkpoint_bytes(trainable: int, frozen: int, of_one_moment: int = 0) -> int:
    """Bytes of a checkpoint's tensors, from numbers of parameters.

    fp32 value and two moments of what is trained (of some of it one, under Muon), fp32 value of
    what is not; over all ranks each once. Names, shapes and the state come on top (well below 1 %
    of any real model).
    """
    return 12 * trainable - 4 * of_one_moment + 4 * frozen


def retire(
    newest: Path, keep: int, is_milestone: Callable[[int], bool], abandoned: Sequence[Path]
) -> None:
    """Remove what was abandoned and the oldest checkpoints, never the newest. Rank 0 only."""
    for path in abandoned:
        if path != newest and path.exists():
            _discard(path)
    complete = complete_checkpoints(newest.parent.parent)
    passing = [path for path in complete if not is_milestone(step_of(path))]
    for path in passing[:-keep]:
        if path != newest:
            _discard(path)


def _discard(path: Path) -> None:
    """Remove a checkpoint. What is no directory has its name and is none: it only loses that."""
    # First the name that makes it a checkpoint, then the files.
    doomed = beside(path)
    path.rename(doomed)
    if doomed.is_dir() and not doomed.is_symlink():
        # What a reader still holds open on a network disk stays; the next save tries again.
        shutil.rmtree(doomed, ignore_errors=True)


def _make_clear(directory: Path) -> None:
    """Make an empty directory, and remove what killed saves left beside it."""
    directory.parent.mkdir(exist_ok=True)
    for leftover in directory.parent.iterdir():
        if LEFTOVER_OF_SAVES.fullmatch(leftover.name):
            # A reader on a network disk may hold it open: the next save tries again.
            shutil.rmtree(leftover, ignore_errors=True)
    directory.mkdir()


def _own_pieces(views: EngineState, ranks: Ranks) -> Iterator[tuple[str, str, int, Tensor]]:
    """What this rank writes: (name, kind, start, flat tensor), over ranks each entry once.

    Masters and remainders are not among it: `value` is the one joined from what they complete.
    """
    for view in views:
        for kind in ("value", *(view.moments if view.flat is not None else ())):
            start, piece, shared = views.piece(view, kind)
            if shared:  # cut in equal parts, so that all write at once
                size = -(-piece.numel() // ranks.world)
                start = ranks.rank * size
                piece = piece[start : start + size]
            if piece.numel():
                yield view.name, kind, start, piece
