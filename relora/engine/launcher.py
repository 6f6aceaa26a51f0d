"""What deepspeed's own launcher is called, given and told; and who it says that we are."""

from __future__ import annotations

import base64
import json
import os
import re
import sys
from collections.abc import Sequence

from relora.engine.signals import FRONT

# What shells on the way to another machine leave alone.
PLAIN = re.compile(r"[A-Za-z0-9_.,:+/-][A-Za-z0-9_.,:+/=@-]*")
ENCODED = "--encoded="


def encode(argument: str) -> str:
    """The argument itself if every shell leaves it alone, else a word that `decode` understands."""
    if PLAIN.fullmatch(argument) and not argument.startswith(ENCODED):
        return argument
    return ENCODED + base64.urlsafe_b64encode(json.dumps(argument).encode()).decode()


def decode(argument: str) -> str:
    """What `encode` was given; other words are as they are, for the command line to judge."""
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
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(devices)}).encode())
    return [
        sys.executable,
        "-u",
        "-m",
        "deepspeed.launcher.launch",
        f"--world_info={world.decode()}",
        "--master_addr=127.0.0.1",
        f"--master_port={port}",
        "--quiet",
        "--module",
        "relora",
        *arguments,
    ]


def launcher_environment() -> dict[str, str]:
    """That of the launcher: nothing is compiled, and the ranks know who counts signals."""
    return {**os.environ, "DS_BUILD_OPS": "0", FRONT: str(os.getpid())}


def speaks_for_machine() -> bool:
    """Whether this process alone, of all ranks on its machine, tells of an error."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
