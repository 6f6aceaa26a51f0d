"""Ranks on other machines: hostfiles, hosts that do not answer, and what two shells make of words.

Stand-ins for ssh and pdsh hand every command to a shell, as the real ones do, and expand what pdsh
expands.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from relora.engine import devices, hosts
from relora.engine.distributed import Ranks, be_found_by_others
from relora.engine.launcher import decode_argument, encode_argument
from relora.errors import ConfigError
from relora.load import load_config
from runs import (
    Process,
    alive,
    checkpoints,
    logged_step,
    make_config,
    relora,
    run_state,
    wait_for,
)

SSH = r"""#!/usr/bin/env bash
while [[ $1 == -* ]]; do
    case $1 in
    --) shift; break ;;
    -o | -p | -l) shift 2 ;;
    *) shift ;;
    esac
done
host=$1
shift
if [[ $host == *down* ]]; then
    echo "ssh: connect to host $host port 22: No route to host" >&2
    exit 255
fi
[[ $host != *bare* ]] || PATH=$(dirname "$0")/bare
cd / && exec /bin/sh -c "$*"
"""
PDSH = r"""#!{python}
import subprocess, sys

at = sys.argv.index("-w")
assert sys.argv[1:at] == ["-S", "-f", "1024"]
line = " ".join(sys.argv[at + 2 :])
running = []
for rank, host in enumerate(sys.argv[at + 1].split(",")):
    meaning, text, rest = {"n": str(rank), "h": host, "u": "me", "%": "%"}, "", iter(line)
    for letter in rest:
        following = next(rest, "") if letter == "%" else ""
        text += meaning.get(following, letter + following) if letter == "%" else letter
    running.append(subprocess.Popen(["ssh", "-2", "-a", "-x", "-l", "me", host, text]))
