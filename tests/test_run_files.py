"""A run's files in a rough world: neighbours, umasks, damage, readers and full disks."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import resource
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relora.commands.compare import read_report
from runs import (
    Process,
    checkpoint,
    checkpoints,
    make_config,
    metric_lines,
    relora,
    run_state,
    train,
)

SPECTRA: dict[str, Any] = {"spectra": {}}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after step 14, with checkpoints of 5, 10 and 14."""
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    assert train(run_dir, "train.stop_after=14", train__save_every=5, **SPECTRA) == 75
    return run_dir


@pytest.fixture
def run_dir(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may break."""
    return shutil.copytree(stopped, tmp_path / "run")


def only_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command has to say."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("relora:")]
    assert len(lines) == 1, error
    return lines[0]


# --- neighbours -----------------------------------------------------------------------------------


def test_nothing_that_others_have_put_beside_is_removed(run_dir: Path, tmp_path: Path) -> None:
    """Names that look temporary, and those that temporaries of earlier versions had."""
    export, report = tmp_path / "export", tmp_path / "report"
    home = run_dir / "checkpoints"
    (run_dir / ".ranks").mkdir(exist_ok=True)
    folders = [
        *(tmp_path / f"export.{end}" for end in ("tmp", "old", "123.tmp")),
        *(run_dir / name for name in ("model.tmp", "tokenizer.tmp", "checkpoints.tmp")),
        *(home / name for name in ("mine.tmp", "step_00000015.mine.tmp", "xstep_00000009.tmp")),
    ]
    texts = [
        *(run_dir / f"{name}.tmp" for name in ("metrics", "config.yaml", "run_state.json")),
        *(run_dir / f"{name}.0.tmp" for name in ("environment.json", "metrics.jsonl")),
        *(home / name for name in ("notes.tmp", "step_00000024.txt")),
        *(run_dir / "spectra" / name for name in ("step_00000099.txt", "step_99.tmp")),
        *(tmp_path / "report" / name for name in ("memory.png.tmp", "report.html.tmp")),
    ]
    report.mkdir()
    for folder in folders:
        folder.mkdir()
        texts.append(folder / "thesis.tex")
    for text in texts:
        text.write_text("years of work")
    assert train(run_dir, train__save_every=5, train__keep_checkpoints=1, **SPECTRA) == 0
    for force in ((), ("--force",)):
        assert relora("export", run_dir, "--to", export, *force) == 0
    assert relora("compare", run_dir, "--to", report) == 0
    for text in texts:
        assert text.read_text() == "years of work", text
    mine = {path.name for path in (*folders, *texts) if path.parent == home}
    assert set(checkpoints(run_dir)) - mine == {"step_00000024"}


def test_what_killed_writers_of_the_run_left_is_cleared(run_dir: Path) -> None:
    left = [
        run_dir / "metrics.jsonl.123-0123abcd.tmp",
        run_dir / "checkpoints" / "step_00000020.123-0123abcd.tmp",
        run_dir / "tokenizer.9-0123abcd.tmp",
    ]
    for path in left[1:]:
        path.mkdir()
        (path / "half").touch()
    left[0].touch()
    assert train(run_dir, "train.stop_after=15") == 75
    assert not [path for path in left if path.exists()]


def test_temporaries_are_made_in_one_module_alone() -> None:
    """Where a name is made up, synced, locked or replaced, it is by `relora.files`."""
    package = Path(__file__).parent.parent / "relora"
    for path in package.rglob("*.py"):
        if path != package / "files.py" and path.parent != package / "data":
            text = path.read_text(encoding="utf8")
            for word in ("os.fsync", '.tmp"', "NamedTemporary", "mkstemp", "flock"):
                assert word not in text.replace(r'\.tmp"', "").replace(r'\.tmp)"', ""), (path, word)


def test_every_file_has_the_mode_that_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert train(tmp_path / "run", train__save_every=12, **SPECTRA) == 0
        assert relora("export", tmp_path / "run", "--to", tmp_path / "export") == 0
        assert relora("compare", tmp_path / "run", "--to", tmp_path / "report") == 0
    finally:
        os.umask(before)
    found = [
        path for place in ("run", "export", "report") for path in (tmp_path / place).rglob("*")
    ]
    assert len([path for path in found if path.suffix == ".safetensors"]) > 15
    for path in found:
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path


# --- complaints -----------------------------------------------------------------------------------


def in_place_of(path: Path, make: Callable[[Path], object]) -> None:
    """Put something else where a file or directory is."""
    path.rename(path.parent.parent.parent / f"aside_{path.name}")
    make(path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no manifest": lambda d: (d / "manifest.json").unlink(),
    "an empty manifest": lambda d: (d / "manifest.json").write_bytes(b""),
    "a manifest of null": lambda d: (d / "manifest.json").write_text("null"),
    "a manifest that is a link": lambda d: in_place_of(
        d / "manifest.json", lambda p: p.symlink_to(p.parent.parent.parent / f"aside_{p.name}")
    ),
    "a manifest that is a FIFO": lambda d: in_place_of(d / "manifest.json", os.mkfifo),
    "a manifest that is a directory": lambda d: in_place_of(d / "manifest.json", Path.mkdir),
    "a link in its place": lambda d: in_place_of(
        d, lambda p: p.symlink_to(p.parent.parent.parent / f"aside_{p.name}")
    ),
    "a link to nothing": lambda d: in_place_of(d, lambda p: p.symlink_to("nothing")),
    "a file in its place": lambda d: in_place_of(d, Path.touch),
    "a FIFO in its place": lambda d: in_place_of(d, os.mkfifo),
    "an empty directory": lambda d: in_place_of(d, Path.mkdir),
    "a rank's file that is a FIFO": lambda d: in_place_of(d / "rank_00000.safetensors", os.mkfifo),
}


# All of them take a minute; three kinds of place, and a FIFO that nobody may wait for, do for one.
OFTEN = ("no manifest", "a manifest of null", "a link in its place", "a FIFO in its place")


@pytest.mark.parametrize(
    "damage", [pytest.param(d, marks=[] if d in OFTEN else pytest.mark.slow) for d in DAMAGES]
)
def test_a_newest_checkpoint_that_is_none_is_named_by_all_who_pass_over_it(
    damage: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = checkpoint(run_dir, 14)
    DAMAGES[damage](newest)
    capsys.readouterr()
    for command in (
        ("evaluate", run_dir, "--max-sequences", 1),
        ("export", run_dir, "--to", tmp_path / "export"),
        ("generate", run_dir, "--prompt", "def", "--max-new-tokens", 1),
    ):
        assert relora(*command) == 0
        captured = capsys.readouterr()
        assert f"relora: passed over {newest}" in captured.err
        assert (
            "step_00000010" in captured.out
            or "step 10 of" in captured.out
            or "def" in (captured.out)
        )
    for subject in (run_dir, newest):
        assert relora("verify", subject) == 4
        assert str(newest) in only_line(capsys)
    warnings = read_report([str(run_dir)]).warnings
    assert any(f"passed over {newest}" in line for line in warnings)
    assert train(run_dir, train__save_every=5) == 0
    output = capsys.readouterr().out
    assert f"passed over {newest}" in output
    assert "going on from step 10" in output
    assert relora("verify", run_dir) == 0


def test_a_finished_run_without_its_last_checkpoint_is_finished_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, config = tmp_path / "run", {"train__steps": 14, "train__save_every": 10}
    assert train(run_dir, **config) == 0
    last = checkpoint(run_dir, 14)
    for damage in ("no manifest", "a link to nothing", "gone"):
        if damage == "gone":
            shutil.rmtree(last)
        else:
            shutil.rmtree(run_dir.parent / f"aside_{last.name}", ignore_errors=True)
            DAMAGES[damage](last)
        capsys.readouterr()
        assert train(run_dir, **config) == 0
        output = capsys.readouterr().out
        assert "going on from step 10" in output
        assert damage == "gone" or f"passed over {last}" in output
        assert relora("verify", run_dir) == 0
        capsys.readouterr()
        assert train(run_dir, **config) == 0
        assert "nothing to do" in capsys.readouterr().out
    shutil.rmtree(run_dir / "checkpoints")
    assert train(run_dir, **config) == 4
    assert "says finished at step 14, and there is no checkpoint" in only_line(capsys)


def test_a_start_that_is_passed_over_is_said_too(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint(run_dir, 14) / "manifest.json").unlink()
    model = {"pretrained": str(run_dir)}
    assert train(tmp_path / "new", "train.stop_after=1", model=model) == 75
    assert f"passed over {checkpoint(run_dir, 14)}" in capsys.readouterr().err


# --- readers --------------------------------------------------------------------------------------


def test_readers_of_a_run_that_retires_checkpoints_never_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It keeps one, and makes another at every step: what is being read goes at once."""
    run_dir = tmp_path / "run"
    train_ = {"steps": 100_000, "save_every": 1, "keep_checkpoints": 1, "eval_every": 5}
    train_ |= {"eval_sequences": 2, "log_every": 5}
    config = make_config(run_dir, train=train_, relora=None)
    process = Process(tmp_path / "out.txt", "train", config)
    process.wait_for_step(run_dir, 10)
    steps: set[str] = set()
    # Until it has gone on under the readers' hands; on a crowded machine that takes its time.
    for turn in range(60):
        if turn >= 2 and len(steps) > 2:
            break
        for command in (
            ("verify", run_dir),
            ("evaluate", run_dir, "--max-sequences", 2),
            ("export", run_dir, "--to", tmp_path / f"export_{turn}"),
            ("generate", run_dir, "--prompt", "x", "--max-new-tokens", 1),
            ("compare", run_dir, "--to", tmp_path / "report"),
        ):
            assert relora(*command) == 0, capsys.readouterr().err
        steps |= set(checkpoints(run_dir))
        assert process.popen.poll() is None, process.text
    process.popen.send_signal(signal.SIGTERM)
    assert process.wait() == 75, process.text
    assert len(steps) > 2
    assert "passed over" not in capsys.readouterr().err


def test_a_checkpoint_is_read_though_its_files_have_gone(run_dir: Path) -> None:
    from relora.record.checkpoint import Checkpoint

    directory = checkpoint(run_dir, 14)
    name = "model.layers.0.mlp.up_proj.weight"
    before = Checkpoint(directory).tensor(name)
    opened = Checkpoint(directory, thorough=True)
    shutil.rmtree(directory)
    assert opened.tensor(name).equal(before)


# --- figures and state ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "broken",
    [
        b'{"step": 7, "train/lo',
        pytest.param(b"[1]", marks=pytest.mark.slow),
        pytest.param(b"null", marks=pytest.mark.slow),
        pytest.param(b'{"a": 1}', marks=pytest.mark.slow),
        pytest.param(b'{"step": "7"}', marks=pytest.mark.slow),
        pytest.param(b"\xff\xfe", marks=pytest.mark.slow),
        pytest.param(b"7" * 5000, marks=pytest.mark.slow),
    ],
)
def test_a_broken_line_of_figures_is_reported_and_kept_out(
    broken: bytes, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:6], broken + b"\n", *lines[6:]]))
    assert relora("export", run_dir, "--to", run_dir.parent / "export") == 0
    assert f"{path}: line 7" in capsys.readouterr().err
    assert train(run_dir, "train.stop_after=15", train__save_every=5) == 75
    output = capsys.readouterr().out
    assert output.count(f"{path}: line 7") == 1
    assert path.read_bytes().startswith(b"".join(lines[:8]))
    assert metric_lines(run_dir)
    assert relora("compare", run_dir, "--to", run_dir.parent / "report") == 0


