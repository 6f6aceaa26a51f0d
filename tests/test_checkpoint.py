"""Checkpoints: complete or not there, checked before they are read, and the same for every rank."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from relora.errors import CheckpointError
from relora.runtime import checkpoint as checkpoint_module
from relora.runtime.checkpoint import Checkpoint, complete_checkpoints, newest_sound, verify
from relora.runtime.distributed import lone_rank
from runs import adam_steps, checkpoint, checkpoints, make_config, relora, run_state, tensors, train


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after step 14, with checkpoints of 5, 10 and 14."""
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    assert train(run_dir, "train.stop_after=14", train__save_every=5) == 75
    assert checkpoints(run_dir) == ["step_00000005", "step_00000010", "step_00000014"]
    return run_dir


@pytest.fixture
def run_dir(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may break."""
    return shutil.copytree(stopped, tmp_path / "run")


def flip_bit(path: Path, byte: int, bit: int = 0) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def test_a_checkpoint_holds_every_weight_and_moment_once(stopped: Path) -> None:
    directory = checkpoint(stopped, 14)
    found = tensors(directory)
    state = json.loads((directory / "state.json").read_text())
    assert {name for name, kind in found if kind == "value"} == set(state["shapes"])
    for (name, _), tensor in found.items():
        assert tensor.numel() == torch.Size(state["shapes"][name]).numel()
    trainable = {name for name, kind in found if kind == "exp_avg"}
    assert trainable == {name for name, kind in found if kind == "exp_avg_sq"}
    frozen = set(state["shapes"]) - trainable
    assert len(frozen) == 14
    assert all(name.endswith("_proj.weight") for name in frozen)
    assert state["step"] == 14
    assert state["consumed"] == 14 * 8
    assert state["merges"] == 1
    # What stays trainable counts all updates, adapters those since their birth.
    assert {round(adam_steps(directory)[n]) for n in trainable if ".lora_" in n} == {8}
    assert {round(adam_steps(directory)[n]) for n in trainable if ".lora_" not in n} == {14}


def test_a_checkpoint_is_no_pickle_and_names_its_files(stopped: Path) -> None:
    directory = checkpoint(stopped, 14)
    assert sorted(path.name for path in directory.iterdir()) == [
        "manifest.json",
        "rank_00000.safetensors",
        "state.json",
    ]
    manifest = json.loads((directory / "manifest.json").read_text())
    assert set(manifest["files"]) == {"rank_00000.safetensors", "state.json"}
    for name, described in manifest["files"].items():
        assert described["bytes"] == (directory / name).stat().st_size


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "state.json"])
@pytest.mark.parametrize("place", [0.0, 0.01, 0.5, 0.999])
def test_one_flipped_bit_is_found_and_the_file_named(
    name: str, place: float, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint(run_dir, 14) / name
    flip_bit(path, int(path.stat().st_size * place), bit=3)
    assert relora("verify", checkpoint(run_dir, 14)) == 4
    assert str(path) in capsys.readouterr().err
    assert relora("verify", checkpoint(run_dir, 10)) == 0
    # Nobody reads it either: what is made from it would be wrong, silently.
    for command in (
        ("evaluate", run_dir),
        ("generate", run_dir, "--prompt", "def"),
        ("export", checkpoint(run_dir, 14), "--to", run_dir.parent / "export"),
    ):
        assert relora(*command) == 4
        error = capsys.readouterr().err
        assert str(path) in error
        assert "Traceback" not in error


def test_a_flipped_bit_in_any_byte_of_a_manifest_is_found(run_dir: Path) -> None:
    path = checkpoint(run_dir, 14) / "manifest.json"
    original = path.read_bytes()
    for byte in range(len(original)):
        bit = byte * 5 % 8
        flip_bit(path, byte, bit)
        with pytest.raises(CheckpointError):
            verify(path.parent, thorough=True)
        path.write_bytes(original)
    verify(path.parent, thorough=True)


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": 1}', '{"format": 1, "files": {}}'])
def test_a_manifest_that_is_none_is_refused(content: str, run_dir: Path) -> None:
    path = checkpoint(run_dir, 14) / "manifest.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match="step_00000014"):
        verify(path.parent, thorough=True)


def test_a_manifest_cannot_name_files_elsewhere(run_dir: Path) -> None:
    path = checkpoint(run_dir, 14) / "manifest.json"
    values = json.loads(path.read_text())
    values["files"]["../../run_state.json"] = values["files"].pop("state.json")
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError):
        verify(path.parent, thorough=True)


def test_a_file_that_the_manifest_does_not_name_is_not_read(run_dir: Path) -> None:
    directory = checkpoint(run_dir, 14)
    before = Checkpoint(directory).tensor("model.norm.weight")
    foreign = {"model.norm.weight|value|0": torch.full((32,), 7.0)}
    save_file(foreign, directory / "rank_-1.safetensors")
    assert torch.equal(Checkpoint(directory).tensor("model.norm.weight"), before)


@pytest.mark.parametrize(
    "damage", ["a flipped bit", "cut short", "emptied", "a file missing", "no manifest"]
)
def test_a_damaged_newest_checkpoint_is_passed_over_and_named(
    damage: str, run_dir: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint(run_dir, 14) / "rank_00000.safetensors"
    if damage == "a flipped bit":
        flip_bit(path, path.stat().st_size // 2)
    elif damage == "cut short":
        os.truncate(path, path.stat().st_size - 1)
    elif damage == "emptied":
        os.truncate(path, 0)
    elif damage == "a file missing":
        path.unlink()
    else:
        (path.parent / "manifest.json").unlink()
    assert train(run_dir, "train.stop_after=11", train__save_every=5) == 75
    output = capsys.readouterr().out
    assert "going on from step 10" in output
    if damage != "no manifest":  # then it is no checkpoint at all, and nobody ever said it was one
        assert f"passed over {path}" in output
        assert str(path) in (run_dir / "log.txt").read_text()


def test_what_was_passed_over_does_not_drive_out_sound_ones(run_dir: Path) -> None:
    """With one to keep, keeping the damaged newest would leave none that is sound."""
    path = checkpoint(run_dir, 14) / "rank_00000.safetensors"
    flip_bit(path, path.stat().st_size // 2)
    changes = {"train__save_every": 5, "train__keep_checkpoints": 1}
    assert train(run_dir, "train.stop_after=12", **changes) == 75
    assert checkpoints(run_dir) == ["step_00000012"]
    assert relora("verify", run_dir) == 0
    assert train(run_dir, **changes) == 0


def test_without_a_sound_checkpoint_a_run_does_not_start_anew(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [checkpoint(run_dir, step) / "rank_00000.safetensors" for step in (5, 10, 14)]
    for path in paths:
        flip_bit(path, 5000)
    assert train(run_dir, train__save_every=5) == 4
    error = capsys.readouterr().err
    assert all(str(path) in error for path in paths)
    assert "Traceback" not in error
    assert run_state(run_dir)["status"] == "failed"
    assert run_state(run_dir)["code"] == 4
    assert checkpoints(run_dir) == ["step_00000005", "step_00000010", "step_00000014"]


@pytest.mark.parametrize("keep", [1, 2])
def test_only_the_newest_are_kept(keep: int, tmp_path: Path) -> None:
    changes = {"train__save_every": 5, "train__keep_checkpoints": keep}
    assert train(tmp_path / "run", **changes) == 0
    kept = ["step_00000015", "step_00000020", "step_00000024"][-keep:]
    assert checkpoints(tmp_path / "run") == kept


def test_what_a_killed_save_left_is_ignored_and_cleaned(run_dir: Path) -> None:
    leftover = run_dir / "checkpoints" / "step_00000020.tmp"
    shutil.copytree(checkpoint(run_dir, 14), leftover)
    assert [path.name for path in complete_checkpoints(run_dir)][-1] == "step_00000014"
    found, complaints = newest_sound(run_dir, lone_rank())
    assert found is not None
    assert found.step == 14
    assert not complaints
    assert train(run_dir, train__save_every=5) == 0
    assert checkpoints(run_dir) == ["step_00000015", "step_00000020", "step_00000024"]


def test_a_full_disk_leaves_the_earlier_checkpoint_and_one_message(run_dir: Path) -> None:
    """No file of this process may grow past 200 KB, as on a disk that is full."""
    config = make_config(run_dir, train__save_every=5)
    limited = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "from relora.cli import main\n"
        f"sys.exit(main(['train', {str(config)!r}]))\n"
    )
    size = (checkpoint(run_dir, 14) / "rank_00000.safetensors").stat().st_size
    assert size > 220_000
    # The file in which coverage would keep its counts may not grow either.
    quiet = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    done = subprocess.run(
        [sys.executable, "-c", limited],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=quiet,
    )
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr
    message = [line for line in done.stderr.splitlines() if line.startswith("relora:")]
    assert len(message) == 1
    assert "step_00000015" in message[0]
    assert "could not be written" in message[0]
    assert run_state(run_dir)["status"] == "failed"
    assert run_state(run_dir)["code"] == 4
    assert checkpoints(run_dir) == ["step_00000005", "step_00000010", "step_00000014"]
    assert relora("verify", run_dir) == 0
    # With room again the same command goes on.
    assert relora("train", config) == 0
    assert run_state(run_dir)["status"] == "finished"


def test_checkpoints_that_cannot_be_made_are_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "checkpoints").write_text("in the way")
    assert train(run_dir, train__save_every=5) == 4
    assert str(run_dir / "checkpoints") in capsys.readouterr().err


class Killed(BaseException):
    """Nothing catches it, so nothing is tidied up."""


@pytest.mark.parametrize("point", ["mkdir", "save_file", "_sync", "rename", "rmtree"])
def test_killed_at_any_point_of_a_save_a_run_goes_on(
    point: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends at the n-th call of something that a save calls, for each n there is."""
    changes = {"train__save_every": 5, "train__keep_checkpoints": 2}
    owner = {"mkdir": Path, "rename": Path, "rmtree": shutil}.get(point, checkpoint_module)
    points = 0
    while True:
        copy = shutil.copytree(run_dir, run_dir.with_name(f"{point}_{points + 1}"))
        # A leftover of an earlier kill, so that there is something to clear at the start too.
        shutil.copytree(checkpoint(run_dir, 14), copy / "checkpoints" / "step_00000019.tmp")
        with monkeypatch.context() as patch:
            until_killed = kill_at_call(patch, owner, point, points + 1)
            try:
                assert train(copy, "train.stop_after=15", **changes) == 75
            except Killed:
                assert not until_killed
        for path in complete_checkpoints(copy):
            verify(path, thorough=True)
        assert complete_checkpoints(copy)
        if until_killed:  # it has seen all calls
            break
        points += 1
        assert train(copy, "train.stop_after=16", **changes) == 75
        assert relora("verify", copy) == 0
        assert len(checkpoints(copy)) == 2
    assert points >= (3 if point == "_sync" else 1)


def kill_at_call(patch: pytest.MonkeyPatch, owner: Any, name: str, nth: int) -> set[int]:
    """Raise Killed at the n-th call of `owner.name` within a save; the calls that are left."""
    import relora.run

    real, real_save, saving, left = getattr(owner, name), relora.run.save, [False], {*range(nth)}

    def counted(*args: Any, **options: Any) -> Any:
        if saving[0]:
            left.discard(min(left, default=0))
            if not left:
                saving[0] = False
                raise Killed
        return real(*args, **options)

    def save(*args: Any) -> Any:
        saving[0] = True
        result = real_save(*args)
        saving[0] = False
        return result

    patch.setattr(owner, name, counted)
    patch.setattr(relora.run, "save", save)
    return left


def test_files_are_compared_before_they_are_read(run_dir: Path) -> None:
    """A rank file of another step fits in size and shape, and is still refused."""
    mine, other = (checkpoint(run_dir, s) / "rank_00000.safetensors" for s in (14, 10))
    assert load_file(mine).keys() == load_file(other).keys()
    shutil.copy(other, mine)
    assert relora("verify", mine.parent) == 4
