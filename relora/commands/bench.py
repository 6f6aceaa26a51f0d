"""`relora bench`: what a step of each method takes on this machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from relora.config import Config
from relora.errors import ConfigError
from relora.files import write_json
from relora.training.bench import Timing, measure_steps, variants
from relora.version import __version__
from relora.words import format_count, format_table


def bench(
    config: Config,
    given: Sequence[str],
    names: Sequence[str] | None = None,
    rounds: int = 9,
    to: Path | None = None,
) -> int:
    """Print a table of the arms' steps.

    Args:
        given: the config's path and its overrides.
        names: of arms; the others are compared with the first. None for all there are.
        to: also write the figures there, as JSON.

    Raises:
        ConfigError: there is no such arm.
    """
    known = variants(config)
    chosen = list(known) if names is None else list(dict.fromkeys(names))
    for name in chosen:
        if name not in known:
            raise ConfigError(f"--arms: {name}: this config has {', '.join(known)}")
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU"
    threads = torch.get_num_threads()
    batch = f"{config.batch.micro_batch_size} × {config.data.sequence_length} tokens"
    print(f"{device}, {threads} threads, torch {torch.__version__}; {batch}, {rounds} rounds")
    timings = measure_steps(config, chosen, rounds)
    for line in format_table(list(_rows(timings)), "<" + ">" * 6):
        print(line)
    if to is not None:
        values = {
            "device": device,
            "threads": threads,
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "relora": __version__,
            "config": list(given),
            "rounds": rounds,
            "arms": [timing._asdict() for timing in timings],
        }
        write_json(to, values)
    return 0


def _rows(timings: Sequence[Timing]) -> list[list[str]]:
    first = timings[0].arm
    rows = [["arm", "ms/step", "±", f"of {first}'s", "tokens/s", "FLOPs/token", "saved/token"]]
    gpu = timings[0].peak_gib is not None
    rows += [
        [
            one.arm,
            f"{one.ms:.1f}",
            f"{one.spread_ms:.1f}",
            f"{one.ratio:.3f}",
            f"{one.tokens_per_s:,.0f}",
            format_count(one.flops),
            f"{one.saved_bytes:,.0f} B" + (f", peak {one.peak_gib:.2f} GiB" if gpu else ""),
        ]
        for one in timings
    ]
    return rows
