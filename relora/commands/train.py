"""`relora train`: the run, from its config to its last checkpoint."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relora.config import (
    MAY_CHANGE,
    Config,
    check_world,
    differences,
    dump_config,
    load_config,
    load_run_config,
)
from relora.errors import (
    PREEMPTED,
    CheckpointError,
    ConfigError,
    DataError,
    LostRankError,
    UserError,
)
from relora.model import build_meta_model, check_pretrained

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

# torch and all that imports it waits until the config has been checked.
if TYPE_CHECKING:
    from relora.data.shards import TokenShards
    from relora.runtime.distributed import Ranks


def train(config: Path, overrides: Sequence[str]) -> int:
    """Train, or go on with, the run that the config describes.

    Returns:
        0 when the run is finished, 75 when it was stopped and can go on.
    """
    settings = load_config(config, overrides)

    from relora.runtime.distributed import read_rank, read_ranks, read_world

    check_world(settings, read_world())
    if is_finished(settings):
        if read_rank() == 0:
            print(f"{settings.run_dir}: is finished ({settings.total_steps} steps); nothing to do")
        return 0
    check_model(settings)

    from relora.data.shards import open_shards
    from relora.runtime import zero

    ranks = read_ranks()
    shards = problem = None
    try:
        shards = open_shards(settings.data, verify=ranks.is_main)
        check_vocabulary(settings, shards)
    except DataError as error:
        problem = error  # one rank's disk alone may be at fault, so all must hear of it
    zero.init_distributed(ranks, settings.deepspeed.timeout_minutes)
    try:
        ranks.agree(problem)
        assert shards is not None
        return _guarded(settings, shards, ranks)
    finally:
        zero.leave()


def is_finished(config: Config) -> bool:
    """Whether the run directory holds this very run, finished.

    Raises:
        ConfigError: it holds another run, or one that is past the wanted length already.
    """
    from relora.runtime.rundir import read_run_state

    saved = config.run_dir / "config.yaml"
    if config.run_dir.exists() and not config.run_dir.is_dir():
        raise ConfigError(f"run_dir: {config.run_dir} is not a directory; choose another")
    if not saved.is_file():
        return False
    changes = [
        f"{path}: was {old!r}, is now {new!r}"
        for path, old, new in differences(load_run_config(config.run_dir), config)
        if not path.startswith(MAY_CHANGE)
    ]
    if changes:
        raise ConfigError(
            "\n  ".join(
                [
                    f"run_dir: {config.run_dir} holds a run with another config; choose another "
                    "run_dir, or undo what a run cannot change on its way:",
                    *changes,
                ]
            )
        )
    state = read_run_state(config.run_dir)
    if state.get("step", 0) > config.total_steps:
        raise ConfigError(
            f"train.steps: {config.total_steps}, but the run in {config.run_dir} is at step "
            f"{state['step']} already"
        )
    return state.get("status") == "finished" and state["step"] == config.total_steps


def check_model(config: Config) -> None:
    """Everything about the model that can be checked without its weights.

    Raises:
        ConfigError: targets, rank or context do not fit the model.
    """
    from relora.runtime.checkpoint import newest_checkpoint
    from relora.subject import is_subject, structure_of

    pretrained = config.model.pretrained
    if structure_of(config) is not config.model:
        check_same_model(config)
    elif pretrained is not None:
        if is_subject(pretrained):
            newest_checkpoint(pretrained)
        else:
            check_pretrained(pretrained)
    model = build_meta_model(structure_of(config))
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and config.data.sequence_length > context:
        raise ConfigError(
            f"data.sequence_length: {config.data.sequence_length} is longer than the model's "
            f"context of {context}; take at most {context}"
        )
    if config.lora is not None:
        from relora.lora.inject import find_targets

        find_targets(model, config.lora)


def check_same_model(config: Config) -> None:
    """Whether the model that the config names is still the one that the run began with.

    Raises:
        ConfigError: its file has changed since; nothing in the shapes need tell.
    """
    from relora.model import ModelConfig, load_model_config

    begun = (config.run_dir / "model" / "config.json").is_file()
    if not begun or (config.model.pretrained and not config.model.pretrained.exists()):
        return
    old = load_model_config(ModelConfig(pretrained=config.run_dir)).to_dict()
    new = load_model_config(config.model).to_dict()
    # What only one of them has is a default of another version of transformers.
    changes = [
        f"{key}: was {old[key]!r}, is now {new[key]!r}"
        for key in sorted(old.keys() & new.keys() - {"transformers_version", "dtype"})
        if old[key] != new[key]
    ]
    if changes:
        where = config.model.config or config.model.pretrained
        raise ConfigError(
            "\n  ".join(
                [
                    f"model: {where} has changed since the run in {config.run_dir} began; choose "
                    "another run_dir, or undo:",
                    *changes,
                ]
            )
        )


def check_vocabulary(config: Config, shards: TokenShards) -> None:
    """Whether the model has an embedding for every token.

    Raises:
        ConfigError: with both sizes.
    """
    from relora.subject import structure_of

    embeddings: Any = build_meta_model(structure_of(config)).get_input_embeddings()
    size = embeddings.weight.shape[0]
    if shards.vocab_size > size:
        raise ConfigError(
            f"data.tokenizer: has {shards.vocab_size} tokens, the model's vocabulary only {size}; "
            "make the model's vocab_size at least that"
        )


def _guarded(config: Config, shards: TokenShards, ranks: Ranks) -> int:
    """Run with the run directory claimed, and leave in it how the run ended."""
    from relora.run import start_run, train_run
    from relora.runtime.distributed import is_lost_rank
    from relora.runtime.rundir import read_run_state, write_run_state
    from relora.runtime.signals import StopRequest

    stop = StopRequest()
    claim = _claim(config, shards, ranks)
    step = read_run_state(config.run_dir).get("step", 0)
    status, reason, code = "failed", "a bug", 1
    run = None
    try:
        run = start_run(config, shards, ranks)
        finished = train_run(run, stop)
        status, reason, code = ("finished", "", 0) if finished else ("preempted", "", PREEMPTED)
        if not finished:
            reason = f"stopped by {stop.signal or 'train.stop_after'}"
            run.metrics.say(f"stopped at step {run.step}; the same command goes on from there")
    except UserError as error:
        reason, code = str(error), error.code
        raise
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            code, reason = CheckpointError.code, f"{config.run_dir}: cannot be written: {error}"
            raise CheckpointError(f"{reason}; the checkpoints in it are intact") from error
        if isinstance(error, RuntimeError) and is_lost_rank(error):
            code = LostRankError.code
            reason = (
                f"another rank is gone, or was silent for {config.deepspeed.timeout_minutes:g} "
                f"minutes; the same command goes on from the newest checkpoint ({error})"
            )
            raise LostRankError(reason) from error
        raise
    finally:
        stop.ignore_further()
        if ranks.is_main:
            step = run.step if run else step
            write_run_state(config.run_dir, status, reason, step, code)
        if run is not None:
            run.metrics.close()
        if claim is not None:
            claim.close()
    ranks.barrier()
    stop.restore()
    return code


def _claim(config: Config, shards: TokenShards, ranks: Ranks) -> Any:
    """Rank 0 opens the run directory; all hear of it if it cannot."""
    claim, problem = None, None
    if ranks.is_main:
        try:
            claim = _open_run_dir(config, shards, ranks)
        except UserError as error:
            problem = error
        except OSError as error:
            problem = ConfigError(f"run_dir: {config.run_dir} cannot be written: {error}")
    ranks.agree(problem)
    return claim


def _open_run_dir(config: Config, shards: TokenShards, ranks: Ranks) -> Any:
    """Claim the run directory and write what describes the run. Rank 0 only."""
    from relora.model import load_model_config
    from relora.runtime.rundir import describe_environment, lock, write_atomically

    run_dir = config.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    claim = lock(run_dir)
    write_atomically(run_dir / "config.yaml", dump_config(config))
    environment = json.dumps(describe_environment(ranks), indent=1)
    write_atomically(run_dir / "environment.json", environment + "\n")
    if not (run_dir / "model").is_dir():
        load_model_config(config.model).save_pretrained(run_dir / "model")
    if not (run_dir / "tokenizer").is_dir():
        shutil.copytree(shards.tokenizer_dir, run_dir / "tokenizer")
    return claim
