"""A run is a directory of plain files: config, state, environment, metrics, checkpoints."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from relora.errors import CheckpointError
from relora.runtime.distributed import Ranks

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "tokenizers", "sentencepiece")


def read_run_state(run_dir: Path) -> dict[str, Any]:
    """What `run_state.json` says: status, reason, step, code. Empty before the first start."""
    path = run_dir / "run_state.json"
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None


def write_run_state(run_dir: Path, status: str, reason: str, step: int, code: int) -> None:
    """Record how the run stands; launchers lose exit codes, this file keeps them.

    Args:
        status: running, preempted, failed or finished.
        code: the exit code that goes with it (0 while running).
    """
    values = {"status": status, "reason": reason, "step": step, "code": code}
    write_atomically(run_dir / "run_state.json", json.dumps(values, indent=1) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file so that a reader sees the old or the new content, never a part."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def lock(run_dir: Path) -> IO[str]:
    """Claim a run directory for this process, for as long as the returned file stays open.

    Raises:
        CheckpointError: another process trains in it.
    """
    file = (run_dir / ".lock").open("a+", encoding="utf8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        raise CheckpointError(
            f"{run_dir}: process {file.read().strip() or 'unknown'} trains in it already; "
            "wait for it, stop it, or choose another run_dir"
        ) from None
    file.seek(0)
    file.truncate()
    file.write(str(os.getpid()))
    file.flush()
    return file


def describe_environment(ranks: Ranks) -> dict[str, Any]:
    """Versions, git commit, devices and world size: what a reader needs to place the figures."""
    import torch

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    on_gpu = ranks.device.type == "cuda"
    return {
        "relora": installed("relora"),
        "commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(ranks.device) if on_gpu else platform.machine(),
        "world_size": ranks.world,
        "threads_per_rank": torch.get_num_threads(),
    }


def _git_commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
