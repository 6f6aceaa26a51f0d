"""Save, find, verify and read checkpoints: tensors by parameter name with their global shape.

    checkpoints/step_00000300/
        rank_00000.safetensors …   flat fp32 pieces, keys `name|kind|start`; each rank its share
        state.json                 step, data position, Adam steps, elapsed time, fingerprints
        manifest.json              bytes and SHA-256 of every file; written last

Nothing in it depends on world size, ZeRO stage or micro-batch, and nothing is a pickle. A
directory counts as a checkpoint once it bears its final name, which is given after everything in
it is synced; what a killed save leaves behind has another name and is cleared by the next save.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from relora.errors import CheckpointError
from relora.runtime.distributed import Ranks
from relora.runtime.places import MOMENTS, Places

FORMAT = 1
_NAME = re.compile(r"step_(\d{8,})")


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
        manifest = verify(directory, thorough)
        self.state: dict[str, Any] = _read_json(directory / "state.json")
        self._pieces: dict[tuple[str, str], list[_Piece]] = defaultdict(list)
        self._open: dict[Path, Any] = {}
        for file in sorted(directory / name for name in manifest["files"]):
            if file.suffix != ".safetensors":
                continue
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                    name, kind, start = key.rsplit("|", 2)
                    count = tensors.get_slice(key).get_shape()[0]
                    piece = _Piece(int(start), int(start) + count, file, key)
                    self._pieces[name, kind].append(piece)
        for pieces in self._pieces.values():
            pieces.sort()

    @property
    def step(self) -> int:
        """Optimizer updates done when it was saved."""
        return int(self.state["step"])

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Global shape of every parameter."""
        return self.state["shapes"]

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor | None:
        """fp32 entries start..stop of a flattened tensor, or None if the checkpoint has none."""
        pieces = self._pieces.get((name, kind))
        if pieces is None:
            return None
        parts, at = [], start
        for piece in pieces:
            if piece.start <= at < min(piece.stop, stop):
                end = min(piece.stop, stop)
                tensor = self._file(piece.file).get_slice(piece.key)
                parts.append(tensor[at - piece.start : end - piece.start])
                at = end
        if at < stop:
            raise CheckpointError(f"{self.directory}: entries {at}–{stop} of {name} are missing")
        return torch.cat(parts) if parts else torch.empty(0)

    def adam_step(self, name: str) -> float | None:
        """Updates that Adam had counted for a parameter."""
        return self.state["adam_steps"].get(name)

    def tensor(self, name: str) -> Tensor:
        """A whole parameter in fp32."""
        shape = torch.Size(self.shapes[name])
        values = self.read(name, "value", 0, shape.numel())
        assert values is not None
        return values.view(shape)

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt").__enter__()
        return self._open[path]


def save(run_dir: Path, places: Places, state: dict[str, Any], ranks: Ranks, keep: int) -> Path:
    """Write a checkpoint of the step in `state`, then drop the oldest beyond `keep`. Collective.

    Raises:
        CheckpointError: a rank could not write (disk full, say); nothing of it is left behind.
    """
    root = run_dir / "checkpoints"
    final = root / f"step_{state['step']:08d}"
    temporary = root / f"{final.name}.tmp"
    problem, entry = None, None
    if ranks.is_main:
        try:
            root.mkdir(exist_ok=True)
            for leftover in root.glob("*.tmp"):
                shutil.rmtree(leftover)
            temporary.mkdir()
        except OSError as error:
            problem = str(error)
    ranks.barrier()
    try:
        entry = _write_rank(temporary, places, ranks)
    except (OSError, SafetensorError, RuntimeError) as error:
        problem = problem or f"rank {ranks.rank}: {error}"
    reports = ranks.gather((problem, entry))
    problems = [report[0] for report in reports if report[0]]
    if not problems and ranks.is_main:
        try:
            _commit(temporary, final, places, state, [report[1] for report in reports])
        except OSError as error:
            problems = [str(error)]
    problems = ranks.share(problems)
    if problems:
        if ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{final}: could not be written: {'; '.join(problems)}; earlier checkpoints are "
            "intact; free some space or choose another run_dir, and run the same command again"
        )
    if ranks.is_main:
        _retire(run_dir, state["step"], keep)
    ranks.barrier()
    return final


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Directories of complete checkpoints, oldest first."""
    found = [p for p in (run_dir / "checkpoints").glob("step_*") if _NAME.fullmatch(p.name)]
    return sorted((p for p in found if (p / "manifest.json").is_file()), key=step_of)


def step_of(directory: Path) -> int:
    """The step in a checkpoint directory's name."""
    match = _NAME.fullmatch(directory.name)
    assert match is not None
    return int(match[1])


def newest_checkpoint(subject: Path) -> Path:
    """The checkpoint that a RUN or CHECKPOINT argument means: itself, or the run's newest.

    Raises:
        CheckpointError: there is none.
    """
    if (subject / "manifest.json").is_file():
        return subject
    found = complete_checkpoints(subject)
    if not found:
        raise CheckpointError(
            f"{subject}: is no checkpoint and no run directory with one; "
            "a run writes checkpoints every train.save_every steps and at its end"
        )
    return found[-1]