FILES = ("metrics.jsonl", "log.txt", "run_state.json", "rollbacks.json", ".lock", "config.yaml")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("what", [Path.mkdir, os.mkfifo], ids=["directory", "FIFO"])
def test_what_is_in_place_of_a_file_of_a_run_is_named(
    name: str, what: Callable[[Path], None], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / name).unlink(missing_ok=True)
    what(run_dir / name)
    assert train(run_dir, train__save_every=5) in (2, 4)
    assert str(run_dir / name) in only_line(capsys)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "null",
        "[]",
        "{}",
        '{"step": 3}',
        '{"status": "running", "reason": "", "code": 0}',
        "{" * 99,
    ]
    + [
        f'{{"status": "x", "reason": "", "code": 0, "step": {n}}}'
        for n in ('"3"', "1e99", "9" * 99)
    ],
)
def test_a_run_state_that_is_none_is_one_message_that_says_the_way_out(
    content: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_dir / "run_state.json"
    path.write_text(content)
    for command in (
        ("train", make_config(run_dir, train__save_every=5)),
        ("compare", run_dir, "--to", run_dir.parent / "report"),
    ):
        assert relora(*command) == 4
        assert f"relora: {path}: " in (line := only_line(capsys))
        assert "remove it" in line
    path.unlink()
    assert train(run_dir, "train.stop_after=15", train__save_every=5) == 75


@pytest.mark.parametrize("content", ["", "null", "[]", '{"earlier": 3}', '{"from_step": "x"}'])
def test_an_environment_that_cannot_be_read_is_made_anew(
    content: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_dir / "environment.json"
    path.write_text(content)
    assert any(str(path) in line for line in read_report([str(run_dir)]).warnings)
    assert train(run_dir, "train.stop_after=15", train__save_every=5) == 75
    assert f"{path}: " in capsys.readouterr().out
    assert json.loads(path.read_text())["from_step"] == 14


@pytest.mark.parametrize("pid", ["null", '"x"', "1e99", "9" * 30, "-1", None])
def test_a_lock_file_may_hold_anything(
    pid: str | None, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Held by somebody, it is a refusal; free, it is overwritten."""
    path = run_dir / ".lock"
    held = f'{{"pid": {pid}, "host": "{platform.node()}"}}'.encode()
    path.write_bytes(held if pid else b"\xff" * 9)
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert train(run_dir, train__save_every=5) == 4
        assert "process unknown trains in it already" in only_line(capsys)
    assert train(run_dir, "train.stop_after=15", train__save_every=5) == 75


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "model/config.json"])
def test_what_leaves_a_run_is_what_it_was_trained_with(
    name: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tokenizer or a model that was changed since gives no wrong export; a run mends its own."""
    path = run_dir / name
    text = path.read_text()
    changed = text.replace('"hidden_act": "silu"', '"hidden_act": "relu"').replace('"0"', '"§"')
    assert changed != text
    path.write_text(changed)
    assert relora("export", run_dir, "--to", tmp_path / "export") == 4
    assert str(path if "model" in name else path.parent) in only_line(capsys)
    assert not (tmp_path / "export").exists()
    code = train(run_dir, "train.stop_after=15", train__save_every=5)
    if name.startswith("model"):
        assert code in (2, 4)
        assert str(run_dir) in only_line(capsys)
    else:
        assert code == 75
        assert path.read_text() == text


# --- full disks and closed consoles ---------------------------------------------------------------


def test_a_run_goes_on_with_its_output_closed(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = make_config(run_dir)
    command = f"{sys.executable} -m relora train {config} >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], check=False).returncode == 0
    assert run_state(run_dir)["status"] == "finished"
    assert metric_lines(run_dir)
    assert "EVAL at step 24" in (run_dir / "log.txt").read_text()


@pytest.mark.parametrize(
    ("command", "size"),
    [
        ("export", 20_000),
        *(
            pytest.param(*rare, marks=pytest.mark.slow)
            for rare in (("export", 100), ("compare", 100), ("compare", 20_000))
        ),
    ],
)
def test_what_finds_no_room_leaves_what_was_there(
    command: str, size: int, run_dir: Path, tmp_path: Path
) -> None:
    """No file may grow past some bytes, as on a disk that is full: one line, nothing half left."""
    to = tmp_path / "to"
    arguments = [command, str(run_dir), "--to", str(to)]
    assert relora(*arguments) == 0
    before = {path: path.read_bytes() for path in to.rglob("*") if path.is_file()}
    beside = sorted(tmp_path.iterdir())
    program = (
        "import resource, signal, sys\n"
        "from relora.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
        f"sys.exit(main({arguments + (['--force'] if command == 'export' else [])!r}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("relora:")]
    assert len(lines) == 1
    assert str(to) in lines[0]
    assert sorted(tmp_path.iterdir()) == beside
    after = {path: path.read_bytes() for path in to.rglob("*") if path.is_file()}
    assert after.keys() == before.keys()
    if command == "export":
        assert after == before


def test_limits_on_open_files_are_raised_for_a_checkpoint_of_many_ranks(run_dir: Path) -> None:
    from relora.record.manifest import _make_room_for

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (600, hard))
        _make_room_for(1000)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(1500, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
