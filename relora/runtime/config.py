"""The sections of what keeps a run alive: batch, train, optimizer, deepspeed."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args

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


class BatchConfig(Section):
    """Sequences per optimizer step; gradient accumulation is derived from the world size."""

    global_batch_size: int = Field(ge=1)  # sequences per optimizer step, over all ranks
    micro_batch_size: int = Field(ge=1)  # sequences per forward, per rank


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


class OptimizerConfig(Section):
    """AdamW with decoupled weight decay, none of it on norms and biases."""

    name: Literal["adamw"] = "adamw"
    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    grad_clip: float | None = Field(default=1.0, gt=0)  # global norm; null = off

    @field_validator("betas")
    @classmethod
    def _below_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("both betas lie in [0, 1)")
        return value


Stage = Literal[0, 1, 2, 3]
Precision = Literal["fp32", "bf16", "fp16", "deepspeed_bf16"]
STAGES: tuple[int, ...] = get_args(Stage)
PRECISIONS: tuple[str, ...] = get_args(Precision)


class DeepSpeedConfig(Section):
    """What DeepSpeed does. Its own JSON is made from this by one function; `extra` goes in last.

    `precision`: `bf16` and `fp16` keep every trainable parameter in fp32 and the frozen base in
    bf16, and multiply under autocast; fp16 scales its loss dynamically. `deepspeed_bf16` is
    DeepSpeed's own engine: all weights and gradients in bf16, with fp32 masters.
    """

    zero_stage: Stage = 2
    precision: Precision = "bf16"
    offload_optimizer: bool = False
    timeout_minutes: float = Field(default=30.0, gt=0)  # of a collective, before a hang is an error
    extra: dict[str, Any] = Field(default_factory=dict)


def refusal(zero_stage: int, precision: str, offload_optimizer: bool) -> tuple[str, str] | None:
    """Why a combination is not offered, and the nearest one that is; None if it works."""
    if offload_optimizer and zero_stage == 0:
        other = "" if precision == "deepspeed_bf16" else ", or offload_optimizer: false"
        return (
            "ZeRO 0 has no partitioned optimizer to offload",
            f"zero_stage 1, 2 or 3{other}",
        )
    if precision == "deepspeed_bf16" and zero_stage == 0:
        return (
            "DeepSpeed's wrapper of ZeRO 0 takes an optimizer step with zero gradients when built",
            "precision: bf16, or zero_stage 1, 2 or 3",
        )
    return None
