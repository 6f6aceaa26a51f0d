"""Memory for a model that was built without any: parameter by parameter, as its engine wants it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def give_memory_(
    model: nn.Module, device: torch.device, partition: Callable[[nn.Parameter], None] | None
) -> None:
    """Move parameters from the meta device to another, in their dtype, in place. They are the same
    objects, to whoever shares them and to an optimizer; they have no values yet.

    Args:
        partition: what becomes of each before the next one gets memory, as under ZeRO 3.
    """
    for param in model.parameters():
        if param.is_meta:
            held = nn.Parameter(torch.empty_like(param, device=device), param.requires_grad)
            torch.utils.swap_tensors(param, held)
            if partition is not None:
                partition(param)
