"""What lies in a run directory, by name. No other file of the package spells these names.

config.yaml             the resolved config
run_state.json          how the run stands or ended, with its exit code
environment.json        what each stretch of it ran on
metrics.jsonl           every figure, a JSON object a line
log.txt                 the same for people
events.out.tfevents.*   the same for TensorBoard, which calls a run as the directory is called;
tokens/                 and its main figures over tokens
model/  tokenizer/      the model's structure, and the tokenizer, as transformers keeps them
checkpoints/step_XXXXXXXX/
    rank_XXXXX.safetensors …  state.json  manifest.json
spectra/step_XXXXXXXX.safetensors …   measurements
spectra/start/LAYER.safetensors …     the weights that they are counted from
adapters/cycle_XXXXX/   what `relora.keep_adapters` keeps of each cycle, as PEFT has it
rollbacks.json          what the run went back from, if it did
changes.json            settings that it changed on its way, if it did
trackers.json           what the run is called where `train.log_to` sends its figures
.lock                   held by the process that trains in it
.ranks/                 marks of ranks that failed, while they do
"""

from __future__ import annotations

import re
from pathlib import Path

from relora.files import TEMPORARY

CONFIG = "config.yaml"
STATE = "run_state.json"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
ARMS_FILE = "arms.json"  # of a comparison: each arm's overrides, runs and rates tried
ROLLBACKS = "rollbacks.json"
CHANGES = "changes.json"
TRACKERS = "trackers.json"
MODEL = "model"
MODEL_JSON = "config.json"  # transformers' own name for a model's structure
TOKENIZER = "tokenizer"
CHECKPOINTS = "checkpoints"
CHECKPOINT_STATE = "state.json"
MANIFEST = "manifest.json"

# What killed processes leave of what is replaced as a whole.
_REPLACED = (
    *(CONFIG, STATE, ENVIRONMENT, METRICS, ROLLBACKS, CHANGES, TRACKERS, MODEL, TOKENIZER),
)
LEFTOVER = re.compile(rf"({'|'.join(map(re.escape, _REPLACED))}){TEMPORARY}")
# Of saves, those of earlier versions too; anything else there is somebody else's.
LEFTOVER_OF_SAVES = re.compile(rf"step_[0-9]{{8,}}({TEMPORARY}|(\.old|\.[0-9]+)?\.tmp)")
RANK_FILE = re.compile(r"rank_[0-9]{5,}\.safetensors")
_CHECKPOINT = re.compile(r"step_([0-9]{8,})")


class RunDirectory:
    """The paths in a run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / CONFIG  # a directory that has it is a run's
        self.state = path / STATE
        self.environment = path / ENVIRONMENT
        self.metrics = path / METRICS
        self.log = path / "log.txt"
        self.over_tokens = path / "tokens"
        self.rollbacks = path / ROLLBACKS
        self.changes = path / CHANGES
        self.trackers = path / TRACKERS
        self.lock = path / ".lock"
        self.marks = path / ".ranks"
        self.model = path / MODEL
        self.model_json = self.model / MODEL_JSON
        self.tokenizer = path / TOKENIZER
        self.checkpoints = path / CHECKPOINTS
        self.spectra = path / "spectra"
        self.adapters = path / "adapters"

    def checkpoint(self, step: int) -> Path:
        """The directory of the checkpoint of a step."""
        return self.checkpoints / f"step_{step:08d}"

    def cycle(self, number: int) -> Path:
        """The directory of the adapters that a cycle ended with; from 1."""
        return self.adapters / f"cycle_{number:05d}"

    def measurement(self, step: int) -> Path:
        """The file of what was measured after a step."""
        return self.spectra / f"step_{step:08d}.safetensors"

    def part_of_measurement(self, step: int, rank: int) -> Path:
        """What a rank writes of it."""
        return self.spectra / f"step_{step:08d}.rank_{rank:04d}"

    def spectra_start(self, layer: str) -> Path:
        """The weight that a layer's updates are counted from."""
        return self.spectra / "start" / f"{layer}.safetensors"


def run_of(checkpoint: Path) -> RunDirectory:
    """The run directory that a checkpoint belongs to, with links followed."""
    return RunDirectory(checkpoint.resolve().parent.parent)


def rank_file(rank: int) -> str:
    """Name of the file of a checkpoint that a rank writes."""
    return f"rank_{rank:05d}.safetensors"


def is_checkpoint_name(name: str) -> bool:
    """Whether a directory of this name is a checkpoint and no unfinished or doomed one."""
    return _CHECKPOINT.fullmatch(name) is not None


def step_of(directory: Path) -> int:
    """The step in a checkpoint directory's name."""
    match = _CHECKPOINT.fullmatch(directory.name)
    assert match is not None
    return int(match[1])
