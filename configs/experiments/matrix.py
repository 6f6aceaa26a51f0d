"""Every way to run the method, each measured against the float64 reference, as one table.

    export PYTHONPATH=tests
    python configs/experiments/matrix.py --to matrix.json       all of it, on gloo ranks
    python configs/experiments/matrix.py --to gpu.json --gpu    one rank on a GPU, by nccl
    python configs/experiments/matrix.py --to some.json --only ranks=2,precision=fp16

ZeRO 0–3 × precision × offload × accumulation × gradient checkpointing × ranks, the global batch
always the same; the short form has each graph of adapted layers on each stage too. Each supported
cell trains the 17 updates of test_method_reference (warm start, birth, 3 merges) and once more,
stopped after updates 9 and 13. Each refused cell must say what to take instead, and that must be
accepted.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import io
import itertools
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from conftest import TINY_LLAMA
from ranks import Scenario, run_ranks
from relora.engine.distributed import lone_rank
from relora.engine.options import refusal
from relora.errors import ConfigError, UserError
from relora.record.rundir import describe_environment
from test_method_reference import (
    BIRTH,
    MERGES,
    deviations,
    run_reference,
    settings,
    targets_of,
    train_recorded,
)

GLOBAL_BATCH = 16
LAST = 17
STOPS = (9, 13)
# After the birth, each merge, and the two updates in which a stale copy would come back.
RECORDED = sorted({BIRTH, *(m + k for m in MERGES for k in (0, 1, 2))} - {LAST})  # it always is
PRECISIONS = ("fp32", "bf16", "fp16", "deepspeed_bf16")
# Where no gradient of this model overflows: else skipped updates would move the run to other
# batches than the reference's. Overflows have a test of their own.
CALM_SCALE = 2.0**10

# What a cell's largest relative deviations may be: of tensors ‖run − reference‖ / ‖reference‖,
# pooled by role, the worst step; `weights` are all that are neither A nor B. B is largest because
# in its first updates after a restart Adam divides a gradient by itself, so entries whose gradient
# is rounding noise move by a full step. `model`: all parameters after the last update, W + s·B·A
# in place of W, A and B. Half precision: three times what was measured.
BOUNDS = {
    "fp32": {"losses": 1e-5, "model": 1e-5, "weights": 1e-5, "A": 1e-5, "B": 5e-5, "moments": 5e-5},
    "bf16": {
        "losses": 1.2e-3,
        "model": 3e-3,
        "weights": 3e-3,
        "A": 2.5e-3,
        "B": 0.42,
        "moments": 0.9,
    },
    "fp16": {"losses": 5.5e-4, "weights": 1.5e-3, "A": 2.2e-3, "B": 0.28, "moments": 0.63},
    "deepspeed_bf16": {"losses": 3e-3, "weights": 4e-3, "A": 2.5e-3, "B": 0.5, "moments": 0.9},
}


# Ways to compute adapted layers, as changes of the settings. auto takes `formed` or `kept` here, by
# the tokens of a micro-batch. With `b` A does not train, and the reference's does not either.
GRAPHS: dict[str, dict[str, Any]] = {
    "auto": {},
    "low_rank": {"lora.graph": "low_rank"},
    "formed": {"lora.graph": "effective", "lora.keep_effective": False},
    "kept": {"lora.graph": "effective", "lora.keep_effective": True},
    "b": {"lora.train": "b"},
}

VARIANTS = ("merges", "no merges", "plain LoRA")  # of the runs whose stages are compared


class Cell(NamedTuple):
    """One combination."""

    stage: int
    precision: str
    offload: bool
    accumulation: int
    checkpointing: bool
    ranks: int
    graph: str = "auto"

    @property
    def name(self) -> str:
        """As in the progress lines and in `--only`."""
        return ",".join(f"{key}={value}" for key, value in self._asdict().items())

    @property
    def changes(self) -> dict[str, Any]:
        """What it changes in the settings of test_method_reference."""
        changes = {
            "deepspeed.zero_stage": self.stage,
            "deepspeed.precision": self.precision,
            "deepspeed.offload_optimizer": self.offload,
            "model.gradient_checkpointing": self.checkpointing,
            "batch.global_batch_size": GLOBAL_BATCH,
            "batch.micro_batch_size": GLOBAL_BATCH // (self.ranks * self.accumulation),
            **GRAPHS[self.graph],
        }
        if self.precision != "fp32":  # rounding W anew moves a model of width 18 by so much
            changes["relora.tolerance"] = 0.1
        return changes

    @property
    def refused(self) -> bool:
        """Whether the config says so."""
        return refusal(self.stage, self.precision, self.offload) is not None


def all_cells(ranks: Sequence[int] = (1, 2, 4)) -> list[Cell]:
    """All combinations, refused ones too."""
    yes_no = (False, True)
    return [
        Cell(*values)
        for values in itertools.product((0, 1, 2, 3), PRECISIONS, yes_no, (1, 4), yes_no, ranks)
    ]


def short_cells() -> list[Cell]:
    """Each stage, precision and offload once, and each graph on each stage, on two ranks."""
    cells = [
        cell
        for cell in all_cells((2,))
        if cell.accumulation == 4 and cell.checkpointing == (cell.stage % 2 == 1)
    ]
    plain = [cell for cell in cells if cell.precision == "fp32" and not cell.offload]
    return cells + [
        cell._replace(graph=graph)
        for cell in plain
        for graph in GRAPHS
        if graph != "auto" and (graph, cell.stage) != ("kept", 3)  # refused: it shares weights
    ]


# --- on the ranks ---------------------------------------------------------------------------------


def measure(
    ranks: Any, model: str, directory: str, cell: Cell, resumed: bool = True
) -> dict[str, Any] | None:
    """The run of a cell, and the one with stops; rank 0 returns what came out, and tells of it."""
    began = time.perf_counter()
    root, changes = Path(directory) / cell.name, cell.changes
    try:
        with undisturbed():
            how: dict[str, Any] = {"recorded": RECORDED, "first_scale": CALM_SCALE}
            whole = train_recorded(ranks, model, str(root / "whole"), changes, **how)
            cut = whole
            if resumed:
                how |= {"recorded": (), "stops": STOPS}
                cut = train_recorded(ranks, model, str(root / "cut"), changes, **how)
    except UserError as error:  # which all ranks raise, so that the next cell can go on
        tell(f"{cell.name}: {error}")
        return {"error": str(error)}
    replicas = ranks.gather((whole["replicas"], cut["replicas"]))
    if not ranks.is_main:
        return None
    checks = {
        "same bits on all ranks": all(other == replicas[0] for other in replicas),
        "masters are their copies": all(masters_agree(state) for state in whole["states"]),
        "resets zero their share": resets_are_whole(whole),
        "three merges": sum("relora/merge" in line for line in whole["log"]) == len(MERGES),
        "nothing skipped": len(whole["losses"]) == LAST,
        "stops leave no trace": same_end(whole, cut),
    }
    seconds = time.perf_counter() - began
    right = truth(model, changes.get("lora.train", "both"))
    figures = figures_of(whole, right) if checks["nothing skipped"] else {}
    told = " ".join(f"{key} {value:.1e}" for key, value in figures.items())
    failed = [name for name, good in checks.items() if not good]
    tell(f"{cell.name}: {told} {seconds:.1f} s {failed or ''}")
    return {**figures, "probe": max(whole["probes"]), "checks": checks, "seconds": seconds}


def trace(
    ranks: Any, model: str, directory: str, cell: Cell, variant: str, seed: int
) -> list[dict[str, np.ndarray]] | None:
    """Rank 0: after each recorded step the weights W + s·B·A and all others, and the losses.

    Args:
        variant: `merges`; `no merges`, the same learning rates with the restarts left out; or
            `plain LoRA`, which is relora: null.
    """
    changes = {**cell.changes, "seed": seed}
    if variant == "plain LoRA":
        del changes["relora.tolerance"]
        changes |= {"relora": None, "optimizer.lr": 1e-2}  # that of relora.lr
    how: dict[str, Any] = {"recorded": RECORDED, "first_scale": CALM_SCALE}
    how["mutant"] = "no restarts" if variant == "no merges" else None
    root = Path(directory) / f"{variant} {seed}" / cell.name
    with undisturbed():
        run = train_recorded(ranks, model, str(root), changes, **how)
    if not ranks.is_main:
        return None
    tell(f"{cell.name}: {variant}, seed {seed}")
    return [merged(exactly(state)) for state in run["states"]] + [
        {"loss": np.array(loss)} for loss in run["losses"]
    ]


def tell(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Silence on stdout; afterwards torch is as it was, which ZeRO 3 does not see to by itself."""
    gc.freeze()  # what stays for ever need not be looked through at each engine's end
    linear = torch.nn.functional.linear
    with contextlib.redirect_stdout(io.StringIO()):
        yield
    torch.nn.functional.linear = linear


