"""Checkpoints: complete or not there, checked before they are read, and the same for every rank."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from relora.engine.distributed import lone_rank
from relora.engine.views import MOMENTS
from relora.errors import CheckpointError
from relora.load import build_config, load_config
from relora.record import saving
from relora.record.checkpoint import Checkpoint, complete_checkpoints, newest_sound
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
    assert build_config(state["config"], "state.json") == load_config(stopped / "config.yaml")
    assert state["versions"]["torch"] == torch.__version__
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
        ("evaluate", checkpoint(run_dir, 14)),
        ("generate", checkpoint(run_dir, 14), "--prompt", "def"),
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
            Checkpoint(path.parent, thorough=True)
        path.write_bytes(original)
    Checkpoint(path.parent, thorough=True)


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
    path = path.parent / "manifest.json" if damage == "no manifest" else path
    assert f"passed over {path}" in output
    assert str(path) in (run_dir / "log.txt").read_text()


def test_what_was_passed_over_does_not_drive_out_sound_ones(run_dir: Path) -> None:
    """With one to keep, keeping the damaged newest would leave none that is sound."""
    path = checkpoint(run_dir, 14) / "rank_00000.safetensors"
    flip_bit(path, path.stat().st_size // 2)
    changes = {"train__save_every": 5, "train__keep_checkpoints": 1}
    # Neither when the next save is of an earlier step nor of a later one.
    ahead = shutil.copytree(run_dir, run_dir.with_name("ahead"))
    assert train(ahead, train__save_every=16, train__keep_checkpoints=2) == 0
    assert checkpoints(ahead) == ["step_00000016", "step_00000024"]
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
    done = subprocess.run(
        [sys.executable, "-c", limited],
        capture_output=True,
        text=True,
        check=False,
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


@pytest.mark.parametrize(
    ("point", "background"),
    [
        *(
            (point, False)
            for point in ("mkdir", "save_file", "write_json", "sync", "rename", "rmtree")
        ),
        *((point, True) for point in ("save_file", "sync")),
    ],
)
def test_killed_at_any_point_of_a_save_a_run_goes_on(
    point: str, background: bool, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends at the n-th call of something that a save calls, for each n there is."""
    changes = {"train__save_every": 15, "train__keep_checkpoints": 2}
    owner = {"mkdir": Path, "rename": Path, "rmtree": shutil}.get(point, saving)
    points = 0
    while True:
        copy = shutil.copytree(run_dir, run_dir.with_name(f"{point}_{points + 1}"))
        # A leftover of an earlier kill, so that there is something to clear at the start too.
        shutil.copytree(checkpoint(run_dir, 14), copy / "checkpoints" / "step_00000019.tmp")
        with monkeypatch.context() as patch:
            until_killed = kill_at_call(patch, owner, point, points + 1)
            # In the background 15 is saved while 16 is trained, then 16 while all wait.
            stop = f"train.stop_after={16 if background else 15}"
            try:
                assert train(copy, stop, train__background_save=background, **changes) == 75
            except Killed:
                assert not until_killed
        for path in complete_checkpoints(copy):
            Checkpoint(path, thorough=True)
        assert complete_checkpoints(copy)
        if until_killed:  # it has seen all calls
            break
        points += 1
        assert train(copy, "train.stop_after=17", **changes) == 75
        assert relora("verify", copy) == 0
        assert len(checkpoints(copy)) == 2
    assert points >= (2 if point in ("write_json", "sync") else 1) * (2 if background else 1)


def kill_at_call(patch: pytest.MonkeyPatch, owner: Any, name: str, nth: int) -> set[int]:
    """Raise Killed at the n-th call of `owner.name` by a save; the calls that are left."""
    real, left, dead = getattr(owner, name), {*range(nth)}, []

    def counted(*args: Any, **options: Any) -> Any:
        caller = sys._getframe(1).f_code.co_filename
        if caller == saving.__file__ and not dead:
            left.discard(min(left, default=0))
            if not left:
                dead.append(True)
                raise Killed
        return real(*args, **options)

    patch.setattr(owner, name, counted)
    # The killed tidy nothing up, nor does another thread of theirs go on.
    patch.setattr(saving.Saving, "drop", lambda self: self._writer.join())
    return left


def test_files_are_compared_before_they_are_read(run_dir: Path) -> None:
    """A rank file of another step fits in size and shape, and is still refused."""
    mine, other = (checkpoint(run_dir, s) / "rank_00000.safetensors" for s in (14, 10))
    assert load_file(mine).keys() == load_file(other).keys()
    shutil.copy(other, mine)
    assert relora("verify", mine.parent) == 4


