"""What a run measures of its weights is what its checkpoints say, and TensorBoard shows it.

Checkpoints are read by the tests' own reader and decomposed by numpy in float64.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from numpy import ndarray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ranks import Outcomes, Scenario, run_ranks
from relora.record import spectra_files
from relora.record.metrics import Metrics
from relora.training import spectra
from relora.training.phases import log_step, update
from runs import (
    SEQUENCE,
    Process,
    checkpoint,
    make_config,
    metric_lines,
    relora,
    run_state,
    series,
    tensors,
    train,
    trajectory,
    workshop,
)

LAST = 24
RANK = 3  # so that sums of updates have ranks 3, 6, 9; the narrowest weight has 32
SCALE = 8 / RANK
PROMPT = "def self"
# Adapters are born after 6, merges are after 12 and 18. Of each step that is measured there is a
# checkpoint: 6, 12, 18 and 24 stay for ever, and 5, 10, 15 and 20 are few.
MEASURED = [10, 12, 15, 18, 20, 24]
BASE: dict[str, Any] = {
    "lora": {"rank": RANK, "alpha": 8},
    "spectra": {"every": 5},
    "train__save_every": 5,
    "train__keep_every": 6,
    "train__keep_checkpoints": 9,
    "train__eval_every": 12,
}
COLD = {"warm_start": None}  # born at 0: merges are after 6 too
BF16 = {"deepspeed__precision": "bf16"}
RELORA = {"cycle_steps": 6, "rewarm_steps": 2, "lr": 2e-2}
LORA = {"relora": None, "lora": {"rank": RANK, "alpha": 8, "lr": 3e-2}}
FULL = {"relora": None, "warm_start": None, "lora": None}
RUNS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, cold": COLD,
    "gpt2": {"model": "gpt2"},
    "gpt2, cold": {"model": "gpt2", **COLD},
    "bf16": BF16,
    "rounded": {**BF16, "relora": {**RELORA, "precision": "rounded"}},
    "merged decay": {"lora": {"rank": RANK, "alpha": 8, "decay": "merged"}},
    "LoRA": LORA,
    "LoRA, cold": {**LORA, **COLD, "model": "gpt2"},
    "full rank": {**FULL, "spectra": {"every": 5, "start": 6}},
    "full rank from 0": {**FULL, "spectra": {}},
    "prompt": {"train__sample_prompt": PROMPT},
}
LAYERS = {
    "llama": [
        f"model.layers.{block}.{part}"
        for block in range(2)
        for part in (
            *(f"self_attn.{letter}_proj" for letter in "qkvo"),
            *(f"mlp.{kind}_proj" for kind in ("gate", "up", "down")),
        )
    ],
    "gpt2": [
        f"transformer.h.{block}.{part}"
        for block in range(2)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ],
}


def slow(value: Any) -> Any:
    """A parameter whose test runs only where the slow ones do."""
    return pytest.param(value, marks=pytest.mark.slow)


def settings(changes: dict[str, Any]) -> dict[str, Any]:
    """Changes for `make_config`, with a model by its name."""
    model = changes.get("model", "llama")
    rest = {key: value for key, value in changes.items() if key != "model"}
    return {**BASE, "model__config": str(workshop() / f"{model}.json"), **rest}


def run(run_dir: Path, *overrides: str, pictures: bool = False, **changes: Any) -> int:
    """`train`, without the pictures, which take longer than everything else, if nobody looks."""
    with pytest.MonkeyPatch.context() as patch:
        if not pictures:
            patch.setattr(Metrics, "figure", lambda *_: None)
        return train(run_dir, *overrides, **changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Finished runs on one rank by name, each trained when first asked for."""
    directory = tmp_path_factory.mktemp("runs")

    def get(name: str) -> Path:
        run_dir = directory / name.replace(", ", "_").replace(" ", "_")
        if not run_dir.exists():
            pictures = name == "prompt"
            assert run(run_dir, pictures=pictures, **settings(RUNS[name])) == 0
        return run_dir

    return get


class Measurement(NamedTuple):
    """One file of a run's spectra."""

    merge: str
    figures: dict[str, dict[str, float | None]]  # by layer
    tensors: dict[str, dict[str, ndarray]]  # by layer


def read(run_dir: Path, step: int) -> Measurement:
    with safe_open(run_dir / "spectra" / f"step_{step:08d}.safetensors", "numpy") as file:
        metadata = file.metadata()
        found: dict[str, dict[str, ndarray]] = {}
        for key in file.keys():  # noqa: SIM118 (it is no dict)
            name, _, kind = key.partition("|")
            found.setdefault(name, {})[kind] = file.get_tensor(key)
            assert found[name][kind].dtype == np.float32
    layers = json.loads(metadata["layers"])
    assert int(metadata["step"]) == step
    return Measurement(metadata["merge"], {x.pop("name"): x for x in layers}, found)


def files(run_dir: Path) -> dict[str, Any]:
    """Every file of a run's spectra: all that it holds, tensors as their bytes.

    Not the file's bytes: safetensors writes metadata in any order.
    """
    home, found = run_dir / "spectra", {}
    for path in sorted(path for path in home.rglob("*") if path.is_file()):
        name = str(path.relative_to(home))
        try:
            with safe_open(path, "numpy") as file:
                held = {key: file.get_tensor(key).tobytes() for key in file.keys()}  # noqa: SIM118
                found[name] = (file.metadata(), held)
        except SafetensorError:
            found[name] = path.read_bytes()
    return found


