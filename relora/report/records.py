"""What `report.json` holds, typed: every figure of a comparison. All pages are made from it.

    Report.model_validate_json(Path("report/report.json").read_text())

Lists called `values` keep one entry a seed. None is a figure that is not known.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

Value = TypeVar("Value")
Figure = float | None
Column = list[float | None]


class StrictModel(BaseModel):
    """A part of the report: nothing else in it, and no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Spread(StrictModel):
    """Mean and sample standard deviation (n − 1) over the seeds that have a value."""

    mean: Figure
    sd: Figure  # None for fewer than two
    n: int
    values: Column


class Curve(StrictModel):
    """Columns of one length: where (step, tokens, seconds) and what; an empty one is not there."""

    step: Column
    tokens: Column
    seconds: Column
    loss: Column = []
    perplexity: Column = []
    sd: Column = []  # over seeds: of the perplexity, or of a difference's loss
    lr: Column = []  # of the updates that follow the steps


class Curves(StrictModel):
    """All curves of an arm; marks and rates are those of the seed that has got furthest."""

    mean: Curve  # of the furthest seeds, at steps that all have; perplexities are averaged
    seeds: list[Curve]  # evaluations of each
    training: list[Curve]  # training loss of each
    merges: Curve
    births: Curve
    rewarm_from: Curve
    rewarm_to: Curve
    lr: Curve
    # Mean loss less the baseline's, which is interpolated in tokens; None of the baseline itself.
    difference: Curve | None = None


class Figures(StrictModel, Generic[Value]):
    """What is known of a run at its end, or of all seeds of an arm."""

    tokens: Value
    seconds: Value
    loss: Value
    perplexity: Value
    merges: Value
    tokens_per_s: Value
    step_ms: Value
    memory_gib: Value  # peak of rank 0: of its device, or without a GPU of its process
    checkpoint_bytes: Value
    merge_s: Value
    merges_s: Value
    flops: Value


class SeedReport(Figures[Figure]):
    """One run."""

    run: str
    seed: int
    status: str
    step: int
    of: int
    world_size: int
    commit: str | None


class Predicted(StrictModel):
    """From config, model and number of ranks alone, as `relora plan` says it."""

    memory: Figure = None  # most bytes on a rank's device at once
    memory_by_part: dict[str, float] | None = None  # bytes a rank; parts do not peak together
    bytes_per_step: Figure = None  # received by a rank in a step of the run's last phase
    checkpoint_bytes: Figure = None
    trainable: int | None = None  # parameters, in the last phase
    parameters: int | None = None  # of the model, without adapters
    adapter: int | None = None  # entries of A and B of all layers; None where there are none

    @property
    def state(self) -> float | None:
        """Bytes of training state on a rank's device: all but DeepSpeed's own buffers."""
        parts = self.memory_by_part
        if parts is None:
            return None
        return sum(parts[key] for key in parts if key not in ("buffers", "host"))


class ArmReport(StrictModel):
    """Runs of one config that differ by their seed."""

    name: str
    method: str
    seeds: list[SeedReport]
    status: str
    progress: str
    evaluated: bool
    # Largest standard error of its runs' last losses: how much they depend on what was evaluated.
    evaluation_error: Figure = None
    on_gpu: bool
    timed: bool  # False if its times are mixtures, of several machines or settings
    figures: Figures[Spread]
    predicted: Predicted
    warm_start: Spread  # tokens
    warm_start_seconds: Spread
    curves: Curves


class EqualRow(StrictModel):
    """An arm where all have spent the same."""

    arm: str
    loss: Spread
    perplexity: Spread
    tokens: Spread
    difference: Figure = None  # of the mean perplexity from the baseline's
    ratio: Figure = None


class AtEqual(StrictModel):
    """An answer at equal tokens or seconds."""

    at: Figure
    rows: list[EqualRow]


class MemoryRow(StrictModel):
    """An arm, and the best that fits into its memory."""

    arm: str
    memory: Spread  # bytes a rank
    perplexity: Spread
    best_within: str | None
    best_perplexity: Figure


class AtEqualMemory(StrictModel):
    """Arms by their memory: the devices' own peak if `measured`, else the training state."""

    measured: bool
    rows: list[MemoryRow]


class TargetRow(StrictModel):
    """What an arm spent until it was as good as the baseline, and that beside the baseline's."""

    arm: str
    reached: bool
    seeds_that_reach_it: int
    of: int
    step: Figure
    tokens: Figure
    seconds: Figure
    flops: Figure
    tokens_ratio: Figure = None
    seconds_ratio: Figure = None
    flops_ratio: Figure = None


class Target(StrictModel):
    """The baseline's last loss, and who reaches it when."""

    loss: float
    perplexity: Figure
    rows: list[TargetRow]


class Questions(StrictModel):
    """The three questions, and the way to the baseline's loss."""

    tokens: AtEqual
    seconds: AtEqual
    memory: AtEqualMemory
    target: Target


class PairedRow(StrictModel):
    """An arm's last losses less the baseline's of the same seeds, on the same sequences."""

    arm: str
    difference: Spread  # nats, over seeds that both have
    # Largest standard error of a seed's difference: of the mean over sequences of how far the two
    # losses of each lie apart.
    error: Figure
    sequences: int


class Difference(StrictModel):
    """A leaf of config, model or environment that is not the same in all arms."""

    path: str
    values: dict[str, Any]  # by arm


class SpectraFigures(StrictModel, Generic[Value]):
    """What is measured of an update: of one cycle, and of all together."""

    cycle_stable_rank: Value
    cycle_effective_rank: Value
    total_stable_rank: Value
    total_effective_rank: Value
    overlap: Value
    amplification: Value
    total_ratio: Value


class Medians(SpectraFigures[Figure]):
    """Over the layers, at one measurement."""

    step: int
    merge: int | None
    cycles: int


class LayerSpectra(SpectraFigures[list[Column]]):
    """Layer by layer (rows) and measurement by measurement (columns)."""

    names: list[str]
    cycles: list[int]


class ArmSpectra(StrictModel):
    """Spectra of an arm: layers and values are those of the seed that was measured last."""

    arm: str
    seed: int
    start: int | None
    step: int
    last: SpectraFigures[Spread]
    rounding_loss: Spread
    seeds: list[list[Medians]]  # all measurements of each
    layers: LayerSpectra
    total_values: dict[str, list[float]]  # by kind of layer, pooled, descending


class Similarity(StrictModel):
    """φ(i, j) between two updates, mean over `layers` layers."""

    what: str  # arms, seeds or cycles
    of: tuple[str, str]
    layers: int
    width: int | None
    phi: list[list[float]]
    whole: Figure


class Report(StrictModel):
    """A comparison."""

    format: int = 3
    relora: str
    written: str
    unfinished: bool
    baseline: str
    # Device, model, data, sizes: what, and of which arms; reports of format 2 have none.
    setting: dict[str, dict[str, list[str]]] = {}
    warnings: list[str]
    notes: list[str] = []  # which differences mean nothing, which rates were tried
    arms: list[ArmReport]
    questions: Questions
    paired: list[PairedRow] = []  # of arms whose runs, and the baseline's, say each sequence's loss
    differences: dict[str, list[Difference]]  # config, environment
    spectra: list[ArmSpectra]  # of those that have any
    similarity: list[Similarity]

    @property
    def numbers(self) -> dict[str, int]:
        """Place of each arm among all, which its colour follows."""
        return {arm.name: number for number, arm in enumerate(self.arms)}
