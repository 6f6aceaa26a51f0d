"""The two JSON files of a checkpoint: the manifest, which names all others, and the state.

Both may have been damaged, mixed up or made up by anybody; what is returned here was checked.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from relora.errors import CheckpointError

FORMAT = 1
MAX_JSON_BYTES = 1 << 26  # far beyond what any model or world size needs
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
        if name != "state.json" and not _RANK_FILE.fullmatch(name):
            raise CheckpointError(
                f"{directory / 'manifest.json'}: names {name[:80]!r}, which is no file of a "
                "checkpoint"
            )
        path = directory / name
        _refuse_link(path)
        if not path.is_file():
            raise CheckpointError(f"{path}: is missing")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(f"{path}: has {size} bytes, {expected['bytes']} were written")
        try:
            changed = thorough and _sha256(path) != expected["sha256"]
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None
        if changed:
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


def describe(path: Path) -> dict[str, Any]:
    """What the manifest says of a file: its size in bytes and its SHA-256."""
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    _refuse_link(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing; this is no complete checkpoint")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: {path.stat().st_size} bytes is too much for this file")
    try:
        values = json.loads(path.read_text(encoding="utf8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: does not hold what a checkpoint's file holds")
    return values


def _refuse_link(path: Path) -> None:
    # A link's target may change, or be any file of whoever reads this.
    if path.is_symlink():
        raise CheckpointError(f"{path}: is a link; a checkpoint holds plain files, copy it whole")


def read_state(path: Path) -> dict[str, Any]:
    """state.json with each field that a run relies on of its type and in its range."""
    state = _DEFAULTS | _read_json(path)
    for field, (fits, allowed) in _FIELDS.items():
        if field not in state:
            raise CheckpointError(f"{path}: {field} is missing")
        if not fits(state[field]):
            raise CheckpointError(f"{path}: {field} must be {allowed}")
    directory = path.parent
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
_DEFAULTS: dict[str, Any] = {"shrink": 1.0, "loss_scale": None, "losses": []}
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
    "shapes": (_is_table(_is_shape), "a list of whole numbers for each parameter"),
    "adam_steps": (_is_table(_is_amount), "a number ≥ 0 for each parameter"),
}
