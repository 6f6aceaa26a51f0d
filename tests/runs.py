"""Tiny runs on disk for the tests of commands: text, tokenizer, shards, configs; and their reader.

What a run has left is read here from its files alone, by other code than the package's own.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from safetensors.torch import load_file

from relora.cli import main
from relora.commands import train as command
from relora.engine.signals import LAUNCHER_GONE, SIGNALS
from relora.files import hold
from relora.training.guard import guarded
from relora.training.phases import Phases

VOCABULARY = 320
SEQUENCE = 32
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 50,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "gpt_neox": {
        "model_type": "gpt_neox",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    },
}
WORDS = [
    "def",
    "return",
    "self",
    "value",
    "\tfor",
    "in",
    "range",
    "if",
    "not",
    "None",
    "🙂",
    "print",
]
WORDS += ["naïve", "x", "y", "z", "=", "(", ")", ":", "+", "[", "]", "0", "1"]


@functools.cache
def workshop() -> Path:
    """A directory, made once a session, with text, model configs and prepared shards."""
    directory = Path(tempfile.mkdtemp(prefix="relora-tests-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    text, rng = directory / "text", random.Random(0)
    text.mkdir()
    for number in range(50):
        rows = (" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for _ in range(60))
        (text / f"{number}.txt").write_text("\n".join(rows), encoding="utf8")
    for name, values in MODELS.items():
        (directory / f"{name}.json").write_text(json.dumps(values))
    with undisturbed():
        assert main(["prepare", str(write_config(directory, directory / "none"))]) == 0
    import deepspeed  # noqa: F401  (with all that torch brings it is half a million objects)

    gc.freeze()  # they stay; looking through them at each collection would double the tests' time
    return directory


def write_config(directory: Path, run_dir: Path, **changes: Any) -> Path:
    """A config file next to `run_dir`: 6 steps of warm start, merges after 12 and 18, 24 steps.

    Args:
        changes: dotted paths with `__` for the dot, such as `optimizer__lr=1e-3`.
    """
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "seed": 1,
        "model": {"config": str(directory / "llama.json")},
        "data": {
            "source": {"files": [str(directory / "text" / "*.txt")]},
            "tokenizer": {"train": "bpe", "vocab_size": VOCABULARY},
            "sequence_length": SEQUENCE,
            "dir": str(directory / "data"),
            "validation_fraction": 0.2,
        },
        "batch": {"global_batch_size": 8, "micro_batch_size": 4},
        "train": {"steps": 24, "log_every": 1, "eval_every": 4, "eval_sequences": 18},
        "optimizer": {"lr": 1e-2, "weight_decay": 0.1},
        "schedule": {"warmup_steps": 3},
        "lora": {"rank": 4, "alpha": 8},
        "relora": {"cycle_steps": 6, "rewarm_steps": 2, "lr": 2e-2},
        "warm_start": {"steps": 6},
        "deepspeed": {"zero_stage": 1, "precision": "fp32"},
        "spectra": None,  # they have tests of their own
    }
    for path, value in changes.items():
        *sections, key = path.split("__")
        node = values
        for section in sections:
            node = node[section]
        node[key] = value
    path = run_dir.with_name(f"{run_dir.name}.yaml")
    path.write_text(yaml.safe_dump(values), encoding="utf8")
    return path


def make_config(run_dir: Path, **changes: Any) -> Path:
    """`write_config` on the session's text and shards."""
    return write_config(workshop(), run_dir, **changes)


def relora(*arguments: object) -> int:
    """`relora …` in this process; returns the exit code, and leaves the process as it was."""
    with undisturbed():
        try:
            return main([str(argument) for argument in arguments])
        except SystemExit as leaving:  # argparse
            return int(leaving.code or 0)


def train(run_dir: Path, *overrides: str, **changes: Any) -> int:
    """Train the tiny run in this process, as one rank.

    Args:
        changes: of the config; or a function in place of one of `training.phases.Phases`, by name.
    """
    phases = {name: changes.pop(name) for name in Phases._fields if name in changes}
    config = make_config(run_dir, **changes)
    with watched(**phases):
        return relora("train", config, *overrides)