@functools.cache
def truth(model: str, train: str) -> Any:
    """The reference's history, which is the same for all cells that train as much of adapters."""
    history = run_reference(model, {"batch.global_batch_size": GLOBAL_BATCH, "lora.train": train})
    assert min(history.gaps) > 1e-4  # so that fp32 must choose the same masks
    return history


def exactly(state: dict[tuple[str, str], np.ndarray]) -> dict[tuple[str, str], np.ndarray]:
    """Values as exact as the run has them, as kind `live`, and the moments."""
    found = {key: tensor for key, tensor in state.items() if key[1].startswith("exp_avg")}
    for kind in ("live", "master", "exact"):  # the later, the finer
        found |= {(name, "live"): tensor for (name, k), tensor in state.items() if k == kind}
    return found


def figures_of(run: dict[str, Any], history: Any) -> dict[str, float]:
    """The largest relative deviations from the reference; see BOUNDS."""
    states = [exactly(state) for state in run["states"]]
    found = deviations({**run, "states": states}, history)
    right = {(name, "live"): t.numpy() for name, t in history.states[LAST].values.items()}
    return {
        "model": apart(merged(right), merged(states[-1])),
        "losses": found["losses"],
        "weights": found["live/weights"],
        "A": found["live/lora_A"],
        "B": found["live/lora_B"],
        "moments": max(value for kind, value in found.items() if kind.startswith("exp_avg")),
    }


