"""The machines of a hostfile: read it, see that all answer, start ranks there and reach them.

Two programs read a command for another host before anything of ours does: pdsh, to which % is
special, and the login shell there. What was checked here has to arrive word for word: every word is
quoted, and an argument with anything in it that a shell could touch is encoded.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from relora.engine.devices import listed
from relora.engine.launcher import encode_argument, node_launcher, what_ranks_run
from relora.engine.signals import FRONT
from relora.errors import ConfigError
from relora.files import is_file, read_text

LINE = "a line is `host slots=N`: a name that ssh knows, and how many GPUs of it to use, from 1 up"
# What pdsh and ssh take for a name and for nothing else; user@ may stand before it.
HOST = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9][A-Za-z0-9_.-]*")
# Variables that ranks elsewhere get from here, by their beginnings: those of deepspeed's own
# launcher, and those that decide what a rank computes with.
EXPORTED: tuple[str, ...] = ("MLFLOW", "MV2", "NCCL", "PYTHON", "UCX")
EXPORTED += ("DS_ACCELERATOR", "DS_BUILD_OPS", "GLOO_", "GOMP_", "MKL_", "OMP_", "TORCH_")
# Runs $2 … and, on SIGTERM, $1; a wait that the signal cut short says nothing of the end.
KEEPER = """
stop=$1
shift
trap 'told=1; eval "$stop"' TERM
"$@" &
wait $!
code=$?
[ -z "$told" ] || { wait $!; code=$?; }
exit $code
"""
ASK_S = 10  # for a host to answer
# What a host needs for its ranks to be told anything later, and its addresses.
ANSWER = """
for tool in hostname pgrep pkill; do
    command -v $tool >/dev/null && continue
    echo "has no $tool, which is in procps or hostname" >&2
    exit 1
done
exec hostname -I
"""
SSH = ("ssh", "-n", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={ASK_S}", "--")


def read_hostfile(path: Path) -> dict[str, int]:
    """Hosts in their order, with the number of ranks on each.

    Raises:
        ConfigError: it cannot be read, a line says something else, a host stands there twice, or
            there is none; names the line.
    """
    try:
        text = read_text(path, ConfigError)
    except ConfigError as error:
        raise ConfigError(f"--hostfile: {error}; {LINE}") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where, host = f"--hostfile: {path}:{number}", words[0]
        if not HOST.fullmatch(host):
            raise ConfigError(f"{where}: {host[:80]!r}: not the name of a host; {LINE}")
        if len(words) != 2 or not re.fullmatch(r"slots=0*[1-9][0-9]{0,4}", words[1], re.ASCII):
            said = " ".join(words[1:])[:80]
            said = f"{said!r} is" if said else "has"
            raise ConfigError(f"{where}: {host}: {said} no `slots=N`; {LINE}")
        if host in slots:
            raise ConfigError(
                f"{where}: {host}: stands there twice; give all its slots in one line"
            )
        slots[host] = int(words[1].removeprefix("slots="))
    if not slots:
        raise ConfigError(f"--hostfile: {path}: names no host; {LINE}")
    return slots


def check_choice(slots: Mapping[str, int]) -> None:
    """Refuse a choice of GPUs made here that other machines would not hear of.

    Raises:
        ConfigError: CUDA_VISIBLE_DEVICES names others than the first ones.
    """
    given = listed()
    if given and given[: max(slots.values())] != [str(n) for n in range(max(slots.values()))]:
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}: is for this machine, and "
            "--hostfile takes the first `slots` GPUs of each; unset it"
        )


def ask_hosts(hosts: Sequence[str]) -> str:
    """See that every host answers and has this folder; the address of the first, for the others.

    Raises:
        ConfigError: pdsh or ssh is not there, or a host does not answer; names all that do not.
    """
    for tool in ("pdsh", "ssh"):
        if shutil.which(tool) is None:
            raise ConfigError(f"--hostfile: needs {tool}, which is not installed here")
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(_ask, hosts))
    silent = [f"{host} ({why})" for host, (_, why) in zip(hosts, answers, strict=True) if why]
    if silent:
        raise ConfigError(
            f"--hostfile: no answer from {', '.join(silent)}; each host must be reached by ssh "
            f"without a password, and have {Path.cwd()}"
        )
    return answers[0][0] or hosts[0].rpartition("@")[2]


def _ask(host: str) -> tuple[str, str]:
    """A host's first address, and why there is none."""
    there = f"cd {shlex.quote(str(Path.cwd()))} && exec sh -c {shlex.quote(ANSWER)}"
    command = [*SSH, host, there]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=6 * ASK_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "", f"silent for {6 * ASK_S} s"
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return "", said[-1] if said else f"ssh ended with {done.returncode}"
    return (done.stdout.split() or [""])[0], ""


