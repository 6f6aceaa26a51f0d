"""Find, verify and read checkpoints: tensors by parameter name with their global shape.

    checkpoints/step_00000300/
        rank_00000.safetensors …   flat fp32 pieces, keys `name|kind|start`; each rank its share
        state.json                 step, data position, Adam steps, elapsed time, fingerprints
        manifest.json              bytes and SHA-256 of every file; written last

Nothing in it depends on world size, ZeRO stage or micro-batch, and nothing is a pickle. A
directory counts as a checkpoint once it bears its final name (see `saving.py`). What is read here
may have been damaged, mixed up or made up by anybody: it is believed only after it was checked.
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from relora.engine.distributed import Ranks
from relora.engine.views import MOMENTS
from relora.errors import CheckpointError
from relora.files import exists, is_dir, is_file, supplied
from relora.record.layout import (
    CHECKPOINT_STATE,
    CHECKPOINTS,
    MANIFEST,
    RunDirectory,
    is_checkpoint_name,
    rank_file,
    step_of,
)
from relora.record.manifest import CheckpointState, compare_hashes, holding, read_state

_KEY = re.compile(rf"(.+)\|(value|{'|'.join(MOMENTS)})\|([0-9]{{1,18}})")


class _Piece(NamedTuple):
    start: int
    stop: int
    file: Path
    key: str


class Checkpoint:
    """A complete checkpoint on disk, as a source of tensors.

    Args:
        directory: its directory.
        thorough: also compare every file's SHA-256 with the manifest.

    Raises:
        CheckpointError: something is missing or not as the manifest says; names the file.
    """

    def __init__(self, directory: Path, thorough: bool = False) -> None:
        self.directory = directory
        self._pieces: dict[tuple[str, str], list[_Piece]] = defaultdict(list)
        self._open: dict[Path, Any] = {}
        with holding(directory) as files:
            if thorough:
                compare_hashes(directory, files)
            self.state = read_state(directory, files)
            names = sorted(files.descriptors.keys() - {CHECKPOINT_STATE})
            world = self.state.world_size
            if len(names) != world or names != [rank_file(rank) for rank in range(world)]:
                raise CheckpointError(
                    f"{directory}: manifest.json names {len(names)} files of ranks, state.json was "
                    f"written by {world} ranks"
                )
            for name in names:
                self._list_pieces(directory / name, files.descriptors[name])
            self.bytes = files.bytes
        self._check_whole()

    @property
    def step(self) -> int:
        """Optimizer updates done when it was saved."""
        return self.state.step

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Global shape of every parameter."""
        return self.state.shapes

    def fetch(self, name: str) -> None:
        """Nothing to make ready: each rank reads what it needs."""

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor | None:
        """fp32 entries start..stop of a flattened tensor, or None if the checkpoint has none."""
        pieces = self._pieces.get((name, kind))
        if pieces is None:
            return None
        parts, at = [], start
        for piece in pieces:
            if piece.start <= at < min(piece.stop, stop):
                end = min(piece.stop, stop)
                tensor = self._open[piece.file].get_slice(piece.key)
                parts.append(tensor[at - piece.start : end - piece.start])
                at = end
        if at < stop:
            raise CheckpointError(f"{self.directory}: entries {at}–{stop} of {name} are missing")
        return torch.cat(parts) if parts else torch.empty(0)

    def adam_step(self, name: str) -> float | None:
        """Updates that Adam had counted for a parameter."""
        return self.state.adam_steps.get(name)

    def check_fits(self, model: nn.Module) -> None:
        """Whether it holds this model's parameters.

        Raises:
            CheckpointError: names the first parameter that only one has, or that differs in shape.
        """
        expected = {name: list(param.shape) for name, param in model.named_parameters()}
        for name in sorted(self.shapes.keys() | expected.keys()):
            mine, other = self.shapes.get(name, "nothing"), expected.get(name, "nothing")
            if mine != other:
                raise CheckpointError(
                    f"{self.directory / CHECKPOINT_STATE}: is of another model: of {name} it has "
                    f"{mine}, the model {other}"
                )

    def tensor(self, name: str) -> Tensor:
        """A whole parameter in fp32."""
        shape = torch.Size(self.shapes[name])
        values = self.read(name, "value", 0, shape.numel())
        assert values is not None
        return values.view(shape)

    def _list_pieces(self, file: Path, descriptor: int) -> None:
        # By its number it can be opened when it has lost its name.
        numbered = Path(f"/proc/self/fd/{descriptor}")
        try:
            # It stays mapped, and needs neither name nor descriptor from here on.
            tensors = safe_open(numbered if numbered.exists() else file, framework="pt").__enter__()
            # Files of several checkpoints put together would fit in every shape.
            step = (tensors.metadata() or {}).get("step", str(self.step))
            if step != str(self.step):
                raise CheckpointError(f"{file}: is of step {step[:20]}, not of {self.step}")
            for key in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                match, part = _KEY.fullmatch(key), tensors.get_slice(key)
                shape = part.get_shape()
                if match is None or part.get_dtype() != "F32" or len(shape) != 1:
                    raise CheckpointError(
                        f"{file}: {key[:80]!r} ({part.get_dtype()} {shape}) is no piece of a "
                        "checkpoint: flat F32, named name|kind|start"
                    )
                name, kind, start = match[1], match[2], int(match[3])
                self._pieces[name, kind].append(_Piece(start, start + shape[0], file, key))
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{file}: is no safetensors file: {error}") from None
        self._open[file] = tensors

    def _check_whole(self) -> None:
        """Every entry of every tensor is there once, and nothing else is."""
        for (name, kind), pieces in self._pieces.items():
            pieces.sort()
            if name not in self.shapes:
                raise CheckpointError(f"{pieces[0].file}: holds {name}, unknown to state.json")
            at, size = 0, math.prod(self.shapes[name])
            for piece in pieces:
                if piece.start != at or piece.stop > size:
                    raise CheckpointError(
                        f"{piece.file}: has entries {piece.start}–{piece.stop} of {size} of "
                        f"{name} ({kind}) where {at} comes next"
                    )
                at = piece.stop
            if at != size:
                raise CheckpointError(
                    f"{pieces[-1].file}: entries {at}–{size} of {name} ({kind}) are in no file"
                )
        trained = set(self.state.adam_steps)
        there: dict[str, set[str]] = {"value": set(self.shapes)} | dict.fromkeys(MOMENTS, trained)
        there[MOMENTS[1]] = trained - set(self.state.first_moment_only)
        for kind, names in there.items():
            different = names ^ {name for name, other in self._pieces if other == kind}
            if different:
                raise CheckpointError(
                    f"{self.directory / CHECKPOINT_STATE}: does not fit the files of the ranks: "
                    f"only one of them has {kind} of {min(different)}"
                )