sys.exit(max(process.wait() for process in running))
"""
NASTY = [
    "$(touch pwned)",
    "`touch pwned`",
    "$HOME ${PATH}",
    "a b  c",
    "'single' \"double\"",
    "back\\slash\\n",
    "%h %n %% %u 100%",
    "line\nbreak\ttab",
    "ünï cödé 🙂",
    "; touch pwned #",
    "~ ! * ? [a] {b,c} | & < > =",
    "",
    "-n",
    "=ls",
    "--encoded=abc",
    "\udcff",
]


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ssh, pdsh and hostname on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    hostname = "#!/bin/sh\necho '127.0.0.1 10.0.0.7'\n"
    for name, text in (("ssh", SSH), ("pdsh", PDSH), ("hostname", hostname)):
        (folder / name).write_text(text.replace("{python}", sys.executable))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.delenv(devices.VISIBLE, raising=False)
    return folder


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_hostfile_is_hosts_and_slots(tmp_path: Path) -> None:
    text = "# all\n\nnode-1 slots=8\n  me@node_2.lan\tslots=4 # the old one\r\n10.0.0.3 slots=1"
    assert hosts.read_hostfile(write(tmp_path / "hosts", text)) == {
        "node-1": 8,
        "me@node_2.lan": 4,
        "10.0.0.3": 1,
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("node1\nnode2\n", (":1: node1: has no `slots=N`",)),
        ("a slots=2\nb slots=x\n", (":2: b: 'slots=x' is no `slots=N`",)),
        ("a slots=0\n", (":1: a: 'slots=0'",)),
        ("a slots=-1\n", (":1: a: 'slots=-1'",)),
        (f"a slots={'9' * 5000}\n", (":1: a: 'slots=999",)),
        ("a slots=2 slots=3\n", (":1: a: 'slots=2 slots=3'",)),
        ("a slots=2 max=3\n", (":1: a: ",)),
        ("a slots=٣\n", (":1: a: ",)),
        ("a slots=2\nb slots=2\na slots=4\n", (":3: a: stands there twice",)),
        ("", ("names no host",)),
        ("# none\n\n", ("names no host",)),
        ("-oProxyCommand=x slots=1\n", (":1: '-oProxyCommand=x': not the name",)),
        ("a,b slots=1\n", (":1: 'a,b': not the name",)),
        ("node[1-3] slots=1\n", ("not the name",)),
        ("$(reboot) slots=1\n", ("not the name",)),
        ("slots=2\n", ("not the name",)),
        (b"\xff\xfe slots=2", ("not UTF-8",)),
    ],
)
def test_a_bad_hostfile_is_one_line_that_names_the_place(
    text: str | bytes, words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert relora("launch", "--hostfile", path, make_config(tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"relora: --hostfile: {path}")
    assert error.count("\n") == 1
    assert len(error) < 600
    assert all(word in error for word in (*words, "`host slots=N`" if "twice" not in error else ""))


def test_a_hostfile_that_is_no_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, word in (("none", "no such file"), (".", "a directory"), ("fifo", "no plain file")):
        path = tmp_path / name
        assert relora("launch", "--hostfile", path, make_config(tmp_path / "run")) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"relora: --hostfile: {path}: ")
        assert word in error


def test_hosts_that_do_not_answer_are_named_before_anything_starts(
    stand_ins: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config(tmp_path / "run", batch__micro_batch_size=2)
    hostfile = write(tmp_path / "hosts", "up slots=1\ndown-1 slots=1\ndown-2 slots=2\n")
    assert relora("launch", "--hostfile", hostfile, config) == 2
    error = capsys.readouterr().err
    assert (
        "no answer from down-1 (ssh: connect to host down-1 port 22: No route to host), " in error
    )
    assert "down-2 (" in error
    assert error.count("\n") == 1
    (stand_ins / "pdsh").unlink()
    monkeypatch.setenv("PATH", str(stand_ins))  # without the one that this machine may have
    assert relora("launch", "--hostfile", hostfile, config) == 2
    assert "needs pdsh, which is not installed" in capsys.readouterr().err


def test_a_host_whose_ranks_no_signal_could_reach_is_named(
    stand_ins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (stand_ins / "bare").mkdir()
    for tool in ("sh", "hostname"):
        (stand_ins / "bare" / tool).symlink_to(f"/bin/{tool}")
    hostfile = write(tmp_path / "hosts", "up slots=1\nbare slots=1\n")
    config = make_config(tmp_path / "run")
    assert relora("launch", "--hostfile", hostfile, config) == 2
    error = capsys.readouterr().err
    assert "no answer from bare (has no pgrep, which is in procps or hostname); each " in error


def test_what_cannot_hold_on_other_machines_is_refused(
    stand_ins: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hostfile = write(tmp_path / "hosts", "a slots=2\nb slots=1\n")
    config = make_config(tmp_path / "run")
    assert relora("launch", "--hostfile", hostfile, config) == 2  # 8 sequences on 3 ranks
    assert "3 ranks" in capsys.readouterr().err
    write(hostfile, "a slots=2\nb slots=2\n")
    monkeypatch.setenv(devices.VISIBLE, "2,3")
    assert relora("launch", "--hostfile", hostfile, config) == 2
    assert "CUDA_VISIBLE_DEVICES=2,3: is for this machine" in capsys.readouterr().err
    for fine in ("0,1,2", ""):
        monkeypatch.setenv(devices.VISIBLE, fine)
        hosts.check_choice({"a": 2})
    monkeypatch.chdir(tmp_path)
    write(tmp_path / ".deepspeed_env", "NCCL_DEBUG=INFO\n# fine\nnothing\n")
    with pytest.raises(ConfigError, match=r"deepspeed_env:3: 'nothing': a line is `NAME=value`"):
        hosts.multi_node_command({"a": 1}, "a", 1, [])


@pytest.mark.parametrize("argument", [*NASTY, "seed=3", "runs/a-b_c.yaml", "lora.targets=[a,b]"])
def test_an_argument_is_the_same_behind_every_shell(argument: str) -> None:
    word = encode_argument(argument)
    assert decode_argument(word) == argument
    assert shlex.quote(word) == word  # nothing in it that a shell could touch
    assert "%" not in word
    assert word[0] != "="
    readable = argument in ("seed=3", "runs/a-b_c.yaml", "-n")
    assert (word == argument) == readable


def test_a_word_that_only_looks_encoded_is_for_the_command_line_to_judge() -> None:
    for word in ("--encoded=!", "--encoded=e30x", "seed=3"):
        assert decode_argument(word) == word


def test_gloo_takes_the_interface_on_the_way_to_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of two machines has what happens else: tests/test_two_hosts.py."""
    own = {
        each.address: interface
        for interface, addresses in psutil.net_if_addrs().items()
        for each in addresses
        if each.family == socket.AF_INET and not each.address.startswith("127.")
    }
    if not own:
        pytest.skip("this machine has no network")
    address, interface = own.popitem()
    name = "GLOO_SOCKET_IFNAME"

    def chosen(master: str, local_world: int = 1, before: str | None = None) -> str | None:
        monkeypatch.setenv(name, before or "")
        if before is None:
            monkeypatch.delenv(name)
        monkeypatch.setenv("MASTER_ADDR", master)
        monkeypatch.setenv("MASTER_PORT", "29500")
        be_found_by_others(Ranks(0, 2, 0, local_world, torch.device("cpu")))
        monkeypatch.delenv("MASTER_ADDR")
        monkeypatch.delenv("MASTER_PORT")
        return os.environ.get(name)

    assert chosen(address) == interface
    assert chosen(address, local_world=2) is None  # one machine
    assert chosen(address, before="ib0") == "ib0"
    assert chosen("127.0.1.1") is None  # no way to anybody
    assert chosen("no-such-host.invalid") is None  # joining says so


