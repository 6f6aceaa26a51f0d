"""The `relora` and `warm_start` sections: what happens at a restart, and where the cycles begin."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from relora.section import Section


class ResetConfig(Section):
    """The partial reset of the Adam moments of A and B at a merge.

    `ratio` is the share of each tensor that is zeroed. `zero` zeroes all of it, `none` nothing;
    `magnitude` zeroes the entries with the smallest |first moment|, `random` a seeded choice.
    `masks: independent` is the published behaviour, which leaves first moments without their
    second ones and so makes the next updates explode; it is there for comparison.
    """

    mode: Literal["zero", "random", "magnitude", "none"] = "magnitude"
    ratio: float | None = Field(default=None, gt=0, le=1)  # random and magnitude: 0.9 by default
    masks: Literal["shared", "independent"] = "shared"
    adam_step: bool = False  # restart the bias correction of A and B too

    @property
    def share(self) -> float:
        """The share of each tensor's moments that a reset zeroes."""
        if self.mode in ("zero", "none"):
            return 1.0 if self.mode == "zero" else 0.0
        return 0.9 if self.ratio is None else self.ratio

    @model_validator(mode="after")
    def _does_something(self) -> ResetConfig:
        if self.mode in ("zero", "none"):
            if self.ratio is not None:
                raise ValueError(f"ratio would do nothing with mode: {self.mode}; set it to null")
            if self.masks == "independent":
                raise ValueError(f"masks would do nothing with mode: {self.mode}")
        return self


class ReLoRAConfig(Section):
    """Merge, reinit and reset every `cycle_steps`. `relora: null` is plain LoRA."""

    cycle_steps: int = Field(ge=1)
    rewarm_steps: int = Field(default=100, ge=0)
    # Learning rate of the adapters; null = lora.lr.
    lr: float | None = Field(default=None, gt=0)
    reset: ResetConfig = ResetConfig()
    # Keep A and B of each cycle as they are merged, and those of the end, in the run's adapters/,
    # as PEFT has them: the sum of their s·B·A is what the run has done to W.
    keep_adapters: bool = False
    # exact keeps a 16-bit remainder beside a bf16 base weight; rounded drops it at each merge.
    precision: Literal["exact", "rounded"] = "exact"
    # Where that remainder lies, 2 bytes a frozen parameter over all ranks together. Only merges and
    # checkpoints read it, so host memory costs a few seconds a cycle and the GPU nothing.
    remainder: Literal["host", "device"] = "host"
    # Largest change of a merge to the probe batch's logits, relative to the largest logit.
    # null = 1e-5 in fp32, 5e-2 in half precision. From 1 on nothing would ever be found.
    tolerance: float | None = Field(default=None, gt=0, lt=1)


class WarmStartConfig(Section):
    """A full-rank phase at the start of the same run."""

    steps: int = Field(ge=1)
