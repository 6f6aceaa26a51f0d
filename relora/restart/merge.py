"""A restart: W += s·B·A on any ZeRO stage, A drawn anew, B = 0, moments partly reset.

Each rank adds the rows of B·A that overlap the part of W it holds: no base weight is gathered or
sent. A and B (and, to choose by magnitude, the first moments) are gathered whole, many layers at a
time. Everything is written to what the forward pass reads *and* to what the optimizer updates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from relora.lora.inject import adapted_layers
from relora.lora.layers import LoRALayer, delta_rows
from relora.restart.config import ReLoRAConfig, ResetConfig
from relora.restart.reinit import draw_a
from relora.restart.reset import keep_masks
from relora.runtime.places import MOMENTS, Place, Places

BLOCK = 32 * 2**20  # entries of A and B gathered at a time: 128 MiB in fp32


class RestartReport(NamedTuple):
    """What a restart did."""

    layers: int
    zeroed_share: float  # of the entries of A's and B's moments, as counted afterwards
    update_ratio: float  # ‖s·B·A‖ / ‖W‖ over all adapted weights


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
    zeroed = total = 0
    squares = torch.zeros(2, dtype=torch.float64)
    for block in _blocks(adapters):
        factors = places.gather([p for x in block for p in (x.a, x.b)], "value")
        for adapter, a, b in zip(block, factors[::2], factors[1::2], strict=True):
            squares += merge_(adapter, a, b)
            adapter.a.write_(draw_a(adapter.a.shape, seed, merge, adapter.a.name))
            adapter.b.write_(torch.zeros(adapter.b.shape))
        zeroed += reset_(places, [p for x in block for p in (x.a, x.b)], config.reset, seed, merge)
        total += sum(x.a.numel + x.b.numel for x in block)
    if config.reset.adam_step:
        for adapter in adapters:
            places.set_adam_step_(adapter.a, 0)
            places.set_adam_step_(adapter.b, 0)
    update, weight = places.total(squares, "value").sqrt().tolist()
    zeroed = int(places.total(torch.tensor(zeroed), "exp_avg"))
    return RestartReport(len(adapters), zeroed / (2 * total), update / max(weight, 1e-30))


def merge_(adapter: Adapter, a: Tensor, b: Tensor) -> Tensor:
    """Add this rank's part of s·B·A to its part of W, to fp32 exactness where W has a remainder.

    Returns:
        Two sums of squares in float64: of the part of s·B·A, and of the part of W before.
    """
    place, layer = adapter.weight, adapter.layer
    place.drop_stale_copies_()
    if not place.live.numel():
        return torch.zeros(2, dtype=torch.float64)
    columns = place.shape[1]
    first, last = place.live_start // columns, (place.live_stop - 1) // columns + 1
    rows = delta_rows(a, b, layer.scale, layer.transposed, first, last)
    delta = rows.flatten().narrow(0, place.live_start - first * columns, place.live.numel())
    before = place.value()
    place.write_live_(before + delta)
    norms = [torch.linalg.vector_norm(t, dtype=torch.float64) ** 2 for t in (delta, before)]
    return torch.stack(norms).cpu()


def reset_(
    places: Places, chosen: Sequence[Place], config: ResetConfig, seed: int, merge: int
) -> int:
    """Zero the moments of some adapter parameters where the masks say so, on this rank's parts.

    Returns:
        How many entries that this rank holds are zero now because a mask says so.
    """
    if config.mode == "none":
        return 0
    moments: list[list[Tensor]] = []
    if config.mode == "magnitude":
        kinds = MOMENTS if config.masks == "independent" else MOMENTS[:1]
        moments = [places.gather(chosen, kind) for kind in kinds]
    zeroed = 0
    for index, place in enumerate(chosen):
        whole = [moment[index] for moment in moments]
        masks = keep_masks(config, whole, place.numel, seed, merge, place.name)
        for kind, keep in zip(MOMENTS, masks, strict=True):
            moment = places.moment(place, kind)
            mine = keep[place.start : place.start + place.count].to(moment.device)
            moment.mul_(mine)
            zeroed += int((moment[~mine] == 0).sum())
    return zeroed


def _blocks(adapters: Sequence[Adapter]) -> Iterator[list[Adapter]]:
    block: list[Adapter] = []
    size = 0
    for adapter in adapters:
        block.append(adapter)
        size += adapter.a.numel + adapter.b.numel
        if size >= BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block
