"""`relora train`: the run, from its config to its last checkpoint."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relora.config import Config
from relora.errors import (
    ConfigError,
    DataError,
    LostRankError,
    UserError,
)
from relora.files import exists, is_dir, is_file
from relora.load import check_world, load_config, load_run_config
from relora.model import build_meta_model, check_causal, check_pretrained
from relora.record.standing import changes_of_model, changes_of_run, is_complete
from relora.structure import check_context

# torch and all that imports it waits until the config has been checked.
if TYPE_CHECKING:
    from relora.data.shards import TokenShards
    from relora.engine.distributed import Ranks


def train(config: Path, overrides: Sequence[str], resume: str = "auto") -> int:
    """Train, or go on with, the run that the config describes.

    Args:
        resume: `auto` for the newest sound checkpoint, or the directory of one.

    Returns:
        0 when the run is finished, 75 when it was stopped and can go on.
    """
    from relora.engine.signals import follow_launcher

    follow_launcher()
    settings = load_config(config, overrides)

    from relora.engine.distributed import (
        is_lost_rank,
        read_rank,
        read_ranks,
        read_world,
    )

    check_world(settings, read_world())
    wanted = None if resume == "auto" else find_checkpoint(settings.run_dir, Path(resume))
    if is_finished(settings, wanted):
        if read_rank() == 0:
            print(f"{settings.run_dir}: is finished ({settings.total_steps} steps); nothing to do")
        return 0
    check_model(settings)

    from relora.data.shards import open_shards
    from relora.engine import deepspeed
    from relora.record.moved import prepared_data
    from relora.training.guard import guarded

    ranks = read_ranks()
    shards = problem = None
    try:
        # Machines may have disks of their own: one rank on each reads its shards through.
        shards = open_shards(prepared_data(settings), verify=ranks.local_rank == 0)
        check_vocabulary(settings, shards)
        if ranks.local_rank == 0:
            check_tokenizer(settings, shards)
    except UserError as error:
        if ranks.world == 1:
            raise
        problem = error  # one rank's disk alone may be at fault, so all must hear of it
    minutes = settings.deepspeed.timeout_minutes
    try:
        deepspeed.init_distributed(ranks, minutes)
        ranks.agree(problem)
        assert shards is not None
        check_same_shards(shards, ranks)
        return guarded(settings, shards, ranks, wanted)
    except RuntimeError as error:
        if is_lost_rank(error):
            raise LostRankError(
                f"not all {ranks.world} ranks came together within {minutes:g} minutes, or one was "
                f"lost before the run began; run the same command again ({error})"
            ) from error
        raise
    finally:
        deepspeed.leave(together=sys.exc_info()[0] is None)


def find_checkpoint(run_dir: Path, path: Path) -> Path:
    """The checkpoint of this run that `--resume PATH` means, sound or not.

    Raises:
        ConfigError: there is none, or it belongs to another run.
    """
    from relora.record.checkpoint import complete_checkpoints
    from relora.record.manifest import is_checkpoint_name

    home = run_dir / "checkpoints"
    names = [checkpoint.name for checkpoint in complete_checkpoints(run_dir)]
    has = f"{home} has {', '.join(names)}" if names else f"{home} has none"
    resolved = Path(os.path.realpath(path))
    if not is_dir(resolved):
        raise ConfigError(f"--resume: {str(path)[:300]}: no such checkpoint; {has}")
    if resolved.parent != Path(os.path.realpath(home)) or not is_checkpoint_name(resolved.name):
        raise ConfigError(
            f"--resume: {path} is no checkpoint of this run; {has}. To start another run from its "
            f"weights, set model.pretrained={path} and another run_dir"
        )
    return home / resolved.name


def is_finished(config: Config, wanted: Path | None = None) -> bool:
    """Whether the run directory holds this very run, finished, and no going back is wanted.

    Raises:
        ConfigError: it holds another run, or one that is past the wanted length already.
        CheckpointError: its checkpoints are gone.
    """
    from relora.record.manifest import step_of
    from relora.record.rundir import check_plain, read_run_state

    saved = config.run_dir / "config.yaml"
    if exists(config.run_dir) and not is_dir(config.run_dir):
        raise ConfigError(f"run_dir: {config.run_dir} is not a directory; choose another")
    check_plain(saved)
    if not is_file(saved):
        return False
    changes = changes_of_run(config)
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
    if load_run_config(config.run_dir) != config:
        check_same_model(config)
    state = read_run_state(config.run_dir)
    step = state.get("step", 0) if wanted is None else step_of(wanted)
    if step > config.total_steps:
        raise ConfigError(
            f"train.steps: {config.total_steps}, but the run in {config.run_dir} is at step "
            f"{step} already"
        )
    return wanted is None and is_complete(config, state)


def check_model(config: Config) -> None:
    """Everything about the model that can be checked without its weights.

    Raises:
        ConfigError: targets, rank or context do not fit the model.
    """
    from relora.engine.distributed import read_rank
    from relora.record.checkpoint import is_checkpoint, named_checkpoints, no_checkpoint
    from relora.record.loaded import is_subject, structure_of

    pretrained = config.model.pretrained
    if structure_of(config) is not config.model:
        check_same_model(config)
    elif pretrained is not None:
        if is_subject(pretrained):
            if not is_checkpoint(pretrained) and not named_checkpoints(pretrained):
                raise no_checkpoint(pretrained)
        else:
            check_pretrained(pretrained)
    if structure_of(config) is config.model and read_rank() == 0:  # one is enough, and costs
        check_causal(config.model)
    model = build_meta_model(structure_of(config))
    where = str(config.model.config or config.model.pretrained)
    check_context(model.config, config.data.sequence_length, where)
    if config.lora is not None:
        from relora.lora.choose import find_targets

        find_targets(model, config.lora)


def check_same_model(config: Config) -> None:
    """Whether the model that the config names is still the one that the run began with.

    Raises:
        ConfigError: its file has changed since; nothing in the shapes need tell.
    """
    changes = changes_of_model(config)
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
    from relora.record.loaded import structure_of

    embeddings: Any = build_meta_model(structure_of(config)).get_input_embeddings()
    size = embeddings.weight.shape[0]
    if shards.vocab_size > size:
        raise ConfigError(
            f"data.tokenizer: has {shards.vocab_size} tokens, the model's vocabulary only {size}; "
            "make the model's vocab_size at least that"
        )


def check_tokenizer(config: Config, shards: TokenShards) -> None:
    """Whether an export will give the ids that the run is trained on.

    Raises:
        DataError: transformers builds another tokenizer for this type of model; or a run that has
            not begun would see documents begin otherwise than texts that an export is given.
    """
    from relora.data.beginning import begin_ids
    from relora.data.tokenizer import load_tokenizer
    from relora.data.transformers_tokenizer import require_agreement
    from relora.model import load_model_config
    from relora.record.loaded import structure_of

    structure = structure_of(config)
    begins = begin_ids(load_tokenizer(shards.tokenizer_dir))
    has_begun = structure is not config.model
    if begins != list(shards.index.get("begin_ids", [])) and not has_begun:
        raise DataError(
            f"{shards.directory}: was prepared when documents did not begin with what the "
            f"tokenizer puts before a text (ids {begins}); delete it and run: relora prepare CONFIG"
        )
    require_agreement(shards.tokenizer_dir, load_model_config(structure))


def check_same_shards(shards: TokenShards, ranks: Ranks) -> None:
    """Whether every rank has opened the same tokens; collective.

    Raises:
        DataError: names the first rank that has not (every rank raises).
    """
    found = ranks.gather(shards.fingerprint)
    other = next((rank for rank in range(ranks.world) if found[rank] != found[0]), None)
    if other is not None:
        raise DataError(
            f"{shards.directory}: holds other tokens on the machine of rank {other} than on that "
            "of rank 0; give all machines the same shards"
        )
