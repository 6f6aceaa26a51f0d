"""Spectra of updates that runs have measured, put together for the report."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from relora.analysis import subspace_similarity
from relora.model import layer_kind
from relora.record import keys
from relora.record.spectra_files import Measurement, read_measurements
from relora.report.arms import ArmRuns, spread
from relora.report.read import RunFiles
from relora.report.records import (
    ArmSpectra,
    LayerSpectra,
    Medians,
    Similarity,
    SpectraFigures,
    Spread,
)

MEASURED = tuple(SpectraFigures.model_fields)
PAIRED = 5  # arms of which every pair is compared
Seed = tuple[RunFiles, list[Measurement]]


def spectra_of_arms(
    arms: Sequence[ArmRuns], baseline: str
) -> tuple[list[ArmSpectra], list[Similarity], list[str]]:
    """What runs have measured, how similar it is, and complaints."""
    measured: dict[str, list[Seed]] = {}
    complaints: list[str] = []
    for arm in arms:
        for run in arm.runs:
            measurements, problems = read_measurements(run.path)
            complaints += problems
            if measurements:
                measured.setdefault(arm.name, []).append((run, measurements))
    found = [_arm(arm, measured[arm.name]) for arm in arms if arm.name in measured]
    return found, _similarities(measured, baseline), complaints


def _arm(arm: ArmRuns, seeds: Sequence[Seed]) -> ArmSpectra:
    run, measurements = max(seeds, key=lambda seed: seed[1][-1].step)
    newest = measurements[-1]
    of_step = [each[-1] for _, each in seeds if each[-1].step == newest.step]
    missing = [None] * (len(arm.runs) - len(of_step))
    last = {key: spread([*(m.median(key) for m in of_step), *missing]) for key in MEASURED}
    table = {
        key: [
            [_number(m.layers.get(layer, {}).get(key)) for m in measurements]
            for layer in newest.layers
        ]
        for key in MEASURED
    }
    return ArmSpectra(
        arm=arm.name,
        seed=run.config.seed,
        start=run.config.spectra_start,
        step=newest.step,
        last=SpectraFigures[Spread](**last),
        rounding_loss=spread([_most_lost(run) for run, _ in seeds]),
        seeds=[[_medians(each, m) for m in found] for each, found in seeds],
        layers=LayerSpectra(
            names=list(newest.layers), cycles=[_cycle(run, m) for m in measurements], **table
        ),
        total_values=_pooled(newest),
    )


def _most_lost(run: RunFiles) -> float | None:
    """Largest share of a merge's update that rounding has kept from the weights."""
    lost = [line[keys.ROUNDING_LOSS] for line in run.events_with(keys.ROUNDING_LOSS)]
    return max(lost, default=None)


def _cycle(run: RunFiles, measurement: Measurement) -> int:
    """The cycle that a measurement is of, from 1; 0 in a run without any.

    What was measured between merges or at the end belongs to the cycle that is under way.
    """
    clock = run.config.clock
    done = clock.merges_before(measurement.step)
    return done + 1 if measurement.merge is None and clock.cycle is not None else done


def last_of_cycles(cycles: Sequence[int]) -> dict[int, int]:
    """Which measurement is the last one of each cycle, of the cycle that each is of."""
    return {cycle: number for number, cycle in enumerate(cycles) if cycle}


def _medians(run: RunFiles, measurement: Measurement) -> Medians:
    return Medians(
        step=measurement.step,
        merge=measurement.merge,
        cycles=_cycle(run, measurement),
        **{key: measurement.median(key) for key in MEASURED},
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _pooled(measurement: Measurement) -> dict[str, list[float]]:
    """Singular values of the whole update, of all layers of a kind together, descending."""
    pools: dict[str, list[np.ndarray]] = {}
    for layer in measurement.layers:
        values = measurement.tensor(layer, "total_values")
        if values is not None:
            pools.setdefault(layer_kind(layer), []).append(values.astype(np.float64))
    return {
        kind: [float(f"{v:.6g}") for v in np.sort(np.concatenate(values))[::-1] if math.isfinite(v)]
        for kind, values in pools.items()
    }


def _similarities(measured: dict[str, list[Seed]], baseline: str) -> list[Similarity]:
    """φ(i, j) between arms, between seeds of an arm, and between an arm's last two cycles.

    Of many arms, each with the baseline alone.
    """
    found = []
    for (one, a_seeds), (other, b_seeds) in itertools.combinations(measured.items(), 2):
        if len(measured) > PAIRED and baseline not in (one, other):
            continue
        pair = (a_seeds[0][1][-1], b_seeds[0][1][-1])
        found.append(_similarity("arms", (one, other), *pair, "total_left"))
    for name, seeds in measured.items():
        if len(seeds) > 1:
            (a, of_a), (b, of_b) = seeds[:2]
            titles = (f"{name}, seed {a.config.seed}", f"{name}, seed {b.config.seed}")
            found.append(_similarity("seeds", titles, of_a[-1], of_b[-1], "total_left"))
        run, measurements = seeds[0]
        last = last_of_cycles([_cycle(run, m) for m in measurements])
        cycles = [measurements[number] for number in last.values()]
        if len(cycles) > 1:
            titles = (f"{name}, step {cycles[-2].step}", f"{name}, step {cycles[-1].step}")
            found.append(_similarity("cycles", titles, cycles[-2], cycles[-1], "cycle_left"))
    return [each for each in found if each is not None]


def _similarity(
    what: str, titles: tuple[str, str], a: Measurement, b: Measurement, kind: str
) -> Similarity | None:
    """Mean of φ over the layers that both have in one shape; None if there are none."""
    tables = []
    for layer in (layer for layer in a.layers if layer in b.layers):
        u, v = a.tensor(layer, kind), b.tensor(layer, kind)
        if u is None or v is None or u.shape != v.shape:
            continue
        phi = subspace_similarity(torch.from_numpy(u), torch.from_numpy(v)).double().numpy()
        if np.isfinite(phi).all():
            tables.append(phi)
            width = len(u)
    if not tables:
        return None
    # Layers may have fewer directions than others: as many as their smaller dimension.
    rows, columns = np.min([table.shape for table in tables], axis=0)
    mean = np.mean([table[:rows, :columns] for table in tables], axis=0)
    return Similarity(
        what=what,
        of=titles,
        layers=len(tables),
        width=width,
        phi=mean.round(6).tolist(),
        whole=float(mean[-1, -1]),
    )
