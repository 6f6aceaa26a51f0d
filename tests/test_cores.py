"""Threads on a CPU: what the user set stays, else what the machine leaves each rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from relora import cores
from relora.cli import main

ASK = (
    "import torch; from relora.engine.distributed import read_ranks; read_ranks(); "
    "print(torch.get_num_threads())"
)


def threads(**environment: str) -> int:
    """What a rank computes with, asked in a process of its own."""
    clean = {k: v for k, v in os.environ.items() if k not in cores.THREADS}
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        env={**clean, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.parametrize(
    "name", [cores.THREADS[0], pytest.param(cores.THREADS[1], marks=pytest.mark.slow)]
)
def test_what_the_user_set_stays(name: str) -> None:
    assert threads(**{name: "1"}) == 1
    # Not shared out between the ranks: torch alone decides, which stops at the machine's cores.
    for ranks in ("1", "9"):
        alone = min(2, os.cpu_count() or 1)
        assert threads(**{name: "2"}, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks) == alone


def test_without_it_ranks_share_what_the_machine_has() -> None:
    usable = cores.usable_cores()
    assert threads() == usable
    assert threads(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2") == max(1, usable // 2)
    assert threads(WORLD_SIZE="9", LOCAL_WORLD_SIZE=str(usable + 1)) == 1


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, float("inf")),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, float("inf")),
        ({"cpu.max": "what is this\n"}, float("inf")),
        ({}, float("inf")),
    ],
)
def test_a_container_pays_for_so_many_cores(
    files: dict[str, str], quota: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert cores._quota() == quota
    assert cores.usable_cores() == (64 if quota == float("inf") else {1.5: 2, 3: 3}[quota])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5})
    assert cores.usable_cores() == 1
    monkeypatch.delattr(os, "sched_getaffinity")  # as on other systems than Linux
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert cores.usable_cores() == min(2, cores.usable_cores())


def test_how_threads_wait_is_the_users_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    cores.limit_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == cores.SPINS
    for name in names:
        for other in names:
            monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv(name, "active")
        cores.limit_spinning()
        assert [n for n in names if n in os.environ] == [name]


def test_the_command_line_limits_spinning_before_torch_is_loaded() -> None:
    """OpenMP reads the variable when it is loaded, and never again."""
    code = (
        "import os, sys, relora.cli\n"
        "assert 'torch' not in sys.modules\n"
        "try:\n    relora.cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == f"{cores.SPINS} False"


def test_windows_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert main(["plan", "any.yaml"]) == 2
    assert capsys.readouterr().err == "relora: needs Linux; on Windows that is WSL 2\n"
