"""`deterministic: true`: kernels that give the same bits each time, or an error where none does.

Batches, draws and reductions over ranks are functions of the seed already; what is left to chance
on a GPU is the order in which threads add up (torch.use_deterministic_algorithms).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from relora.errors import ConfigError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
FIXED_WORKSPACES = (":4096:8", ":16:8")  # under which cuBLAS promises equal bits


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Within it, if it is wanted, torch runs deterministic kernels alone, and raises for others.

    Raises:
        ConfigError: cuBLAS works already, or is told to work, in a way that is not repeatable.
    """
    if not wanted:
        yield
        return
    given = os.environ.get(WORKSPACE)
    if torch.cuda.is_available() and given not in FIXED_WORKSPACES:
        if given is not None:
            raise ConfigError(
                f"deterministic: {WORKSPACE}={given} in the environment lets cuBLAS give other "
                f"bits each time; unset it, or make it {' or '.join(FIXED_WORKSPACES)}"
            )
        if torch.cuda.is_initialized():
            raise ConfigError(
                f"deterministic: this process has used its GPU before; set {WORKSPACE}="
                f"{FIXED_WORKSPACES[0]} in its environment at the start"
            )
        os.environ[WORKSPACE] = FIXED_WORKSPACES[0]
    enabled, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    tunes = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # it picks kernels by a stopwatch
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        torch.backends.cudnn.benchmark = tunes
        if given is None:
            os.environ.pop(WORKSPACE, None)


def without_deterministic_kernel(error: BaseException) -> ConfigError | None:
    """What to tell of torch's refusal of an operation that has no deterministic kernel here; None
    for any other error."""
    text = str(error)
    if not isinstance(error, RuntimeError) or "deterministic" not in text:
        return None
    if "does not have a deterministic implementation" not in text:
        return None
    return ConfigError(
        f"deterministic: the model uses an operation that gives other bits each time on this "
        f"device: {text.partition(',')[0]}; take deterministic: false, or another model or device"
    )
