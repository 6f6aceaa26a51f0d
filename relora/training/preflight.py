"""What is looked at before a run begins or goes on: its checkpoint, its model, its data; once each.

The run directory itself is `record.standing`'s.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from relora.config import Config
from relora.data.beginning import begin_ids
from relora.data.shards import TokenShards, open_shards
from relora.data.tokenizer import load_tokenizer
from relora.data.transformers_tokenizer import require_agreement
from relora.engine.distributed import Ranks
from relora.errors import ConfigError, DataError
from relora.files import is_dir
from relora.lora.choose import find_targets
from relora.model import build_meta_model, check_causal, check_pretrained
from relora.record.checkpoint import (
    complete_checkpoints,
    is_checkpoint,
    named_checkpoints,
    no_checkpoint,
)
from relora.record.layout import RunDirectory, is_checkpoint_name
from relora.record.loaded import is_run_or_checkpoint, structure_of
from relora.record.moved import prepared_data
from relora.structure import check_context
from relora.training.compiled import find_blocks


def checkpoint_to_resume(run_dir: Path, path: Path) -> Path:
    """The checkpoint of this run that `--resume PATH` means, sound or not.

    Raises:
        ConfigError: there is none, or it belongs to another run.
    """
    home = RunDirectory(run_dir).checkpoints
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


def check_model(config: Config, thorough: bool = True) -> PreTrainedModel:
    """Everything about the model that can be checked without its weights; it, on the meta device.

    Args:
        thorough: try whether it looks ahead, too. One rank is enough, and it costs.

    Raises:
        ConfigError: targets, rank, context or what else is asked for do not fit the model.
    """
    structure, pretrained = structure_of(config), config.model.pretrained
    if structure is config.model:  # the run has no copy of it yet
        if pretrained is not None and not is_run_or_checkpoint(pretrained):
            check_pretrained(pretrained)
        elif pretrained is not None and not (
            is_checkpoint(pretrained) or named_checkpoints(pretrained)
        ):
            raise no_checkpoint(pretrained)
        if thorough:
            check_causal(config.model)
    model = build_meta_model(structure)
    where = str(config.model.config or pretrained)
    check_context(model.config, config.data.sequence_length, where)
    if config.lora is not None:
        find_targets(model, config.lora)
    if config.train.compile:
        find_blocks(model)
    return model


def check_data(config: Config, model: PreTrainedModel, ranks: Ranks) -> TokenShards:
    """The run's shards, if they and their tokenizer are sound and fit the model.

    Machines may have disks of their own: one rank on each reads its shards through.

    Args:
        model: on any device.

    Raises:
        ConfigError: they are not prepared, or the model has no embedding for every token.
        DataError: they are damaged, or an export would give other ids.
    """
    first = ranks.local_rank == 0
    shards = open_shards(prepared_data(config), verify=first)
    embeddings: Any = model.get_input_embeddings()
    size = embeddings.weight.shape[0]
    if shards.vocab_size > size:
        raise ConfigError(
            f"data.tokenizer: has {shards.vocab_size} tokens, the model's vocabulary only {size}; "
            "make the model's vocab_size at least that"
        )
    if first:
        if structure_of(config) is config.model:
            check_beginning(shards)
        require_agreement(shards.tokenizer_dir, model.config)
    return shards


def check_beginning(shards: TokenShards) -> None:
    """Whether documents begin as texts do that an export is given. Runs that have begun may go on.

    Raises:
        DataError: they do not.
    """
    begins = begin_ids(load_tokenizer(shards.tokenizer_dir))
    if begins != list(shards.index.get("begin_ids", [])):
        raise DataError(
            f"{shards.directory}: was prepared when documents did not begin with what the "
            f"tokenizer puts before a text (ids {begins}); delete it and run: relora prepare CONFIG"
        )


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
