"""`relora arms`: what is trained for a comparison, in which order, at which rates."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from relora.commands import arms as command
from relora.config import Config
from relora.errors import NumericsError
from relora.load import dump_config, load_config
from relora.lora.inject import add_adapters
from relora.model import build_meta_model, build_model, count_parameters
from relora.training.arms import Arm, standard_arms
from relora.training.tuning import search
from runs import Process, alive, logged_step, make_config, relora, run_state, series, wait_for

FULL = ["lora=null", "relora=null", "warm_start=null"]


def settings(overrides: list[str], config: Path) -> Config:
    """The config of a run that was asked for."""
    return load_config(config, overrides)


@pytest.mark.parametrize("model", ["llama", "gpt2", "gpt_neox"])
def test_the_standard_arms_are_the_papers(model: str, tmp_path: Path) -> None:
    config = make_config(tmp_path / "run")
    path = json.loads(json.dumps(yaml.safe_load(config.read_text())["model"]["config"]))
    config = make_config(tmp_path / "run", model={"config": path.replace("llama", model)})
    arms = standard_arms(load_config(config), tmp_path / "arms")
    found = {a.name: settings(a.run(tmp_path / a.slug, 7), config) for a in arms}
    assert {n: (c.method, bool(c.warm_start)) for n, c in found.items()} == {
        "full rank": ("full rank", False),
        "control": ("full rank", False),
        "LoRA": ("LoRA", False),
        "ReLoRA": ("ReLoRA", False),
        "LoRA + warm start": ("LoRA", True),
        "ReLoRA + warm start": ("ReLoRA", True),
    }
    for one in found.values():
        assert one.seed == 7
        assert (one.data, one.batch, one.train) == (found["LoRA"].data, one.batch, one.train)
    # The rate after the birth is the same with and without merges, and full rank has its own.
    assert {found[n].learning_rate(10) for n in ("LoRA + warm start", "ReLoRA + warm start")} == {
        found["ReLoRA + warm start"].learning_rate(10)
    }
    adapted = build_meta_model(found["ReLoRA"].model)
    assert found["ReLoRA"].lora is not None
    add_adapters(adapted, found["ReLoRA"].lora)
    trainable, _ = count_parameters(adapted)
    control, _ = count_parameters(build_model(found["control"].model, 0))
    assert control == pytest.approx(trainable, rel=0.3)  # widths of 16 and 24 lie far apart
    ids = torch.arange(8)[None]
    assert build_model(found["control"].model, 0)(input_ids=ids).logits.isfinite().all()


def test_the_control_of_a_real_model_is_as_large_as_what_relora_trains(tmp_path: Path) -> None:
    config = Path("configs/published/llama_60m.yaml")
    control = next(a for a in standard_arms(load_config(config), tmp_path) if a.name == "control")
    size, _ = count_parameters(build_meta_model(settings(list(control.overrides), config).model))
    run = load_config(config)
    model = build_meta_model(run.model)
    assert run.lora is not None
    add_adapters(model, run.lora)
    assert size == pytest.approx(count_parameters(model)[0], rel=0.02)


def test_the_arms_of_blocks_are_full_rank_by_either_optimizer_and_blocks(tmp_path: Path) -> None:
    config = Path("configs/llama_60m_relora.yaml")
    arms = standard_arms(load_config(config), tmp_path)
    found = {a.name: settings(list(a.overrides), config) for a in arms}
    assert {
        n: (c.lora is None, c.relora is None, c.optimizer.matrices) for n, c in found.items()
    } == {
        "full rank": (True, True, "adamw"),
        "full rank, Muon": (True, True, "muon"),
        "control": (True, True, "muon"),
        "blocks, no restarts": (False, True, "muon"),
        "blocks": (False, False, "muon"),
    }
    after_warm_up = {found[n].learning_rate(600) for n in ("blocks, no restarts", "blocks")}
    assert len(after_warm_up) == 1


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Runs that were asked for; instead of training, a run's loss depends on its rates.

    The best rate is 2e-2 for adapters and 5e-3 for full rank; beyond 0.1 a run diverges.
    """
    asked: list[Config] = []

    def launch(work: Any, arm: Arm, directory: Path, seed: int) -> int:
        config = load_config(Path(work.given[0]), [*work.given[1:], *arm.run(directory, seed)])
        asked.append(config)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.yaml").write_text(dump_config(config))
        rate = config.learning_rate(10) / config.clock.lr_factor(10)
        state: dict[str, Any] = {"status": "finished", "reason": "", "step": 24, "code": 0}
        if rate > 0.1:
            state |= {"status": "failed", "reason": "not finite", "code": NumericsError.code}
        loss = 3 + abs(math.log(rate / (2e-2 if config.lora else 5e-3)))
        if isinstance(config.optimizer.lr_embeddings, float):  # best at 2e-2
            loss += abs(math.log(config.optimizer.lr_embeddings / 2e-2))
        (directory / "run_state.json").write_text(json.dumps(state))
        (directory / "metrics.jsonl").write_text(json.dumps({"step": 24, "eval/loss": loss}) + "\n")
        return state["code"]

    monkeypatch.setattr(command._Work, "_launch", launch)
    return asked


