"""The partial reset of Adam's moments at a merge, as pure tensor functions.

The masks are computed from the whole tensor, so they are the same on every ZeRO stage and world
size. One mask serves both moments: where m is kept and v is zeroed, the next update is m/eps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from relora.restart.config import ResetConfig
from relora.restart.reinit import seeded_generator


def keep_masks(
    config: ResetConfig,
    moments: Sequence[Tensor] | None,
    numel: int,
    seed: int,
    merge: int,
    name: str,
) -> tuple[Tensor, Tensor]:
    """Flat bool masks for (exp_avg, exp_avg_sq): True where the entry survives.

    Exactly round(ratio · numel) entries of each tensor are False.

    Args:
        moments: for `magnitude`, the whole exp_avg, and exp_avg_sq for independent masks.
        numel: entries of the parameter.
        seed, merge, name: key of the choice, for `random`.
    """
    zeroed = round(config.share * numel)
    if config.mode == "none":
        keep = torch.ones(numel, dtype=torch.bool)
        return keep, keep
    if config.mode == "zero":
        keep = torch.zeros(numel, dtype=torch.bool)
        return keep, keep
    if config.mode == "random":
        scores = [
            torch.rand(numel, generator=seeded_generator(seed, merge, f"{name}/reset/{i}"))
            for i in range(2 if config.masks == "independent" else 1)
        ]
    else:
        assert moments, "magnitude needs the moments"
        used = moments if config.masks == "independent" else moments[:1]
        scores = [moment.flatten().abs() for moment in used]
    masks = [keep_largest(score, numel - zeroed) for score in scores]
    return masks[0], masks[-1]


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """Bool mask over flat `scores` with exactly `count` True, at the largest; ties go by position.

    A sort and not a quantile: `torch.quantile` refuses more than 16 M elements and cuts ties off
    all together.
    """
    keep = torch.zeros_like(scores, dtype=torch.bool)
    keep[scores.argsort(descending=True, stable=True)[:count]] = True
    return keep
