"""Runs, models and data that were moved: what they hold counts, and not how they are called."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from relora.commands.compare import read_report
from runs import (
    MODELS,
    differing,
    metric_lines,
    relora,
    run_state,
    trajectory,
    workshop,
    write_config,
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of its own with text, model, shards, and a run stopped at 8 and one that was not.

    All paths in the config are relative to it.
    """
    home = tmp_path_factory.mktemp("project") / "first"
    shutil.copytree(workshop() / "text", home / "text")
    (home / "models").mkdir()
    (home / "models" / "a.json").write_text(json.dumps(MODELS["llama"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        relative(home, "runs/whole")
        assert relora("prepare", "whole.yaml") == 0
        assert relora("train", "whole.yaml") == 0
        relative(home, "runs/cut")
        assert relora("train", "cut.yaml", "train.stop_after=8") == 75
    return home


def relative(home: Path, run_dir: str, **changes: Any) -> Path:
    """A config whose paths are relative, named after its run."""
    path = write_config(home, home / Path(run_dir).name, **changes)
    values = yaml.safe_load(path.read_text())
    values["run_dir"] = run_dir
    values["model"]["config"] = "models/a.json"
    values["data"]["source"]["files"] = ["text/*.txt"]
    values["data"]["dir"] = "data"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def moved(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """All of it in another place; the working directory is a third one, and the first is gone."""
    shutil.copytree(project, tmp_path / "second")
    hidden = project.with_name("hidden")
    project.rename(hidden)
    (tmp_path / "third").mkdir()
    monkeypatch.chdir(tmp_path / "third")
    yield tmp_path / "second"
    hidden.rename(project)


def test_a_run_and_its_data_moved_together_can_be_read_from_any_folder(
    moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = moved / "runs" / "whole"
    capsys.readouterr()
    for subject in (run_dir, Path("../second/runs/whole"), run_dir / "checkpoints/step_00000024"):
        assert relora("evaluate", subject, "--max-sequences", 18) == 0
        loss = re.search(r"loss ([\d.]+)", capsys.readouterr().out)
        assert loss is not None
        last = [line["eval/loss"] for line in metric_lines(run_dir) if "eval/loss" in line][-1]
        assert float(loss[1]) == pytest.approx(last, abs=1e-4)
    assert relora("export", run_dir, "--to", tmp_path / "export") == 0
    assert relora("generate", run_dir, "--prompt", "def", "--max-new-tokens", 3) == 0
    assert relora("compare", run_dir, moved / "runs/cut", "--to", tmp_path / "report") == 0


def test_a_run_that_was_moved_goes_on_from_any_folder_and_says_what_moved(
    project: Path, moved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its data are found beside it, or where data.dir says."""
    (moved / "models" / "a.json").rename(moved / "models" / "b.json")
    whole = moved / "runs" / "whole"
    for run, more in (("cut", []), ("again", [f"data.dir={moved / 'data'}"])):
        run_dir = moved / "runs" / run
        if run == "again":
            shutil.copytree(project.with_name("hidden") / "runs" / "cut", run_dir)
        capsys.readouterr()
        model = moved / "models" / "b.json"
        settings = [f"run_dir={run_dir}", f"model.config={model}", *more]
        assert relora("train", moved / "cut.yaml", *settings) == 0
        said = capsys.readouterr().out
        assert said.count("moved, what it holds is the same") == 1
        assert f"model.config: was models/a.json, is now {model}: moved" in said
        assert trajectory(run_dir) == trajectory(whole)
        name = "checkpoints/step_00000024"
        assert differing(run_dir / name, whole / name) == []


def test_resume_needs_the_run_directory_alone(moved: Path, project: Path) -> None:
    """Its config's paths lead nowhere from here: the model is the run's own, the data is found."""
    run_dir = moved / "runs" / "cut"
    assert relora("resume", run_dir) == 0
    whole = trajectory(moved / "runs" / "whole")
    assert trajectory(run_dir) == whole


def test_text_that_moved_is_the_same_once_it_was_prepared(
    moved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal tokens go on; other tokens, or unknown ones, are refused and nothing is touched."""
    run_dir, config = moved / "runs" / "cut", moved / "cut.yaml"
    (moved / "text").rename(moved / "words")
    settings = [f"run_dir={run_dir}", f"model.config={moved / 'models/a.json'}"]
    settings += [f"data.dir={moved / 'data'}", f"data.source.files=[{moved / 'words'}/*.txt]"]
    before = run_state(run_dir)
    assert relora("train", config, *settings) == 2
    assert "data.source.files: was" in (error := capsys.readouterr().err)
    assert "not prepared" in error
    (moved / "words" / "0.txt").write_text("def return self value")
    assert relora("prepare", config, *settings) == 0
    assert relora("train", config, *settings) == 2
    assert "other text" in capsys.readouterr().err
    assert run_state(run_dir) == before
    shutil.copy(workshop() / "text" / "0.txt", moved / "words" / "0.txt")
    assert relora("prepare", config, *settings) == 0
    assert relora("train", config, *settings) == 0
    assert "data.source.files: was ['text/*.txt']" in capsys.readouterr().out
    whole = moved / "runs" / "whole"
    assert trajectory(run_dir) == trajectory(whole)
    # Nor does a report take them for other data, or for more than one arm's.
    report = read_report([str(whole), str(run_dir)])
    assert not [line for line in report.warnings if "data" in line]
    (arm,) = read_report([f"same={whole}", f"same={run_dir}"]).arms
    assert len(arm.seeds) == 2


def test_another_model_under_another_name_is_refused(
    moved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = moved / "models" / "c.json"
    other.write_text(json.dumps({**MODELS["llama"], "rms_norm_eps": 1e-2}))
    for run in ("cut", "whole"):  # a finished one too
        settings = [f"run_dir={moved / 'runs' / run}", f"model.config={other}"]
        assert relora("train", moved / f"{run}.yaml", *settings) == 2
        assert "rms_norm_eps" in capsys.readouterr().err


def test_shards_that_went_elsewhere_alone_are_asked_for(
    moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (moved / "data").rename(tmp_path / "far")
    assert relora("evaluate", moved / "runs/whole") == 2
    error = capsys.readouterr().err
    assert "no token shards" in error
    assert "data.dir=DIR" in error
    assert str(moved / "data") in error
    assert relora("evaluate", moved / "runs/whole", f"data.dir={tmp_path / 'far'}") == 0
    assert relora("evaluate", moved / "runs/whole", "data.num_workers=3") == 2
    # What a run has used last is found by itself.
    settings = [f"run_dir={moved / 'runs/cut'}", f"model.config={moved / 'models/a.json'}"]
    far = f"data.dir={tmp_path / 'far'}"
    assert relora("train", moved / "cut.yaml", *settings, far) == 0
    assert relora("evaluate", moved / "runs/cut") == 0


def test_weights_that_a_run_started_from_may_move_and_may_not_change(
    moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, run_dir = moved / "start", tmp_path / "new"
    assert relora("export", moved / "runs/whole", "--to", start) == 0
    config = write_config(workshop(), run_dir, model={"pretrained": str(start)})
    assert relora("train", config, "train.stop_after=8") == 75
    copy = shutil.copytree(start, tmp_path / "copy")
    assert relora("train", config, f"model.pretrained={copy}", "train.stop_after=9") == 75
    assert "model.pretrained: was" in capsys.readouterr().out
    assert relora("export", moved / "runs/cut", "--to", tmp_path / "other") == 0
    assert relora("train", config, f"model.pretrained={tmp_path / 'other'}") == 2
    assert "other weights" in capsys.readouterr().err
    shutil.rmtree(copy)
    assert relora("train", config, f"model.pretrained={start}") == 0
