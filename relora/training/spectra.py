"""What the weights did: singular values of each cycle's update and of all updates together.

Measured while training, at each merge and at the end of the run, for every adapted weight (in full
rank: for those that would be adapted). W_start, which the cumulative update W + s·B·A − W_start is
counted from, and each measurement are files (see `record.spectra_files`). Ranks share the layers
between them.

Orientation is that of the map x ↦ x Wᵀ: `left` directions are in the output's space (out, d),
`right` ones in the input's (in, d), also where a model keeps its weight transposed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from relora.analysis import (
    amplification,
    effective_rank,
    factored_spectrum,
    overlap,
    principal_angles,
    spectrum,
    stable_rank,
)
from relora.errors import CheckpointError
from relora.lora.choose import projections
from relora.lora.config import OF_EXPERTS
from relora.lora.kinds import kind_of
from relora.lora.layers import AdaptedLayer, adapted_layers
from relora.lora.names import names_of
from relora.model import layer_kind
from relora.record import keys
from relora.record.layout import RunDirectory
from relora.record.spectra_files import (
    directions_of_cycle,
    join_parts,
    open_start,
    read_tensors,
    write_part,
    write_start,
)
from relora.training.run import Run

# Smaller dimension up to which all singular values are computed: a second or two a layer.
EXACT_UP_TO = 2048
# Figures of a layer whose medians over the layers go into metrics.jsonl.
MEDIANS = (
    "cycle_stable_rank",
    "cycle_effective_rank",
    "total_stable_rank",
    "total_effective_rank",
    "total_ratio",
    "overlap",
    "smallest_angle_deg",
    "amplification",
)


@torch.no_grad()
def keep_start(run: Run) -> None:
    """Write W_start of every layer, to be read at each measurement. Collective.

    Raises:
        CheckpointError: it cannot be written (every rank raises).
    """
    run_dir = run.config.run_dir
    with run.ranks.together() as alone:
        for name, mine in _shared_out(run):
            weight = run.state.gather([run.state[names_of(name).weight]], "value")[0]
            if mine:
                with alone(), _files_of(run_dir):
                    write_start(run_dir, name, weight, run.step)


@torch.no_grad()
def measure(run: Run, merge: int | None) -> dict[str, float]:
    """Measure every layer, write the file of this step; returns medians over the layers.

    Collective; after an applied update, and before the merge if one follows it.

    Args:
        merge: number of the merge that follows; None in between and at the end.

    Raises:
        CheckpointError: W_start is gone, or nothing can be written (every rank raises).
    """
    ranks, run_dir = run.ranks, run.config.run_dir
    part = RunDirectory(run_dir).part_of_measurement(run.step, ranks.rank)
    try:
        figures = _write_part(run, part)
        everyone: dict[str, list[dict[str, Any]]] = {}
        for rows in ranks.gather(figures):
            for key, row in rows.items():
                everyone.setdefault(key.partition("[")[0], []).append({"name": key, **row})
        layers = [row for name, _ in _shared_out(run) for row in everyone[name]]
        with ranks.together(), _files_of(run_dir):
            if ranks.is_main:
                join_parts(run_dir, run.step, ranks.world, merge, layers)
    except CheckpointError:
        with suppress(OSError):
            part.unlink()
        raise
    medians = {}
    for key in MEDIANS:
        known = [row[key] for row in layers if row[key] is not None]
        if known:
            medians[f"{keys.SPECTRA_PREFIX}{key}"] = statistics.median(known)
    return medians


def _write_part(run: Run, part: Path) -> dict[str, dict[str, Any]]:
    """Measure this rank's layers and write their file; returns their figures. Collective."""
    settings, run_dir = run.config.spectra, run.config.run_dir
    assert settings is not None
    earlier: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    figures: dict[str, dict[str, Any]] = {}
    with run.ranks.together() as alone:
        with alone(), _files_of(run_dir):
            earlier = directions_of_cycle(run_dir, run.config.clock.merges_before(run.step - 1))
        for name, mine in _shared_out(run):
            layer = run.engine.module.get_submodule(name)
            names = names_of(name)[: 3 if isinstance(layer, AdaptedLayer) else 1]
            held = run.state.gather([run.state[each] for each in names], "value")
            if mine:
                with alone(), _files_of(run_dir):
                    with open_start(run_dir, name, run.config.spectra_start) as file:
                        start = file.get_tensor("weight")
                    for key, *numbers in _matrices_of(name, start, *held):
                        figures[key], found = measure_layer(
                            layer, numbers[1:], numbers[0], earlier.get(key), settings.directions
                        )
                        tensors |= {f"{key}|{kind}": tensor for kind, tensor in found.items()}
        with _files_of(run_dir):
            write_part(part, tensors)
    return figures


