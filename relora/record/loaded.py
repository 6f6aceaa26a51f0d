"""What a RUN|CHECKPOINT argument means: its config, its checkpoint, its model with all merged."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from relora.config import Config
from relora.errors import CheckpointError, ConfigError
from relora.files import is_file, supplied
from relora.load import build_config, load_run_config
from relora.lora.inject import add_adapters, merge_adapters
from relora.lora.layers import adapted_layers
from relora.model import ModelConfig, build_model, fingerprint
from relora.record.checkpoint import (
    Checkpoint,
    is_checkpoint,
    open_checkpoint_of,
)
from relora.record.layout import CHECKPOINT_STATE, MODEL, TOKENIZER, RunDirectory, run_of
from relora.record.own_files import hash_run_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LoadedRun:
    """A checkpoint of a run, ready to be read."""

    run_dir: Path
    config: Config
    checkpoint: Checkpoint

    @property
    def tokenizer_dir(self) -> Path:
        """The run's transformers tokenizer.

        Raises:
            CheckpointError: it is not the one that the checkpoint was written with.
        """
        directory = RunDirectory(self.run_dir).tokenizer
        self._compare(directory, TOKENIZER)
        return directory

    @property
    def structure(self) -> ModelConfig:
        """The model's structure, from the run's own copy.

        Raises:
            CheckpointError: it is not the one that the checkpoint was written with.
        """
        path = RunDirectory(self.run_dir).model_json
        self._compare(path, MODEL)
        return ModelConfig(config=path)

    def first_model(self) -> PreTrainedModel:
        """The model that the run began with, on the CPU in fp32.

        Raises:
            ConfigError: what it was made of is gone, or has other weights now.
        """
        pretrained = self.config.model.pretrained
        structure = self.config.model if pretrained else self.structure
        model = build_beginning(structure, self.config.seed)
        known = self.checkpoint.state.beginning  # "" in checkpoints of old
        if known and fingerprint(model) != known:
            place, way_out = "its seed", "install the versions that environment.json names"
            if pretrained:
                place, way_out = f"model.pretrained: {pretrained}", "put the old weights back"
            raise ConfigError(
                f"{place}: gives other weights now than {self.run_dir} began with; {way_out}"
            )
        return model

    def merged_model(self) -> PreTrainedModel:
        """The plain transformers model, on the CPU in fp32: W + s·B·A for each adapted W."""
        model = self.adapted_model()
        merge_adapters(model)
        return model.requires_grad_(True)

    def adapted_model(self) -> PreTrainedModel:
        """The transformers model with its adapters, if the run has them by then, beside W."""
        config, checkpoint = self.config, self.checkpoint
        model = build_model(self.structure, config.seed)
        if config.clock.has_adapters(checkpoint.step):
            assert config.lora is not None
            add_adapters(model, config.lora, seed=None)
        checkpoint.check_fits(model)
        with torch.no_grad():
            for name, param in model.named_parameters():
                param.copy_(checkpoint.tensor(name))
        for _, layer in adapted_layers(model):
            layer.shrink = checkpoint.state.shrink  # decay since the last merge
        return model

    def _compare(self, path: Path, name: str) -> None:
        expected = self.checkpoint.state.run_files.get(name)  # not in checkpoints of old
        with supplied(CheckpointError, path):
            if expected is not None and hash_run_files(self.run_dir)[name] != expected:
                raise CheckpointError(
                    f"{path}: is not as it was when {self.checkpoint.directory} was written; put "
                    "the old one back"
                )


def build_beginning(structure: ModelConfig, seed: int) -> PreTrainedModel:
    """What a run begins with: weights from scratch, of a transformers directory, or of a run.

    Raises:
        ConfigError, CheckpointError: there are none, or not all.
    """
    if structure.pretrained is not None and is_run_or_checkpoint(structure.pretrained):
        return load_run(structure.pretrained).merged_model()
    return build_model(structure, seed)


def is_run_or_checkpoint(path: Path) -> bool:
    """Whether `path` is a run directory or one of its checkpoints."""
    return is_file(RunDirectory(path).config) or is_checkpoint(path)


def say_aside(text: str) -> None:
    """A line beside a command's output, which may be read by a program."""
    print(f"relora: {text}", file=sys.stderr)


def load_run(path: Path | str, say: Callable[[str], None] = say_aside) -> LoadedRun:
    """Find the checkpoint that `path` (a run or a checkpoint) means, and its run.

    A flipped bit would load without a word, so every file is hashed. All are held open: the run
    may retire the checkpoint as soon as it was found.

    Args:
        say: is told of every newer checkpoint that was passed over.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    checkpoint, complaints = open_checkpoint_of(Path(path))
    files = run_of(checkpoint.directory)
    run_dir = files.path
    if not is_file(files.config):
        raise CheckpointError(
            f"{checkpoint.directory}: {run_dir} is no run directory: it has no config.yaml"
        )
    for complaint in complaints:
        say(f"passed over {complaint}")
    return LoadedRun(run_dir, _config_of(checkpoint, run_dir), checkpoint)


def _config_of(checkpoint: Checkpoint, run_dir: Path) -> Config:
    """The config that a checkpoint was written with, whatever became of the run's file since."""
    values = checkpoint.state.config
    if values is None:
        return load_run_config(run_dir)
    where = f"{checkpoint.directory / CHECKPOINT_STATE}: config"
    try:
        return build_config(values, where, read_model=False)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def structure_of(config: Config) -> ModelConfig:
    """The model's structure: the run directory's own once the run has begun, else as configured.

    So what a run started from may go; its checkpoints hold every weight.
    """
    path = RunDirectory(config.run_dir).model_json
    if not is_file(path):
        return config.model
    checkpointing = config.model.gradient_checkpointing
    return ModelConfig(config=path, gradient_checkpointing=checkpointing)
