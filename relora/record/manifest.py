"""The two JSON files of a checkpoint: the manifest, which names all others, and the state.

Both may have been damaged, mixed up or made up by anybody; what is returned here was checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from relora.errors import CheckpointError
from relora.files import MAX_JSON_BYTES, supplied

FORMAT = 1
_NAME = re.compile(r"step_([0-9]{8,})")
_RANK_FILE = re.compile(r"rank_[0-9]{5,}\.safetensors")


def rank_file(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"rank_{rank:05d}.safetensors"


def is_checkpoint_name(name: str) -> bool:
    """Whether a directory of this name is a checkpoint and no unfinished or doomed one."""
    return _NAME.fullmatch(name) is not None


def step_of(directory: Path) -> int:
    """The step in a checkpoint directory's name."""
    match = _NAME.fullmatch(directory.name)
    assert match is not None
    return int(match[1])


class Files(NamedTuple):
    """A checkpoint's files, open: a run may retire it while somebody reads."""

    manifest: dict[str, Any]
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
        first = _open(directory / "manifest.json", stack)
        manifest = _parse_json(directory / "manifest.json", first)
        if manifest.get("format") != FORMAT:
            raise CheckpointError(
                f"{directory}: has format {str(manifest.get('format'))[:20]}, this version reads "
                f"{FORMAT}"
            )
        described = _described_files(directory, manifest)
        _make_room_for(len(described))
        files = {name: _open(directory / name, stack) for name in described}
        for name, expected in described.items():
            size = os.fstat(files[name]).st_size
            if size != expected["bytes"]:
                written = str(expected["bytes"])[:20]
                raise CheckpointError(
                    f"{directory / name}: has {size} bytes, {written} were written"
                )
        yield Files(
            manifest, files, sum(os.fstat(each).st_size for each in (first, *files.values()))
        )


def compare_hashes(directory: Path, files: Files) -> None:
    """Hash every file of a checkpoint.

    Raises:
        CheckpointError: names the first whose content is not that which was written.
    """
    for name, expected in files.manifest["files"].items():
        path = directory / name
        with (
            supplied(CheckpointError, path),
            open(files.descriptors[name], "rb", closefd=False) as file,
        ):
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != expected["sha256"]:
            raise CheckpointError(f"{path}: its content changed after it was written (SHA-256)")


def verify(directory: Path, thorough: bool) -> dict[str, Any]:
    """Compare a checkpoint's files with its manifest; returns the manifest.

    Args:
        thorough: hash every file too, not just compare the sizes.

    Raises:
        CheckpointError: names the first file that is missing, changed or of an unknown format.
    """
    with holding(directory) as files:
        if thorough:
            compare_hashes(directory, files)
        return files.manifest


def _described_files(directory: Path, manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(file, dict) and {"bytes", "sha256"} <= file.keys() for file in files.values()
    ):
        raise CheckpointError(f"{directory}: manifest.json does not describe the files")
    if "state.json" not in files:
        raise CheckpointError(f"{directory}: manifest.json does not name state.json")
    for name in files:
        if name != "state.json" and not _RANK_FILE.fullmatch(name):
            raise CheckpointError(
                f"{directory / 'manifest.json'}: names {name[:80]!r}, which is no file of a "
                "checkpoint"
            )
    return files


def describe(path: Path) -> dict[str, Any]:
    """What the manifest says of a file: its size in bytes and its SHA-256."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _open(path: Path, stack: ExitStack) -> int:
    """A descriptor of a plain file; whatever else bears the name is not waited for."""
    _refuse_link(path)
    with supplied(CheckpointError, path):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            manifest = "; this is no complete checkpoint" if path.name == "manifest.json" else ""
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


def read_state(directory: Path, files: Files) -> dict[str, Any]:
    """state.json with each field that a run relies on of its type and in its range."""
    path = directory / "state.json"
    state = _DEFAULTS | _parse_json(path, files.descriptors["state.json"])
    for field, (fits, allowed) in _FIELDS.items():
        if field not in state:
            raise CheckpointError(f"{path}: {field} is missing")
        if not fits(state[field]):
            raise CheckpointError(f"{path}: {field} must be {allowed}")
    if is_checkpoint_name(directory.name) and step_of(directory) != state["step"]:
        raise CheckpointError(
            f"{path}: is of step {state['step']}, the directory of {step_of(directory)}"
        )
    return state


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_amount(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 2**63


def _is_table(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _is_scale(value: Any) -> bool:
    return value is None or (
        isinstance(value, list) and len(value) == 2 and _is_amount(value[0]) and _is_count(value[1])
    )


# Of checkpoints from before these were kept.
_DEFAULTS: dict[str, Any] = {
    "shrink": 1.0,
    "loss_scale": None,
    "losses": [],
    "config": None,
    "run_files": {},
}
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("step", "consumed", "skipped", "merges", "world_size"), (_is_count, "a whole number ≥ 0")
    ),
    "elapsed_s": (_is_amount, "a number ≥ 0"),
    "shrink": (_is_amount, "a number ≥ 0"),
    "loss_scale": (_is_scale, "null or [scale, updates since it changed]"),
    "losses": (
        lambda value: isinstance(value, list) and all(map(_is_amount, value)),
        "a list of numbers ≥ 0",
    ),
    "data": (lambda value: isinstance(value, str), "text"),
    "config": (lambda value: value is None or isinstance(value, dict), "a mapping"),
    "run_files": (_is_table(lambda value: isinstance(value, str)), "a hash for each name"),
    "shapes": (_is_table(_is_shape), "a list of whole numbers for each parameter"),
    "adam_steps": (_is_table(_is_amount), "a number ≥ 0 for each parameter"),
}