# --- made up by somebody --------------------------------------------------------------------------

RANK, STATE, MANIFEST = "rank_00000.safetensors", "state.json", "manifest.json"
NORM = "model.norm.weight|value|0"


def seal(directory: Path, **changes: Any) -> None:
    """Write a manifest in which all is in order, as whoever made the files up would."""
    files = {
        path.name: {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in directory.iterdir()
        if path.name != MANIFEST
    }
    (directory / MANIFEST).write_text(json.dumps({"format": 1, "files": files} | changes))


def with_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Rewrite the rank's file after a change to its tensors by key."""

    def make(directory: Path) -> None:
        pieces = load_file(directory / RANK)
        change(pieces)
        save_file(pieces, directory / RANK)
        seal(directory)

    return make


def with_state(**changes: Any) -> Callable[[Path], None]:
    """Rewrite state.json with other fields; `...` removes one."""

    def make(directory: Path) -> None:
        state = json.loads((directory / STATE).read_text()) | changes
        state = {key: value for key, value in state.items() if value is not ...}
        (directory / STATE).write_text(json.dumps(state))
        seal(directory)

    return make


def with_bytes(name: str, content: bytes) -> Callable[[Path], None]:
    """Replace a file of the checkpoint as a whole."""

    def make(directory: Path) -> None:
        (directory / name).write_bytes(content)
        if name != MANIFEST:
            seal(directory)

    return make


def with_link(name: str) -> Callable[[Path], None]:
    """Replace a file by a symbolic link to its like."""

    def make(directory: Path) -> None:
        outside = directory.parent.parent / name
        (directory / name).rename(outside)
        (directory / name).symlink_to(outside)

    return make


def naming(name: str) -> Callable[[Path], None]:
    """A manifest that names a file which is there, and is none of a checkpoint's."""

    def make(directory: Path) -> None:
        files = json.loads((directory / MANIFEST).read_text())["files"]
        content = (directory / name).read_bytes()
        described = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        seal(directory, files=files | {name: described})

    return make


def twice(directory: Path) -> None:
    """The same pieces in the files of two ranks, of which the state knows."""
    shutil.copy(directory / RANK, directory / "rank_00001.safetensors")
    with_state(world_size=2)(directory)


def of_another_step(directory: Path) -> None:
    shutil.copy(checkpoint(directory.parent.parent, 10) / RANK, directory / RANK)
    seal(directory)


def of_another_world(directory: Path) -> None:
    """Half of the pieces, as on a rank of two, and the other rank's file is not there."""
    pieces = load_file(directory / RANK)
    save_file({k: t[: t.numel() // 2] for k, t in pieces.items()}, directory / RANK)
    seal(directory)


class Pickled:
    """Unpickling it makes a file, as unpickling anybody's file may do anything."""

    def __init__(self, sentinel: str) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return open, (self.sentinel, "w")


def rename_key(pieces: dict[str, torch.Tensor], key: str) -> None:
    pieces[key] = pieces.pop(NORM)


def replace(pieces: dict[str, torch.Tensor], tensor: torch.Tensor) -> None:
    pieces[NORM] = tensor


# What was made up: how, and the file that the message names.
MADE_UP: dict[str, tuple[Callable[[Path], None], str]] = {
    "manifest: a list": (with_bytes(MANIFEST, b"[]"), MANIFEST),
    "manifest: empty": (with_bytes(MANIFEST, b"{}"), ""),
    "manifest: no files": (with_bytes(MANIFEST, b'{"format": 1}'), MANIFEST),
    "manifest: none of the files": (with_bytes(MANIFEST, b'{"format": 1, "files": {}}'), MANIFEST),
    "manifest: no text": (with_bytes(MANIFEST, b"\xff\x00"), MANIFEST),
    "manifest: brackets": (with_bytes(MANIFEST, b"[" * 200_000), MANIFEST),
    "manifest: a long number": (with_bytes(MANIFEST, b'{"format": ' + b"9" * 5000), MANIFEST),
    "manifest: too large": (with_bytes(MANIFEST, b" " * (1 << 26) + b"{}"), MANIFEST),
    "manifest: a file above": (naming("../../run_state.json"), MANIFEST),
    "manifest: an absolute path": (naming("/etc/hostname"), MANIFEST),
    "manifest: the directory": (
        lambda d: seal(d, files={"..": {"bytes": 0, "sha256": ""}, STATE: {}}),
        MANIFEST,
    ),
    "manifest: a link": (with_link(MANIFEST), MANIFEST),
    "state: a link": (with_link(STATE), STATE),
    "rank: a link": (with_link(RANK), RANK),
    "rank: a link to itself": (
        lambda d: ((d / RANK).unlink(), (d / RANK).symlink_to(RANK)),
        RANK,
    ),
    "state: no JSON": (with_bytes(STATE, b"{'step': 14}"), STATE),
    "state: brackets": (with_bytes(STATE, b'{"a":' * 200_000), STATE),
    **{
        f"state: no {field}": (with_state(**{field: ...}), STATE)
        for field in ("step", "consumed", "skipped", "merges", "elapsed_s", "data", "world_size")
    },
    "state: no shapes": (with_state(shapes=...), STATE),
    "state: step in words": (with_state(step="14"), STATE),
    "state: step is true": (with_state(step=True), STATE),
    "state: half a step": (with_state(step=14.5), STATE),
    "state: below zero": (with_state(consumed=-8), STATE),
    "state: beyond all measure": (with_state(consumed=10**400), STATE),
    "state: no time": (with_state(elapsed_s=float("nan")), STATE),
    "state: another step": (with_state(step=15), STATE),
    "state: no rank": (with_state(world_size=0), ""),
    "state: too many ranks": (with_state(world_size=10**12), ""),
    "state: shapes in words": (with_state(shapes={"model.norm.weight": "32"}), STATE),
    "state: shapes below zero": (with_state(shapes={"model.norm.weight": [-32]}), STATE),
    "state: shapes of nothing": (with_state(shapes={}), RANK),
    "state: endless Adam": (with_state(adam_steps={"model.norm.weight": float("inf")}), STATE),
    "state: Adam of nothing": (with_state(adam_steps={}), STATE),
    "state: one moment too few": (with_state(first_moment_only=["model.norm.weight"]), STATE),
    "rank: empty": (with_bytes(RANK, b""), RANK),
    "rank: random bytes": (with_bytes(RANK, bytes(range(256)) * 40), RANK),
    "rank: endless header": (with_bytes(RANK, (2**62).to_bytes(8, "little") + b"{}"), RANK),
    "rank: header beyond the file": (with_bytes(RANK, (9**8).to_bytes(8, "little") + b"{}"), RANK),
    "rank: header of brackets": (
        with_bytes(RANK, (99_999).to_bytes(8, "little") + b"[" * 99_999),
        RANK,
    ),
    "rank: offsets beyond the file": (
        with_bytes(
            RANK,
            (77).to_bytes(8, "little")
            + b'{"a|value|0": {"dtype": "F32", "shape": [999999], "data_offsets": [0, 3999996]}}'[
                :77
            ].ljust(77),
        ),
        RANK,
    ),
    "piece: no key": (with_tensors(lambda p: rename_key(p, "model.norm.weight")), RANK),
    "piece: no start": (with_tensors(lambda p: rename_key(p, "model.norm.weight|value|")), RANK),
    "piece: starts below 0": (with_tensors(lambda p: rename_key(p, f"{NORM[:-1]}-1")), RANK),
    "piece: starts at 10^30": (with_tensors(lambda p: rename_key(p, NORM + "0" * 30)), RANK),
    "piece: starts at ٣": (with_tensors(lambda p: rename_key(p, f"{NORM[:-1]}٣")), RANK),
    "piece: another kind": (with_tensors(lambda p: rename_key(p, "model.norm.weight|x|0")), RANK),
    "piece: another name": (with_tensors(lambda p: rename_key(p, "norm|value|0")), RANK),
    "piece: starts later": (with_tensors(lambda p: rename_key(p, f"{NORM[:-1]}1")), RANK),
    "piece: too short": (with_tensors(lambda p: replace(p, torch.zeros(31))), RANK),
    "piece: too long": (with_tensors(lambda p: replace(p, torch.zeros(33))), RANK),
    "piece: a matrix": (with_tensors(lambda p: replace(p, torch.zeros(4, 8))), RANK),
    "piece: a number": (with_tensors(lambda p: replace(p, torch.tensor(1.0))), RANK),
    "piece: fp64": (with_tensors(lambda p: replace(p, torch.zeros(32).double())), RANK),
    "piece: int32": (with_tensors(lambda p: replace(p, torch.zeros(32).int())), RANK),
    "piece: overlapping": (
        with_tensors(lambda p: p.update({f"{NORM[:-1]}16": torch.zeros(16)})),
        RANK,
    ),
    "piece: none of a weight": (with_tensors(lambda p: p.pop(NORM)), STATE),
    "piece: none of a moment": (
        with_tensors(lambda p: p.pop(NORM.replace("value", "exp_avg_sq"))),
        STATE,
    ),
    "piece: in two files": (twice, "rank_00001.safetensors"),
    "files: of another step": (of_another_step, RANK),
    "files: of another world": (of_another_world, RANK),
}


@pytest.mark.parametrize("what", MADE_UP)
def test_what_somebody_made_up_is_refused_and_its_file_named(
    what: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hashes are right, so that only what the files say gives it away."""
    make, name = MADE_UP[what]
    directory = checkpoint(run_dir, 14)
    make(directory)
    assert relora("verify", directory) == 4
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert str(directory) in lines[0]
    assert name in lines[0]
    found, complaints = newest_sound(run_dir, lone_rank())
    assert found is not None
    assert found.step == 10
    assert [f"relora: {complaint}" for complaint in complaints] == lines


def test_a_pickle_is_never_unpickled(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentinel = run_dir / "executed"
    path = checkpoint(run_dir, 14) / RANK
    for protocol, content in ((2, pickle.dumps), (4, pickle.dumps), (0, torch_saved)):
        path.write_bytes(content(Pickled(str(sentinel)), protocol))
        seal(path.parent)
        assert relora("verify", path.parent) == 4
        assert relora("evaluate", path.parent) == 4
        assert train(run_dir, "--resume", str(path.parent)) == 4
        captured = capsys.readouterr()
        assert captured.err.count(f"relora: {path}: is no safetensors file") == 3
        assert "Traceback" not in captured.err
    assert train(run_dir, "train.stop_after=11") == 75
    assert f"passed over {path}" in capsys.readouterr().out
    assert not sentinel.exists()


def torch_saved(value: Any, protocol: int) -> bytes:
    """The bytes of a file by torch.save."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_a_checkpoint_of_another_model_is_refused(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All in itself in order, and a weight of another shape, or one that is not there."""
    directory = checkpoint(run_dir, 14)
    state = json.loads((directory / STATE).read_text())
    original = load_file(directory / RANK)
    for name, shape in (("model.norm.weight", [33]), ("model.nurm.weight", [32])):
        shapes = {k: v for k, v in state["shapes"].items() if k != "model.norm.weight"}
        steps = {k: v for k, v in state["adam_steps"].items() if k != "model.norm.weight"}
        kept = {k: v for k, v in original.items() if not k.startswith("model.norm.")}
        kept |= {f"{name}|{kind}|0": torch.ones(shape) for kind in ("value", *MOMENTS)}
        save_file(kept, directory / RANK)
        with_state(shapes=shapes | {name: shape}, adam_steps=steps | {name: 14.0})(directory)
        assert relora("verify", directory) == 0
        for command in (("train", make_config(run_dir)), ("evaluate", directory)):
            assert relora(*command) == 4
            error = capsys.readouterr().err
            assert f"{directory / STATE}: is of another model: of model.n" in error
            assert "Traceback" not in error


def test_a_huge_header_takes_no_memory(run_dir: Path) -> None:
    """A sparse file of 10 GB, whose header says that all of it is header."""
    directory = checkpoint(run_dir, 14)
    for size in (99_000_000, 10_000_000_000):
        with (directory / RANK).open("wb") as file:
            file.write(size.to_bytes(8, "little"))
            file.truncate(size + 8)
        manifest = {"bytes": size + 8, "sha256": ""}
        seal_state = json.loads((directory / MANIFEST).read_text())["files"][STATE]
        values = {"format": 1, "files": {RANK: manifest, STATE: seal_state}}
        (directory / MANIFEST).write_text(json.dumps(values))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(CheckpointError, match=RANK):
            Checkpoint(directory)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


def test_a_checkpoint_that_goes_while_it_is_verified_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a run retires it: hashed and sound, and gone when it is opened."""
    from relora.record import checkpoint as module

    def gone(path: Path, **_: Any) -> None:
        raise RuntimeError(f"unable to open file <{path}> in read-only mode")

    assert train(tmp_path / "run", "train.stop_after=2") == 75
    monkeypatch.setattr(module, "safe_open", gone)
    assert relora("verify", tmp_path / "run") == 4
    error = capsys.readouterr().err
    assert "rank_00000.safetensors" in error
    assert "Traceback" not in error