def merged(state: dict[tuple[str, str], np.ndarray]) -> dict[str, np.ndarray]:
    """W + s·B·A of adapted layers, other weights as they are."""
    values = {name: tensor for (name, kind), tensor in state.items() if kind == "live"}
    for target in targets_of(state):
        a, b = values.pop(f"{target}.lora_A"), values.pop(f"{target}.lora_B")
        values[f"{target}.weight"] = values[f"{target}.weight"] + 1.5 * b @ a
    return values


def masters_agree(state: dict[tuple[str, str], np.ndarray]) -> bool:
    """Whether all copies of each parameter hold one value, or its rounding to bf16."""
    for (name, kind), tensor in state.items():
        live = state[name, "live"]
        if kind in ("master", "shards") and not np.array_equal(tensor, live):
            rounded = torch.from_numpy(tensor).float().bfloat16().double().numpy()
            if kind == "shards" or not np.array_equal(rounded, live):
                return False
    return True


def resets_are_whole(run: dict[str, Any]) -> bool:
    """Whether each restart zeroed 90 % of each moment of A and B, and logged what it zeroed."""
    states = dict(zip(run["steps"], run["states"], strict=True))
    logged = [line["relora/zeroed_share"] for line in run["log"] if "relora/zeroed_share" in line]
    zeroed = total = 0
    for (name, kind), tensor in states[MERGES[0]].items():
        if "lora" in name and kind.startswith("exp"):
            zeroed, total = zeroed + round(0.9 * tensor.size), total + tensor.size
            for step in MERGES:
                now = states[step][name, kind]
                if np.count_nonzero(now) > now.size - round(0.9 * now.size):
                    return False
    return logged == [zeroed / total] * len(MERGES)


