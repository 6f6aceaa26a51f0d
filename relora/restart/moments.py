"""What becomes of Adam's moments of A and B at a merge: a partial reset.

A reset keeps or zeroes entries where they lie. Those that survive are chosen among the whole
tensor's, so they are the same on every ZeRO stage and world size; ranks agree on them by counts and
never see each other's moments. One choice serves both moments: where m is kept and v is zeroed, the
next update is m/eps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from relora.engine.state import EngineState
from relora.engine.views import MOMENTS, ParameterView
from relora.lora.draws import seeded_generator
from relora.lora.layers import parameter_roles
from relora.restart.config import ResetConfig

DEFAULT_RESET = ResetConfig()
Reduce = Callable[[Tensor], Tensor]


class Edge(NamedTuple):
    """Where a tensor's surviving entries begin."""

    bound: int  # bit pattern of the smallest magnitude that survives
    quota: int  # how many of this rank's entries of just that magnitude do


@torch.no_grad()
def reset_moments(
    state: EngineState,
    merge: int,
    seed: int = 0,
    reset: ResetConfig = DEFAULT_RESET,
) -> float:
    """Zero the moments of adapters' A and B where the masks say so, on this rank's parts.

    Collective. `reset.adam_step` also restarts their bias correction (under ZeRO that of all
    parameters in their groups of the optimizer: adapters need groups of their own).

    Args:
        merge, seed: key the masks of `random`.
        reset: which entries, and whether the bias correction starts anew.

    Returns:
        The share of these entries, over all ranks, that are zero now because a mask says so.
    """
    adapters = [name for name, role in parameter_roles(state.model).items() if role in ("A", "B")]
    chosen = [state[name] for name in adapters if state[name].flat is not None]  # those that train
    zeroed = _reset(state, chosen, reset, seed, merge) if reset.mode != "none" else 0
    if reset.adam_step:
        for view in chosen:
            state.set_adam_step_(view, 0)
    return zeroed / max(1, sum(len(view.moments) * view.numel for view in chosen))


def _reset(
    state: EngineState, chosen: Sequence[ParameterView], config: ResetConfig, seed: int, merge: int
) -> int:
    """How many entries, over all ranks, are zero now because a mask says so."""
    edges = [
        find_edges(
            [state.moment(view, kind) for view in chosen],
            [kept(config, view.numel) for view in chosen],
            lambda counts: state.total(counts, not state.sharded),
            state.before,
        )
        for kind in MOMENTS[: 2 if config.masks == "independent" else 1]
        if config.mode == "magnitude"
    ]
    zeroed = 0
    for index, view in enumerate(chosen):
        moments = [state.moment(view, kind) for kind in view.moments]
        if config.mode == "magnitude":
            masks = [beyond(m, e[index]) for m, e in zip(moments, edges, strict=False)]
        elif config.mode == "random":
            wholes = random_keep(config, view.numel, seed, merge, view.name)
            masks = [whole[view.start : view.start + view.count] for whole in wholes]
        else:
            masks = [torch.zeros_like(moments[0], dtype=torch.bool)]
        for moment, keep in zip(moments, (masks[0], masks[-1]), strict=False):
            keep = keep.to(moment.device)
            moment.mul_(keep)
            zeroed += int((moment[~keep] == 0).sum())
    return int(state.total(torch.tensor(zeroed), not state.sharded))


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
