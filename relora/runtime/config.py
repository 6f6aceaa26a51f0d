"""The sections of what keeps a run alive: batch, train, optimizer, deepspeed."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from relora.section import Section

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(value: object) -> int:
    """`1.2B` → 1200000000; K, M, B and T are powers of a thousand."""
    match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([KMBT]?)\s*", str(value).upper())
    if match is None:
        raise ValueError("a whole number, or one with K, M, B or T, such as 1.2B")
    return round(float(match[1].replace("_", "")) * _UNITS[match[2]])


class BatchConfig(Section):
    """Sequences per optimizer step; gradient accumulation is derived from the world size."""

    global_batch_size: int = Field(ge=1)  # sequences per optimizer step, over all ranks
    micro_batch_size: int = Field(ge=1)  # sequences per forward, per rank


class TrainConfig(Section):
    """How long, and how often what. Lengths and intervals may change when a run is continued."""

    steps: int | None = Field(default=None, ge=1)
    tokens: int | None = Field(default=None, ge=1)  # instead of steps; 1.2B is understood
    log_every: int = Field(default=10, ge=1)
    eval_every: int | None = Field(default=None, ge=1)  # null = at the end only
    eval_sequences: int | None = Field(default=None, ge=1)  # null = the whole validation split
    save_every: int | None = Field(default=None, ge=1)  # null = at the end only
    keep_checkpoints: int = Field(default=3, ge=1)
    stop_after: int | None = Field(default=None, ge=1)  # stop, resumable, once this step is done
    max_skipped: int = Field(default=10, ge=1)  # non-finite updates in a row before giving up

    @field_validator("tokens", mode="before")
    @classmethod
    def _count(cls, value: object) -> object:
        return None if value is None else parse_count(value)

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give the run's length as either steps or tokens")
        return self


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


class DeepSpeedConfig(Section):
    """What DeepSpeed does. Its own JSON is made from this by one function; `extra` goes in last.

    `precision: bf16` keeps every trainable parameter in fp32, casts the frozen base to bf16 and
    multiplies in bf16 (autocast).
    """

    zero_stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["fp32", "bf16"] = "bf16"
    offload_optimizer: bool = False
    timeout_minutes: float = Field(default=30.0, gt=0)  # of a collective, before a hang is an error
    extra: dict[str, Any] = Field(default_factory=dict)
