"""The `relora` and `warm_start` sections: what happens at a restart, and where the cycles begin."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from relora.section import Section

LONGEST_REWARM = 100  # steps, if nothing else is said: the paper's for cycles of 5,000


class ResetConfig(Section):
    """The partial reset of the Adam moments of A and B at a merge.

    `ratio` is the share of each tensor that is zeroed. `zero` zeroes all of it, `none` nothing;
    `magnitude` zeroes the entries with the smallest |first moment|, `random` a seeded choice.
    `masks: independent` is the published behaviour, which leaves first moments without their
    second ones and so makes the next updates explode; it is there for comparison.
    """

    mode: Literal["zero", "random", "magnitude", "none"] = "magnitude"
    """Which entries of a tensor's moments are zeroed: all, the smallest first moments, a seeded
    choice, or nothing."""
    ratio: float | None = Field(default=None, gt=0, le=1)
    """Share that random and magnitude zero; null = 0.9."""
    masks: Literal["shared", "independent"] = "shared"
    """One mask for both moments, or one each: the published behaviour, for comparison."""
    adam_step: bool = False
    """Restart the bias correction of A and B too."""

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
    """Steps between merges, C."""
    rewarm_steps: int = Field(default=None, ge=0)  # type: ignore[assignment] # see `_rewarms`
    """Steps in which the adapters' rate rises again after a merge; null = a tenth of the cycle, at
    most 100."""
    lr: float | None = Field(default=None, gt=0)
    """Learning rate of the adapters; null = lora.lr, or optimizer.lr."""
    reset: ResetConfig = ResetConfig()
    """What is left of the moments of A and B at a merge."""
    keep_adapters: bool = False
    """Keep A and B of each cycle as they are merged, and those of the end, in the run's adapters/,
    as PEFT has them: the sum of their s·B·A is what the run has done to W."""
    precision: Literal["exact", "rounded"] = "exact"
    """exact keeps a 16-bit remainder beside a bf16 base weight; rounded drops it at each merge."""
    remainder: Literal["host", "device"] = "host"
    """Where that remainder lies, 2 bytes a frozen parameter over all ranks together. Only merges
    and checkpoints read it, so host memory costs a few seconds a cycle and the GPU nothing."""
    tolerance: float | None = Field(default=None, gt=0, lt=1)
    """Largest change of a merge to the probe batch's logits, relative to the largest logit. null =
    1e-5 in fp32, 5e-2 in half precision. From 1 on nothing would ever be found."""

    @model_validator(mode="before")
    @classmethod
    def _rewarms(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("rewarm_steps") is None:
            cycle = values.get("cycle_steps")
            rewarm = min(LONGEST_REWARM, cycle // 10) if isinstance(cycle, int) else 0
            return {**values, "rewarm_steps": max(rewarm, 0)}
        return values


class WarmStartConfig(Section):
    """A full-rank phase at the start of the same run."""

    steps: int = Field(ge=1)
    """Steps in full rank before adapters are born, S."""
