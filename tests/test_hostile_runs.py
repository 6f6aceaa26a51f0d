"""Run directories that were damaged anywhere: one message or the right result, and no hang."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import random
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from runs import checkpoint, differing, make_config, metric_lines, relora, train

CHANGES: dict[str, Any] = {"train__save_every": 5}
FILES = (
    "config.yaml",
    "run_state.json",
    "environment.json",
    "metrics.jsonl",
    "rollbacks.json",
    "log.txt",
    ".lock",
    "model",
    "model/config.json",
    "tokenizer",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokens",
    "checkpoints",
    "checkpoints/step_00000010",
    "checkpoints/step_00000014",
    "checkpoints/step_00000014/manifest.json",
    "checkpoints/step_00000014/state.json",
    "checkpoints/step_00000014/rank_00000.safetensors",
)
FEW = ("--max-sequences", 4)
LOSS = re.compile(r"step_(\d+): validation loss ([\d.]+)")
Damage = Callable[[Path, random.Random], object]


def cut(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(max(1, len(content)))])


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 8))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def tear(path: Path, rng: random.Random) -> None:
    """A line is cut in its middle, and the next goes on behind it."""
    lines = path.read_bytes().split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = lines[at][: len(lines[at]) // 2]
    path.write_bytes(b"\n".join(lines))


def put(content: bytes) -> Damage:
    return lambda path, _: path.write_bytes(content)


def instead(make: Callable[[Path], object]) -> Damage:
    """Something else of the name."""

    def change(path: Path, _: random.Random) -> None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)

    return change


def link_away(path: Path, _: random.Random) -> None:
    aside = path.parent / f"aside_{path.name}"
    path.rename(aside)
    path.symlink_to(aside.name)


OF_FILES: dict[str, Damage] = {
    "cut": cut,
    "flipped": flip,
    "torn": tear,
    "empty": put(b""),
    "null": put(b"null\n"),
    "a list": put(b"[1, {}]\n"),
    "a mapping": put(b"{}\n"),
    "deep": put(b"[" * 50_000),
    "a long number": put(b"7" * 5_000),
    "a huge number": put(b'{"step": 1e999, "format": 1e300, "status": 9}\n'),
    "binary": put(bytes(range(256)) * 20),
}
OF_ALL: dict[str, Damage] = {
    "missing": instead(lambda path: None),
    "a link": link_away,
    "a link to itself": instead(lambda path: path.symlink_to(path.name)),
    "a FIFO": instead(os.mkfifo),
    "a directory": instead(Path.mkdir),
    "a file": instead(Path.touch),
}
COMMANDS = ("train", "evaluate", "export", "generate", "verify", "compare")


def cases() -> list[tuple[str, str, str]]:
    """(file, damage, command) of all there is, shuffled by a seed."""
    found = [
        (name, damage, command)
        for name, command in itertools.product(FILES, COMMANDS)
        for damage in ({**OF_FILES, **OF_ALL} if "." in name else OF_ALL)
    ]
    random.Random(9).shuffle(found)
    return found


class Undamaged:
    """A run stopped after step 14, the same finished, and what is right about each step."""

    def __init__(self, home: Path) -> None:
        self.stopped, self.finished = home / "run", home / "finished"
        assert train(self.stopped, "train.stop_after=14", **CHANGES) == 75
        (self.stopped / "rollbacks.json").write_text("[]")
        shutil.copytree(self.stopped, self.finished)
        assert train(self.finished, **CHANGES) == 0
        self.weights, self.losses = {}, {}
        for step in (5, 10, 14):
            to = home / f"export_{step}"
            assert relora("export", checkpoint(self.stopped, step), "--to", to) == 0
            self.weights[step] = load_file(to / "model.safetensors")
            with contextlib.redirect_stdout(io.StringIO()) as said:
                assert relora("evaluate", checkpoint(self.stopped, step), *FEW) == 0
            self.losses[step] = LOSS.findall(said.getvalue())
            self.vocabulary = (to / "tokenizer.json").read_bytes()

    def check_train(self, run_dir: Path, _: str) -> None:
        assert differing(checkpoint(run_dir, 24), checkpoint(self.finished, 24)) == []
        right = {x["step"]: x["train/loss"] for x in metric_lines(self.finished) if "train/lr" in x}
        found = {x["step"]: x["train/loss"] for x in metric_lines(run_dir) if "train/lr" in x}
        assert {k: v for k, v in found.items() if k > 14} == {k: right[k] for k in range(15, 25)}

    def check_export(self, run_dir: Path, said: str) -> None:
        step = re.search(r"step (\d+) of ", said)
        assert step is not None
        found, right = (
            load_file(run_dir.parent / "to/model.safetensors"),
            self.weights[int(step[1])],
        )
        assert found.keys() == right.keys()
        assert all(found[name].equal(right[name]) for name in right)
        assert (run_dir.parent / "to" / "tokenizer.json").read_bytes() == self.vocabulary

    def check_verify(self, run_dir: Path, said: str) -> None:
        name = re.search(r"step_\d+", said)
        assert name is not None
        for path in (run_dir / "checkpoints" / name[0]).iterdir():
            assert (
                path.read_bytes()
                == (self.stopped / "checkpoints" / name[0] / path.name).read_bytes()
            )

    def check_evaluate(self, run_dir: Path, said: str) -> None:
        ((step, loss),) = LOSS.findall(said)
        assert self.losses[int(step)] == [(step, loss)]


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory: pytest.TempPathFactory) -> Undamaged:
    return Undamaged(tmp_path_factory.mktemp("undamaged"))


def hung(*_: object) -> None:
    raise AssertionError("it waits for something that never comes")


def check(
    case: tuple[str, str, str],
    undamaged: Undamaged,
    home: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Damage a copy of the run, give a command, and look at what comes of it."""
    name, damage, command = case
    shutil.rmtree(home, ignore_errors=True)
    run_dir = shutil.copytree(undamaged.stopped, home / "run")
    rng = random.Random(str(case))
    {**OF_FILES, **OF_ALL}[damage](run_dir / name, rng)
    arguments: dict[str, tuple[object, ...]] = {
        "train": (make_config(run_dir, **CHANGES),),
        "evaluate": (run_dir, *FEW),
        "export": (run_dir, "--to", home / "to"),
        "generate": (run_dir, "--prompt", "def", "--max-new-tokens", 1),
        "verify": (run_dir,),
        "compare": (run_dir, "--to", home / "to"),
    }
    capsys.readouterr()
    signal.signal(signal.SIGALRM, hung)
    signal.alarm(100)
    try:
        code = relora(command, *arguments[command])
    finally:
        signal.alarm(0)
    captured = capsys.readouterr()
    assert code in (0, 2, 3, 4), case
    assert "Traceback" not in captured.err, case
    lines = [line for line in captured.err.splitlines() if line.startswith("relora:")]
    if code:
        failed = [line for line in lines if "passed over" not in line and "card" not in line]
        assert len(failed) == 1, (case, captured.err)
        assert str(run_dir) in failed[0], case
        assert command != "export" or not (home / "to").exists(), case
    else:
        right = getattr(undamaged, f"check_{command}", None)
        if right is not None:
            right(run_dir, captured.out)


