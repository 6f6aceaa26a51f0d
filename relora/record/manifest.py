"""The two JSON files of a checkpoint: the manifest, which names all others, and the state.

Both may have been damaged, mixed up or made up by anybody; what is returned here was checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from relora.errors import CheckpointError
from relora.files import MAX_JSON_BYTES, supplied
from relora.record.changes import Change
from relora.record.checked import Amount, Count, JsonRecord, checked
from relora.record.layout import (
    CHECKPOINT_STATE,
    MANIFEST,
    RANK_FILE,
    is_checkpoint_name,
    step_of,
)

CHECKPOINT_FORMAT = 1


class FileRecord(JsonRecord):
    """What the manifest says of a file."""

    bytes: Count
    sha256: str


class Manifest(JsonRecord):
    """manifest.json: what was written."""

    format: int = Field(default=CHECKPOINT_FORMAT, description=str(CHECKPOINT_FORMAT))
    files: dict[str, FileRecord] = Field(description="the bytes and sha256 of each file")


class CheckpointState(JsonRecord):
    """state.json: where a run stood. Fields with a default are not in checkpoints of old."""

    step: Count = Field(description="a whole number ≥ 0")
    consumed: Count = Field(description="a whole number ≥ 0")
    skipped: Count = Field(description="a whole number ≥ 0")
    merges: Count = Field(description="a whole number ≥ 0")
    world_size: Count = Field(description="a whole number ≥ 0")
    elapsed_s: Amount = Field(description="a number ≥ 0")
    shrink: Amount = Field(default=1.0, description="a number ≥ 0")
    loss_scale: Annotated[tuple[Amount, Count], Field(strict=False)] | None = Field(
        default=None, description="null or [scale, updates since it changed]"
    )
    losses: list[Amount] = Field(default=[], description="a list of numbers ≥ 0")
    data: str = Field(description="text")
    beginning: str = Field(default="", description="text")  # see `model.fingerprint`
    config: dict[str, Any] | None = Field(default=None, description="a mapping")
    changes: list[Change] = Field(default=[], description="a list of changed settings")
    run_files: dict[str, str] = Field(default={}, description="a hash for each name")
    versions: dict[str, str | None] = Field(default={}, description="a version for each package")
    shapes: dict[str, list[Count]] = Field(description="a list of whole numbers for each parameter")
    adam_steps: dict[str, Amount] = Field(description="a number ≥ 0 for each parameter")
    # Of those, the parameters of which the optimizer keeps no second moment.
    first_moment_only: list[str] = Field(default=[], description="a list of parameters")


class Files(NamedTuple):
    """A checkpoint's files, open: a run may retire it while somebody reads."""

    manifest: Manifest
    descriptors: dict[str, int]  # of every file that the manifest names
    bytes: int  # of these and the manifest


@contextmanager
def holding(directory: Path) -> Iterator[Files]:
    """Open all files of a checkpoint before the first is read, and close them at the end.

    Raises:
        CheckpointError: names the first that is missing, no plain file or of another size.
    """
    _refuse_link(directory)
    with ExitStack() as stack:
        first = _open(directory / MANIFEST, stack)
        manifest = _manifest(directory / MANIFEST, first)
        _make_room_for(len(manifest.files))
        files = {name: _open(directory / name, stack) for name in manifest.files}
        for name, expected in manifest.files.items():
            size = os.fstat(files[name]).st_size
            if size != expected.bytes:
                raise CheckpointError(
                    f"{directory / name}: has {size} bytes, {expected.bytes} were written"
                )
        yield Files(
            manifest, files, sum(os.fstat(each).st_size for each in (first, *files.values()))
        )


def compare_hashes(directory: Path, files: Files) -> None:
    """Hash every file of a checkpoint.

    Raises:
        CheckpointError: names the first whose content is not that which was written.
    """
    for name, expected in files.manifest.files.items():
        path = directory / name
        with (
            supplied(CheckpointError, path),
            open(files.descriptors[name], "rb", closefd=False) as file,
        ):
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != expected.sha256:
            raise CheckpointError(f"{path}: its content changed after it was written (SHA-256)")


def _manifest(path: Path, descriptor: int) -> Manifest:
    values = _parse_json(path, descriptor)
    if values.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{path.parent}: has format {str(values.get('format'))[:20]}, this version reads "
            f"{CHECKPOINT_FORMAT}"
        )
    manifest = checked(Manifest, values, path)
    if CHECKPOINT_STATE not in manifest.files:
        raise CheckpointError(f"{path}: does not name {CHECKPOINT_STATE}")
    for name in manifest.files:
        if name != CHECKPOINT_STATE and not RANK_FILE.fullmatch(name):
            raise CheckpointError(f"{path}: names {name[:80]!r}, which is no file of a checkpoint")
    return manifest


def describe_file(path: Path) -> FileRecord:
    """What the manifest says of a file: its size in bytes and its SHA-256."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(bytes=path.stat().st_size, sha256=digest)


def _open(path: Path, stack: ExitStack) -> int:
    """A descriptor of a plain file; whatever else bears the name is not waited for."""
    _refuse_link(path)
    with supplied(CheckpointError, path):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            manifest = "; this is no complete checkpoint" if path.name == MANIFEST else ""
            raise CheckpointError(f"{path}: is missing{manifest}") from None
        stack.callback(os.close, descriptor)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CheckpointError(f"{path}: is no plain file; this is no complete checkpoint")
    return descriptor


def _make_room_for(count: int) -> None:
    """Let this process hold so many files more, as far as it may: there is one a rank."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _parse_json(path: Path, descriptor: int) -> dict[str, Any]:
    """The object in an open file; `path` names it in messages."""
    size = os.fstat(descriptor).st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: {size} bytes is too much for this file")
    with supplied(CheckpointError, path, "not valid JSON"):
        values = json.loads(os.pread(descriptor, size, 0).decode("utf8"))
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: does not hold what a checkpoint's file holds")
    return values


def _refuse_link(path: Path) -> None:
    # A link's target may change, or be any file of whoever reads this.
    if path.is_symlink():
        raise CheckpointError(f"{path}: is a link; a checkpoint holds plain files, copy it whole")


def read_state(directory: Path, files: Files) -> CheckpointState:
    """state.json with each field that a run relies on of its type and in its range."""
    path = directory / CHECKPOINT_STATE
    values = _parse_json(path, files.descriptors[CHECKPOINT_STATE])
    state = checked(CheckpointState, values, path)
    if is_checkpoint_name(directory.name) and step_of(directory) != state.step:
        raise CheckpointError(
            f"{path}: is of step {state.step}, the directory of {step_of(directory)}"
        )
    return state
