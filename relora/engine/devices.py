"""Which GPUs the ranks of a launch get: those that CUDA_VISIBLE_DEVICES names, as it names them."""

from __future__ import annotations

import os
import subprocess
from itertools import takewhile
from pathlib import Path

from relora.errors import ConfigError

VISIBLE = "CUDA_VISIBLE_DEVICES"
HIDDEN = "-1"  # names no GPU


def choose_devices(wanted: int | None) -> list[str]:
    """One entry of CUDA_VISIBLE_DEVICES for each rank on this machine, in their order.

    Where the driver knows no GPU, or DS_ACCELERATOR is cpu, ranks compute on the CPU, and the
    variable limits nothing.

    Args:
        wanted: how many; None for all GPUs that may be seen, or one rank on a CPU.

    Raises:
        ConfigError: there are not so many GPUs to see, or the variable names some that are not.
    """
    given, machine = listed(), gpus_here()
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    if machine and not on_cpu:
        entries = list(map(str, range(machine))) if given is None else given
        _check(entries, wanted, machine)
        return entries[:wanted]
    count = wanted or (1 if on_cpu else _count_by_torch()) or 1
    if on_cpu and machine:
        return [HIDDEN] * count
    if given is None:
        return list(map(str, range(count)))
    return given[:count] if len(given) >= count else [HIDDEN] * count


def listed() -> list[str] | None:
    """The entries of CUDA_VISIBLE_DEVICES as they are given; None if it is not set.

    CUDA reads up to the first entry that names no device (-1, say); so an empty list hides all.
    """
    text = os.environ.get(VISIBLE)
    if text is None:
        return None
    return list(takewhile(_names_a_device, map(str.strip, text.split(","))))


def gpus_here() -> int:
    """How many GPUs the driver of this machine knows, whatever the environment hides."""
    try:
        said = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):  # not every container has it
        said = ""
    if found := sum(line.startswith("GPU ") for line in said.splitlines()):
        return found
    driver = Path("/proc/driver/nvidia/gpus")
    return len(list(driver.iterdir())) if driver.is_dir() else 0


def _names_a_device(entry: str) -> bool:
    return entry.isdecimal() or entry.startswith(("GPU-", "MIG-"))


def _check(entries: list[str], wanted: int | None, machine: int) -> None:
    """Raise unless there are `wanted` entries (at least one), each a GPU and each another one."""
    said = f"{VISIBLE}={os.environ[VISIBLE]}" if VISIBLE in os.environ else "it is not limited"
    missing = [entry for entry in entries if entry.isdecimal() and int(entry) >= machine]
    if missing or len(set(entries)) < len(entries):
        raise ConfigError(
            f"{said}: names a GPU twice, or one that is not there "
            f"({', '.join(missing or entries)}); this machine has {machine}, from 0 up"
        )
    if (wanted or 1) > len(entries):
        raise ConfigError(
            f"--devices: {wanted or 'all'}, and {len(entries)} of this machine's {machine} GPUs "
            f"can be seen ({said}); name more of them there, ask for fewer devices, or set "
            "DS_ACCELERATOR=cpu to train on the CPU"
        )


def _count_by_torch() -> int:
    """GPUs that another driver than NVIDIA's may have."""
    import torch  # seconds, for others than NVIDIA's alone

    return torch.cuda.device_count()
