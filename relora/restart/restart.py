"""A restart: W += s·B·A on any ZeRO stage, A drawn anew and B = 0, moments partly reset.

For each layer: gather A and B → merge → reinit → write; at the end the reset of the moments. Each
rank adds the rows of B·A that overlap its own part of W: that is its shard under ZeRO 3. Where all
ranks hold W whole and it is bf16, each holds the remainder of a part, merges that part, and gathers
the others' new bf16 values, 2 bytes an entry, the only time that a base weight is sent; W in fp32
has no remainder, and each rank merges all of it. Under ZeRO 3 A and B are gathered, many layers at
a time; moments are reset where they lie. Everything is written to what the forward pass reads *and*
to what the optimizer updates.

Memory beyond what training holds: less than ΔW of the largest adapted layer in fp32. Gathered
factors take a third of it, what a rank sends for them less; W is worked on, and gathered, in
slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from relora.engine.state import EngineState
from relora.engine.views import ParameterView
from relora.lora.draws import draw_a
from relora.lora.layers import AdaptedLayer, adapted_layers
from relora.lora.names import names_of
from relora.restart.config import ResetConfig
from relora.restart.moments import DEFAULT_RESET, reset_moments


class RestartReport(NamedTuple):
    """What a restart did."""

    layers: int
    zeroed_share: float  # of the entries of A's and B's moments, as counted afterwards
    update_ratio: float  # ‖s·B·A‖ / ‖W‖ over all adapted weights
    rounding_loss: float  # share of s·B·A that did not arrive in W; 0 unless it is `rounded`


class Adapter(NamedTuple):
    """One adapted layer with the views of its three parameters."""

    layer: AdaptedLayer
    weight: ParameterView
    a: ParameterView
    b: ParameterView


@torch.no_grad()
def merge_and_restart(
    state: EngineState,
    merge: int,
    seed: int = 0,
    reset: ResetConfig = DEFAULT_RESET,
) -> RestartReport:
    """Merge, reinit and reset adapters. Collective; call right after an applied step.

    Args:
        state: of the engine, or of the model and its optimizer.
        merge: number of this merge, from 1.
        seed: with the merge's number and a parameter's name it keys A's draw and random masks.
        reset: of the moments of A and B.
    """
    adapters = [
        Adapter(layer, *(state[p] for p in names_of(name)))
        for name, layer in adapted_layers(state.model)
    ]
    largest = max(adapter.weight.numel for adapter in adapters)
    squares = torch.zeros(2, 3, dtype=torch.float64)  # of weights in parts, and of whole ones
    for part in gather_blocks([x.a.numel + x.b.numel for x in adapters], largest):
        block = adapters[part]
        factors = state.gather_each([p for x in block for p in (x.a, x.b)], "value")
        for adapter in block:
            a, b = next(factors), next(factors)
            squares[int(state.shares(adapter.weight))] += merge_(adapter, a, b, largest // 32)
            state.spread_(adapter.weight, largest // 4)
            # Layers that share A have one key, and so one draw.
            key = adapter.layer.shared_a or adapter.a.name
            adapter.a.write_(draw_a(a.shape, seed, merge, key, adapter.layer.fan_in))
            adapter.b.write_(torch.zeros_like(b))
    share = reset_moments(state, merge, seed, reset)
    whole = all(state.shares(adapter.weight) for adapter in adapters)
    update, weight, lost = (state.total(squares[0], whole) + squares[1]).sqrt().tolist()
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
    view, layer = adapter.weight, adapter.layer
    view.drop_stale_copies_()
    row = view.numel // view.shape[0]
    size = max(1, slice_size // row) * row
    squares = torch.zeros(3, dtype=torch.float64, device=a.device)
    start, end = view.held()
    while start < end:
        stop = min(end, (start // size + 1) * size)
        delta = layer.delta(a, b, view.shape, start, stop)
        weight = view.value(start, stop).to(delta.device)
        squares[:2] += _sums_of_squares(delta, weight)
        view.write_live_(delta.add_(weight, alpha=layer.shrink), start)
        squares[2:] += _sums_of_squares(delta.sub_(view.value(start, stop).to(delta.device)))
        start = stop
    layer.shrink = 1.0
    layer.requantise_()
    return squares.cpu()


def _sums_of_squares(*tensors: Tensor) -> Tensor:
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
    return torch.stack(norms) ** 2


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
