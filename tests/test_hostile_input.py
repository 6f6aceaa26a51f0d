"""Whatever is supplied on the command line or in a config ends in work or in one message.

Configs and arguments are mutated by a seeded generator; the same is done to data, models and run
directories in the tests of their packages.
"""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from relora.errors import ConfigError
from relora.load import load_config
from runs import make_config, relora

# Values that a config may be given by mistake, by malice or by a program.
HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308,
    1e-320, "", " ", "x", "null", "1e-3", "\0", "é" * 5000, "/" * 300, "../..", "~", "${HOME}",
    "$(id)", "{", "*", "**", "[", "/dev/full", "/dev/zero", "/proc/self/mem", [], [[]], [None], {},
    {"": 0}, {"a": {"a": {"a": 1}}}, [1, 2, 3], ["a"], "2026-13-45", "٣", "1_0", "0x10", ".inf",
]  # fmt: skip


def _places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every node of a tree of plain values, but for the root."""
    pairs: Any = ()
    if isinstance(tree, dict):
        pairs = tree.items()
    elif isinstance(tree, list):
        pairs = enumerate(tree)
    for key, value in pairs:
        yield (*path, key)
        yield from _places(value, (*path, key))


def mutate(rng: random.Random, values: Any) -> Any:
    """A copy with one to three nodes replaced, renamed, doubled or gone."""
    values = copy.deepcopy(values)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(values))
        if not places:
            break
        *above, last = rng.choice(places)
        node = values
        for key in above:
            node = node[key]
        what = rng.randrange(4)
        if what == 0:
            del node[last]
        elif what == 1 and isinstance(node, dict):
            node[f"{last}{rng.choice('sx_.')}"] = node.pop(last)
        else:
            node[last] = copy.deepcopy(rng.choice(HOSTILE))
    return values


def _mutated_configs(count: int, tmp_path: Path) -> tuple[int, int]:
    """How many of `count` mutated configs were read, and how many refused in one message."""
    base = yaml.safe_load(make_config(tmp_path / "run").read_text())
    base["deepspeed"]["timeout_minutes"] = 1
    rng = random.Random(5)
    path = tmp_path / "mutated.yaml"
    read = refused = 0
    for _ in range(count):
        values = mutate(rng, base)
        path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf8")
        problem = _problem(path)
        assert problem is None or problem.startswith(str(path)), values
        read += problem is None
        refused += problem is not None
    return read, refused


def _problem(path: Path) -> str | None:
    try:
        load_config(path)
    except ConfigError as error:
        return str(error)
    return None


def test_a_mutated_config_is_read_or_refused_in_one_message(tmp_path: Path) -> None:
    read, refused = _mutated_configs(300, tmp_path)
    assert read > 5
    assert refused > 150


@pytest.mark.slow
def test_many_mutated_configs_are_read_or_refused_in_one_message(tmp_path: Path) -> None:
    read, refused = _mutated_configs(10_000, tmp_path)
    assert read > 100
    assert refused > 5000


def _planned(count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = yaml.safe_load(make_config(tmp_path / "run").read_text())
    rng = random.Random(6)
    path = tmp_path / "mutated.yaml"
    codes = []
    for _ in range(count):
        values = mutate(rng, base)
        path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf8")
        codes.append(relora("plan", path))
        told = capsys.readouterr().err
        assert codes[-1] in (0, 2, 3, 4), values
        assert (codes[-1] == 0) == (told == ""), values
    assert codes.count(0) > count / 50


def test_a_mutated_config_is_planned_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _planned(100, tmp_path, capsys)


@pytest.mark.slow
def test_many_mutated_configs_are_planned_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _planned(3000, tmp_path, capsys)


@pytest.mark.parametrize(
    "verb",
    [
        "plan", "prepare", "train", "launch", "arms --to {to}", "evaluate", "export --to {to}",
        "generate --prompt x", "verify", "compare --to {to}",
    ],
)  # fmt: skip
def test_every_path_on_the_command_line_is_a_message_if_it_is_no_good(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_text("x")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "loop").symlink_to("loop")
    folder = tmp_path / "folder"
    folder.mkdir()
    bad = ["", "none", "fifo", "file", "binary", "loop", "folder", "file/x", "x" * 300, "x" * 5000]
    words = verb.format(to=tmp_path / "to").split()
    for name in bad:
        code = relora(*words, tmp_path / name)
        told = capsys.readouterr().err
        assert code in (2, 3, 4), name[:20]
        assert told.startswith("relora: "), told
        assert told.count("\n") == 1, told
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("evaluate", "x", "--batch-size", "9" * 30), "--batch-size"),
        (("generate", "x", "--prompt", "x", "--seed", "9" * 30), "--seed"),
        (("generate", "x", "--prompt", "x", "--top-k", "9" * 30), "--top-k"),
        (("plan", "x", "--devices", "9" * 30), "--devices"),
        (("plan", "x", "--devices", "9" * 5000), "--devices"),
        (("plan", "x", "--tokens-per-s", "9" * 400), "--tokens-per-s"),
        (("compare", "x", "--to", "y", "--watch", "nan"), "--watch"),
        (("compare", "x", "--to", "y", "--watch", "1e300"), "--watch"),
        (("prepare", "x", "--workers", "100000"), "--workers"),  # all would be started
        (("arms", "x", "--to", "y", "--seeds", "9999999999"), "--seeds"),
        (("generate", "x", "--prompt", "x", "--temperature", "1e-300"), "--temperature"),
        (("generate", "x", "--prompt", "\udcff"), "--prompt"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(
    arguments: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert relora(*arguments) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("deepspeed.extra.nonsense=1", "deepspeed.extra.nonsense: DeepSpeed knows no such key"),
        ("deepspeed.extra.step_per_print=1", "did you mean steps_per_print?"),
        ("deepspeed.extra.steps_per_print=x", "deepspeed.extra.steps_per_print: 'x': must be a"),
        ("deepspeed.extra.prescale_gradients=1", "prescale_gradients: 1: must be true or false"),
        ("deepspeed.extra.flops_profiler=3", "deepspeed.extra.flops_profiler: 3: DeepSpeed"),
        (
            "deepspeed.extra.zero_optimization={reduce_bucket_size: many}",
            "deepspeed.extra.zero_optimization.reduce_bucket_size: 'many': DeepSpeed refuses it",
        ),
        (
            "deepspeed.extra.zero_optimization={overlap_com: true}",
            "deepspeed.extra.zero_optimization.overlap_com: True: DeepSpeed refuses it",
        ),
    ],
)
def test_what_deepspeed_refuses_is_refused_before_any_work(
    override: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path / "run")
    assert relora("plan", config, override) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        # Ends the process by itself, with 0, in the middle of the run.
        ({"autotuning": {"enabled": True}}, "deepspeed.extra.autotuning: it ends the process"),
        ({"data_efficiency": {"enabled": True}}, "deepspeed.extra.data_efficiency: would do noth"),
        ({"tensor_parallel": {"autotp_size": 2}}, "deepspeed.extra.tensor_parallel: merges count"),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "zero_optimization.zenflow"),
        # Its config model lets this pass, its engine does not.
        ({"gradient_predivide_factor": 2.0}, "deepspeed.extra: DeepSpeed builds no engine with"),
    ],
)
def test_what_deepspeed_would_fail_on_later_is_refused(
    extra: dict[str, Any], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes: dict[str, Any] = {"deepspeed__extra": extra, "deepspeed__zero_stage": 2}
    assert relora("train", make_config(tmp_path / "run", **changes)) == 2
    assert named in capsys.readouterr().err


def test_what_deepspeed_takes_is_taken(tmp_path: Path) -> None:
    extra = {
        "wall_clock_breakdown": False,
        "steps_per_print": 10,
        "gradient_predivide_factor": 1,
        "communication_data_type": "fp32",
        "flops_profiler": {"enabled": False},
        "zero_optimization": {"reduce_bucket_size": 1000, "overlap_comm": True},
    }
    config = load_config(make_config(tmp_path / "run", deepspeed__extra=extra))
    assert config.deepspeed.extra == extra


# --- standard streams, in processes of their own --------------------------------------------------


def _shell(script: str, cwd: Path, **values: object) -> subprocess.CompletedProcess[str]:
    """A shell in which `relora` is this interpreter's."""
    command = f'relora() {{ "{sys.executable}" -m relora "$@"; }}\n{script}'
    environment = {**os.environ, **{key: str(value) for key, value in values.items()}}
    return subprocess.run(
        ["bash", "-c", command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("redirection", "code", "told"),
    [
        pytest.param(">&- 2>&- <&-", 0, "", marks=pytest.mark.slow),  # as below, and a run's
        ("> /dev/full", 4, "relora: standard output: cannot be written: No space left on device"),
        ("| head -c 10 > /dev/null", 0, ""),
    ],
)
def test_nobody_to_read_what_is_printed_is_no_traceback(
    redirection: str, code: int, told: str, tmp_path: Path
) -> None:
    config = make_config(tmp_path / "run")
    done = _shell(
        f'relora plan "$CONFIG" {redirection}; exit ${{PIPESTATUS[0]}}', tmp_path, CONFIG=config
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(told)
    assert done.stderr.count("\n") == bool(told)


def test_a_closed_output_does_not_end_the_work(tmp_path: Path) -> None:
    """Nor does it land in a file that got the number of standard output."""
    config = make_config(tmp_path / "run", data__dir=str(tmp_path / "data"))
    done = _shell('relora prepare "$CONFIG" >&- 2>&-', tmp_path, CONFIG=config)
    assert done.returncode == 0
    [index] = (tmp_path / "data").glob("*/index.json")
    assert index.read_text().startswith("{")
    done = _shell('relora prepare "$CONFIG" | true; exit ${PIPESTATUS[0]}', tmp_path, CONFIG=config)
    assert done.returncode == 0


def test_a_message_that_nobody_can_read_keeps_its_code(tmp_path: Path) -> None:
    for redirection in ("2>&-", "2> /dev/full", "2> >(true)"):
        done = _shell(f"relora plan none.yaml {redirection}", tmp_path)
        assert done.returncode == 2, redirection


def test_ctrl_c_is_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "text.txt")
    code = (
        "import relora.commands.verify as v, time, sys\n"
        "v.verify = lambda checkpoint: (print('here', flush=True), time.sleep(60))\n"
        "from relora.cli import main\nsys.exit(main(['verify', 'x']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate()
    assert told == "relora: verify was stopped by Ctrl-C\n"
    assert process.returncode == 130
