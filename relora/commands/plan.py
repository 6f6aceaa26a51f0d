"""`relora plan`: a run on one page before anybody pays for it. Needs no GPU, no data, no memory."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from relora.config import Config
from relora.plan.gpus import Pace
from relora.plan.page import page
from relora.plan.timeline import draw_timeline


def plan(
    config: Config,
    given: Sequence[str],
    devices: int,
    png: Path | None = None,
    tokens_per_s: float | None = None,
    gpu: str | None = None,
    mfu: float = 0.4,
    price: float | None = None,
) -> int:
    """Print model, method, timeline, parameters, memory, arithmetic, batch geometry and warnings.

    Args:
        given: the config's path and its overrides, for the commands that come next.
        png: also draw the timeline there.
        tokens_per_s: of the whole job, over all devices; then hours are printed too.
        gpu: a kind of GPU that hours are estimated for, a key of `GPUS`.
        mfu: share of its peak that is reached.
        price: of a GPU-hour.

    Raises:
        ConfigError: the config does not fit its model.
    """
    for block in page(config, given[0], devices, Pace(tokens_per_s, gpu, mfu, price)):
        print(block, end="\n\n")
    if png is not None:
        draw_timeline(config, png)
        print(f"picture      {png}")
    print(f"next         relora prepare {shlex.join(given)}")
    train = "train" if devices == 1 else f"launch --devices {devices}"
    print(f"             relora {train} {shlex.join(given)}")
    return 0