@pytest.fixture
def write_arms(tmp_path: Path) -> Callable[..., Path]:
    """Write a file of arms."""

    def write(**values: Any) -> Path:
        path = tmp_path / "arms.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return write


def test_rates_are_tuned_on_a_seed_of_their_own_and_the_best_is_used(
    tmp_path: Path, trained: list[Config], write_arms: Callable[..., Path]
) -> None:
    config = make_config(tmp_path / "run", lora={"rank": 4, "lr": 1e-2})
    values = yaml.safe_load(config.read_text())
    del values["relora"]["lr"]
    config.write_text(yaml.safe_dump(values))
    arms = {"LoRA": ["relora=null"], "full rank": FULL, "ReLoRA": []}
    tune = {"factors": [0.5, 1, 2, 20], "lr_embeddings": None, "extend": 0, "seed": 9}
    file = write_arms(seeds=[3, 4], tune=tune, arms=arms)
    assert relora("arms", config, "--arms", file, "--to", tmp_path / "to") == 0
    assert [c.seed for c in trained] == [9] * 12 + [3, 4] * 3
    kept = trained[12:]
    assert [c.optimizer.lr for c in kept] == [5e-3] * 6  # of full rank, and so of each warm start
    assert [c.lora and c.lora.lr for c in kept] == [2e-2, 2e-2, None, None, 2e-2, 2e-2]
    report = json.loads((tmp_path / "to" / "arms.json").read_text())
    assert report["LoRA"]["tried"]["0.2"] is None  # diverged
    assert min(report["LoRA"]["tried"].items(), key=lambda x: x[1] or 9)[0] == "0.02"
    lines = (tmp_path / "to" / "runs.txt").read_text().splitlines()
    assert lines[-1] == f"ReLoRA={tmp_path / 'to' / 'relora' / 'seed_4'}"
    # All of it is done: nothing is trained again.
    trained.clear()
    assert relora("arms", config, "--arms", file, "--to", tmp_path / "to") == 0
    assert trained == []


def test_a_search_goes_on_beyond_the_edge_and_has_a_limit() -> None:
    def hill(best: float) -> Callable[[float], float]:
        return lambda factor: math.inf if factor > 30 else abs(math.log(factor / best))

    inside = search([0.5, 1, 2], hill(1), 3)
    assert (inside.best, inside.edge, inside.added) == (1, False, 0)
    above = search([1, 2, 0.5], hill(8), 3)
    assert list(above.losses) == [0.5, 1, 2, 4, 8, 16]
    assert (above.best, above.edge, above.added) == (8, False, 3)
    assert "edge of what" not in above.sentence("x", "lr", 1e-3)
    below = search([3, 9], hill(0.01), 2)
    assert (list(below.losses)[:2], below.edge, below.added) == ([1 / 3, 1], True, 2)
    said = below.sentence("x", "lr", 3e-3)
    assert said.startswith("x: lr 0.001, the best of 0.001 (3.5066), 0.003 (4.6052), 0.009 (")
    assert said.endswith(
        "2 of them added because the best was at the edge; it is the edge of what was tried"
    )
    wild = search([40, 80], hill(10), 1)  # all diverge: it goes down
    assert (wild.best, wild.diverged) == (20, False)
    assert search([40, 80], hill(10), 0).diverged