def draw_spectrum(run_dir: Path, step: int) -> Any:
    """A measurement as a matplotlib figure: singular values of each kind of layer, medians.

    Most of what it costs is text and axes, so there is one of each, and few ticks; a logarithmic
    axis would take three times as long.
    """
    from matplotlib.figure import Figure  # runs that measure nothing start without it

    tensors = read_tensors(run_dir, step)
    kinds: dict[tuple[str, str, int], list[Tensor]] = {}
    for key, values in tensors.items():
        name, _, what = key.partition("|")
        if what.endswith("_values"):
            kinds.setdefault((what, layer_kind(name), len(values)), []).append(values)
    figure = Figure(figsize=(6, 4), dpi=80)
    axes = figure.subplots()
    colours = {kind: f"C{n}" for n, kind in enumerate(dict.fromkeys(k for _, k, _ in kinds))}
    for (what, kind, _), layers in kinds.items():
        whole = what == "total_values"
        axes.plot(
            torch.stack(layers).quantile(0.5, dim=0).clamp_min(1e-12).log10(),
            label=kind if whole else None,
            color=colours[kind],
            linestyle="-" if whole else ":",
        )
    axes.set_title("updates since the start; dotted: of this cycle")
    axes.set_xlabel("number of the singular value")
    axes.set_ylabel("log₁₀ of it")
    axes.locator_params(nbins=4)
    axes.legend(frameon=False, loc="upper right")
    return figure


@torch.no_grad()
def check_start(run: Run) -> None:
    """Whether W_start is there for a run that goes on behind it. Collective.

    Raises:
        CheckpointError: it is not, and the next measurement would end the run (every rank raises).
    """
    run_dir, start = run.config.run_dir, run.config.spectra_start
    with run.ranks.together(), _files_of(run_dir):
        for name, mine in _shared_out(run):
            if mine:
                with open_start(run_dir, name, start):
                    pass


@contextmanager
def _files_of(run_dir: Path) -> Iterator[None]:
    """What goes wrong with the files of spectra, with the way out."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, torch.linalg.LinAlgError) as error:
        raise CheckpointError(
            f"{RunDirectory(run_dir).spectra}: {error}; the checkpoints are intact, and with "
            "spectra: null the run goes on without measuring"
        ) from error


def _shared_out(run: Run) -> Iterator[tuple[str, bool]]:
    """The name of every layer that is measured, and whether this rank is the one to do it."""
    model = run.engine.module
    # In full rank nothing names targets; it is compared with runs that have the default ones.
    names = [name for name, _ in adapted_layers(model)] or list(projections(model))
    for index, name in enumerate(names):
        yield name, index % run.ranks.world == run.ranks.rank


def _matrices_of(name: str, *held: Tensor) -> Iterator[tuple[Any, ...]]:
    """(name, tensors of one matrix) of a layer: each expert is measured by itself."""
    if not name.endswith(OF_EXPERTS):
        yield name, *held
        return
    for index, tensors in enumerate(zip(*held, strict=True)):
        yield f"{name}[{index}]", *tensors


def measure_layer(
    layer: Any, held: list[Tensor], start: Tensor, before: Tensor | None, count: int
) -> tuple[dict[str, float | None], dict[str, Tensor]]:
    """Figures of one layer, and its singular values and directions.

    Args:
        held: the weight, and A and B if the layer is adapted.
        start: W_start.
        before: left directions of the cycle before, if there was one.
        count: leading directions to keep.
    """
    weight, *factors = held
    start = start.to(weight.device)
    cycle = None
    if factors:
        a, b = factors
        if layer.has_blocks:
            delta = layer.delta(a, b, weight.shape, 0, weight.numel()).view(weight.shape)
            cycle = spectrum(layer.matrix(delta), count, EXACT_UP_TO)
        else:
            cycle = factored_spectrum(b, a, layer.scale, count)
        weight = layer.merged(weight, a, b)
    owner = kind_of(layer)
    assert owner is not None
    weight, start = owner.matrix(weight), owner.matrix(start)
    total = spectrum(weight - start, count, EXACT_UP_TO)
    start_norm = float(torch.linalg.vector_norm(start))
    factor = amplification(start, total)
    figures: dict[str, float | None] = {
        "start_norm": start_norm,
        "weight_norm": float(torch.linalg.vector_norm(weight)),
        "total_ratio": total.norm / start_norm if start_norm else None,
        "amplification": factor if math.isfinite(factor) else None,
        "overlap": None,
        "smallest_angle_deg": None,
    }
    # Right after a merge B may still be zero, and its directions are arbitrary.
    if cycle is not None and cycle.norm and before is not None:
        before = before.to(cycle.left)
        figures["overlap"] = overlap(before, cycle.left)
        figures["smallest_angle_deg"] = math.degrees(principal_angles(before, cycle.left)[0])
    tensors = {}
    for kind, one in (("cycle", cycle), ("total", total)):
        figures[f"{kind}_norm"] = one.norm if one else None
        figures[f"{kind}_stable_rank"] = stable_rank(one) if one else None
        figures[f"{kind}_effective_rank"] = effective_rank(one) if one else None
        if one is not None:
            tensors[f"{kind}_values"] = one.values
            tensors[f"{kind}_left"], tensors[f"{kind}_right"] = one.left, one.right
    return figures, tensors