@contextlib.contextmanager
def watched(**phases: Any) -> Iterator[None]:
    """Runs in this process have these functions in place of those of `Phases`, by name."""
    wrapped = functools.partial(guarded, phases=Phases(**phases))
    with mock.patch.object(command, "guarded", wrapped):
        yield


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """A run sets environment variables, signal handlers and threads for its process's life.

    ZeRO 3 also leaves a linear of its own in torch, which makes every later run slower. One thread,
    because those that wait for a busy core cost more than they bring.
    """
    linear = torch.nn.functional.linear
    environment, threads = dict(os.environ), torch.get_num_threads()
    handlers = {n: signal.getsignal(n) for n in (*SIGNALS, LAUNCHER_GONE)}
    torch.set_num_threads(1)
    try:
        with mock.patch.object(torch, "set_num_threads"):
            yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(threads)
        torch.nn.functional.linear = linear
        for number, handler in handlers.items():
            signal.signal(number, handler)


# --- what a run has left --------------------------------------------------------------------------


def metric_lines(run_dir: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl."""
    text = (run_dir / "metrics.jsonl").read_text(encoding="utf8")
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=_no_constants) for line in text[:-1].split("\n")]


def series(run_dir: Path, key: str) -> dict[int, Any]:
    """Values of `key` by step; fails if a step has more than one."""
    found: dict[int, Any] = {}
    for line in metric_lines(run_dir):
        if key in line:
            assert line["step"] not in found, f"{key} twice at step {line['step']}"
            found[line["step"]] = line[key]
    return found


def trajectory(run_dir: Path) -> list[dict[str, Any]]:
    """All lines in their order, without what clocks on the wall and meters say."""
    lines = [
        {key: value for key, value in line.items() if not key.startswith(("time", "perf/"))}
        for line in metric_lines(run_dir)
    ]
    return [line for line in lines if len(line) > 1]  # a line about a save holds nothing else


def checkpoint(run_dir: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def checkpoints(run_dir: Path) -> list[str]:
    """Names of all that lies among the checkpoints."""
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def tensors(directory: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Flat tensors of a checkpoint by (parameter, kind), put together from all ranks' files."""
    pieces: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        for key, tensor in load_file(file).items():
            name, kind, start = key.split("|")
            assert tensor.dtype == torch.float32
            assert int(start) not in pieces.setdefault((name, kind), {})
            pieces[name, kind][int(start)] = tensor
    whole = {}
    for key, parts in pieces.items():
        at = 0
        for start in sorted(parts):
            assert start == at, f"{key}: a gap or an overlap at {at}"
            at += parts[start].numel()
        whole[key] = torch.cat([parts[start] for start in sorted(parts)])
    return whole


def adam_steps(directory: Path) -> dict[str, float]:
    """What Adam had counted, by parameter."""
    return json.loads((directory / "state.json").read_text())["adam_steps"]


def differing(one: Path, other: Path) -> list[tuple[str, str]]:
    """Tensors in which two checkpoints differ in any bit, or that only one of them has."""
    a, b = tensors(one), tensors(other)
    assert a
    assert adam_steps(one) == adam_steps(other)
    return [
        key
        for key in sorted(a.keys() | b.keys())
        if key not in a or key not in b or not same_bits(a[key], b[key])
    ]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two fp32 tensors hold the same bits."""
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


@contextlib.contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """A run directory as one in which a process trains."""
    with (run_dir / ".lock").open("a") as file:
        assert hold(file)
        yield


def run_state(run_dir: Path) -> dict[str, Any]:
    """run_state.json."""
    return json.loads((run_dir / "run_state.json").read_text())


def _no_constants(name: str) -> float:
    raise AssertionError(f"{name} is not JSON")


# --- processes ------------------------------------------------------------------------------------


class Patience:
    """How long to wait for processes: for what they are given, not for what a clock says.

    On a crowded machine a second may bring a tenth of its work. So the wait ends once they have
    used up `seconds` of two cores, or when after `seconds` they do nothing any more.
    """

    IDLE_S = 20.0

    def __init__(self, pid: int, seconds: float) -> None:
        self.pid, self.seconds = pid, seconds
        self.began = self.moved = time.monotonic()
        self.first = self.last = self._used()

    @property
    def over(self) -> bool:
        """Whether there is no point in waiting longer; to be asked again and again."""
        now = time.monotonic()
        if now - self.began > self.seconds:
            used = self._used()
            if used > self.last + 0.1:
                self.last, self.moved = used, now
            return used - self.first > 2 * self.seconds or now - self.moved > self.IDLE_S
        return False

    def _used(self) -> float:
        """CPU seconds of the process and all below it, those that have ended too."""
        import psutil

        used = 0.0
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            for one in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    used += sum(one.cpu_times()[:4])
        return used


def wait_for(condition: Callable[[], bool], pid: int | None = None, seconds: float = 60) -> None:
    """Wait for something that a process (this one, if none is named) brings about."""
    patience = Patience(pid or os.getpid(), seconds)
    while not condition():
        assert not patience.over, "waited in vain"
        time.sleep(0.01)


def heed_signals() -> None:
    """A preexec_fn: a child must not ignore what this process may have been told to ignore."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


class Process:
    """`relora …` in a process of its own, its output in a file."""

    def __init__(
        self,
        output: Path,
        *arguments: object,
        program: tuple[str, ...] = (),
        preexec: Callable[[], None] = heed_signals,
    ) -> None:
        self.output = output
        command = program or (sys.executable, "-m", "relora")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        self.began = time.monotonic()
        with output.open("w") as file:
            self.popen = subprocess.Popen(
                [*command, *map(str, arguments)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=preexec,
            )

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self.output.read_text(errors="replace")

    @property
    def age(self) -> float:
        """Seconds since it was started: once it trains, a measure of what the machine delivers."""
        return time.monotonic() - self.began

    def wait(self, timeout: float = 120) -> int:
        """Its exit code; when patience with it is over, all of it is killed and the test fails."""
        patience = Patience(self.popen.pid, timeout)
        while self.popen.poll() is None:
            if patience.over:
                self.kill()
                raise AssertionError(f"still running after {self.age:.0f} s:\n{self.text}")
            time.sleep(0.01)
        return self.popen.returncode

    def kill(self) -> None:
        """End it and all that it has started."""
        for pid in [*self.descendants(), self.popen.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.popen.wait()

    def wait_until(self, condition: Callable[[], bool], timeout: float = 120) -> None:
        """Wait for something to happen while the process runs."""
        patience = Patience(self.popen.pid, timeout)
        while not condition():
            assert self.popen.poll() is None, f"ended with {self.popen.returncode}:\n{self.text}"
            if patience.over:
                self.kill()
                raise AssertionError(f"nothing after {self.age:.0f} s:\n{self.text}")
            time.sleep(0.01)

    def wait_for_step(self, run_dir: Path, step: int, timeout: float = 120) -> None:
        """Wait until the run has logged a step."""
        self.wait_until(lambda: logged_step(run_dir) >= step, timeout)

    def descendants(self) -> list[int]:
        """Process ids of its children and theirs."""
        import psutil

        try:
            return [child.pid for child in psutil.Process(self.popen.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def ranks(self) -> list[int]:
        """Process ids of the ranks, by rank."""
        import psutil

        found = {}
        for pid in self.descendants():
            with contextlib.suppress(psutil.NoSuchProcess):
                environment = psutil.Process(pid).environ()
                if "RANK" in environment and "LOCAL_RANK" in environment:
                    found[int(environment["RANK"])] = pid
        return [found[rank] for rank in sorted(found)]


def logged_step(run_dir: Path) -> int:
    """The newest step in metrics.jsonl; -1 before the first."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return -1
    lines = path.read_text().split("\n")[:-1]
    return max((json.loads(line)["step"] for line in lines), default=-1)


def alive(pids: list[int]) -> list[int]:
    """Those of the processes that still run; a zombie does not."""
    import psutil

    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return found
