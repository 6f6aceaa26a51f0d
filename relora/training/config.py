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
    window: int = Field(default=128, ge=2)  # steps; before so many there is no jump
    max_rollbacks: int = Field(default=3, ge=1)  # in the whole run; one more ends it


class TrainConfig(Section):
    """How long, and how often what. Lengths and intervals may change when a run is continued."""

    steps: int | None = Field(default=None, ge=1)
    tokens: int | None = Field(default=None, ge=1)  # instead of steps; 1.2B is understood
    log_every: int = Field(default=10, ge=1)
    # Dashboards that get the figures too, each an optional package; TensorBoard always does.
    log_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        default=["tensorboard"]
    )
    eval_every: int | None = Field(default=None, ge=1)  # null = at the end only
    eval_sequences: int | None = Field(default=None, ge=1)  # null = the whole validation split
    # Text that each evaluation continues by the likeliest tokens, for TensorBoard; null = none.
    sample_prompt: str | None = Field(default=None, min_length=1)
    save_every: int | None = Field(default=None, ge=1)  # null = at the end only
    background_save: bool = False  # write checkpoints beside the training; needs host memory
    keep_checkpoints: int = Field(default=3, ge=1)
    # Checkpoints that stay for ever, and are not counted: each N steps, or at each merge (`cycle`).
    keep_every: int | Literal["cycle"] | None = None
    stop_after: int | None = Field(default=None, ge=1)  # stop, resumable, once this step is done
    max_skipped: int = Field(default=10, ge=1)  # non-finite updates in a row before giving up
    compile: Literal["blocks"] | None = None  # each block by torch.compile; null = nothing
    spike: SpikeConfig | None = None  # null = train on through a jump of the loss

    @field_validator("tokens", mode="before")
    @classmethod
    def _count(cls, value: object) -> object:
        return None if value is None else parse_count(value)

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

    every: int | None = Field(default=None, ge=1)  # steps; null = at each merge, and at the end
    # Step that the cumulative update is counted from: null = the birth of adapters, or 0. In full
    # rank it may be set to the step at which the runs to compare with get their adapters.
    start: int | None = Field(default=None, ge=0)
    directions: int = Field(default=8, ge=1)  # leading singular vectors kept of each update