def test_a_damaged_run_is_one_message_or_the_right_result(
    undamaged: Undamaged, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some of all cases; those that draw pictures take longest."""
    chosen = [case for case in cases() if case[2] != "compare"][:25]
    for case in chosen:
        check(case, undamaged, tmp_path / "home", capsys)


@pytest.mark.slow
def test_a_run_damaged_in_any_way_is_one_message_or_the_right_result(
    undamaged: Undamaged, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for case in cases():
        check(case, undamaged, tmp_path / "home", capsys)


# --- arguments ------------------------------------------------------------------------------------

READERS: dict[str, tuple[object, ...]] = {
    "evaluate": (),
    "generate": ("--prompt", "x"),
    "export": ("--to", "to"),
    "verify": (),
    "compare": ("--to", "to"),
}


@pytest.mark.parametrize("verb", READERS)
def test_a_subject_that_is_none_is_one_message(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.yaml").write_text("a: [")
    names = ["file", "folder", "fifo", "loop", "half", "none", "/dev/null", "x" * 300]
    names += ["y/" * 3000, "file/below", "a\nb"]
    for name in names:
        assert relora(verb, name, *READERS[verb]) == 4, name
        error = capsys.readouterr().err
        assert error.startswith("relora: "), name
        assert "Traceback" not in error
        assert not (tmp_path / "to").exists()
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("verb", ["export", "compare"])
def test_a_place_that_cannot_be_written_to_is_one_message(
    verb: str, undamaged: Undamaged, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("file", "file/below", "fifo", "loop", "x" * 300, "y/" * 3000, "/proc/x"):
        assert relora(verb, undamaged.stopped, "--to", tmp_path / name) in (2, 4), name
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith("relora: ")]
        assert len(lines) == 1, name
        assert "Traceback" not in error
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_dir_or_checkpoint_of_an_odd_name_is_one_message(
    undamaged: Undamaged, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path / "run")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("x" * 300, "y/" * 3000, "loop", "/dev/null"):
        for arguments in (
            (config, f"run_dir={tmp_path / name}"),
            (config, "--resume", tmp_path / name),
            (config, "--resume", f"{undamaged.stopped}/checkpoints/{name}"),
        ):
            assert relora("train", *arguments) in (2, 4), name
            error = capsys.readouterr().err
            assert error.startswith("relora: "), name
            assert "Traceback" not in error