def test_embeddings_rate_is_searched_too_and_shared_by_all_arms(
    tmp_path: Path,
    trained: list[Config],
    write_arms: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stopped in the middle of it, too; the same command goes on."""
    config = make_config(tmp_path / "run", optimizer={"lr": 5e-3}, lora={"rank": 4})
    arms = {"ReLoRA": ["relora.lr=0.02"], "full rank": FULL, "own": ["optimizer.lr_embeddings=0.1"]}
    file = write_arms(seeds=[3], tune={"factors": [0.5, 1, 2], "seed": 9}, arms=arms)
    command_line = ("arms", config, "--arms", file, "--to", tmp_path / "to")
    real = command._Work._launch

    def stops(work: Any, *args: Any) -> int:
        return 75 if len(trained) == 11 else real(work, *args)

    with monkeypatch.context() as patch:
        patch.setattr(command._Work, "_launch", stops)
        assert relora(*command_line) == 75
    assert not (tmp_path / "to" / "runs.txt").exists()
    before = len(trained)
    capsys.readouterr()
    assert relora(*command_line) == 0
    output = capsys.readouterr().out
    assert "all arms: optimizer.lr_embeddings 0.02, the best of 0.0025 (" in output
    assert "by the mean loss of full rank, ReLoRA; 2 of them added" in output
    asked = [(c.seed, c.method, c.learning_rate(10), c.optimizer.lr_embeddings) for c in trained]
    assert len(asked[:before]) == 11
    assert len(set(asked)) == len(asked)  # what was done was not trained again
    kept = [c for c in trained if c.seed == 3]
    assert [c.optimizer.lr_embeddings for c in kept] == [0.02, 0.02, 0.1]
    report = json.loads((tmp_path / "to" / "arms.json").read_text())
    assert len(report["ReLoRA"]["tuning"]) == 2
    assert len(report["own"]["tuning"]) == 1


def test_a_run_that_diverges_is_a_result_and_one_that_stops_stops_all(
    tmp_path: Path,
    trained: list[Config],
    write_arms: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config(tmp_path / "run")
    file = write_arms(arms={"wild": ["relora.lr=0.5"], "calm": []})
    assert relora("arms", config, "--arms", file, "--to", tmp_path / "to") == 0
    assert len(trained) == 2
    monkeypatch.setattr(command._Work, "_launch", lambda *_: 75)
    assert relora("arms", config, "--arms", file, "--to", tmp_path / "again") == 75
    assert not (tmp_path / "again" / "runs.txt").exists()


def test_a_run_with_other_settings_is_not_taken_for_the_one_that_is_wanted(
    tmp_path: Path,
    trained: list[Config],
    write_arms: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make_config(tmp_path / "run")
    file = write_arms(arms={"calm": []})
    assert relora("arms", config, "--arms", file, "--to", tmp_path / "to") == 0
    trained.clear()
    for change in ("optimizer.lr=3e-3", "train.steps=30"):
        assert relora("arms", config, change, "--arms", file, "--to", tmp_path / "to") == 2
        error = capsys.readouterr().err
        assert change.split("=")[0] in error
        assert "delete it" in error
    assert relora("arms", config, "train.log_every=2", "--arms", file, "--to", tmp_path / "to") == 0
    assert trained == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arms": {"a b": [], "a-b": []}}, "two names would share the directory 'a_b'"),
        ({"seeds": [1], "tune": {"factors": [1, 2], "seed": 1}}, "tune.seed: 1 is one of seeds"),
        ({"arm": {"x": []}}, "arm: unknown key; did you mean arms?"),
        ({"arms": {"w/o rewarm": []}}, "'w/o rewarm': a name begins with no -, and has no /"),
        ({"arms": {"lr=1": []}}, "'lr=1': a name begins with no -"),
        ({"arms": {"--to": []}}, "'--to': a name begins with no -"),
        ({"tune": {"factors": [1, 0], "seed": 5}}, "tune.factors"),
        ({"tune": {"factors": [1, 1], "seed": 5}}, "must differ from each other"),
        ({"tune": {"factors": [1], "seed": 5}}, "tune.factors: [1]: must have at least 2 of them"),
        ({"arms": {"x": ["lora.rnk=3"]}}, "arm 'x': "),
        ({"arms": {"fine": [], "y": ["lora=null"]}}, "arm 'y': "),
    ],
)
def test_a_bad_file_of_arms_is_refused_before_anything_is_trained(
    values: dict[str, Any],
    message: str,
    tmp_path: Path,
    trained: list[Config],
    write_arms: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ("--arms", write_arms(**values), "--to", tmp_path / "to")
    assert relora("arms", make_config(tmp_path / "run"), *arguments) == 2
    assert message in capsys.readouterr().err
    assert trained == []


def test_rates_are_not_tuned_on_a_seed_that_the_command_line_adds(
    tmp_path: Path,
    trained: list[Config],
    write_arms: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write_arms(seeds=[7], tune={"factors": [1, 2], "seed": 1}, arms={"calm": []})
    arguments = ("--arms", file, "--to", tmp_path / "to", "--seeds", "2")
    assert relora("arms", make_config(tmp_path / "run"), *arguments) == 2
    assert "tune.seed: 1 is one of seeds" in capsys.readouterr().err
    assert trained == []


def test_an_arm_that_diverges_at_every_rate_is_not_trained_with_one_of_them(
    tmp_path: Path,
    trained: list[Config],
    write_arms: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write_arms(tune={"factors": [50, 100], "extend": 0, "seed": 9}, arms={"wild": []})
    arguments = ("--arms", file, "--to", tmp_path / "to")
    assert relora("arms", make_config(tmp_path / "run"), *arguments) == NumericsError.code
    assert "'wild': diverged at every relora.lr that was tried" in capsys.readouterr().err
    assert [run.seed for run in trained] == [9, 9]


def test_the_control_keeps_what_is_no_matter_of_its_size(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run")
    overrides = ["model.gradient_checkpointing=true"]
    control = next(
        a for a in standard_arms(load_config(config, overrides), tmp_path) if a.name == "control"
    )
    assert settings([*overrides, *control.overrides], config).model.gradient_checkpointing


def test_a_full_rank_config_has_no_standard_arms(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path / "run", lora=None, relora=None, warm_start=None)
    assert relora("arms", config, "--to", tmp_path / "to") == 2
    assert "the standard arms derive from a ReLoRA config" in capsys.readouterr().err


def start(config: Path, file: Path, to: Path, *overrides: str, **options: Any) -> Process:
    """`relora arms` in a process of its own."""
    arguments = ("--arms", file, "--to", to, "--devices", 2, *overrides)
    return Process(to.with_suffix(".txt"), "arms", config, *arguments, **options)


def stop(process: Process, run: Path, number: int) -> list[int]:
    """Send a signal to arms alone once the run trains; what it had started is gone at the end."""
    process.wait_for_step(run, logged_step(run) + 3)
    pids = process.descendants()
    assert len(pids) >= 4  # launch, deepspeed's launcher, two ranks
    os.kill(process.popen.pid, number)
    process.wait()
    wait_for(lambda: not alive(pids))
    state = run_state(run)
    assert state["status"] == "preempted"
    assert (run / "checkpoints" / f"step_{state['step']:08d}").is_dir()
    return pids


def test_arms_that_are_ended_leave_nobody_training_and_go_on(
    tmp_path: Path, write_arms: Callable[..., Path]
) -> None:
    """Under nohup, whose hangup ends nothing, and then killed outright; then stopped."""
    config = make_config(tmp_path / "run", train__steps=60, train__eval_every=30)
    file, to = write_arms(seeds=[5], arms={"ReLoRA": []}), tmp_path / "to"
    run = to / "relora" / "seed_5"
    process = start(config, file, to, preexec=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.wait_for_step(run, 3)
    for pid in (process.popen.pid, *process.descendants()):
        os.kill(pid, signal.SIGHUP)
    stop(process, run, signal.SIGKILL)
    assert "the loss of" in run_state(run)["reason"]

    process = start(config, file, to)
    stop(process, run, signal.SIGTERM)
    assert process.popen.returncode == 75
    assert run_state(run)["reason"] == "stopped by SIGTERM"
    assert process.text.count("relora: stopping after this step (") == 1, process.text
    assert "Traceback" not in process.text
    assert not (to / "runs.txt").exists()
    environment = json.loads((run / "environment.json").read_text())
    assert environment["world_size"] == 2


@pytest.mark.slow
def test_arms_that_were_stopped_go_on_to_the_end(
    tmp_path: Path, write_arms: Callable[..., Path]
) -> None:
    config = make_config(tmp_path / "run", train__steps=30, train__eval_every=30)
    file, to = write_arms(seeds=[5], arms={"ReLoRA": []}), tmp_path / "to"
    run = to / "relora" / "seed_5"
    stop(start(config, file, to), run, signal.SIGTERM)
    process = start(config, file, to)
    assert process.wait() == 0, process.text
    assert (to / "runs.txt").read_text() == f"ReLoRA={run}\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGUSR1])
def test_arms_pass_every_stop_signal_on(
    number: signal.Signals, tmp_path: Path, write_arms: Callable[..., Path]
) -> None:
    config = make_config(tmp_path / "run", train__steps=2000, train__eval_every=None)
    file, to = write_arms(seeds=[5], arms={"ReLoRA": []}), tmp_path / "to"
    process = start(config, file, to)
    stop(process, to / "relora" / "seed_5", number)
    assert process.popen.returncode == 75
    assert run_state(to / "relora" / "seed_5")["reason"] == f"stopped by {number.name}"


def test_arms_of_a_seed_see_the_same_batches_from_the_same_weights(
    tmp_path: Path, write_arms: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(work: Any, arm: Arm, directory: Path, seed: int) -> int:
        return relora("train", *work.given, *arm.run(directory, seed))

    monkeypatch.setattr(command._Work, "_launch", launch)
    config = make_config(tmp_path / "run", train__steps=14)
    file = write_arms(seeds=[5], arms={"full rank": FULL, "ReLoRA": []})
    assert relora("arms", config, "--arms", file, "--to", tmp_path) == 0
    first, second = (
        series(tmp_path / arm / "seed_5", "train/loss") for arm in ("full_rank", "relora")
    )
    assert len(first) == len(second) == 14
    # Until the adapters come, after 6 steps of warm start.
    assert [first[step] for step in range(1, 7)] == [second[step] for step in range(1, 7)]
    assert first[14] != second[14]
