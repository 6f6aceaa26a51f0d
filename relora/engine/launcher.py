"""What deepspeed's own launcher is called, given and told; and who it says that we are."""

from __future__ import annotations

import base64
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence

from relora.engine.signals import FRONT

# What shells on the way to another machine leave alone.
PLAIN = re.compile(r"[A-Za-z0-9_.,:+/-][A-Za-z0-9_.,:+/=@-]*")
ENCODED = "--encoded="


def encode_argument(argument: str) -> str:
    """The argument itself if every shell leaves it alone, else a word for `decode_argument`."""
    if PLAIN.fullmatch(argument) and not argument.startswith(ENCODED):
        return argument
    return ENCODED + base64.urlsafe_b64encode(json.dumps(argument).encode()).decode()


def decode_argument(argument: str) -> str:
    """What `encode_argument` was given; other words as they are, for the command line to judge."""
    if not argument.startswith(ENCODED):
        return argument
    try:
        return str(json.loads(base64.urlsafe_b64decode(argument.removeprefix(ENCODED))))
    except ValueError:
        return argument


def one_node_command(devices: Sequence[str], port: int, arguments: Sequence[str]) -> list[str]:
    """The per-node launcher of deepspeed, which starts and watches the ranks of `relora …`.

    Args:
        devices: what the launcher makes CUDA_VISIBLE_DEVICES of its ranks, word for word; the
            rank with local number k takes the k-th.
        port: for the ranks to find each other.
    """
    world = {"localhost": list(devices)}
    return [*node_launcher(world), *what_ranks_run("127.0.0.1", port, arguments)]


def node_launcher(world: Mapping[str, Sequence[object]]) -> list[str]:
    """How the launcher's command begins, by which its process is known.

    Args:
        world: the devices of each host.
    """
    encoded = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    python = [sys.executable, "-u", "-m", "deepspeed.launcher.launch"]
    return [*python, f"--world_info={encoded}"]


def what_ranks_run(address: str, port: int, arguments: Sequence[str]) -> list[str]:
    """How it ends: where rank 0 listens, and `relora …`."""
    where = [f"--master_addr={address}", f"--master_port={port}"]
    return [*where, "--quiet", "--module", "relora", *arguments]


def launcher_environment(on_cpu: bool) -> dict[str, str]:
    """That of the launcher: nothing is compiled, and the ranks know who counts signals.

    Args:
        on_cpu: there is no GPU here to look for; each process would warn that it found none.
    """
    found = {"DS_ACCELERATOR": "cpu"} if on_cpu else {}
    return {**found, **os.environ, "DS_BUILD_OPS": "0", FRONT: str(os.getpid())}


def speaks_for_machine() -> bool:
    """Whether this process alone, of all ranks on its machine, tells of an error."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def words_of_train() -> list[str]:
    """How this process's `relora train` is typed: by itself, or by what launched it."""
    if FRONT in os.environ:
        return ["relora", "launch"]
    if "LOCAL_RANK" in os.environ:
        return ["deepspeed", "--module", "relora", "train"]
    return ["relora", "train"]
