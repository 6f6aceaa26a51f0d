"""Rate, schedule and batch of a run may change on its way, on record, and all else stays exact."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from ranks import Scenario, run_ranks
from relora.commands import train as command
from relora.config import Config
from relora.errors import ConfigError
from relora.load import load_config, load_run_config
from relora.plan.estimate import training_flops
from relora.record.changes import before_changes, eras, read_changes
from relora.record.standing import standing
from relora.report.predict import predict
from relora.report.read import read_run
from relora.report.records import Report
from relora.training.phases import PHASES
from runs import (
    SEQUENCE,
    checkpoint,
    checkpoints,
    differing,
    make_config,
    metric_lines,
    relora,
    run_state,
    series,
    train,
    trajectory,
    undisturbed,
    workshop,
)

CHANGED = 14  # in the second of three cycles
# Other rates, curve, batch and length, all at once.
ALL = [
    "optimizer.lr=4e-3",
    "relora.lr=1e-2",
    "schedule.base=linear",
    "schedule.min_lr_ratio=0.2",
    "relora.rewarm_steps=3",
    "batch.global_batch_size=16",
    "train.steps=28",
]


class Killed(BaseException):
    """Nothing catches it."""


def killed_at(step: int) -> Any:
    def update(run: Any, *arguments: Any) -> Any:
        if run.step == step:
            raise Killed
        return PHASES.update(run, *arguments)

    return update


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped at step 14; its checkpoints are of 5, 10 and 14."""
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    assert train(run_dir, f"train.stop_after={CHANGED}", train__save_every=5) == 75
    return run_dir