def multi_node_command(
    slots: Mapping[str, int], address: str, port: int, arguments: Sequence[str]
) -> list[str]:
    """pdsh, which starts deepspeed's per-node launcher on every host at once.

    On SIGTERM (this process is gone) all ranks are told to stop: what ssh has started does not hear
    of the end of the ssh that started it.
    """
    variables = {"DS_BUILD_OPS": "0"}
    variables |= {k: v for k, v in os.environ.items() if k.startswith(EXPORTED)} | _read_env_file()
    variables[FRONT] = "1"
    words = ["env", *(f"{name}={value}" for name, value in variables.items())]
    words += node_launcher(_world(slots))
    there = f"cd {_quote(str(Path.cwd()))} && exec {' '.join(map(_quote, words))} --node_rank=%n "
    run = what_ranks_run(address, port, [encode_argument(argument) for argument in arguments])
    there += " ".join(map(_quote, run))
    stop = shlex.join(signal_command(slots, port, signal.SIGTERM))
    return ["sh", "-c", KEEPER, "sh", stop, *_pdsh(slots, there)]


def signal_command(slots: Mapping[str, int], port: int, number: int) -> list[str]:
    """pdsh, which sends a signal to all ranks of a launch, or to a launcher that has none yet."""
    # From its beginning: pdsh, ssh and the shell that runs this hold the same words further on.
    start = re.sub(r"([][\\.^$*+?(){}|])", r"\\\1", " ".join(node_launcher(_world(slots))))
    pattern = f"^{start} .*--master_port={port} "
    script = (
        f"for p in $(pgrep -f -- {shlex.quote(pattern)}); do "
        f"pkill -{number:d} -P $p || kill -{number:d} $p; done"
    )
    return _pdsh(slots, f"exec sh -c {_quote(script)}")


def _world(slots: Mapping[str, int]) -> dict[str, list[int]]:
    return {host: list(range(count)) for host, count in slots.items()}


def _pdsh(slots: Mapping[str, int], there: str) -> list[str]:
    return ["env", "PDSH_RCMD_TYPE=ssh", "pdsh", "-S", "-f", "1024", "-w", ",".join(slots), there]


def _quote(word: str) -> str:
    """For pdsh and then for a shell."""
    return shlex.quote(word).replace("%", "%%")


def _read_env_file() -> dict[str, str]:
    """Variables that deepspeed's launcher takes from a file: the user's, then this folder's.

    Raises:
        ConfigError: a line is not `NAME=value`.
    """
    found = {}
    for folder in (Path.home(), Path.cwd()):
        path = folder / os.environ.get("DS_ENV_FILE", ".deepspeed_env")
        lines = read_text(path, ConfigError).splitlines() if is_file(path) else []
        for number, line in enumerate(lines, 1):
            name, equals, value = (part.strip() for part in line.partition("="))
            if equals and name.isidentifier():
                found[name] = value
            elif name and not name.startswith("#"):
                raise ConfigError(f"{path}:{number}: {line[:80]!r}: a line is `NAME=value`")
    return found