def measured(run_dir: Path) -> list[int]:
    """Steps of which there is a file; fails if there is anything but those files and the start."""
    names = sorted(path.name for path in (run_dir / "spectra").iterdir())
    assert names.pop(0) == "start"
    steps = [int(name[5:13]) for name in names]
    assert names == [f"step_{step:08d}.safetensors" for step in steps]
    return steps


def at(run_dir: Path, step: int) -> dict[str, dict[str, ndarray]]:
    """Weights of a checkpoint in float64, by layer: `weight` (out, in), and A and B if it has."""
    directory = checkpoint(run_dir, step)
    shapes = json.loads((directory / "state.json").read_text())["shapes"]
    found: dict[str, dict[str, ndarray]] = {}
    for (name, kind), flat in tensors(directory).items():
        if kind == "value":
            layer, _, which = name.rpartition(".")
            matrix = flat.double().numpy().reshape(shapes[name])
            # GPT-2 computes x W + b.
            turn = which == "weight" and name.startswith("transformer.h") and matrix.ndim == 2
            found.setdefault(layer, {})[which] = matrix.T if turn else matrix
    return found


def product(layer: dict[str, ndarray]) -> ndarray:
    """s·B·A."""
    return SCALE * layer["lora_B"] @ layer["lora_A"]


def singular(matrix: ndarray) -> ndarray:
    return np.linalg.svd(matrix, compute_uv=False)


def assert_shows(one: dict[str, ndarray], kind: str, matrix: ndarray, atol: float) -> None:
    """The values are the matrix's; so are the directions, its output's space on the left."""
    values, left, right = (one[f"{kind}_{what}"] for what in ("values", "left", "right"))
    np.testing.assert_allclose(values, singular(matrix)[: len(values)], rtol=1e-4, atol=atol)
    if kind == "total":
        assert len(values) == min(matrix.shape)
    count = min(8, len(values))
    assert (left.shape, right.shape) == ((len(matrix), count), (matrix.shape[1], count))
    for side in (left, right):
        np.testing.assert_allclose(side.T @ side, np.eye(count), atol=1e-5)
    middle = left.T.astype(float) @ matrix @ right
    np.testing.assert_allclose(middle, np.diag(values[:count]), atol=20 * atol)


# --- against the checkpoints ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("llama", "gpt2, cold", "bf16", "LoRA"),
        *(slow(name) for name in ("llama, cold", "gpt2", "rounded", "LoRA, cold")),
    ],
)
def test_spectra_are_those_of_what_the_checkpoints_hold(
    name: str, runs: Callable[[str], Path]
) -> None:
    run_dir, changes = runs(name), RUNS[name]
    cold = changes.get("warm_start", True) is None
    merges = [] if changes.get("relora", RELORA) is None else [6, 12, 18] if cold else [12, 18]
    steps = measured(run_dir)
    assert steps == sorted({*range(5 if cold else 10, LAST, 5), *merges, LAST})
    # Weights under adapters stay as they are till a merge.
    first = at(run_dir, 5 if cold else 6)
    before = first
    for step in steps:
        now, found = at(run_dir, step), read(run_dir, step)
        assert list(found.figures) == LAYERS[changes.get("model", "llama")]
        assert found.merge == (str(merges.index(step) + 1) if step in merges else "")
        for layer, one in found.tensors.items():
            weight, start = now[layer]["weight"], first[layer]["weight"]
            if step not in merges:
                cycle = product(now[layer])
                assert_shows(one, "cycle", cycle, 1e-6)
                assert_shows(one, "total", weight + cycle - start, 2e-6)
            elif name != "rounded":  # what a merge then loses is not in the measurement before it
                assert_shows(one, "cycle", weight - before[layer]["weight"], 2e-6)
                assert_shows(one, "total", weight - start, 2e-6)
        before = now


def stable_rank(values: ndarray) -> float:
    return float((values**2).sum() / values[0] ** 2)


def effective_rank(values: ndarray) -> float:
    shares = values[values > 0] / values.sum()
    return math.exp(-float((shares * np.log(shares)).sum()))


