"""What must hold across a merge, checked while training. A violation stops the run (exit 5)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from relora.engine.codec import checksum
from relora.engine.deepspeed import Engine
from relora.engine.state import EngineState
from relora.engine.views import ParameterView
from relora.errors import NumericsError
from relora.lora.layers import adapted_layers
from relora.lora.names import names_of
from relora.lora.quantised import exact_base


@torch.no_grad()
def probe(engine: Engine, batch: Tensor) -> Tensor:
    """Logits of the probe batch (rows, tokens) without dropout, in fp32 on this rank.

    With the exact base weights: a merge moves codes that stand for them by whole steps.
    """
    engine.eval()
    with exact_base(engine.module):
        logits = engine(input_ids=batch).logits.float()
    engine.train()
    return logits


def check_function(before: Tensor, after: Tensor, tolerance: float, merge: int) -> float:
    """The largest change of the probe's logits relative to the largest logit.

    Raises:
        NumericsError: it exceeds the tolerance on some rank (every rank raises).
    """
    deviation = (after - before).abs().max() / before.abs().max().clamp_min(1e-30)
    worst = deviation.double().nan_to_num(nan=float("inf"))
    if dist.get_world_size() > 1:
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    if worst.item() > tolerance:
        raise NumericsError(
            f"merge {merge} changed the model's function: the probe batch's logits moved by "
            f"{worst.item():.2e} of the largest, allowed is {tolerance:.0e}; the weights are not "
            "saved. If the model is healthy, raise relora.tolerance; else report this"
        )
    return worst.item()


@torch.no_grad()
def check_copies(state: EngineState, merge: int) -> None:
    """Replicas hold the same bits on all ranks, and fp32 masters equal what the forward reads.

    Raises:
        NumericsError: with the first parameter's name (every rank raises).
    """
    names = [view.name for view in state]
    bad = torch.tensor([_master_differs(view) for view in state], dtype=torch.int64)
    found = [checksum(view.live) for view in state]
    for name, layer in adapted_layers(state.model):
        if layer.quantised is not None:
            names.append(names_of(name).weight)
            found.append(layer.quantised.checksum())
    sums = torch.tensor(found, dtype=torch.int64)
    if dist.get_world_size() > 1:
        device = state.device
        bad, low, high = bad.to(device), sums.to(device), sums.to(device).clone()
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        if not state.partitioned:  # under ZeRO 3 ranks hold different shards, not replicas
            dist.all_reduce(low, op=dist.ReduceOp.MIN)
            dist.all_reduce(high, op=dist.ReduceOp.MAX)
            if bool((low != high).any()):
                name = names[int((low != high).nonzero()[0])]
                raise NumericsError(
                    f"after merge {merge} the ranks hold different values of {name}; "
                    "resume from the last checkpoint, and report this"
                )
    if bool(bad.any()):
        name = names[int(bad.nonzero()[0])]
        raise NumericsError(
            f"after merge {merge} the optimizer's fp32 copy of {name} differs from the weights; "
            "resume from the last checkpoint, and report this"
        )


def _master_differs(view: ParameterView) -> bool:
    if view.master is None or not view.count:
        return False
    live = view.live.narrow(0, view.start - view.live_start, view.count)
    return not torch.equal(view.master.to(live), live)
