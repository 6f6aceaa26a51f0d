"""The `train` and `spectra` sections: how long, how often what, and what is measured."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from relora.section import Section

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(value: object) -> int:
    """`1.2B` → 1200000000; K, M, B and T are powers of a thousand."""
    match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([KMBT]?)\s*", str(value).upper())
    if match is None:
        raise ValueError("a whole number, or one with K, M, B or T, such as 1.2B")
    count = float(match[1].replace("_", "")) * _UNITS[match[2]]
    if count >= 2**63:
        raise ValueError("must fit in 64 bits")
    return round(count)


class SpikeConfig(Section):
    """Go back to the newest checkpoint, and past the data since, when the loss jumps.

    A jump is a step whose loss exceeds mean + sigmas · standard deviation of the last `window`
    steps, when the learning rate is neither warming up nor warming up again.
    """

    sigmas: float = Field(default=6.0, gt=0)
    """How far a loss lies above the mean of the window to be a jump, in standard deviations."""
    window: int = Field(default=128, ge=2)
    """Steps that mean and deviation are taken of; before so many there is no jump."""
    max_rollbacks: int = Field(default=3, ge=1)
    """In the whole run; one more ends it."""


class TrainConfig(Section):
    """How long, and how often what. Lengths and intervals may change when a run is continued."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; either this or `tokens`. 20k is understood."""
    tokens: int | None = Field(default=None, ge=1)
    """Length in tokens, rounded up to whole steps; 1.2B is understood."""
    log_every: int = Field(default=10, ge=1)
    """Steps between lines of the log."""
    log_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        default=["tensorboard"]
    )
    """Where figures go beside metrics.jsonl: TensorBoard in any case, the others as optional
    packages."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations; null = at the end only."""
    eval_sequences: int | None = Field(default=None, ge=1)
    """Sequences of an evaluation; null = the whole validation split."""
    sample_prompt: str | None = Field(default=None, min_length=1)
    """Text that each evaluation continues by the likeliest tokens, for TensorBoard; null = none."""
    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; null = after half an hour of training without one, and at the
    end."""
    background_save: bool = False
    """Write checkpoints beside the training; needs host memory for a copy."""
    keep_checkpoints: int = Field(default=3, ge=1)
    """How many of the newest stay."""
    keep_every: int | Literal["cycle"] | None = None
    """Checkpoints that stay for ever, and are not counted: each N steps, or at each merge
    (cycle)."""
    stop_after: int | None = Field(default=None, ge=1)
    """Stop, resumable, once this step is done."""
    max_skipped: int = Field(default=10, ge=1)
    """Non-finite updates in a row before giving up."""
    compile: Literal["blocks"] | None = None
    """Each block by torch.compile; null = nothing."""
    spike: SpikeConfig | None = None
    """Go back and past the data when the loss jumps; null = train on."""

    @field_validator("steps", "tokens", mode="before")
    @classmethod
    def _count(cls, value: object) -> object:
        return parse_count(value) if isinstance(value, str) else value

    @field_validator("keep_every", mode="before")
    @classmethod
    def _interval(cls, value: object) -> object:
        if value not in (None, "cycle") and not (type(value) is int and value >= 1):
            raise ValueError("must be a number of steps from 1 up, or cycle, or null")
        return value

    @field_validator("log_to")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("must name each once")
        return value

    @model_validator(mode="after")
    def _lengths(self) -> TrainConfig:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give the run's length as either steps or tokens")
        return self


class SpectraConfig(Section):
    """Singular values of what the adapted weights gain, for each cycle and since `start`.

    `relora compare` draws them. They take a copy of those weights on disk (fp32, in the run
    directory), and well below 1 % of the training time at the default interval.
    """

    every: int | None = Field(default=None, ge=1)
    """Steps between measurements; null = at each merge, and at the end."""
    start: int | None = Field(default=None, ge=0)
    """Step that the cumulative update is counted from: null = the birth of adapters, or 0. In full
    rank it may be set to the step at which the runs to compare with get their adapters."""
    directions: int = Field(default=8, ge=1)
    """Leading singular vectors kept of each update."""
