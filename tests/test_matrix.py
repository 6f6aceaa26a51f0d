"""Combinations of stage, precision, offload and accumulation against the float64 reference.

The ordinary tests are a few cells that test_method_reference has not; the slow one is the whole of
`configs/experiments/matrix.py`. What each cell must be stands there.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import pytest

import matrix
from matrix import Cell
from ranks import Outcomes, Scenario, run_ranks
from test_method_reference import train_recorded
from test_skipped import spoilt

CELLS = [
    Cell(0, "fp16", False, 1, False, 2),
    Cell(3, "fp16", False, 1, False, 2, "low_rank"),
    Cell(2, "fp16", True, 1, True, 2),
    Cell(1, "bf16", True, 1, False, 2, "kept"),
    Cell(1, "deepspeed_bf16", False, 2, False, 2),
]
STAGES = (0, 1, 2, 3)
STEPS, STOP = 6, 4  # of the runs that overflow; the stop is on their merge
FIRST_SCALE = 2.0**24
LATER = 9  # the global batch that overflows on one rank alone


def overflowing(ranks: Any, model: str, directory: str, stage: int) -> dict[str, Any] | None:
    """A run in fp16 whose first scale is too large, and the same with a stop."""
    changes = {
        "deepspeed.zero_stage": stage,
        "deepspeed.precision": "fp16",
        "relora.tolerance": 0.1,
        "batch.global_batch_size": 8,
        "batch.micro_batch_size": 4,
        "train.steps": STEPS,
        "train.log_every": 1,
        "warm_start": None,
    }
    root = Path(directory) / f"overflow_{stage}"
    bad = spoilt({LATER}, rank=1, value=float("inf"))
    how: dict[str, Any] = {"recorded": (), "update": bad, "first_scale": FIRST_SCALE}
    with matrix.undisturbed():
        whole = train_recorded(ranks, model, str(root / "whole"), changes, **how)
        cut = train_recorded(ranks, model, str(root / "cut"), changes, stops=(STOP,), **how)
    counts = ranks.gather((whole["replicas"], len(whole["norms"]), whole["scale"]))
    return {"whole": whole, "cut": cut, "counts": counts} if ranks.is_main else None


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Everything on 2 ranks."""
    root = tmp_path_factory.mktemp("matrix")
    model = matrix.write_model(root)
    wanted = [
        # The runs that overflow show that fp16 resumes.
        Scenario(c.name, matrix.measure, (model, str(root), c, c.offload or c.precision != "fp16"))
        for c in CELLS
    ]
    wanted += [Scenario(f"overflow {s}", overflowing, (model, str(root), s)) for s in STAGES]
    return run_ranks(2, wanted, 280)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_half_precision_follows_the_reference_and_resumes(cell: Cell, pair: Outcomes) -> None:
    result = pair[cell.name][0]
    print({key: value for key, value in result.items() if key != "checks"})
    assert matrix.shortcomings(cell, result) == []


@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_halves_the_scale_on_all_ranks_and_training_goes_on(
    stage: int, pair: Outcomes
) -> None:
    found = pair[f"overflow {stage}"][0]
    whole = found["whole"]
    skipped = [k for k, norm in enumerate(whole["norms"]) if norm == float("inf")]
    # The first scale is too large for any gradient; later one rank alone has an infinite loss.
    assert skipped[:3] == [0, 1, 2]
    assert LATER in skipped
    assert LATER - 1 not in skipped
    applied = [k for k in range(STEPS + len(skipped)) if k not in skipped]
    assert len(whole["norms"]) == STEPS + len(skipped)
    expected = [FIRST_SCALE / 2 ** sum(s < k for s in skipped) for k in applied]
    logged = [line for line in whole["log"] if "train/loss_scale" in line]
    assert [line["train/loss_scale"] for line in logged] == expected
    assert whole["scale"] == (expected[-1], sum(k > skipped[-1] for k in applied))
    assert logged[-1]["train/skipped"] == len(skipped)
    assert found["counts"][0] == found["counts"][1]
    assert [line["step"] for line in whole["log"] if "relora/merge" in line] == [STOP]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stop_keeps_the_loss_scale(stage: int, pair: Outcomes) -> None:
    found = pair[f"overflow {stage}"][0]
    assert matrix.same_end(found["whole"], found["cut"])


REFUSED = [cell for cell in matrix.all_cells((1,)) if cell.refused]


def test_what_a_refusal_names_instead_is_accepted() -> None:
    assert {(c.stage, c.precision, c.offload) for c in REFUSED} == {
        *((0, precision, True) for precision in matrix.PRECISIONS),
        (0, "deepspeed_bf16", False),
    }
    for cell in REFUSED:
        assert matrix.shortcomings(cell, matrix.check_refusal(cell)) == [], cell


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_whole_matrix(world: int, tmp_path: Path) -> None:
    cells = matrix.all_cells((world,))
    results = matrix.measure_all(cells, tmp_path)
    print(matrix.markdown(results))
    bad = {c.name: matrix.shortcomings(c, results[c]) for c in cells}
    assert {name: texts for name, texts in bad.items() if texts} == {}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_graph_merges_and_resumes_on_every_stage(tmp_path: Path) -> None:
    cells = [cell for cell in matrix.short_cells() if cell.graph != "auto"]
    assert {(cell.graph, cell.stage) for cell in cells} == {
        (graph, stage) for graph in matrix.GRAPHS for stage in STAGES if graph != "auto"
    } - {("kept", 3)}
    results = matrix.measure_all(cells, tmp_path)
    print(matrix.markdown(results))
    bad = {c.name: matrix.shortcomings(c, results[c]) for c in cells}
    assert {name: texts for name, texts in bad.items() if texts} == {}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_merges_drive_stages_no_further_apart_than_rounding_does(tmp_path: Path) -> None:
    """On average over seeds at most twice as far as without merges: differences are noise."""
    for precision, spread in matrix.run_spread(tmp_path).items():
        print(precision, spread)
        for kind in ("losses", "weights"):
            merges, *without = (mean(spread[variant][kind]) for variant in matrix.VARIANTS)
            assert merges <= 2 * max(without), (precision, kind, spread)
