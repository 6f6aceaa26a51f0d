"""The one clock of a run: learning-rate factor, phase and merge steps as functions of the step.

`step` is the number of optimizer updates done. Nothing here has state, so nothing here is saved.

    S  birth       the step at which adapters are born: 0, or the end of the warm start
    C  cycle       steps between merges; boundaries are S + n·C
    w  rewarm      steps of linear warm-up after each boundary

The factor for S = 0 and a cosine base is, value for value, the `cosine_restarts` rule of the
published ReLoRA code with adjust_step = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

from pydantic import Field

from relora.lora.config import ADAPTER_GROUPS, GROUPS
from relora.section import Section


class ScheduleConfig(Section):
    """The learning-rate curve under the restarts, as a factor of the learning rate."""

    base: Literal["cosine", "linear", "constant"] = "cosine"
    """The curve from the end of the warm-up to the end of the run."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up at the start."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Last factor of the learning rate; `constant` has none."""


class Clock(NamedTuple):
    """All that decides when something happens in a run.

    Attributes:
        total: optimizer updates of the whole run.
        warmup: updates of linear warm-up at its start.
        base: the curve without restarts: cosine, linear or constant.
        min_ratio: its last factor.
        birth: the update after which there are adapters; 0 for all of the run, None for never.
        cycle: updates between merges; None without restarts (full rank, plain LoRA).
        rewarm: updates of linear warm-up after each restart.
    """

    total: int
    warmup: int = 0
    base: str = "cosine"
    min_ratio: float = 0.1
    birth: int | None = 0
    cycle: int | None = None
    rewarm: int = 0

    def has_adapters(self, step: int) -> bool:
        """Whether the model holds adapters once `step` updates are done."""
        return self.birth is not None and step >= self.birth

    def is_birth(self, step: int) -> bool:
        """Whether adapters are born after update `step` (the end of a warm start)."""
        return self.birth is not None and step == self.birth > 0

    def is_merge(self, step: int) -> bool:
        """Whether update `step` is followed by a merge: a boundary, after S, before the end."""
        if self.birth is None or self.cycle is None:
            return False
        return self.birth < step < self.total and (step - self.birth) % self.cycle == 0

    def merges_before(self, step: int) -> int:
        """How many merges are done once `step` updates are (the one at `step` counts)."""
        if self.birth is None or self.cycle is None:
            return 0
        last = min(step, self.total - 1)
        return max(0, last - self.birth) // self.cycle

    def merge_steps(self) -> range:
        """Every merge step of the run, in order: counted, cut and indexed without a list of them.

        A run may have billions.
        """
        if self.birth is None or self.cycle is None:
            return range(0)
        return range(self.birth + self.cycle, self.total, self.cycle)

    def turns(self, start: int, stop: int) -> list[int]:
        """Steps of start … stop − 1 among which are the highest and the lowest factor of them all.

        The factor rises or falls all the way from one restart, end of a warm-up or end of a rewarm
        to the next. From one whole cycle to the next its peak does not rise, and its lowest value
        is either 0 in all of them or does not rise either: two cycles at each end are enough.
        """
        edges = {start, stop - 1, self.warmup, self.birth or 0, (self.birth or 0) + self.rewarm}
        first, last = self.merges_before(start), self.merges_before(stop)
        if self.birth is not None and self.cycle is not None:
            for n in {first, first + 1, first + 2, last - 2, last - 1, last}:
                boundary = self.birth + n * self.cycle
                edges |= {boundary, boundary + self.rewarm}
        edges |= {edge - 1 for edge in edges}
        return sorted(edge for edge in edges if start <= edge < stop)

    def place_in_cycle(self, step: int) -> tuple[int, int] | None:
        """(number of the cycle from 1, steps into it from 1) of update `step`; None outside any."""
        if self.birth is None or self.cycle is None or step <= self.birth:
            return None
        done, within = divmod(step - self.birth - 1, self.cycle)
        return done + 1, within + 1

    def boundary_before(self, step: int) -> int | None:
        """The last restart of the learning rate at or before `step`, if there was one.

        The birth of adapters counts when it ends a warm start.
        """
        if self.birth is None or step < self.birth:
            return None
        boundary = (
            self.birth + (step - self.birth) // self.cycle * self.cycle
            if self.cycle
            else (self.birth)
        )
        return boundary if boundary > 0 else None

    def is_warming(self, step: int) -> bool:
        """Whether the update that follows `step` finished ones is of a warm-up or a rewarm."""
        boundary = self.boundary_before(step)
        return step < self.warmup or (boundary is not None and step - boundary < self.rewarm)

    def base_factor(self, step: int) -> float:
        """The curve without restarts, for step >= warmup.

        cosine: min + (1 − min)·½(1 + cos(π·(t − warmup) / max(1, total − warmup)))
        """
        progress = (step - self.warmup) / max(1, self.total - self.warmup)
        if self.base == "constant":
            return 1.0
        if self.base == "linear":
            return self.min_ratio + (1 - self.min_ratio) * max(0.0, 1 - progress)
        return self.min_ratio + (1 - self.min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    def smooth_factor(self, step: int) -> float:
        """Factor of the learning rate of what knows no restarts."""
        return step / self.warmup if step < self.warmup else self.base_factor(step)

    def factors(self, step: int) -> dict[str, float]:
        """Both, by the names of `parameter_groups`: restarts are those of the adapters alone."""
        smooth = dict.fromkeys(GROUPS, self.smooth_factor(step))
        return smooth | dict.fromkeys(ADAPTER_GROUPS, self.lr_factor(step))

    def lr_factor(self, step: int) -> float:
        """Factor of the learning rate for the update that follows `step` finished ones.

        t < warmup: t/warmup. Within w steps after a boundary b: (t − b)/w · base(b + w).
        Otherwise base(t). So the update right after a merge has learning rate 0 and only fills
        the moments of the optimizer.
        """
        return self.jagged(self.smooth_factor, step)

    def jagged(self, curve: Callable[[int], float], step: int) -> float:
        """Any curve over the steps, with a linear climb after each restart to where it is then."""
        boundary = self.boundary_before(step)
        if step >= self.warmup and boundary is not None and step - boundary < self.rewarm:
            return (step - boundary) / self.rewarm * curve(boundary + self.rewarm)
        return curve(step)
