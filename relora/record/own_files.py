"""What a run keeps of its own beside its checkpoints: model, tokenizer, and what it ran on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relora.config import Config
from relora.data.tokenizer import tokenizer_hash
from relora.errors import CheckpointError
from relora.files import is_file, making, read_json, supplied
from relora.load import OF_SPEED, leaves
from relora.record.layout import MODEL, TOKENIZER, RunDirectory
from relora.record.rundir import describe_environment, record_stretch

if TYPE_CHECKING:
    from relora.data.shards import TokenShards
    from relora.engine.distributed import Ranks
    from relora.record.checkpoint import Checkpoint


def hash_run_files(run_dir: Path) -> dict[str, str]:
    """SHA-256 of what a checkpoint needs of its run directory, by a name of it."""
    model = read_json(RunDirectory(run_dir).model_json, CheckpointError)
    model.pop("transformers_version", None)
    return {
        MODEL: hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest(),
        TOKENIZER: tokenizer_hash(RunDirectory(run_dir).tokenizer),
    }


def describe_files(
    config: Config, shards: TokenShards, ranks: Ranks, checkpoint: Checkpoint | None, step: int
) -> tuple[dict[str, str], list[str]]:
    """Hashes of the run's own model and tokenizer, and what had to be made anew. Collective.

    Nothing, where no run has claimed the directory.

    Raises:
        CheckpointError: the model is another than that of the checkpoint, or nothing can be written
            (every rank raises).
    """
    files: dict[str, str] = {}
    said: list[str] = []
    run_dir = config.run_dir
    what = "its own files cannot be read or written"
    with ranks.together(), supplied(CheckpointError, run_dir, what):
        if ranks.is_main and is_file(RunDirectory(run_dir).config):
            said, files = keep_tokenizer(run_dir, shards), hash_run_files(run_dir)
            before = checkpoint.state.run_files.get(MODEL) if checkpoint else None
            if before not in (None, files[MODEL]):  # None: not in checkpoints of old
                raise CheckpointError(
                    f"{RunDirectory(run_dir).model_json}: is not as it was when the newest "
                    "checkpoint was written; put the old one back"
                )
            complaint = record_stretch(run_dir, step, _environment(config, shards, ranks))
            said += [complaint] if complaint else []
    return files, said


def _environment(config: Config, shards: TokenShards, ranks: Ranks) -> dict[str, Any]:
    """What this process is part of; `settings` are those that change how long a step takes."""
    values = leaves(config.model_dump(mode="json"))
    return {
        **describe_environment(ranks),
        "settings": {path: values[path] for path in OF_SPEED if path in values},
        "shards": str(shards.directory.resolve()),
    }


def keep_tokenizer(run_dir: Path, shards: TokenShards) -> list[str]:
    """Make the run's tokenizer that of its shards, if it is not; rank 0 alone."""
    own = RunDirectory(run_dir).tokenizer
    with contextlib.suppress(OSError):
        if tokenizer_hash(own) == shards.index["tokenizer_sha256"]:
            return []
    there = own.exists()
    with making(own, replace=True) as temporary:
        shutil.copytree(shards.tokenizer_dir, temporary, dirs_exist_ok=True)
    return [f"{own}: was not the tokenizer of the shards; made anew"] if there else []