def nobody(pids: list[int]) -> bool:
    return not alive(pids)


def values_of(pid: int) -> list[str]:
    """The arguments of a rank, as they were typed."""
    words = psutil.Process(pid).cmdline()
    return [decode_argument(word) for word in words[words.index("train") :]]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_every_rank_gets_what_was_checked_byte_for_byte(
    number: signal.Signals, stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two hosts, a folder and an environment that a shell would take apart; then a stop."""
    folder = tmp_path / 'it\'s $(touch pwned) %h `touch pwned` "ü"'
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NCCL_TEST", "$(touch pwned) 'x' %n")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    changes: dict[str, Any] = {"train__steps": 2000, "train__eval_every": None}
    make_config(tmp_path / "run", **changes).rename("a config.yaml")
    prompt = json.dumps(" ".join(word for word in NASTY if word != "\udcff"), ensure_ascii=False)
    overrides = [f"train.sample_prompt={prompt}", "seed=3", f"run_dir={folder / 'run $HOME'}"]
    hostfile = write(tmp_path / "hosts", "node1 slots=1\nnode2 slots=1\n")
    command = ("launch", "--hostfile", hostfile, "a config.yaml", *overrides)
    process = Process(tmp_path / "out", *command)
    run = folder / "run $HOME"
    process.wait_for_step(run, 3)
    ranks = process.ranks()
    assert len(ranks) == 2
    for rank in ranks:
        assert values_of(rank) == ["train", "a config.yaml", *overrides]
        assert psutil.Process(rank).environ()["NCCL_TEST"] == os.environ["NCCL_TEST"]
        assert psutil.Process(rank).cwd() == str(folder)
        assert "seed=3" in psutil.Process(rank).cmdline()  # to be read in `ps`
    resolved = yaml.safe_load((run / "config.yaml").read_text(encoding="utf8"))
    wanted = load_config(Path("a config.yaml"), overrides)
    assert resolved["train"]["sample_prompt"] == wanted.train.sample_prompt
    # Stopped, or the front killed: in both cases all ranks save together.
    asked, pids = logged_step(run), [process.popen.pid, *process.descendants()]
    os.kill(process.popen.pid, number)
    process.wait()
    wait_for(functools.partial(nobody, pids))
    state = run_state(run)
    assert (state["status"], state["reason"]) == ("preempted", "stopped by SIGTERM")
    assert state["step"] >= asked
    assert checkpoints(run)[-1] == f"step_{state['step']:08d}"
    assert process.text.count("relora: stopping after this step (") == 1, process.text
    assert number == signal.SIGKILL or process.popen.returncode == 75, process.text
    assert not [path for path in tmp_path.rglob("*") if path.name == "pwned"]
    assert not Path("/pwned").exists()
