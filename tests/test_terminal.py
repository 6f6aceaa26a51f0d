"""What a run looks like: on a terminal, in a file, and beside other libraries."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from relora.load import load_config
from relora.quiet import QUIET
from relora.record import console as under_test
from relora.record import keys
from relora.record.console import LINE_WIDTH, Console, wants_colours
from relora.training.log_lines import merge_line, next_commands, row, spectra_line, step_line
from runs import make_config, metric_lines, relora, train, workshop

CONFIGS = Path(__file__).parent.parent / "configs"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
WIPE = "\r\x1b[2K"


def on_a_terminal(columns: int, *arguments: object, **environment: str) -> str:
    """What `relora …` writes to a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    # What other tests of this process have set by `main` is not what a user has.
    strange = {"NO_COLOR", "FORCE_COLOR", "COLUMNS", *QUIET}
    plain = {name: value for name, value in os.environ.items() if name not in strange}
    more = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TERM": "xterm", **environment}
    environment = {name: value for name, value in (plain | more).items() if value}
    process = subprocess.Popen(
        [sys.executable, "-m", "relora", *map(str, arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
    )
    os.close(theirs)
    parts = []
    with contextlib.suppress(OSError):  # EIO: all of it has been read, and the process is gone
        while part := os.read(ours, 1 << 16):
            parts.append(part)
    os.close(ours)
    screen = b"".join(parts).decode().replace("\r\n", "\n")
    assert process.wait() == 0, screen
    return screen


def lines_of(screen: str) -> list[str]:
    """The lines that stay, without colours; what was wiped is gone."""
    plain = COLOUR.sub("", screen)
    return [line.rpartition(WIPE)[2] for line in plain.split("\n")]


@pytest.fixture(scope="module")
def screen(tmp_path_factory: pytest.TempPathFactory) -> str:
    run_dir = tmp_path_factory.mktemp("terminal") / "run"
    return on_a_terminal(140, "train", make_config(run_dir, train__log_every=10))


@pytest.mark.process
def test_a_terminal_shows_lines_of_100_columns_and_what_stands_out(screen: str) -> None:
    lines = lines_of(screen)
    paths = [line for line in lines if "/tmp" in line]  # a test's paths are long
    assert max(len(line) for line in lines if line not in paths) <= LINE_WIDTH
    coloured = set(re.findall(r"\x1b\[[0-9;]+m(\w+)", screen))
    assert coloured == {"MERGE", "BIRTH", "EVAL", "finished"}
    steps = [line.split()[1] for line in lines if line.startswith("step ")]
    assert steps == ["1/24", "10/24", "20/24", "24/24"]


@pytest.mark.process
def test_a_terminal_has_a_bar_with_speed_and_time_left_below_the_lines(screen: str) -> None:
    bars = re.findall(r"\[[█·]{24}\] [^\x1b\r\n]*", screen)
    assert f"[{'█' * 12}{'·' * 12}] 12/24  loss " in "".join(bars)
    last = next(bar for bar in bars if "] 23/24" in bar)
    assert re.search(r"\] 23/24  loss \d\.\d{4}  [\d.]+ steps/s  eta \d+s$", last)
    assert not any("█" in line for line in lines_of(screen))
    # A line appears above the bar, which is drawn again at once.
    assert re.search(rf"{re.escape(WIPE)}\x1b\[1;32mEVAL at step 12[^\n]*\n\[█", screen)


@pytest.mark.process
def test_no_color_is_honoured_and_a_narrow_terminal_wraps(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", train__log_every=10)
    screen = on_a_terminal(60, "train", config, NO_COLOR="1")
    assert not COLOUR.search(screen)
    bars = re.findall(r"\[[█·]{24}\] [^\x1b\r\n]*", screen)
    assert bars
    assert max(map(len, bars)) < 60
    words = [line for line in lines_of(screen) if "/" not in line]
    assert max(map(len, words)) <= 60
    # The log has whole lines all the same.
    assert re.search(r"^MERGE 1 at step 12: .* s\)$", (tmp_path / "run/log.txt").read_text(), re.M)


def test_colours_are_for_terminals_unless_the_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert [wants_colours(True), wants_colours(False)] == [True, False]
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert wants_colours(False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colours(True)
    monkeypatch.setenv("NO_COLOR", "")
    monkeypatch.delenv("FORCE_COLOR")
    assert wants_colours(True)
    monkeypatch.setenv("TERM", "dumb")
    assert not wants_colours(True)


def test_many_ranks_have_plain_lines_on_a_terminal_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(under_test, "on_terminal", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(bar=False)
    console.step(1, 2, "loss 1")
    console.say("step 1/2")
    console.close()
    assert capsys.readouterr().out == "step 1/2\n"


LONGEST = {
    keys.TRAIN_LOSS: 3.41211,
    keys.LR: 4e-4,
    keys.GRAD_NORM: 0.6123,
    keys.TOKENS_PER_S: 1.234e6,
    keys.UPDATE_RATIO: 2e-3,
    keys.ZEROED_SHARE: 0.899,
    keys.PROBE_DEVIATION: 2e-7,
    keys.MERGE_S: 12.34,
    keys.SPECTRA_S: 12.34,
    "spectra/total_effective_rank": 512.12,
    keys.CYCLE_EFFECTIVE_RANK: 128.12,
    keys.OVERLAP: 0.22,
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("**/llama_*.yaml")), ids=lambda p: p.stem)
def test_the_lines_of_every_shipped_run_fit(path: Path) -> None:
    clock = load_config(path).clock
    step = clock.total - 1
    values = LONGEST | {keys.STEP_MS: 123 * 3600e3}  # hours to go, whatever step it is
    assert len(step_line(clock, step, values)) <= LINE_WIDTH
    values |= {keys.MERGE: clock.merges_before(step)}
    assert len(merge_line(step, 224, values)) <= LINE_WIDTH
    assert len(spectra_line(step, values)) <= LINE_WIDTH


def test_a_row_goes_on_below_its_text_and_no_path_is_cut() -> None:
    path = "/" + "x" * 120
    assert row("model", f"{path}: 38.4K parameters") == [
        "model",
        f"          {path}:",
        "          38.4K parameters",
    ]


@pytest.mark.process
def test_a_finished_run_says_what_to_type_next_and_it_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "my run"
    assert train(run_dir, train__log_every=1000) == 0
    output = capsys.readouterr().out
    assert [x["step"] for x in metric_lines(run_dir) if "train/loss" in x] == [1, 24]
    assert "finished  24 steps, 6.14K tokens in " in output
    assert output.endswith("\n".join(next_commands(run_dir)) + "\n")

    for line in next_commands(run_dir):
        words = shlex.split(line.removeprefix("next"))
        words = [str(run_dir) if word == "ANOTHER_RUN" else word for word in words]
        words = [str(tmp_path / "report") if word == "report" else word for word in words]
        short = (
            ["--max-new-tokens", "9"] if "generate" in words else []
        )  # so is the model's context
        assert relora(*words[1:], *short) == 0, line
    assert relora("train", make_config(run_dir)) == 0
    assert "nothing to do\nnext      relora evaluate" in capsys.readouterr().out


@pytest.mark.slow
def test_other_libraries_are_silent_unless_the_environment_asks(tmp_path: Path) -> None:
    """transformers has a bar for the weights that it loads."""
    workshop()
    assert train(tmp_path / "first", train__steps=14) == 0
    assert relora("export", tmp_path / "first", "--to", tmp_path / "export") == 0
    model = {"pretrained": str(tmp_path / "export")}
    said = {}
    for name, loud in (("quiet", "0"), ("loud", "1")):
        config = make_config(tmp_path / name, model=model, train__steps=14)
        said[name] = on_a_terminal(140, "train", config, RELORA_VERBOSE=loud, NO_COLOR="1")
    assert "Loading weights" in said["loud"]
    assert strange_lines(said["quiet"]) == []


def strange_lines(screen: str) -> list[str]:
    """Those that no run of ours says."""
    ours = r"(run|model|data|ranks|timeline|in full|note|step|EVAL|BIRTH|MERGE|finished|next| +|$)"
    return [line for line in lines_of(screen) if not re.match(ours, line)]


@pytest.mark.launch
def test_a_launch_has_plain_lines_without_a_bar_or_a_word_of_deepspeed(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", train__steps=14)
    screen = on_a_terminal(140, "launch", "--devices", 2, config, DS_ACCELERATOR="")
    assert strange_lines(screen) == []
    assert "█" not in screen
    assert "\x1b[1;35mMERGE 1 at step 12: " in screen