def newest_sound(run_dir: Path, ranks: Ranks) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files are all as written, and complaints about newer ones.

    Collective: rank 0 hashes, all open the same one. None only if there are no checkpoints.

    Raises:
        CheckpointError: there are checkpoints, and none is sound (every rank raises).
    """
    found: tuple[Path | None, list[str]] = (None, [])
    if ranks.is_main:
        complaints = []
        for directory in reversed(complete_checkpoints(run_dir)):
            try:
                verify(directory, thorough=True)
            except CheckpointError as error:
                complaints.append(str(error))
                continue
            found = (directory, complaints)
            break
        else:
            found = (None, complaints)
    directory, complaints = ranks.share(found)
    if directory is None:
        if complaints:
            raise CheckpointError(
                f"{run_dir}: no checkpoint is sound: {'; '.join(complaints)}; start anew in "
                "another run_dir"
            )
        return None, []
    return Checkpoint(directory), complaints


def run_of(checkpoint: Path) -> Path:
    """The run directory that a checkpoint belongs to."""
    return checkpoint.resolve().parent.parent


def verify(directory: Path, thorough: bool) -> dict[str, Any]:
    """Compare a checkpoint's files with its manifest; returns the manifest.

    Args:
        thorough: hash every file too, not just compare the sizes.

    Raises:
        CheckpointError: names the first file that is missing, changed or of an unknown format.
    """
    manifest = _read_json(directory / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{directory}: has format {manifest.get('format')!r}, this version reads {FORMAT}"
        )
    for name, expected in _described_files(directory, manifest).items():
        if Path(name).name != name:
            raise CheckpointError(f"{directory}: manifest.json names {name!r}, outside of it")
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path}: is missing")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(f"{path}: has {size} bytes, {expected['bytes']} were written")
        if thorough and _sha256(path) != expected["sha256"]:
            raise CheckpointError(f"{path}: its content changed after it was written (SHA-256)")
    return manifest


def _described_files(directory: Path, manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(file, dict) and {"bytes", "sha256"} <= file.keys() for file in files.values()
    ):
        raise CheckpointError(f"{directory}: manifest.json does not describe the files")
    if "state.json" not in files:
        raise CheckpointError(f"{directory}: manifest.json does not name state.json")
    return files


def _write_rank(directory: Path, places: Places, ranks: Ranks) -> dict[str, dict[str, Any]]:
    pieces = {
        f"{name}|{kind}|{start}": tensor.detach().to("cpu", torch.float32).contiguous().clone()
        for name, kind, start, tensor in _own_pieces(places, ranks)
    }
    path = directory / f"rank_{ranks.rank:05d}.safetensors"
    save_file(pieces, path)
    _sync(path)
    return {path.name: _describe(path)}


def _own_pieces(places: Places, ranks: Ranks) -> Iterator[tuple[str, str, int, Tensor]]:
    """What this rank writes: (name, kind, start, flat tensor), over ranks each entry once."""
    for place in places:
        if places.partitioned:
            if place.live.numel():
                yield place.name, "value", place.live_start, place.value()
        else:
            yield from _share_of(place.name, "value", place.value(), ranks)
        if place.flat is None:
            continue
        for kind in MOMENTS:
            moment = places.moment(place, kind)
            if not places.sharded:
                yield from _share_of(place.name, kind, moment, ranks)
            elif place.count:
                yield place.name, kind, place.start, moment


def _share_of(
    name: str, kind: str, tensor: Tensor, ranks: Ranks
) -> Iterator[tuple[str, str, int, Tensor]]:
    # What every rank holds is cut in equal parts, so that all write at once.
    size = -(-tensor.numel() // ranks.world)
    start = ranks.rank * size
    part = tensor[start : start + size]
    if part.numel():
        yield name, kind, start, part


def _commit(
    temporary: Path, final: Path, places: Places, state: dict[str, Any], entries: list[Any]
) -> None:
    trainable = [place for place in places if place.flat is not None]
    state = {
        **state,
        "shapes": {place.name: list(place.shape) for place in places},
        "adam_steps": {place.name: places.adam_step(place) for place in trainable},
    }
    _write_json(temporary / "state.json", state)
    files = {"state.json": _describe(temporary / "state.json")}
    for entry in entries:
        files |= entry
    _write_json(temporary / "manifest.json", {"format": FORMAT, "files": files})
    _sync(temporary)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    _sync(final.parent)


def _retire(run_dir: Path, step: int, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints up to `step`, and those beyond it.

    Those were damaged and passed over; counted as kept, they would drive out sound ones.
    """
    complete = complete_checkpoints(run_dir)
    newer = [path for path in complete if step_of(path) > step]
    for old in newer + complete[: len(complete) - len(newer)][:-keep]:
        # First the name that makes it a checkpoint, then the files.
        doomed = old.with_name(f"{old.name}.tmp")
        old.rename(doomed)
        # What a reader still holds open on a network disk stays; the next save tries again.
        shutil.rmtree(doomed, ignore_errors=True)


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf8")
    _sync(path)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing; this is no complete checkpoint")
    try:
        values = json.loads(path.read_text(encoding="utf8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: does not hold what a checkpoint's file holds")
    return values


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