@pytest.mark.parametrize("name", ["llama", slow("gpt2"), "bf16"])
def test_figures_are_those_of_the_checkpoints(name: str, runs: Callable[[str], Path]) -> None:
    run_dir = runs(name)
    first = at(run_dir, 6)
    for step in (10, 15, 20, 24):
        now, found = at(run_dir, step), read(run_dir, step)
        for layer, figures in found.figures.items():
            start = first[layer]["weight"]
            cycle = product(now[layer])
            weight = now[layer]["weight"] + cycle
            left, values, right = np.linalg.svd(weight - start)
            count = min(8, RANK * (1 + (step - 7) // 6))  # directions that are not noise
            projected = left[:, :count].T @ start @ right[:count].T
            norm = np.linalg.norm
            wanted = {
                "start_norm": norm(start),
                "weight_norm": norm(weight),
                "total_norm": norm(weight - start),
                "total_ratio": norm(weight - start) / norm(start),
                "total_stable_rank": stable_rank(values),
                "total_effective_rank": effective_rank(values),
                "cycle_norm": norm(cycle),
                "cycle_stable_rank": stable_rank(singular(cycle)),
                "cycle_effective_rank": effective_rank(singular(cycle)[:RANK]),
                "amplification": norm(values[:count]) / norm(projected),
            }
            for key in ("overlap", "smallest_angle_deg"):  # with the cycle before
                assert (figures.pop(key) is None) == (step == 10)
            assert figures == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("name", ["llama", slow("gpt2"), "LoRA", "full rank"])
def test_metrics_have_the_medians_over_the_layers(name: str, runs: Callable[[str], Path]) -> None:
    run_dir = runs(name)
    lines = {x["step"]: x for x in metric_lines(run_dir) if "time/spectra_s" in x}
    assert list(lines) == measured(run_dir)
    for step, line in lines.items():
        wanted = {}
        for key in spectra.MEDIANS:
            known = [x[key] for x in read(run_dir, step).figures.values() if x[key] is not None]
            if known:
                wanted[f"spectra/{key}"] = statistics.median(known)
        assert {key: x for key, x in line.items() if key.startswith("spectra/")} == wanted
        # Full rank has no cycles, plain LoRA none before its own.
        missing = {"full rank": 4, "LoRA": 2}.get(name, 2 if step <= 12 else 0)
        assert len(wanted) == len(spectra.MEDIANS) - missing


@pytest.mark.parametrize("name", ["llama", slow("gpt2"), "bf16"])
def test_the_rank_of_all_updates_grows_by_that_of_one_a_cycle(
    name: str, runs: Callable[[str], Path]
) -> None:
    for step, cycles in {10: 1, 12: 1, 15: 2, 18: 2, 20: 3, 24: 3}.items():
        for layer in read(runs(name), step).tensors.values():
            assert len(layer["cycle_values"]) == RANK
            assert numerical_rank(layer["total_values"]) == RANK * cycles


def numerical_rank(values: ndarray) -> int:
    """How many are above the rounding of the weights that were subtracted."""
    return int((values > 2e-5 * values[0]).sum())


def test_plain_lora_has_the_rank_of_its_adapters_and_full_rank_has_all(
    runs: Callable[[str], Path],
) -> None:
    for step in (10, 15, 20, 24):
        for layer in read(runs("LoRA"), step).tensors.values():
            assert numerical_rank(layer["total_values"]) == RANK
            np.testing.assert_allclose(
                layer["total_values"][:RANK], layer["cycle_values"], rtol=1e-4
            )
        for layer in read(runs("full rank"), step).tensors.values():
            assert numerical_rank(layer["total_values"]) == len(layer["total_values"]) == 32


@pytest.mark.parametrize(
    ("name", "start", "steps"),
    [("full rank", 6, [10, 15, 20, LAST]), ("full rank from 0", 0, [LAST])],
)
def test_full_rank_is_measured_from_where_it_is_told(
    name: str, start: int, steps: list[int], runs: Callable[[str], Path]
) -> None:
    run_dir = runs(name)
    assert measured(run_dir) == steps
    # Step 0 has no checkpoint; the first update has learning rate 0, so it is the second's.
    assert start or series(run_dir, "train/lr")[1] == 0
    for step in steps:
        found = read(run_dir, step)
        assert list(found.tensors) == sorted(LAYERS["llama"])
        now = at(run_dir, step)
        for layer, one in found.tensors.items():
            assert set(one) == {"total_values", "total_left", "total_right"}
            first = at(run_dir, start)[layer]["weight"] if start else weight_at_0(run_dir, layer)
            assert_shows(one, "total", now[layer]["weight"] - first, 2e-6)
            figures = found.figures[layer]
            assert {key for key, x in figures.items() if x is None} == {
                *("overlap", "smallest_angle_deg"),
                *("cycle_norm", "cycle_stable_rank", "cycle_effective_rank"),
            }


def weight_at_0(run_dir: Path, layer: str) -> ndarray:
    """The model of a seed, as its class draws it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = yaml.safe_load((run_dir / "config.yaml").read_text())
    torch.manual_seed(values["seed"])
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**json.loads(Path(values["model"]["config"]).read_text()))
    )
    return model.get_submodule(layer).weight.detach().double().numpy()


def test_with_decay_of_the_merged_weights_the_total_has_decayed_too(
    runs: Callable[[str], Path],
) -> None:
    run_dir = runs("merged decay")
    first, rates = at(run_dir, 6), series(run_dir, "train/lr")
    for step, merge in {10: 6, 15: 12, 20: 18, 24: 18}.items():
        shrink = math.prod(1 - rates[n] * 0.1 for n in range(merge + 1, step + 1))
        assert shrink < 0.9999
        now = at(run_dir, step)
        for layer, one in read(run_dir, step).tensors.items():
            total = shrink * now[layer]["weight"] + product(now[layer]) - first[layer]["weight"]
            assert_shows(one, "cycle", product(now[layer]), 1e-6)
            assert_shows(one, "total", total, 2e-6)
    for step in (12, 18):
        now = at(run_dir, step)
        for layer, one in read(run_dir, step).tensors.items():
            assert_shows(one, "total", now[layer]["weight"] - first[layer]["weight"], 2e-6)


# --- successive cycles ----------------------------------------------------------------------------


def test_the_overlap_is_that_of_the_two_files(runs: Callable[[str], Path]) -> None:
    for name in ("llama", "gpt2, cold"):
        run_dir = runs(name)
        first = 12 if name == "llama" else 6
        for step in measured(run_dir):
            # The last measurement before the cycle began.
            earlier = [m for m in (6, 12, 18) if first <= m < step]
            for layer, figures in read(run_dir, step).figures.items():
                if not earlier:
                    assert figures["overlap"] is None
                    continue
                u, v = (
                    read(run_dir, s).tensors[layer]["cycle_left"].astype(float)
                    for s in (earlier[-1], step)
                )
                assert u.shape[1] == v.shape[1] == RANK
                wanted = np.linalg.norm(u.T @ v) ** 2 / RANK
                assert figures["overlap"] == pytest.approx(wanted, abs=1e-6)
                cosine = np.linalg.svd(u.T @ v, compute_uv=False).max()
                angle = np.degrees(np.arccos(min(cosine, 1)))
                assert figures["smallest_angle_deg"] == pytest.approx(angle, abs=0.05)
                assert 0 < wanted < 1


def test_a_cycle_that_has_not_moved_overlaps_with_nothing(tmp_path: Path) -> None:
    """The update after a merge has learning rate 0: B = 0, and its directions mean nothing."""
    run_dir = tmp_path / "run"
    assert run(run_dir, **{**settings({}), "train__steps": 13}) == 0
    assert series(run_dir, "train/lr")[13] == 0
    found = read(run_dir, 13)
    for layer, figures in found.figures.items():
        assert not found.tensors[layer]["cycle_values"].any()
        assert figures["cycle_effective_rank"] == figures["cycle_norm"] == 0
        assert figures["overlap"] is None
    assert list(series(run_dir, "spectra/total_ratio")) == [10, 12, 13]
    assert not series(run_dir, "spectra/overlap")


# --- what merges lose -----------------------------------------------------------------------------


def test_merges_lose_nothing_unless_told_to(runs: Callable[[str], Path]) -> None:
    for name in ("llama", "bf16"):
        assert series(runs(name), "relora/rounding_loss") == {12: 0.0, 18: 0.0}


def test_rounded_merges_lose_what_bf16_cannot_hold(tmp_path: Path) -> None:
    """A run that ends on a boundary has what a merge there starts from; made longer, it merges."""
    run_dir = tmp_path / "run"
    changes = {**settings(RUNS["rounded"]), "schedule__base": "constant"}
    assert run(run_dir, **changes, train__steps=18) == 0
    assert read(run_dir, 18).merge == ""
    held = at(run_dir, 18)
    assert run(run_dir, **changes, train__steps=20) == 0
    assert read(run_dir, 18).merge == "2"
    update = lost = size = 0.0
    for layer in LAYERS["llama"]:
        weight = held[layer]["weight"]
        wanted = weight + product(held[layer])
        arrived = torch.from_numpy(wanted).float().bfloat16().double().numpy()
        update += float((product(held[layer]) ** 2).sum())
        size += float((weight**2).sum())
        lost += float(((wanted - arrived) ** 2).sum())
    figures = [x for x in metric_lines(run_dir) if x.get("relora/merge") == 2]
    assert len(figures) == 1
    assert figures[0]["relora/rounding_loss"] == pytest.approx(math.sqrt(lost / update), rel=1e-3)
    assert figures[0]["relora/update_ratio"] == pytest.approx(math.sqrt(update / size), rel=1e-3)
    assert 0.001 < figures[0]["relora/rounding_loss"] < 0.5


# --- stops, kills, going back ---------------------------------------------------------------------


def test_stops_leave_no_trace_in_what_is_measured(
    runs: Callable[[str], Path], tmp_path: Path
) -> None:
    """Before a merge, on one, within a cycle, on a measurement in between."""
    run_dir = tmp_path / "run"
    for stop in (11, 12, 15, 16):
        assert run(run_dir, f"train.stop_after={stop}", **settings({})) == 75
        assert measured(run_dir) == [step for step in MEASURED if step <= stop]
    assert run(run_dir, **settings({})) == 0
    assert files(run_dir) == files(runs("llama"))
    assert trajectory(run_dir) == trajectory(runs("llama"))


def test_going_back_measures_again(runs: Callable[[str], Path], tmp_path: Path) -> None:
    run_dir = shutil.copytree(runs("llama"), tmp_path / "run")
    back = ("--resume", str(checkpoint(run_dir, 10)), "train.stop_after=11")
    assert run(run_dir, *back, **settings({})) == 75
    assert measured(run_dir) == [10]
    assert run(run_dir, **settings({})) == 0
    assert files(run_dir) == files(runs("llama"))
    assert trajectory(run_dir) == trajectory(runs("llama"))


def test_nothing_that_a_killed_run_left_is_taken_for_a_measurement(
    runs: Callable[[str], Path], tmp_path: Path
) -> None:
    """It was ahead of its checkpoint, and on more ranks: one file whole, one in parts, one cut."""
    run_dir, home = tmp_path / "run", tmp_path / "run" / "spectra"
    assert run(run_dir, "train.stop_after=14", **settings({})) == 75
    other = (runs("gpt2") / "spectra" / "step_00000015.safetensors").read_bytes()
    (home / "step_00000015.safetensors").write_bytes(other)
    for name in ("step_00000018.rank_0000", "step_00000018.rank_0001", "step_00000015.rank_0003"):
        (home / name).write_bytes(other)
    for name in ("step_00000018.safetensors.tmp", "step_00000018.rank_0002.tmp"):
        (home / name).write_bytes(other[:1000])
    assert run(run_dir, **settings({})) == 0
    assert files(run_dir) == files(runs("llama"))


def test_a_last_cycle_that_cannot_be_read_ends_the_run_with_one_line(
    runs: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert run(run_dir, "train.stop_after=14", **settings({})) == 75
    path = run_dir / "spectra" / "step_00000012.safetensors"
    path.write_bytes(path.read_bytes()[:300])
    capsys.readouterr()
    assert run(run_dir, **settings({})) == 4
    assert str(run_dir / "spectra") in one_line(capsys)


@pytest.mark.slow
def test_a_run_killed_in_a_measurement_measures_the_same(
    runs: Callable[[str], Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    config = make_config(run_dir, **settings({}))
    program = (
        "import sys, time\n"
        "from relora.training import spectra\n"
        "real = spectra.join_parts\n"
        "def slow(run_dir, step, *arguments):\n"
        "    if step == 18:\n"
        "        time.sleep(60)\n"
        "    real(run_dir, step, *arguments)\n"
        "spectra.join_parts = slow\n"
        "from relora.cli import main\n"
        f"sys.exit(main(['train', {str(config)!r}]))\n"
    )
    process = Process(tmp_path / "out.txt", program=(sys.executable, "-c", program))
    part = run_dir / "spectra" / "step_00000018.rank_0000"
    process.wait_until(part.exists)
    os.kill(process.popen.pid, signal.SIGKILL)
    process.wait()
    assert part.exists()
    assert relora("train", config) == 0
    assert files(run_dir) == files(runs("llama"))
    assert trajectory(run_dir) == trajectory(runs("llama"))


# --- when it is not to be, or cannot be -----------------------------------------------------------


def test_null_leaves_nothing_and_changes_nothing(
    runs: Callable[[str], Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert run(run_dir, **{**settings({}), "spectra": None}) == 0
    assert not (run_dir / "spectra").exists()
    lines = metric_lines(run_dir)
    assert not [x for x in lines if any("spectra" in key for key in x)]
    assert "SPECTRA" not in (run_dir / "log.txt").read_text()
    with_spectra = [x for x in trajectory(runs("llama")) if "spectra/total_ratio" not in x]
    assert trajectory(run_dir) == with_spectra


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A run in its second cycle, its first one measured."""
    run_dir = tmp_path / "run"
    assert run(run_dir, "train.stop_after=14", **settings({})) == 75
    return run_dir


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """All that a failed command says on standard error, which must be one line of its own."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.startswith("relora:")]
    assert len(lines) == 1, text
    return lines[0]


def test_a_start_that_is_gone_ends_the_run_with_one_line(
    stopped: Path, runs: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(stopped / "spectra" / "start")
    before = series(stopped, "train/loss")
    capsys.readouterr()
    assert run(stopped, **settings({})) == 4
    assert series(stopped, "train/loss") == before  # at once, not a cycle later
    line = one_line(capsys)
    assert line.startswith(f"relora: {stopped / 'spectra'}: ")
    assert "start" in line
    assert "with spectra: null the run goes on" in line
    state = run_state(stopped)
    assert (state["status"], state["code"]) == ("failed", 4)
    # Nothing was lost: with the start back it goes on.
    shutil.copytree(runs("llama") / "spectra" / "start", stopped / "spectra" / "start")
    assert run(stopped, **settings({})) == 0
    assert files(stopped) == files(runs("llama"))


def test_the_way_out_of_a_start_that_is_gone_is_one(
    stopped: Path, runs: Callable[[str], Path]
) -> None:
    shutil.rmtree(stopped / "spectra")
    assert run(stopped, **{**settings({}), "spectra": None}) == 0
    losses = "train/loss"
    assert series(stopped, losses) == series(runs("llama"), losses)


def test_a_start_of_another_step_is_not_taken_for_the_one_that_is_wanted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = {"lora": None, "relora": None, "warm_start": None}
    assert train(tmp_path / "run", "train.stop_after=8", spectra={"start": 3}, **full) == 75
    assert train(tmp_path / "run", spectra={"start": 6}, **full) == 4
    assert "is of step 3, spectra.start says 6" in capsys.readouterr().err
    assert train(tmp_path / "run", spectra={"start": 3}, **full) == 0


@pytest.mark.parametrize(
    ("when", "error"),
    [
        ("start", OSError(28, "No space left")),
        ("rank_0000", SafetensorError("I/O error")),
        ("safetensors", OSError(28, "No space left")),
    ],
    ids=["the start", "a part", "the whole"],
)
def test_a_full_disk_ends_the_run_and_leaves_no_part_of_a_measurement(
    when: str,
    error: Exception,
    runs: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(runs("llama"), run_dir)
    real = spectra_files.save_file

    def full(held: Any, path: Path, **options: Any) -> None:
        measures = "start" not in str(path.relative_to(run_dir))
        if measures == (when != "start") and (not measures or f".{when}" in path.name):
            path.write_bytes(b"half")
            raise error
        real(held, path, **options)

    monkeypatch.setattr(spectra_files, "save_file", full)
    step = 5 if when == "start" else 10
    # The start is written again where the run goes back to before it.
    back = ("--resume", str(checkpoint(run_dir, step)))
    assert run(run_dir, *back, **settings({})) == 4
    line = one_line(capsys)
    assert str(error) in line
    assert str(run_dir / "spectra") in line
    left = [name for name in files(run_dir) if not name.startswith("start/")]
    assert left == ([] if step == 5 else ["step_00000010.safetensors"])
    assert not list((run_dir / "spectra").rglob("*.tmp"))
    monkeypatch.undo()
    assert run(run_dir, *back, **settings({})) == 0
    assert files(run_dir) == files(runs("llama"))


# --- stages and ranks -----------------------------------------------------------------------------


def assert_same_figures(one: Path, other: Path, rel: float) -> None:
    """Every singular value to a share of the largest, every figure to a share of itself."""
    assert measured(one) == measured(other) == MEASURED
    for step in MEASURED:
        mine, theirs = read(one, step), read(other, step)
        assert mine.merge == theirs.merge
        assert list(mine.figures) == list(theirs.figures)
        for layer, figures in mine.figures.items():
            wanted = {k: x for k, x in theirs.figures[layer].items() if x is not None}
            found = {k: x for k, x in figures.items() if x is not None}
            assert found == pytest.approx(wanted, rel=rel, abs=rel)
            for kind in ("cycle_values", "total_values"):
                a, b = mine.tensors[layer][kind], theirs.tensors[layer][kind]
                np.testing.assert_allclose(a, b, rtol=0, atol=rel * b[0])
    for key in [f"spectra/{key}" for key in spectra.MEDIANS]:
        assert series(one, key) == pytest.approx(series(other, key), rel=rel, abs=rel)


# Stages and numbers of ranks add up in other orders; in fp32 24 steps make 1e-4 of it.
CLOSE = 2e-3
# Under autocast every product is rounded to 3 digits.
CLOSE_BF16 = 0.1


@pytest.mark.parametrize("stage", [slow(0), slow(2), 3])
def test_all_stages_measure_the_same(
    stage: int, runs: Callable[[str], Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert run(run_dir, **settings({}), deepspeed__zero_stage=stage) == 0
    assert_same_figures(run_dir, runs("llama"), CLOSE)


def test_bf16_measures_about_the_same_as_fp32(runs: Callable[[str], Path]) -> None:
    for step in MEASURED:
        mine, theirs = (read(runs(name), step) for name in ("bf16", "llama"))
        for layer in mine.figures:
            for kind in ("cycle_values", "total_values"):
                a, b = mine.tensors[layer][kind], theirs.tensors[layer][kind]
                np.testing.assert_allclose(a, b, rtol=0, atol=CLOSE_BF16 * b[0])


def leg(ranks: Any, config: str, harm: str, *stops: int | None) -> tuple[list[int], str]:
    """Exit codes of `relora train`, once for each stop, with the message that ended the last.

    Args:
        harm: `start` removes what is counted from after step 14, `full` lets no file of rank 1
            grow from step 7 on.
    """
    from relora.errors import UserError
    from test_resume import legs
    from test_saving import small_files_on

    def harmed(run: Any, *arguments: Any) -> Any:
        if harm == "start" and ranks.is_main and run.step == 14:
            shutil.rmtree(run.config.run_dir / "spectra" / "start")
        return update(run, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Metrics, "figure", lambda *_: None)
        log = small_files_on(ranks, patch, 1, 2000) if harm == "full" else log_step
        try:
            return legs(ranks, config, *stops, update=harmed, log=log), ""
        except UserError as error:
            return [error.code], str(error)
        finally:
            import resource

            limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


Launch = tuple[Path, Outcomes]  # the directory of its runs, and what came out


def launch(
    directory: Path,
    rows: dict[str, tuple[dict[str, Any], str, list[int | None]]],
) -> Launch:
    """Changes, harm and stops by name: each a scenario of one launch of two ranks."""
    workshop()
    scenarios = []
    for name, (changes, harm, stops) in rows.items():
        config = make_config(directory / name, **settings(changes))
        scenarios.append(Scenario(name, leg, (str(config), harm, *stops)))
    return directory, run_ranks(2, scenarios, timeout=280)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    few = {"train__keep_every": None, "spectra": {}}  # nothing else is written before the merge
    return launch(
        tmp_path_factory.mktemp("two_ranks"),
        {
            "stage_3": ({"deepspeed__zero_stage": 3}, "", [None]),
            "full": ({**few, "train__save_every": None}, "full", [None]),
        },
    )


@pytest.fixture(scope="module")
def more_on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    rows: dict[str, Any] = {
        f"stage_{stage}": ({"deepspeed__zero_stage": stage}, "", [None]) for stage in range(4)
    }
    stage_3 = {"deepspeed__zero_stage": 3}
    rows["cut"] = (stage_3, "", [12, 16, None])
    rows["bf16"] = ({**BF16, **stage_3}, "", [None])
    rows["prompt"] = ({**stage_3, "train__sample_prompt": PROMPT}, "", [None])
    rows["gone"] = ({}, "start", [None])
    return launch(tmp_path_factory.mktemp("more"), rows)


def test_two_ranks_measure_the_same(runs: Callable[[str], Path], two_ranks: Launch) -> None:
    directory, outcomes = two_ranks
    assert outcomes["stage_3"] == [([0], "")] * 2
    assert_same_figures(directory / "stage_3", runs("llama"), CLOSE)
    assert_held(directory / "stage_3")


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_two_ranks_measure_the_same_on_all_stages(
    stage: int, runs: Callable[[str], Path], more_on_two_ranks: Launch
) -> None:
    directory, outcomes = more_on_two_ranks
    assert outcomes[f"stage_{stage}"] == [([0], "")] * 2
    assert_same_figures(directory / f"stage_{stage}", runs("llama"), CLOSE)


@pytest.mark.slow
def test_two_ranks_in_bf16_measure_what_the_checkpoints_hold(more_on_two_ranks: Launch) -> None:
    directory, outcomes = more_on_two_ranks
    assert outcomes["bf16"] == [([0], "")] * 2
    assert_held(directory / "bf16")


def assert_held(run_dir: Path) -> None:
    """Ranks have the layers by turns; in the file they are all there, each its own."""
    first = at(run_dir, 6)
    for step in MEASURED:
        now, found = at(run_dir, step), read(run_dir, step)
        assert list(found.figures) == LAYERS["llama"]
        assert sorted(found.tensors) == sorted(LAYERS["llama"])
        for layer, one in found.tensors.items():
            weight = now[layer]["weight"]
            if step not in (12, 18):
                assert_shows(one, "cycle", product(now[layer]), 1e-6)
                weight = weight + product(now[layer])
            assert_shows(one, "total", weight - first[layer]["weight"], 2e-6)


@pytest.mark.slow
def test_on_two_ranks_stops_leave_no_trace_in_what_is_measured(
    more_on_two_ranks: Launch,
) -> None:
    directory, outcomes = more_on_two_ranks
    assert outcomes["cut"] == [([75, 75, 0], "")] * 2
    assert files(directory / "cut") == files(directory / "stage_3")
    assert trajectory(directory / "cut") == trajectory(directory / "stage_3")


@pytest.mark.slow
def test_on_two_ranks_a_start_that_is_gone_ends_both(more_on_two_ranks: Launch) -> None:
    directory, outcomes = more_on_two_ranks
    (codes, message), other = outcomes["gone"]
    assert other == (codes, message)
    assert codes == [4]
    assert message.startswith(f"{directory / 'gone' / 'spectra'}: ")
    assert "\n" not in message
    assert [n for n in files(directory / "gone") if "start" not in n] == [
        "step_00000010.safetensors",
        "step_00000012.safetensors",
    ]
    assert run_state(directory / "gone")["code"] == 4


def test_a_disk_that_is_full_for_one_rank_ends_both(two_ranks: Launch) -> None:
    directory, outcomes = two_ranks
    (codes, message), other = outcomes["full"]
    assert other == (codes, message)
    assert codes == [4]
    assert message.startswith(f"{directory / 'full' / 'spectra'}: ")
    assert "File too large" in message
    assert "\n" not in message
    assert not [name for name in files(directory / "full") if not name.startswith("start/")]


# --- TensorBoard ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def board(runs: Callable[[str], Path]) -> Any:
    """What TensorBoard reads of a run, all of it."""
    return events(runs("prompt"))


def events(run_dir: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    everything = {"images": 0, "tensors": 0, "scalars": 0}
    found = EventAccumulator(str(run_dir), size_guidance=everything)
    found.Reload()
    return found


def test_tensorboard_has_every_number_of_the_metrics(
    board: Any, runs: Callable[[str], Path]
) -> None:
    for key in ("relora/merge", "relora/update_ratio", "eval/loss", "spectra/total_ratio"):
        written = {x.step: x.value for x in board.Scalars(key)}
        assert written == pytest.approx(series(runs("prompt"), key), rel=1e-6)
    assert {x.step: x.value for x in board.Scalars("relora/merge")} == {12: 1, 18: 2}
    for tag in board.Tags()["scalars"]:
        assert tag.partition("/")[0] in ("train", "eval", "relora", "spectra", "perf", "time")


def test_the_picture_shows_the_median_values_of_each_kind(runs: Callable[[str], Path]) -> None:
    run_dir = runs("llama")
    found = read(run_dir, 18)
    (axes,) = spectra.draw_spectrum(run_dir, 18).axes
    drawn = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    dotted = [line for line in axes.get_lines() if line.get_linestyle() == ":"]
    kinds = {".".join(name.split(".")[-2:]) for name in found.figures}
    assert len(kinds) == 7
    assert kinds <= set(drawn)
    assert len(dotted) == 7
    for kind in kinds:
        layers = [found.tensors[name]["total_values"] for name in found.tensors if kind in name]
        wanted = np.log10(np.maximum(np.median(layers, axis=0), 1e-12))
        assert np.asarray(drawn[kind]) == pytest.approx(wanted, abs=1e-5)


def test_layers_of_one_name_and_other_sizes_can_be_drawn(tmp_path: Path) -> None:
    """As GPT-2's two c_proj, of attention and MLP."""
    values = {
        "h.0.attn.c_proj|total_values": torch.ones(32),
        "h.0.mlp.c_proj|total_values": torch.ones(16),
        "h.1.mlp.c_proj|total_values": torch.ones(8),
    }
    (tmp_path / "spectra").mkdir()
    save_file(values, tmp_path / "spectra" / "step_00000003.safetensors")
    (axes,) = spectra.draw_spectrum(tmp_path, 3).axes
    assert sorted(len(line.get_ydata()) for line in axes.get_lines()) == [8, 16, 32]


def test_tensorboard_has_a_picture_of_each_measurement(board: Any) -> None:
    import io

    from matplotlib.image import imread

    pictures = board.Images("spectra/singular_values")
    assert [picture.step for picture in pictures] == MEASURED
    for picture in pictures:
        pixels = imread(io.BytesIO(picture.encoded_image_string))
        assert pixels.shape[:2] == (picture.height, picture.width)


def test_tensorboard_has_a_sample_at_each_evaluation(
    board: Any, runs: Callable[[str], Path]
) -> None:
    samples = board.Tensors("eval/sample/text_summary")
    assert [x.step for x in samples] == list(series(runs("prompt"), "eval/loss")) == [12, LAST]
    for sample in samples:
        (text,) = sample.tensor_proto.string_val
        assert text.decode().startswith(f"    {PROMPT}")  # code, to Markdown
        assert len(text.decode()) > len(PROMPT) + 4 + 10
        assert not [x for x in text.decode().splitlines() if not x.startswith("    ")]


def test_the_last_sample_is_what_the_model_makes_of_the_prompt(
    board: Any, runs: Callable[[str], Path], tmp_path: Path
) -> None:
    """By transformers alone, from what `export` writes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert relora("export", runs("prompt"), "--to", tmp_path / "model") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        for _ in range(SEQUENCE // 2):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    (text,) = board.Tensors("eval/sample/text_summary")[-1].tensor_proto.string_val
    assert text.decode().replace("\n    ", "\n") == f"    {tokenizer.decode(ids[0])}"


def test_the_hyper_parameters_tab_has_the_config_and_the_final_figures(
    board: Any, runs: Callable[[str], Path]
) -> None:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    def content(what: str) -> Any:
        return HParamsPluginData.FromString(
            board.summary_metadata[f"_hparams_/{what}"].plugin_data.content
        )

    run_dir = runs("prompt")
    shown = {
        key: value.string_value or value.number_value or value.bool_value
        for key, value in content("session_start_info").session_start_info.hparams.items()
    }
    wanted = dict(flattened(yaml.safe_load((run_dir / "config.yaml").read_text())))
    wanted["method"] = "ReLoRA"
    # What runs are compared by; folders and intervals are no hyper-parameters.
    assert {"method", "optimizer.lr", "lora.rank", "relora.cycle_steps", "seed"} <= shown.keys()
    assert not {"run_dir", "data.dir", "train.log_every", "data.num_workers"} & shown.keys()
    assert shown["lora.rank"] == RANK
    assert shown["optimizer.lr"] == wanted["optimizer.lr"] == 1e-2
    for key in shown:
        value = wanted[key]
        assert shown[key] == (value if isinstance(value, bool | int | float) else str(value))
    metrics = content("experiment").experiment.metric_infos
    names = {x.name.tag for x in metrics}
    assert {"eval/loss", "eval/perplexity"} <= names
    assert names <= set(board.Tags()["scalars"])  # a column without a scalar stays empty
    assert content("session_end_info").session_end_info.status == 1  # STATUS_SUCCESS


def flattened(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.mark.slow
def test_a_run_that_was_stopped_shows_each_thing_once(
    runs: Callable[[str], Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    changes = settings(RUNS["prompt"])
    for stop in (12, 16):
        assert run(run_dir, f"train.stop_after={stop}", pictures=True, **changes) == 75
        assert not [tag for tag in events(run_dir).summary_metadata if "session_end" in tag]
        time.sleep(1.1)  # TensorBoard reads files in the order of their names: of whole seconds
    assert run(run_dir, pictures=True, **changes) == 0
    found = events(run_dir)
    assert [x.step for x in found.Images("spectra/singular_values")] == MEASURED
    assert [x.step for x in found.Tensors("eval/sample/text_summary")] == [12, LAST]
    assert [x.step for x in found.Scalars("relora/merge")] == [12, 18]
    assert "_hparams_/session_end_info" in found.summary_metadata


def test_samples_change_nothing(runs: Callable[[str], Path]) -> None:
    assert trajectory(runs("prompt")) == trajectory(runs("llama"))
    assert files(runs("prompt")) == files(runs("llama"))


@pytest.mark.slow
def test_on_two_ranks_with_sharded_weights_samples_change_nothing(
    more_on_two_ranks: Launch,
) -> None:
    directory, outcomes = more_on_two_ranks
    assert outcomes["prompt"] == outcomes["stage_3"] == [([0], "")] * 2
    assert trajectory(directory / "prompt") == trajectory(directory / "stage_3")
    assert files(directory / "prompt") == files(directory / "stage_3")


# --- the rate of plain LoRA -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LoRA", "LoRA, cold"])
def test_adapters_of_plain_lora_have_a_rate_of_their_own(
    name: str, runs: Callable[[str], Path]
) -> None:
    def factor(done: int) -> float:
        if done < 3:
            return done / 3
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (done - 3) / (LAST - 3)))

    born = 6 if name == "LoRA" else 0
    assert series(runs(name), "train/lr") == pytest.approx(
        {step: (3e-2 if step > born else 1e-2) * factor(step - 1) for step in range(1, LAST + 1)}
    )