def same_end(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Bit for bit: every loss, the last step's tensors, what Adam and the loss scale count."""
    a, b = one["states"][-1], other["states"][-1]
    return (
        all(one[key] == other[key] for key in ("losses", "norms", "adam_steps", "scale"))
        and a.keys() == b.keys()
        and all(np.array_equal(a[key], b[key]) for key in a)
    )


# --- here -----------------------------------------------------------------------------------------


def run_cells(cells: Sequence[Cell], directory: Path) -> dict[Cell, dict[str, Any]]:
    """Measure supported cells, one launch per number of ranks; a cell without result says why."""
    model = write_model(directory)
    found: dict[Cell, dict[str, Any]] = {}
    for world in sorted({cell.ranks for cell in cells}):
        mine = [cell for cell in cells if cell.ranks == world]
        wanted = [Scenario(c.name, measure, (model, str(directory), c)) for c in mine]
        outcomes = run_ranks(world, wanted, timeout=120 + 120 * len(mine))
        for cell in mine:
            result = outcomes.results.get(cell.name)
            found[cell] = result[0] if result else {"error": "the launch ended before"}
        if outcomes.problem:
            tell(outcomes.problem)
    return found


def run_spread(directory: Path, seeds: Sequence[int] = (5, 6, 7)) -> dict[str, Any]:
    """How far runs of one precision on different stages are apart, with and without merges.

    Returns:
        By precision and variant: the largest relative difference of losses and of weights
        (W + s·B·A) over all pairs of stages, on two ranks; one of each for every seed.
    """
    model = write_model(directory)
    cells = [
        cell
        for cell in all_cells((2,))
        if cell.precision != "fp32" and not cell.refused
        if not cell.offload and not cell.checkpointing and cell.accumulation == 1
    ]
    runs = list(itertools.product(cells, VARIANTS, seeds))
    wanted = [
        Scenario(f"{c.name} {variant} {seed}", trace, (model, str(directory), c, variant, seed))
        for c, variant, seed in runs
    ]
    outcomes = run_ranks(2, wanted, timeout=120 + 60 * len(wanted))
    spread: dict[str, Any] = {}
    for precision, variant in itertools.product(PRECISIONS[1:], VARIANTS):
        found = spread.setdefault(precision, {})[variant] = {"losses": [], "weights": []}
        for seed in seeds:
            mine = [c.name for c in cells if c.precision == precision]
            traces = [outcomes[f"{name} {variant} {seed}"][0] for name in mine]
            pairs = [zip(*two, strict=True) for two in itertools.combinations(traces, 2)]
            steps = [step for pair in pairs for step in pair]
            found["losses"].append(max(apart(*step, "loss") for step in steps))
            found["weights"].append(max(apart(*step) for step in steps))
    return spread


def apart(a: dict[str, np.ndarray], b: dict[str, np.ndarray], only: str | None = None) -> float:
    """‖a − b‖ / ‖a‖ over the tensors named `only`, or over all others than losses."""
    names = [name for name in a if (name == "loss") == (only == "loss")]
    size = sum(float(np.linalg.norm(a[name])) ** 2 for name in names)
    difference = sum(float(np.linalg.norm(a[name] - b[name])) ** 2 for name in names)
    return (difference / size) ** 0.5 if size else 0.0


def check_refusal(cell: Cell) -> dict[str, Any]:
    """That a refused cell exits with 2 and one line, and that all it names instead is accepted."""
    refused = refusal(cell.stage, cell.precision, cell.offload)
    assert refused is not None
    why, way_out = refused
    result: dict[str, Any] = {"refused": why, "take": way_out, "accepted": {}}
    try:
        settings("unused", "unused", cell.changes)
    except ConfigError as error:
        message = str(error)
        result["exit 2"] = error.code == 2 and f"{why}; take {way_out}" in message
    else:
        result["exit 2"] = False
    for key, value in ways_out(way_out):
        changes = {**cell.changes, f"deepspeed.{key}": value}
        if changes["deepspeed.precision"] != "fp32":
            changes.setdefault("relora.tolerance", 0.1)
        try:
            settings("unused", "unused", changes)
            result["accepted"][f"{key}: {value}"] = True
        except ConfigError as error:
            # No such model file, which is how far a config gets whose settings fit together.
            only_the_model = "deepspeed:" not in str(error)
            result["accepted"][f"{key}: {value}"] = only_the_model
    return result


def ways_out(text: str) -> Iterator[tuple[str, Any]]:
    """(key, value) of each alternative that a refusal names."""
    for stages in re.findall(r"zero_stage ([0-9](?:(?:, | or )[0-9])*)", text):
        yield from (("zero_stage", int(stage)) for stage in re.findall(r"[0-9]", stages))
    for key, value in re.findall(r"(precision|offload_optimizer): (\w+)", text):
        yield key, {"true": True, "false": False}.get(value, value)


def shortcomings(cell: Cell, result: dict[str, Any]) -> list[str]:
    """What is not as it must be in a cell's result; empty if all is well."""
    if "error" in result:
        return [f"no result: {result['error']:.200}"]
    if cell.refused:
        bad = [way for way, good in result["accepted"].items() if not good]
        bad += [] if result["accepted"] else ["nothing"]
        return [f"names {way}, which is refused" for way in bad] + (
            [] if result["exit 2"] else ["is not refused as it says"]
        )
    bad = [name for name, good in result["checks"].items() if not good]
    for kind, bound in BOUNDS.get(cell.precision, {}).items():
        if not result.get(kind, float("inf")) <= bound:
            bad.append(f"{kind} {result.get(kind, float('nan')):.1e} > {bound:.0e}")
    return bad


def write_model(directory: Path) -> str:
    """A tiny Llama's config JSON there."""
    path = directory / "tiny_llama.json"
    path.write_text(json.dumps(TINY_LLAMA))
    return str(path)


def markdown(results: dict[Cell, dict[str, Any]]) -> str:
    """One row per stage, precision, offload and graph, over accumulation × checkpointing."""
    worlds = sorted({cell.ranks for cell in results})
    heads = [f"{n} rank{'s' if n > 1 else ''}" for n in worlds]
    lines = [
        "losses / final parameters (W + s·B·A) / B on the way: the largest relative deviation "
        "from the float64 reference",
        "",
        f"| ZeRO | precision | offload | graph | {' | '.join(heads)} | checks |",
        f"|---|---|---|---|{'---|' * len(worlds)}---|",
    ]
    for row, cells in itertools.groupby(sorted(results, key=_row), key=_row):
        mine = list(cells)
        shown = [_pooled([results[c] for c in mine if c.ranks == n]) for n in worlds]
        bad = sorted({text for c in mine for text in shortcomings(c, results[c])})
        if mine[0].refused:
            result = results[mine[0]]
            shown = [f"refused: {result['refused']}; take {result['take']}"] + ["″"] * (
                len(worlds) - 1
            )
        stage, precision, offload = row[0], PRECISIONS[row[1]], "yes" if row[2] else "–"
        verdict = "; ".join(bad) or "all pass"
        cells_of_row = " | ".join((str(stage), precision, offload, mine[0].graph, *shown, verdict))
        lines.append(f"| {cells_of_row} |")
    return "\n".join(lines)


def _row(cell: Cell) -> tuple[int, int, bool, int]:
    graph = list(GRAPHS).index(cell.graph)
    return cell.stage, PRECISIONS.index(cell.precision), cell.offload, graph


def _pooled(results: list[dict[str, Any]]) -> str:
    done = [result for result in results if "losses" in result]
    if not done:
        return "–"
    worst = (max(result[key] for result in done) for key in ("losses", "model", "B"))
    return " / ".join(f"{value:.1e}" for value in worst)


def chosen(cells: Sequence[Cell], only: str | None) -> list[Cell]:
    """Cells whose fields are as `key=value,key=value` says."""
    wanted = [pair.split("=") for pair in only.split(",")] if only else []
    unknown = [key for key, *_ in wanted if key not in Cell._fields]
    if unknown:
        raise SystemExit(f"--only: {unknown[0]}: is none of {', '.join(Cell._fields)}")
    return [
        cell
        for cell in cells
        if all(str(getattr(cell, key)).lower() == value.lower() for key, value in wanted)
    ]


def measure_all(cells: Sequence[Cell], directory: Path) -> dict[Cell, dict[str, Any]]:
    """Results of supported cells and of refused ones."""
    found = {cell: check_refusal(cell) for cell in cells if cell.refused}
    return found | run_cells([cell for cell in cells if not cell.refused], directory)


def main() -> int:
    """Run it; 1 if a cell is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, required=True, metavar="FILE", help="JSON")
    parser.add_argument("--short", action="store_true", help="each row once, on two ranks")
    parser.add_argument("--gpu", action="store_true", help="one rank on the GPU")
    parser.add_argument("--only", metavar="K=V,…", help=f"keys: {', '.join(Cell._fields)}")
    parser.add_argument("--no-spread", action="store_true", help="leave the stages' spread out")
    options = parser.parse_args()
    if options.gpu != torch.cuda.is_available():
        raise SystemExit("--gpu: there is no GPU" if options.gpu else "there is a GPU: give --gpu")
    cells = all_cells((1,)) if options.gpu else short_cells() if options.short else all_cells()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        results = measure_all(chosen(cells, options.only), Path(name))
        spread = None if options.gpu or options.no_spread else run_spread(Path(name))
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": describe_environment(lone_rank()),
        "minutes": (time.perf_counter() - began) / 60,
        "cells": [
            {**cell._asdict(), **result, "shortcomings": shortcomings(cell, result)}
            for cell, result in results.items()
        ],
        "spread": spread,
    }
    options.to.write_text(json.dumps(report, indent=1) + "\n", encoding="utf8")
    print(markdown(results))
    if spread:
        print(f"\nBetween stages, 2 ranks: {json.dumps(spread, indent=1)}")
    return int(any(cell["shortcomings"] for cell in report["cells"]))


if __name__ == "__main__":
    sys.exit(main())
