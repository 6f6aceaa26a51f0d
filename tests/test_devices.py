"""Which GPU a rank gets: the one that the user chose for it, or none at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from relora.engine import devices
from relora.engine.devices import choose_devices
from relora.engine.distributed import environment_kept, read_ranks
from relora.errors import ConfigError
from runs import Process, make_config, relora

UUID, MIG = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "MIG-GPU-8932f937-d72c/1/0"


def machine(monkeypatch: pytest.MonkeyPatch, gpus: int, visible: str | None) -> None:
    """A machine with so many GPUs, and CUDA_VISIBLE_DEVICES."""
    monkeypatch.setattr(devices, "gpus_here", lambda: gpus)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv(devices.VISIBLE, raising=False)
    if visible is not None:
        monkeypatch.setenv(devices.VISIBLE, visible)


@pytest.mark.parametrize(
    ("gpus", "visible", "wanted", "chosen"),
    [
        (8, "2,3", 2, ["2", "3"]),
        (8, "3,2", 1, ["3"]),
        (8, "5, 1 ,7", None, ["5", "1", "7"]),
        (8, "1,-1,2", None, ["1"]),  # as CUDA reads it
        (8, f"{UUID},{MIG}", 2, [UUID, MIG]),
        (1, f"{MIG},MIG-b", None, [MIG, "MIG-b"]),  # more slices than GPUs
        (4, None, None, ["0", "1", "2", "3"]),
        (4, None, 2, ["0", "1"]),
        # Without a GPU the list means nothing, and is not in the way.
        (0, "2,3", 2, ["2", "3"]),
        (0, "2,3", None, ["2"]),
        (0, "0", 3, ["-1", "-1", "-1"]),
        (0, "-1", 2, ["-1", "-1"]),
        (0, "", 2, ["-1", "-1"]),
        (0, None, 2, ["0", "1"]),
        (0, None, None, ["0"]),
    ],
)
def test_rank_k_gets_the_kth_entry_as_given(
    gpus: int,
    visible: str | None,
    wanted: int | None,
    chosen: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, gpus, visible)
    assert choose_devices(wanted) == chosen


@pytest.mark.parametrize(
    ("visible", "wanted", "words"),
    [
        ("2,3", 3, ("--devices: 3", "2 of this machine's 4", "CUDA_VISIBLE_DEVICES=2,3")),
        ("-1", 1, ("--devices: 1", "0 of this machine's 4", "CUDA_VISIBLE_DEVICES=-1")),
        ("", 2, ("--devices: 2", "0 of this machine's 4", "DS_ACCELERATOR=cpu")),
        ("", None, ("--devices: all", "0 of")),
        ("NoDevFiles", 2, ("--devices: 2", "0 of")),
        (None, 5, ("--devices: 5", "4 of this machine's 4")),
        ("2,4", 2, ("not there (4)", "this machine has 4")),
        ("2,2", 2, ("twice", "2, 2")),
    ],
)
def test_what_cannot_be_had_is_refused_with_both_numbers(
    visible: str | None, wanted: int | None, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 4, visible)
    with pytest.raises(ConfigError) as caught:
        choose_devices(wanted)
    assert all(word in str(caught.value) for word in words), caught.value


def test_who_asks_for_the_cpu_gets_it_beside_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible in (None, "", "0,1"):
        machine(monkeypatch, 4, visible)
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        assert choose_devices(2) == ["-1", "-1"]


def test_the_driver_counts_whatever_is_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: x)'\necho '  MIG 1g Device 0: (UUID: y)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv(devices.VISIBLE, "")
    assert devices.gpus_here() == 1
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    driver = Path("/proc/driver/nvidia/gpus")
    assert devices.gpus_here() == (len(list(driver.iterdir())) if driver.is_dir() else 0)


@pytest.mark.parametrize("chosen", [pytest.param("3,1", marks=pytest.mark.slow), f"{UUID},MIG-b,7"])
def test_launched_ranks_have_the_entries_in_their_environment(
    chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read from the processes; torch then numbers the devices in this order."""
    monkeypatch.setenv(devices.VISIBLE, chosen)
    process = Process(tmp_path / "out", "launch", "--devices", 2, make_config(tmp_path / "run"))
    try:
        process.wait_until(lambda: len(process.ranks()) == 2)
        for rank, pid in enumerate(process.ranks()):
            environment = psutil.Process(pid).environ()
            assert environment["LOCAL_RANK"] == str(rank)
            assert environment[devices.VISIBLE].split(",") == chosen.split(",")[:2]
    finally:
        process.kill()
    monkeypatch.setenv(devices.VISIBLE, environment[devices.VISIBLE])
    first = torch.cuda._parse_visible_devices()[0]
    assert str(first) == chosen.split(",")[0]


@pytest.mark.parametrize("verb", ["launch", "arms"])
def test_a_refusal_comes_before_anything_is_started(verb: str, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: x)'\necho 'GPU 1: A (UUID: y)'\n")
    tool.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {devices.VISIBLE: "1"}
    environment.pop("DS_ACCELERATOR", None)
    config = make_config(tmp_path / "run")
    options = ["--to", tmp_path / "to"] if verb == "arms" else []
    done = subprocess.run(
        [sys.executable, "-m", "relora", verb, "--devices", "2", *options, config],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("relora: --devices: 2, and 1 of this machine's 2 GPUs")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "to").exists()
    assert not (tmp_path / "run").exists()


def test_more_ranks_than_gpus_is_a_message_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under any launcher, as when Slurm shows each of eight tasks one GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with (
        environment_kept(),
        pytest.raises(ConfigError, match="2 ranks on this machine, and each sees 1 GPU "),
    ):
        read_ranks()
    assert relora("train", make_config(tmp_path / "run")) == 2
    assert "--gpus-per-node" in capsys.readouterr().err
