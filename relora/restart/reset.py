"""The partial reset of Adam's moments at a merge, as pure tensor functions.

The entries that survive are chosen among those of the whole tensor, so they are the same on every
ZeRO stage and world size; ranks agree on them by counts and never see each other's moments. One
choice serves both moments: where m is kept and v is zeroed, the next update is m/eps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from relora.restart.config import ResetConfig
from relora.restart.reinit import seeded_generator

Reduce = Callable[[Tensor], Tensor]


class Edge(NamedTuple):
    """Where a tensor's surviving entries begin."""

    bound: int  # bit pattern of the smallest magnitude that survives
    quota: int  # how many of this rank's entries of just that magnitude do


def random_keep(config: ResetConfig, numel: int, seed: int, merge: int, name: str) -> list[Tensor]:
    """Flat bool masks of a whole tensor, one for both moments or one for each, from a key.

    Exactly round(ratio · numel) entries of each are False.
    """
    masks = []
    for index in range(2 if config.masks == "independent" else 1):
        generator = seeded_generator(seed, merge, f"{name}/reset/{index}")
        scores = torch.rand(numel, generator=generator)
        (edge,) = find_edges([scores], [kept(config, numel)])
        masks.append(beyond(scores, edge))
    return masks


def kept(config: ResetConfig, numel: int) -> int:
    """How many entries of a tensor of `numel` survive."""
    return numel - round(config.share * numel)


def find_edges(
    parts: Sequence[Tensor],
    counts: Sequence[int],
    total: Reduce = torch.clone,
    before: Reduce = torch.zeros_like,
) -> list[Edge]:
    """For each of some tensors, where its `counts` entries of largest magnitude begin.

    Of each whole tensor exactly as many survive; ties go by position. The edge is found byte by
    byte in the bit patterns, whose order is that of the magnitudes: a histogram of 256 counts per
    tensor and byte is all that ranks exchange. (`torch.quantile` refuses more than 16 M elements,
    and cuts all ties off together.)

    Args:
        parts: this rank's flat part of each; parts follow each other in the order of ranks.
        counts: entries to keep of each whole tensor.
        total: sum of an int64 tensor over ranks.
        before: its sum over the ranks before this one.
    """
    wanted = torch.tensor(counts)  # still to be found among those that begin like `prefix`
    prefix = torch.zeros_like(wanted)
    width = 8 * parts[0].element_size()
    for shift in range(width - 8, -1, -8):
        rows = []
        for part, high in zip(parts, prefix.tolist(), strict=True):
            alike = _pattern(part)
            if shift + 8 < width:
                alike = alike[alike >> (shift + 8) == high]
            rows.append(torch.bincount((alike >> shift) & 255, minlength=256).cpu())
        histogram = total(torch.stack(rows))
        above = histogram.flip(1).cumsum(1).flip(1)  # entries with at least this byte
        byte = (above >= wanted.clamp_min(1)[:, None]).sum(1) - 1
        wanted -= (above - histogram).gather(1, byte[:, None])[:, 0]
        prefix = prefix * 256 + byte
    bounds = prefix.tolist()
    ties = [
        (_pattern(part) == bound).sum().cpu() for part, bound in zip(parts, bounds, strict=True)
    ]
    quotas = (wanted - before(torch.stack(ties))).tolist()
    none = Edge(2 ** (width - 1) - 1, 0)  # no number has this pattern
    return [
        Edge(bound, quota) if count else none
        for bound, quota, count in zip(bounds, quotas, counts, strict=True)
    ]


def beyond(part: Tensor, edge: Edge) -> Tensor:
    """Flat bool mask over this rank's part of a tensor: True where an entry survives."""
    pattern = _pattern(part)
    tie = pattern == edge.bound
    return (pattern > edge.bound) | (tie & (tie.cumsum(0) <= edge.quota))


def _pattern(part: Tensor) -> Tensor:
    """Whole numbers in the order of the magnitudes."""
    return part.abs().view(torch.int32 if part.element_size() == 4 else torch.int64)