def named_checkpoints(run_dir: Path) -> list[Path]:
    """Whatever bears the name of a checkpoint in a run directory, oldest first, sound or not."""
    home = RunDirectory(run_dir).checkpoints
    with supplied(CheckpointError, home):
        found = [p for p in home.iterdir() if is_checkpoint_name(p.name)] if is_dir(home) else []
    return sorted(found, key=step_of)


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Directories of complete checkpoints, oldest first."""
    found = [path for path in named_checkpoints(run_dir) if not path.is_symlink()]
    return [path for path in found if is_file(path / MANIFEST)]


def is_checkpoint(path: Path) -> bool:
    """Whether a path means a checkpoint, sound or not, and no run."""
    named = is_checkpoint_name(path.name) and path.parent.name == CHECKPOINTS and exists(path)
    return named or exists(path / MANIFEST)


def open_checkpoint_of(place: Path) -> tuple[Checkpoint, list[str]]:
    """The checkpoint that a RUN or CHECKPOINT argument means: itself, or the run's newest sound
    one with complaints about newer ones.

    Raises:
        CheckpointError: there is none, or none that is sound.
    """
    if is_checkpoint(place):
        # A link to a checkpoint from outside of its run is another name for it.
        return Checkpoint(place if _is_inside_run(place) else place.resolve(), True), []
    found, complaints = open_newest(place)
    if found is None:
        raise no_checkpoint(place)
    return found, complaints


def no_checkpoint(place: Path) -> CheckpointError:
    """What a RUN or CHECKPOINT argument that is neither gets."""
    return CheckpointError(
        f"{place}: is no checkpoint and no run directory with one; "
        "a run writes checkpoints every train.save_every steps and at its end"
    )


def _is_inside_run(checkpoint: Path) -> bool:
    return exists(RunDirectory(checkpoint.parent.parent).config)


def open_newest(run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files are all as written, and complaints about newer ones.

    A run that is at work may retire what is being opened; then there is a newer one to take. None
    only if there are no checkpoints.

    Raises:
        CheckpointError: there are checkpoints, and none is sound.
    """
    complaints: dict[Path, str] = {}
    while True:
        left = [path for path in named_checkpoints(run_dir) if path not in complaints]
        if not left:
            break
        try:
            return Checkpoint(left[-1], thorough=True), list(complaints.values())
        except CheckpointError as error:
            if os.path.lexists(left[-1]):
                complaints[left[-1]] = str(error)
    if complaints:
        raise CheckpointError(
            f"{run_dir}: no checkpoint is sound: {'; '.join(complaints.values())}; start anew in "
            "another run_dir"
        )
    return None, []


class Standing(NamedTuple):
    """A checkpoint's state.json, and its bytes on disk."""

    state: CheckpointState
    bytes: int


def newest_state(place: Path) -> tuple[Standing | None, list[str]]:
    """How a checkpoint stands, or a run's newest that is whole, and complaints about newer ones.

    Nothing is hashed, so a flipped bit in its tensors is not noticed. None if there is none.
    """
    complaints: dict[Path, str] = {}
    while True:
        found = [place] if is_checkpoint(place) else named_checkpoints(place)
        left = [path for path in found if path not in complaints]
        if not left:
            return None, list(complaints.values())
        try:
            with holding(left[-1]) as held:
                return Standing(read_state(left[-1], held), held.bytes), list(complaints.values())
        except CheckpointError as error:
            if os.path.lexists(left[-1]):  # and not retired by its run in this moment
                complaints[left[-1]] = str(error)


def newest_sound(run_dir: Path, ranks: Ranks) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files are all as written, and complaints about newer ones.

    Collective: rank 0 hashes, all open the same one. None only if there are no checkpoints.

    Raises:
        CheckpointError: there are checkpoints, and none is sound (every rank raises).
    """
    found, complaints = None, list[str]()
    with ranks.together():
        if ranks.is_main:
            found, complaints = open_newest(run_dir)
    directory, complaints = ranks.share((found and found.directory, complaints))
    if directory is None:
        return None, []
    return open_checkpoint(directory, ranks, thorough=False), complaints


def open_checkpoint(directory: Path, ranks: Ranks, thorough: bool = True) -> Checkpoint:
    """The checkpoint in `directory`, on every rank. Collective.

    Args:
        thorough: rank 0 also hashes every file; the others need not do it again.

    Raises:
        CheckpointError: it is not sound on some rank (every rank raises).
    """
    with ranks.together():
        found = Checkpoint(directory, thorough and ranks.is_main)
    return found
