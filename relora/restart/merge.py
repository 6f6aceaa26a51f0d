"""A restart: W += s·B·A on any ZeRO stage, A drawn anew, B = 0, moments partly reset.

Each rank adds the rows of B·A that overlap the part of W it holds: no base weight is gathered or
sent. Under ZeRO 3 A and B are gathered, many layers at a time; moments are reset where they lie.
Everything is written to what the forward pass reads *and* to what the optimizer updates.

Memory beyond what training holds: less than ΔW of the largest adapted layer in fp32. Gathered
factors take a third of it, what a rank sends for them less; W is worked on in slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from relora.engine.state import MOMENTS, Place, Places
from relora.lora.inject import adapted_layers
from relora.lora.layers import LoRALayer, delta_rows
from relora.restart.config import ReLoRAConfig, ResetConfig
from relora.restart.reinit import draw_a
from relora.restart.reset import beyond, find_edges, kept, random_keep


class RestartReport(NamedTuple):
    """What a restart did."""

    layers: int
    zeroed_share: float  # of the entries of A's and B's moments, as counted afterwards
    update_ratio: float  # ‖s·B·A‖ / ‖W‖ over all adapted weights
    rounding_loss: float  # share of s·B·A that did not arrive in W; 0 unless it is `rounded`


class Adapter(NamedTuple):
    """One adapted layer with the places of its three parameters."""

    layer: LoRALayer
    weight: Place
    a: Place
    b: Place


@torch.no_grad()
def init_adapters_(model: nn.Module, seed: int) -> None:
    """Draw every A of a model that no engine holds yet (birth is merge number 0)."""
    for name, layer in adapted_layers(model):
        layer.lora_A.copy_(draw_a(layer.lora_A.shape, seed, 0, f"{name}.lora_A"))


@torch.no_grad()
def restart_(
    model: nn.Module, places: Places, config: ReLoRAConfig, seed: int, merge: int
) -> RestartReport:
    """Merge, reinit and reset every adapter. Collective; call right after an applied step.

    Args:
        merge: number of this merge, from 1; with the seed it keys A's draw and random masks.
    """
    adapters = [
        Adapter(layer, places[f"{n}.weight"], places[f"{n}.lora_A"], places[f"{n}.lora_B"])
        for n, layer in adapted_layers(model)
    ]
    largest = max(adapter.weight.numel for adapter in adapters)
    squares = torch.zeros(3, dtype=torch.float64)
    for part in gather_blocks([x.a.numel + x.b.numel for x in adapters], largest):
        block = adapters[part]
        factors = places.gather_each([p for x in block for p in (x.a, x.b)], "value")
        for adapter in block:
            squares += merge_(adapter, next(factors), next(factors), largest // 32)
            adapter.a.write_(draw_a(adapter.a.shape, seed, merge, adapter.a.name))
            adapter.b.write_(torch.zeros(adapter.b.shape))
    chosen = [place for adapter in adapters for place in (adapter.a, adapter.b)]
    zeroed = reset_(places, chosen, config.reset, seed, merge)
    if config.reset.adam_step:
        for place in chosen:
            places.set_adam_step_(place, 0)
    update, weight, lost = places.total(squares, "value").sqrt().tolist()
    share = zeroed / (2 * sum(place.numel for place in chosen))
    loss = lost / max(update, 1e-30)
    return RestartReport(len(adapters), share, update / max(weight, 1e-30), loss)


def merge_(adapter: Adapter, a: Tensor, b: Tensor, slice_size: int) -> Tensor:
    """Add this rank's part of s·B·A to its part of W, to fp32 exactness where W has a remainder.

    Args:
        a, b: the whole factors, fp32.
        slice_size: entries of W worked on at a time.

    Returns:
        Three sums of squares in float64: of the part of s·B·A, of the part of W before, and of
        what rounding has kept from W.
    """
    place, layer = adapter.weight, adapter.layer
    place.drop_stale_copies_()
    columns = place.shape[1]
    size = max(1, slice_size // columns) * columns
    squares = torch.zeros(3, dtype=torch.float64, device=a.device)
    start = place.live_start
    while start < place.live_stop:
        stop = min(place.live_stop, (start // size + 1) * size)
        first, last = start // columns, (stop - 1) // columns + 1
        rows = delta_rows(a, b, layer.scale, layer.transposed, first, last)
        delta = rows.flatten().narrow(0, start - first * columns, stop - start)
        weight = place.value(start, stop)
        squares[:2] += _sums_of_squares(delta, weight)
        place.write_live_(delta.add_(weight, alpha=layer.shrink), start)
        squares[2:] += _sums_of_squares(delta.sub_(place.value(start, stop)))
        start = stop
    layer.shrink = 1.0
    return squares.cpu()


def _sums_of_squares(*tensors: Tensor) -> Tensor:
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
    return torch.stack(norms) ** 2


def reset_(
    places: Places, chosen: Sequence[Place], config: ResetConfig, seed: int, merge: int
) -> int:
    """Zero the moments of some adapter parameters where the masks say so, on this rank's parts.

    Returns:
        How many entries, over all ranks, are zero now because a mask says so.
    """
    if config.mode == "none":
        return 0
    edges = [
        find_edges(
            [places.moment(place, kind) for place in chosen],
            [kept(config, place.numel) for place in chosen],
            lambda counts: places.total(counts, "exp_avg"),
            places.before,
        )
        for kind in MOMENTS[: 2 if config.masks == "independent" else 1]
        if config.mode == "magnitude"
    ]
    zeroed = 0
    for index, place in enumerate(chosen):
        moments = [places.moment(place, kind) for kind in MOMENTS]
        if config.mode == "magnitude":
            masks = [beyond(m, e[index]) for m, e in zip(moments, edges, strict=False)]
        elif config.mode == "random":
            wholes = random_keep(config, place.numel, seed, merge, place.name)
            masks = [whole[place.start : place.start + place.count] for whole in wholes]
        else:
            masks = [torch.zeros_like(moments[0], dtype=torch.bool)]
        for moment, keep in zip(moments, (masks[0], masks[-1]), strict=True):
            keep = keep.to(moment.device)
            moment.mul_(keep)
            zeroed += int((moment[~keep] == 0).sum())
    return int(places.total(torch.tensor(zeroed), "exp_avg"))


@torch.no_grad()
def shrink_(model: nn.Module, factor: float) -> None:
    """Decay every frozen weight by a factor, without touching it: merges and forwards know."""
    for _, layer in adapted_layers(model):
        layer.shrink *= factor


def gather_blocks(factors: Sequence[int], largest: int) -> list[slice]:
    """Which adapters' factors are gathered together: a third of the largest ΔW at a time, or one.

    Args:
        factors: entries of A and B of each adapter.
        largest: entries of the largest adapted weight.
    """
    blocks, start, size = [], 0, 0
    for index, entries in enumerate(factors):
        if size and size + entries > largest // 3:
            blocks.append(slice(start, index))
            start, size = index, 0
        size += entries
    return [*blocks, slice(start, len(factors))]
