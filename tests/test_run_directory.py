"""A run directory: what lies in it, what continues it, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from ranks import Scenario, run_ranks
from reference import lr_factor
from runs import (
    MODELS,
    SEQUENCE,
    checkpoints,
    differing,
    make_config,
    metric_lines,
    relora,
    run_state,
    series,
    train,
    trajectory,
    wait_for,
    workshop,
    write_config,
)

LAST = 24


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that saved every 8 steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_planted_secret")
        run_dir = tmp_path_factory.mktemp("finished") / "run"
        assert train(run_dir, train__save_every=8) == 0
    return run_dir


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return shutil.copytree(finished, tmp_path / "run")


def contents(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Time and bytes of every file below a directory."""
    return {
        str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


# --- what lies in it ------------------------------------------------------------------------------


def test_a_run_is_a_directory_of_plain_files(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()} - {".lock"}
    (events,) = (name for name in names if name.startswith("events.out.tfevents."))
    assert names == {
        "config.yaml",
        "run_state.json",
        "environment.json",
        "metrics.jsonl",
        "tokens",
        events,
        "checkpoints",
        "log.txt",
        "model",
        "tokenizer",
    }
    assert checkpoints(finished) == ["step_00000008", "step_00000016", "step_00000024"]
    assert not list(finished.rglob("*.tmp"))


def test_the_config_is_whole_and_reads_back(finished: Path) -> None:
    from relora.load import load_config

    written = yaml.safe_load((finished / "config.yaml").read_text())
    assert written["optimizer"]["betas"] == [0.9, 0.95]  # a default, spelt out
    assert written["optimizer"]["lr"] == 1e-2
    again = make_config(finished, train__save_every=8)
    assert load_config(finished / "config.yaml") == load_config(again)


def test_the_environment_places_the_figures(finished: Path) -> None:
    import torch
    import transformers

    found = json.loads((finished / "environment.json").read_text())
    assert found["packages"]["torch"] == torch.__version__
    assert found["packages"]["transformers"] == transformers.__version__
    assert found["packages"]["deepspeed"]
    assert found["world_size"] == 1
    assert found["python"].startswith("3.")
    assert {"relora", "commit", "platform", "device", "threads_per_rank"} < found.keys()


def test_model_and_tokenizer_are_transformers_directories(finished: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(finished / "model")
    assert config.hidden_size == MODELS["llama"]["hidden_size"]
    text = "def\tnaïve 🙂:\n  return"
    tokenizer = AutoTokenizer.from_pretrained(finished / "tokenizer")
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_finished_run_says_so(finished: Path) -> None:
    expected = {"status": "finished", "reason": "", "step": LAST, "code": 0}
    assert run_state(finished) == expected


def test_a_log_line_has_all_figures(finished: Path) -> None:
    lines = [line for line in metric_lines(finished) if "train/loss" in line]
    keys = {"step", "time_s", "train/loss", "train/lr", "train/grad_norm", "train/tokens"}
    keys |= {"train/skipped", "perf/tokens_per_s", "perf/step_ms", "perf/memory_gib"}
    keys |= {"time/elapsed_s"}
    for line in lines:
        assert set(line) == (keys | {"relora/cycle"} if line["step"] > 6 else keys)
    for line in lines:
        assert line["train/tokens"] == line["step"] * 8 * SEQUENCE
        assert line["train/skipped"] == 0
        seconds = line["perf/step_ms"] / 1000
        assert line["perf/tokens_per_s"] * seconds == pytest.approx(8 * SEQUENCE)
        assert 0.05 < line["perf/memory_gib"] < 16
    elapsed = [line["time/elapsed_s"] for line in lines]
    assert elapsed == sorted(elapsed)
    assert {line["step"]: line["relora/cycle"] for line in lines if line["step"] > 6} == {
        **dict.fromkeys(range(7, 13), 1),
        **dict.fromkeys(range(13, 19), 2),
        **dict.fromkeys(range(19, 25), 3),
    }


def test_a_merge_line_says_what_was_done(finished: Path) -> None:
    for number, line in enumerate((x for x in metric_lines(finished) if "relora/merge" in x), 1):
        assert line["relora/merge"] == number
        assert 0.89 < line["relora/zeroed_share"] <= 0.9
        assert 0 < line["relora/probe_deviation"] < 1e-5
        assert 1e-3 < line["relora/update_ratio"] < 1
        assert line["time/merge_s"] > 0


def test_an_evaluation_line_is_consistent(finished: Path) -> None:
    from math import exp

    for line in (x for x in metric_lines(finished) if "eval/loss" in x):
        assert line["eval/perplexity"] == pytest.approx(exp(line["eval/loss"]))
        assert line["eval/tokens"] == 18 * (SEQUENCE - 1)


def test_logged_learning_rates_are_the_clock_s(finished: Path) -> None:
    """The line of step k has the rate of its update, which follows k − 1 finished ones."""
    for step, rate in series(finished, "train/lr").items():
        base = 1e-2 if step <= 6 else 2e-2
        factor = lr_factor(step - 1, total=LAST, warmup=3, cycle=6, rewarm=2, low=0.1, birth=6)
        assert rate == pytest.approx(base * factor, rel=1e-12, abs=0)
    assert [k for k, rate in series(finished, "train/lr").items() if rate == 0] == [1, 7, 13, 19]


def test_no_secret_of_the_environment_is_in_it(finished: Path) -> None:
    for path in finished.rglob("*"):
        assert not path.is_file() or b"hf_planted_secret" not in path.read_bytes(), path


def test_other_methods_leave_out_what_they_do_not_have(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"relora": None, "warm_start": None, "lora": None}
    assert train(tmp_path / "run", **changes) == 0
    keys = {key for line in metric_lines(tmp_path / "run") for key in line}
    assert not {key for key in keys if key.startswith("relora/")}


# --- what continues it ----------------------------------------------------------------------------


def test_a_finished_run_is_left_alone(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    from relora.engine import deepspeed

    monkeypatch.setattr(deepspeed, "init_distributed", None)  # it would be slow, and is not needed
    before = contents(run_dir)
    assert train(run_dir, train__save_every=8) == 0
    assert "finished (24 steps); nothing to do" in capsys.readouterr().out
    assert contents(run_dir) == before


@pytest.mark.parametrize(
    ("path", "value", "was"),
    [
        ("optimizer.lr", "0.003", "0.01"),
        ("optimizer.grad_clip", "null", "1.0"),
        ("seed", "2", "1"),
        ("lora.rank", "5", "4"),
        ("relora.cycle_steps", "5", "6"),
        ("relora.reset.mode", "zero", "magnitude"),
        ("warm_start.steps", "5", "6"),
        ("batch.global_batch_size", "4", "8"),
        ("data.sequence_length", "16", "32"),
        ("data.validation_fraction", "0.1", "0.2"),
        ("deepspeed.precision", "bf16", "fp32"),
        ("schedule.warmup_steps", "2", "3"),
    ],
)
def test_another_config_is_refused_with_both_values(
    path: str, value: str, was: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run_dir)
    assert train(run_dir, f"{path}={value}", train__save_every=8) == 2
    error = capsys.readouterr().err
    (line,) = (x for x in error.splitlines() if x.strip().startswith(f"{path}: "))
    assert was in line
    assert (value if value == "null" else str(yaml.safe_load(value))) in line
    assert "choose another run_dir" in error
    assert contents(run_dir) == before


def test_all_differences_are_listed_at_once(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"optimizer__lr": 5e-3, "seed": 9, "train__log_every": 3}
    assert train(run_dir, train__save_every=8, **changes) == 2
    error = capsys.readouterr().err
    assert "optimizer.lr" in error
    assert "seed" in error
    assert "log_every" not in error  # that may change


def test_lengths_intervals_and_machine_settings_may_change(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert train(run_dir, "train.stop_after=9") == 75
    changes: dict[str, Any] = {
        "train__log_every": 5,
        "train__eval_every": 10,
        "train__eval_sequences": 4,
        "train__save_every": 7,
        "train__keep_checkpoints": 1,
        "batch__micro_batch_size": 2,
        "deepspeed__zero_stage": 2,
        "deepspeed__timeout_minutes": 5,
        "data__num_workers": 1,
        "model__gradient_checkpointing": True,
    }
    assert train(run_dir, **changes) == 0
    assert list(series(run_dir, "train/loss")) == [*range(1, 10), 10, 15, 20, 24]
    assert checkpoints(run_dir) == ["step_00000024"]


def test_a_length_in_tokens_is_a_length(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = LAST * 8 * SEQUENCE
    changes = {"train__steps": None, "train__tokens": tokens, "train__save_every": 8}
    assert train(run_dir, **changes) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_longer_run_goes_on_from_the_end(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = trajectory(run_dir)
    assert train(run_dir, "train.steps=31", train__save_every=8) == 0
    assert "going on from step 24" in capsys.readouterr().out
    after = trajectory(run_dir)
    assert after[: len(before)] == before
    assert list(series(run_dir, "train/loss")) == list(range(1, 32))
    assert run_state(run_dir)["step"] == 31
    assert checkpoints(run_dir)[-1] == "step_00000031"


def test_a_boundary_at_the_former_end_is_made_up_for(tmp_path: Path) -> None:
    """Under a constant base the length changes no rate, so the longer run is the same run.

    Step 24 is a boundary. As the end of the run it is no merge; with more to come it is one.
    """
    changes = {"schedule__base": "constant"}
    assert train(tmp_path / "whole", train__steps=31, **changes) == 0
    assert train(tmp_path / "longer", **changes) == 0
    assert series(tmp_path / "longer", "relora/merge") == {12: 1, 18: 2}
    assert train(tmp_path / "longer", train__steps=31, **changes) == 0
    for key in ("relora/merge", "relora/update_ratio", "train/lr", "train/loss"):
        assert series(tmp_path / "longer", key) == series(tmp_path / "whole", key), key
    # Killed before the next checkpoint, it makes up for it again, and says so once.
    assert train(tmp_path / "killed", **changes) == 0
    with pytest.raises(Killed):
        train(tmp_path / "killed", update=kill, train__steps=31, **changes)
    assert series(tmp_path / "killed", "relora/merge") == {12: 1, 18: 2, 24: 3}
    assert train(tmp_path / "killed", train__steps=31, **changes) == 0
    assert trajectory(tmp_path / "killed") == trajectory(tmp_path / "longer")
    last = [tmp_path / name / "checkpoints" / "step_00000031" for name in ("whole", "longer")]
    assert differing(*last) == []


class Killed(BaseException):
    """Nothing catches it."""


def kill(*arguments: Any) -> None:
    raise Killed


def test_a_shorter_run_is_refused_once_past_it(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(run_dir, "train.steps=20", train__save_every=8) == 2
    assert "is at step 24 already" in capsys.readouterr().err


# --- what it refuses ------------------------------------------------------------------------------


def test_a_run_dir_that_is_a_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").write_text("mine")
    assert train(tmp_path / "run") == 2
    assert f"{tmp_path / 'run'} is not a directory" in capsys.readouterr().err
    assert (tmp_path / "run").read_text() == "mine"


def test_a_run_dir_that_cannot_be_made_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    config = make_config(tmp_path / "run")
    assert relora("train", config, f"run_dir={tmp_path / 'file' / 'run'}") == 2
    assert "run_dir" in capsys.readouterr().err


def test_a_second_process_is_refused_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import os

    from relora.record.rundir import lock

    run_dir = tmp_path / "run"
    assert train(run_dir, "train.stop_after=4") == 75
    claim = lock(run_dir)
    before = contents(run_dir)
    assert train(run_dir) == 4
    error = capsys.readouterr().err
    assert f"process {os.getpid()} trains in it already" in error
    assert contents(run_dir) == before
    claim.close()
    assert train(run_dir, "train.stop_after=5") == 75


def test_a_broken_state_is_named(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "run_state.json").write_text("{")
    assert train(run_dir, train__save_every=8) == 4
    assert "run_state.json" in capsys.readouterr().err


@pytest.mark.parametrize("refused", ["a file in its way", "a broken state"])
def test_a_start_that_is_refused_leaves_its_process_as_it_was(
    refused: str, tmp_path: Path, run_dir: Path
) -> None:
    """A caller in Python goes on: with its own signal handlers, no thread more, and no lock."""
    import signal
    import threading

    from relora.record.rundir import lock

    if refused == "a file in its way":
        (tmp_path / "file").write_text("mine")
        arguments = (make_config(tmp_path / "run"), f"run_dir={tmp_path / 'file' / 'run'}")
    else:
        (run_dir / "run_state.json").write_text("{")
        arguments = (make_config(run_dir, train__save_every=8),)
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    assert relora("train", *arguments) in (2, 4)
    assert {number: signal.getsignal(number) for number in before} == before
    wait_for(lambda: not any(t.name == "stop request" for t in threading.enumerate()))
    if refused == "a broken state":
        lock(run_dir, patience_s=0).close()


def own_data(tmp_path: Path) -> Path:
    """A config with text of its own."""
    directory = tmp_path / "own"
    directory.mkdir()
    shutil.copytree(workshop() / "text", directory / "text")
    shutil.copy(workshop() / "llama.json", directory / "llama.json")
    return write_config(directory, tmp_path / "run")


def test_a_run_does_not_go_on_with_other_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = own_data(tmp_path)
    assert relora("prepare", config) == 0
    assert relora("train", config, "train.stop_after=4") == 75
    (tmp_path / "own" / "text" / "0.txt").write_text("quite another text\n" * 300)
    assert relora("prepare", config) == 0
    capsys.readouterr()
    for command in (("train", config), ("evaluate", tmp_path / "run")):
        assert relora(*command) == 3
        error = capsys.readouterr().err
        assert "holds other tokens" in error
        assert "Traceback" not in error


def test_missing_and_broken_shards_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = own_data(tmp_path)
    assert relora("train", config) == 2
    assert "relora prepare" in capsys.readouterr().err
    assert relora("prepare", config) == 0
    (shard,) = (tmp_path / "own" / "data").rglob("train.bin")
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    assert relora("train", config) == 3
    assert str(shard) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_shards_that_changed_places_with_their_index_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are what their index says, and not what the run was trained on."""
    config = own_data(tmp_path)
    assert relora("prepare", config) == 0
    assert relora("train", config, "train.stop_after=4") == 75
    (index,) = (tmp_path / "own" / "data").rglob("index.json")
    values = json.loads(index.read_text())
    splits = values["splits"]
    splits["train"], splits["validation"] = splits["validation"], splits["train"]
    del values["index_sha256"]  # or the index alone would be refused
    index.write_text(json.dumps(values))
    train_bin, validation_bin = (index.with_name(f"{x}.bin") for x in ("train", "validation"))
    train_bin.rename(index.with_name("aside"))
    validation_bin.rename(train_bin)
    index.with_name("aside").rename(validation_bin)
    assert relora("train", config) == 3
    assert "holds other tokens" in capsys.readouterr().err
    assert run_state(tmp_path / "run")["code"] == 3


def train_apart(ranks: Any, config: str, data: list[str]) -> tuple[int, str]:
    """(exit code, message) of `relora train` on a rank with a data directory of its own."""
    from relora.commands.train import train as command
    from relora.engine import deepspeed
    from relora.errors import UserError
    from relora.load import load_config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed, "init_distributed", lambda *_: None)  # this group is there already
        patch.setattr(deepspeed, "leave", lambda **_: None)
        patch.setenv("LOCAL_RANK", "0")  # each on a machine of its own
        try:
            return command(load_config(Path(config), [f"data.dir={data[ranks.rank]}"])), ""
        except UserError as error:
            return error.code, str(error)


def test_shards_that_are_bad_on_one_machine_stop_all_ranks(tmp_path: Path) -> None:
    """Whatever it is, and whichever machine: exit 3 (not prepared there: 2), the file named."""
    config = own_data(tmp_path)
    assert relora("prepare", config) == 0
    good = tmp_path / "own" / "data"

    def damaged(name: str, file: str, change: Any) -> str:
        (path,) = shutil.copytree(good, tmp_path / name).rglob(file)
        change(path)
        return str(tmp_path / name)

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-2])

    def exchange(path: Path) -> None:
        """Other tokens, with an index that fits them."""
        flip(path)
        index = path.with_name("index.json")
        values = json.loads(index.read_text())
        values["splits"]["train"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        del values["index_sha256"]  # or the index alone would be refused
        index.write_text(json.dumps(values))

    cases = {
        "train.bin: has sha256": damaged("flipped", "train.bin", flip),
        "validation.bin: has sha256": damaged("flipped_too", "validation.bin", flip),
        "train.bin: has ": damaged("cut", "train.bin", cut),
        "holds other tokens on the machine of rank 1": damaged("other", "train.bin", exchange),
        "there are no token shards": damaged("none", "index.json", Path.unlink),
    }
    scenarios = [
        Scenario(f"{message} {bad}", train_apart, (str(config), pair))
        for message, directory in cases.items()
        for bad, pair in enumerate(([directory, str(good)], [str(good), directory]))
    ]
    outcomes = run_ranks(2, scenarios, timeout=120)
    for message in cases:
        for bad in range(2):
            for code, said in outcomes[f"{message} {bad}"]:
                assert code == (2 if "no token shards" in message else 3), said
                assert message in said
    assert not (tmp_path / "run").exists()


def test_a_bug_is_kept_in_the_state_and_not_swallowed(tmp_path: Path) -> None:
    def broken(run: Any) -> None:
        raise RuntimeError("something is off")

    with pytest.raises(RuntimeError, match="something is off"):
        train(tmp_path / "run", evaluate=broken)
    state = run_state(tmp_path / "run")
    assert state["status"] == "failed"
    assert state["code"] == 1
    assert "something is off" in state["reason"]
    assert train(tmp_path / "run") == 0


def test_a_model_file_that_changed_under_the_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The path in the config is the same, the model is not; nothing in the shapes would tell."""
    model = tmp_path / "model.json"
    model.write_text(json.dumps(MODELS["llama"]))
    changes = {"model__config": str(model)}
    assert train(tmp_path / "run", "train.stop_after=4", **changes) == 75
    model.write_text(json.dumps({**MODELS["llama"], "rms_norm_eps": 1e-2}))
    assert train(tmp_path / "run", **changes) == 2
    error = capsys.readouterr().err
    assert "rms_norm_eps" in error
    assert str(model) in error


# --- what does nothing ----------------------------------------------------------------------------

PAST = "beyond the run's 24 steps, so it does nothing: "
IDLE = {
    "train.log_every": PAST + "the last step alone is logged",
    "train.eval_every": PAST + "evaluated at the end alone",
    "train.save_every": PAST + "saved at the end alone",
    "train.keep_every": PAST + "no checkpoint stays for that",
    "spectra.every": PAST + "measured at merges and the end",
    "train.stop_after": "does nothing, since the run ends after 24 steps",
    "train.eval_sequences": "the validation split has 320: all are read",
    "spectra.directions": "no measured weight has more than 32",
}


def test_what_does_nothing_in_a_run_is_said_by_it_and_by_its_plan_and_changes_nothing(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """999 of everything; a line for each, and the same losses."""
    settings = [f"{path}=999" for path in IDLE if path != "train.eval_every"]
    settings += ["train.spike={window: 999}"]
    config = make_config(tmp_path / "run", spectra={})
    assert relora("train", config, *settings, "train.eval_sequences=999") == 0
    output = " ".join(capsys.readouterr().out.split())
    said = {path: text for path, text in IDLE.items() if path != "train.eval_every"}
    for path, text in said.items():
        assert f"note {path} 999: {text}" in output, path
    assert "note train.spike.window 999: never full in 24 steps" in output
    assert output.count(" note ") == len(said) + 1
    assert series(tmp_path / "run", "train/loss")[24] == series(finished, "train/loss")[24]
    assert relora("plan", config, *settings, "train.eval_every=999") == 0
    planned = " ".join(capsys.readouterr().out.split())
    for path, text in IDLE.items():
        if path != "train.eval_sequences":  # its text is not read for a plan
            assert f"{path} 999: {text}" in planned, path


def test_a_stop_that_is_past_is_said(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(run_dir, "train.steps=26", "train.stop_after=8") == 0
    output = capsys.readouterr().out
    assert "train.stop_after 8: does nothing, since the run is at step 24 already" in output


def test_a_run_in_which_all_does_something_has_no_notes(finished: Path) -> None:
    assert "\nnote " not in (finished / "log.txt").read_text()