@pytest.fixture
def run_dir(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return shutil.copytree(stopped, tmp_path / "run")


def on(run_dir: Path, *overrides: str, **changes: Any) -> int:
    """Go on with the run."""
    return train(run_dir, *overrides, train__save_every=5, **changes)


def settings_of(run_dir: Path, *overrides: str) -> Config:
    return load_config(make_config(run_dir, train__save_every=5), overrides)


def tokens_of(run_dir: Path) -> dict[int, int]:
    """Tokens taken by each step; evaluations say it too."""
    return {x["step"]: x["train/tokens"] for x in metric_lines(run_dir) if "train/lr" in x}


# --- the event ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def changed(stopped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run changed at 14 and never killed."""
    run_dir = shutil.copytree(stopped, tmp_path_factory.mktemp("changed") / "run")
    assert on(run_dir, *ALL, "--change") == 0
    return run_dir


def test_a_change_holds_from_its_step_on_and_nothing_before_it_moves(
    changed: Path, stopped: Path
) -> None:
    old, new = settings_of(changed), settings_of(changed, *ALL)
    rates, tokens = series(changed, "train/lr"), tokens_of(changed)
    assert list(rates) == list(range(1, 29))
    for step, rate in rates.items():
        config = old if step <= CHANGED else new
        assert rate == config.learning_rate(step - 1), step
        sequences = 8 * min(step, CHANGED) + 16 * max(0, step - CHANGED)
        assert tokens[step] == sequences * SEQUENCE
    assert series(changed, "relora/merge") == {12: 1, 18: 2, 24: 3}
    before = trajectory(stopped)
    assert trajectory(changed)[: len(before)] == before
    assert load_run_config(changed).schedule.base == "linear"


@pytest.mark.parametrize("at", [16, 21])
def test_a_run_killed_after_its_change_is_the_run_that_was_not(
    at: int, run_dir: Path, changed: Path
) -> None:
    """Before the next checkpoint and behind it; resumed by the first command and by the second."""
    with pytest.raises(Killed):
        on(run_dir, *ALL, "--change", update=killed_at(at))
    with pytest.raises(Killed):  # the config as it was at first
        on(run_dir, update=killed_at(at + 1))
    assert on(run_dir, *ALL) == 0
    assert trajectory(run_dir) == trajectory(changed)
    assert differing(checkpoint(run_dir, 28), checkpoint(changed, 28)) == []
    assert read_changes(run_dir) == read_changes(changed)
    assert (run_dir / "changes.json").read_text() == (changed / "changes.json").read_text()


def test_a_change_is_in_the_log_among_the_figures_and_in_every_later_checkpoint(
    changed: Path,
) -> None:
    (change,) = read_changes(changed)
    assert change.step == CHANGED
    assert change.settings["relora.lr"] == (2e-2, 1e-2)
    assert change.settings["train.steps"] == (24, 28)
    assert set(change.settings) == {override.partition("=")[0] for override in ALL}
    said = series(changed, "train/change")[CHANGED]
    assert "relora.lr 0.02 → 0.01" in said
    old, new = settings_of(changed), settings_of(changed, *ALL)
    assert series(changed, "train/lr_before_change") == {CHANGED: old.learning_rate(CHANGED)}
    assert series(changed, "train/lr_after_change") == {CHANGED: new.learning_rate(CHANGED)}
    log = " ".join((changed / "log.txt").read_text().split())
    assert "changed from step 14 on: " in log
    rates = f"{old.learning_rate(CHANGED):.2e} → {new.learning_rate(CHANGED):.2e}"
    assert f"rates of the step after 14: adapters {rates}" in log
    assert "merges to come: 18, 24; ends at 28" in log
    for step in (20, 25, 28):
        state = json.loads((checkpoint(changed, step) / "state.json").read_text())
        assert state["changes"] == json.loads((changed / "changes.json").read_text())


def test_a_change_back_is_another_change(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert on(run_dir, "relora.lr=1e-2", "--change", "train.stop_after=16") == 75
    assert on(run_dir, "train.stop_after=17") == 75
    output = capsys.readouterr().out
    assert "changed   from step 14 on: relora.lr 0.02 → 0.01" in output
    assert on(run_dir, "--change", "train.stop_after=19") == 75
    assert [(c.step, c.settings) for c in read_changes(run_dir)] == [
        (14, {"relora.lr": (2e-2, 1e-2)}),
        (17, {"relora.lr": (1e-2, 2e-2)}),
    ]
    config = load_run_config(run_dir)
    assert [(at, c.relora and c.relora.lr) for at, c in eras(config, read_changes(run_dir))] == [
        (0, 2e-2),
        (14, 1e-2),
        (17, 2e-2),
    ]
    # The same words again change nothing, so a queue may start the same command again.
    assert on(run_dir, "--change") == 0
    assert len(read_changes(run_dir)) == 2


def test_going_back_to_before_a_change_forgets_it(run_dir: Path) -> None:
    assert on(run_dir, "relora.lr=1e-2", "--change", "train.keep_checkpoints=9") == 0
    assert on(run_dir, "--resume", str(checkpoint(run_dir, CHANGED)), "--change") == 0
    assert read_changes(run_dir) == []
    assert load_run_config(run_dir).relora.lr == 2e-2  # type: ignore[union-attr]
    assert train(run_dir.with_name("whole"), train__save_every=5) == 0
    assert trajectory(run_dir) == trajectory(run_dir.with_name("whole"))


def test_a_change_is_on_record_where_the_run_really_goes_on(run_dir: Path) -> None:
    """The newest checkpoint turns out to be damaged, so it is the one before."""
    path = checkpoint(run_dir, CHANGED) / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    assert on(run_dir, "relora.lr=1e-2", "--change", "train.stop_after=12") == 75
    assert [change.step for change in read_changes(run_dir)] == [10]
    new = settings_of(run_dir, "relora.lr=1e-2")
    assert series(run_dir, "train/lr")[11] == new.learning_rate(10)


def test_a_change_whose_start_was_killed_is_no_change_of_its_checkpoint(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two files of its record, the run goes on by either command."""
    from relora.record import changes

    def failing(*arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(changes, "write_atomically", failing)
        with pytest.raises(Killed):
            on(run_dir, "relora.lr=1e-2", "--change")
    assert load_run_config(run_dir).relora.lr == 2e-2  # type: ignore[union-attr]
    assert on(run_dir, "train.stop_after=15") == 75
    assert read_changes(run_dir) == []


# --- a longer run ---------------------------------------------------------------------------------


def test_a_longer_run_says_old_and_new_rate_and_the_merges_to_come(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert on(run_dir) == 0
    capsys.readouterr()
    assert on(run_dir, "train.steps=40", "train.stop_after=26") == 75
    output = capsys.readouterr().out
    old, new = settings_of(run_dir), settings_of(run_dir, "train.steps=40")
    # The boundary at the former end is made up for, so the next step's rate is 0.
    assert "changed   from step 24 on: train.steps 24 → 40\n" in output
    assert (
        f"adapters {old.learning_rate(24):.2e} → 0.00e+00 (rewarmed at step 26: "
        f"{new.learning_rate(26):.2e})" in output
    )
    assert f"embeddings {old.rates(24)['embeddings']:.2e} → " in output
    assert "merges    to come: 24, 30, 36; ends at 40\n" in output
    # A length needs no asking, and is the config's again.
    assert on(run_dir, "train.steps=30") == 0
    assert run_state(run_dir)["step"] == 30
    assert [c.settings for c in read_changes(run_dir)] == [
        {"train.steps": (24, 40)},
        {"train.steps": (40, 30)},
    ]


def test_the_same_length_in_other_words_is_no_change(run_dir: Path) -> None:
    tokens = 24 * 8 * SEQUENCE
    assert on(run_dir, "train.steps=null", f"train.tokens={tokens}", "train.stop_after=15") == 75
    assert read_changes(run_dir) == []
    assert not (run_dir / "changes.json").exists()


# --- what is refused ------------------------------------------------------------------------------


def commands_in(message: str) -> list[list[str]]:
    """What a message says to type, as the words behind `relora`."""
    lines = [line.strip() for line in message.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("relora train ")]


def test_without_asking_the_refusal_gives_both_commands_and_they_work(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run_dir / "config.yaml").read_text()
    assert on(run_dir, "optimizer.lr=5e-3", "train.stop_after=16") == 2
    error = capsys.readouterr().err
    assert "  optimizer.lr: was 0.01, is now 0.005\n" in error
    assert "change from step 14 on" in error
    assert "steps, schedule, the optimizer's state and the order of the data start over" in error
    assert (run_dir / "config.yaml").read_text() == before
    change, anew = commands_in(error)
    assert change[-1] == "--change"
    assert relora(*change) == 75
    assert read_changes(run_dir)[0].settings == {"optimizer.lr": (0.01, 0.005)}
    # The other one begins at step 0 with the loss that this run has reached.
    assert relora(*anew, "train.eval_every=1", "schedule.warmup_steps=3") == 75
    other = run_dir.with_name("run_2")
    assert checkpoints(other)[-1] == "step_00000016"
    assert read_changes(other) == []
    reached = series(run_dir, "eval/loss")[16]
    assert series(other, "eval/loss")[1] == pytest.approx(reached, abs=0.1)
    assert series(other, "eval/loss")[1] < series(run_dir, "eval/loss")[4] - 1


def test_going_back_to_a_checkpoint_is_part_of_the_command(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = str(checkpoint(run_dir, 5))
    assert on(run_dir, "optimizer.lr=5e-3", "--resume", wanted) == 2
    change, anew = commands_in(capsys.readouterr().err)
    assert change[-3:] == ["--resume", wanted, "--change"]
    assert f"model.pretrained={wanted}" in anew


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("lora.rank=5", "the adapters so far and their moments are of this kind"),
        ("seed=2", "the order of the data and every draw follow from it"),
        ("data.sequence_length=16", "the run is on its way through these tokens"),
        ("model.loss_chunk=512", "the weights so far are of this model"),
        ("optimizer.betas=[0.9, 0.99]", "the optimizer's state so far was gathered under it"),
        ("deepspeed.precision=bf16", "what is stored so far has this precision"),
        ("relora.reset.mode=zero", "the restarts so far were of this kind"),
    ],
)
def test_what_cannot_change_is_refused_with_its_reason_asked_or_not(
    override: str, reason: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for asked in ([], ["--change"]):
        assert on(run_dir, override, "optimizer.lr=5e-3", *asked) == 2
        error = capsys.readouterr().err
        (line,) = (x for x in error.splitlines() if x.startswith(f"  {override.split('=')[0]}: "))
        assert reason in line
        assert "  optimizer.lr: was 0.01, is now 0.005: may change" in error
        assert not any("--change" in command for command in commands_in(error))
    assert read_changes(run_dir) == []


def test_the_clock_may_change_where_it_fits_what_is_done(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cycles until the first merge, the warm start until the birth."""
    assert on(run_dir, "relora.cycle_steps=8", "--change") == 2
    error = capsys.readouterr().err
    assert (
        "relora.cycle_steps: was 6, is now 8: at step 14 the last restart was at step 12" in error
    )
    assert on(run_dir, "warm_start.steps=8", "--change") == 2
    assert "warm_start.steps: was 6, is now 8: at step 14" in capsys.readouterr().err
    early = ("--resume", str(checkpoint(run_dir, 10)), "train.stop_after=11")
    assert on(run_dir, "relora.cycle_steps=3", *early, "--change") == 2
    assert "at step 10 the last restart was at step 6" in capsys.readouterr().err
    first = ("--resume", str(checkpoint(run_dir, 5)))
    assert on(run_dir, "warm_start.steps=8", "relora.cycle_steps=7", *first, "--change") == 0
    assert series(run_dir, "relora/birth") == {8: 1}
    assert series(run_dir, "relora/merge") == {15: 1, 22: 2}


def test_tokens_and_another_batch_name_the_steps_that_come_to_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, tokens = tmp_path / "run", 24 * 8 * SEQUENCE
    length = {"train__steps": None, "train__tokens": tokens}
    assert train(run_dir, "train.stop_after=14", **length) == 75
    batch = ("batch.global_batch_size=4", "--change")
    assert train(run_dir, *batch, **length) == 2
    error = capsys.readouterr().err
    assert "give train.tokens=null train.steps=34" in error
    given = ("train.tokens=null", "train.steps=34")
    assert train(run_dir, *batch, *given, "train.stop_after=16", **length) == 75
    assert train(run_dir, **length) == 0  # as at first
    assert tokens_of(run_dir)[34] == tokens


def test_a_broken_record_is_named_and_made_anew_without_it(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert on(run_dir, "relora.lr=1e-2", "--change", "train.stop_after=16") == 75
    path = run_dir / "changes.json"
    whole = path.read_text()
    unknown = '[{"step": 3, "settings": {"seed": [1, 2]}}]'
    for broken in ("[", "{}", '[{"step": -1, "settings": {}}]', '[{"step": 3}]', unknown):
        path.write_text(broken)
        assert on(run_dir, "relora.lr=1e-2") == 4
        assert f"{path}: is broken" in capsys.readouterr().err
    path.unlink()
    assert on(run_dir, "relora.lr=1e-2", "train.stop_after=17") == 75
    assert path.read_text() == whole


def test_python_says_it_in_python_and_the_plan_says_what_train_would_do(run_dir: Path) -> None:
    other = settings_of(run_dir, "relora.lr=1e-2", "train.stop_after=15")
    with pytest.raises(ConfigError, match=r"relora\.train\(config, change=True\)"):
        command.train(other)
    assert standing(other) == "train asks for --change: relora.lr: was 0.02, is now 0.01"
    with undisturbed():
        assert command.train(other, change=True) == 75
    assert standing(settings_of(run_dir)) == (
        "has begun: train goes on from step 15, with relora.lr 0.01 by its change"
    )


def test_launch_refuses_before_anything_starts_and_passes_the_asking_on(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from relora.commands import launch

    commands: list[list[str]] = []
    monkeypatch.setattr(
        launch, "_run", lambda command, *_: (commands.append(list(command)) or 0, None)
    )
    config = make_config(run_dir, train__save_every=5)
    words = ("launch", "--devices", "1", config, "optimizer.lr=5e-3")
    assert relora(*words) == 2
    assert f"  relora launch --devices=1 {config} optimizer.lr=5e-3 --change\n" in (
        capsys.readouterr().err
    )
    assert commands == []
    assert relora(*words, "--change") == 0
    assert commands[0][-4:] == ["train", str(config), "optimizer.lr=5e-3", "--change"]


# --- two ranks, and the report --------------------------------------------------------------------


def changed_legs(ranks: Any, first: str, second: str, *stops: int | None) -> list[int]:
    """Exit codes: the first config up to the first stop, the second from there on."""
    from relora.data.shards import open_shards
    from relora.training.guard import guarded

    codes = []
    for number, stop in enumerate(stops):
        path = Path(second if number else first)
        settings = load_config(path, [f"train.stop_after={stop}"] if stop else [])
        codes.append(guarded(settings, open_shards(settings.data), ranks))
    return codes


def test_two_ranks_change_and_resume_bit_for_bit(tmp_path: Path) -> None:
    workshop()
    scenarios = []
    for name, stops in {"whole": (14, None), "cut": (14, 16, 19, None)}.items():
        changes = {"deepspeed__zero_stage": 2}
        first = make_config(tmp_path / name, **changes)
        first = first.rename(first.with_suffix(".first.yaml"))
        changes |= {"optimizer__lr": 4e-3, "batch__global_batch_size": 16}
        second = make_config(tmp_path / name, **changes)
        scenarios.append(Scenario(name, changed_legs, (str(first), str(second), *stops)))
    outcomes = run_ranks(2, scenarios, timeout=200)
    assert outcomes["whole"] == [[75, 0]] * 2
    assert outcomes["cut"] == [[75, 75, 75, 0]] * 2
    assert trajectory(tmp_path / "whole") == trajectory(tmp_path / "cut")
    assert differing(checkpoint(tmp_path / "whole", 24), checkpoint(tmp_path / "cut", 24)) == []


def test_the_report_names_the_change_and_draws_and_counts_what_was(
    changed: Path, tmp_path: Path
) -> None:
    assert relora("compare", changed, "--to", tmp_path / "report") == 0
    said = (tmp_path / "report" / "report.md").read_text()
    assert "changed its settings from step 14 on: " in said
    assert "train.steps 24 → 28" in said
    report = Report.model_validate_json((tmp_path / "report" / "report.json").read_text())
    drawn = report.arms[0].curves.lr
    rates = series(changed, "train/lr")
    assert [rates[int(step) + 1] for step in drawn.step] == drawn.lr
    run = read_run(changed)
    flops = predict(run).flops
    assert flops is not None
    old = before_changes(run.config, run.changes)
    first = training_flops(old, CHANGED)
    assert flops(CHANGED) == first
    whole = training_flops(run.config, 28) - training_flops(run.config, CHANGED)
    assert flops(28) == pytest.approx(first + whole)
