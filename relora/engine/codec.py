"""How frozen base weights are stored: what the forward pass reads, and what completes it to fp32.

A merge adds small updates to a large weight; what it adds must not be lost to rounding. A codec is
a pair of functions: `encode` fp32 values into (live, remainder), `decode` them, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from relora.engine import precision
from relora.lora.layers import adapted_layers

REMAINDER_DTYPE = precision.dtype_of(precision.REMAINDER)


@torch.no_grad()
def store_base_(model: nn.Module, formats: precision.Precision) -> None:
    """Cast the weights that adapters freeze, and A if it does not train, to the dtype that the
    forward pass reads.

    DeepSpeed's own engine is given fp32, and casts by itself.
    """
    if not formats.is_deepspeeds:
        for _, layer in adapted_layers(model):
            for param in layer.frozen():
                param.data = param.data.to(precision.dtype_of(formats.base))


def decode(live: Tensor, remainder: Tensor | None) -> Tensor:
    """fp32 values of stored weights: the very tensor where that is fp32, else a copy.

    Args:
        live: fp32 or bf16.
        remainder: int16 of the same shape, wherever it lies; None where bf16 is all there is.
    """
    if remainder is None:
        return live.float()
    return join_bf16(live, remainder.to(live.device))


def encode_(
    values: Tensor, live: Tensor, remainder: Tensor | None, part: slice = slice(None)
) -> None:
    """Store flat fp32 values, in place; without a remainder they are rounded to what `live` holds.

    Args:
        part: of the values, which the remainder is of; that of the others lies elsewhere.
    """
    if remainder is None:
        live.copy_(values)
        return
    high, low = split_fp32(values.to(live.device))
    live.copy_(high)
    remainder.copy_(low[part])


def checksum(live: Tensor) -> int:
    """A number that equal bits have in common."""
    bits = live.view(torch.int16 if live.element_size() == 2 else torch.int32)
    return int(bits.sum(dtype=torch.int64))


def join_bf16(high: Tensor, low: Tensor) -> Tensor:
    """fp32 from its bf16 rounding and the int16 difference of the bit patterns; exact."""
    bits = (high.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)
    return bits.view(torch.float32)


def split_fp32(values: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 → (bf16, int16) with join_bf16(bf16, int16) == fp32, bit for bit.

    Rounds half away from zero, so that the difference always fits 16 bits; rounding half to even
    would leave +0x8000 and −0x8000 for the same bf16.
    """
    bits = values.contiguous().view(torch.int32)
    high = (bits + 0x8000) >> 16
    low = (bits - (high << 16)).to(torch.int16)
    return high.to(torch.int16).view(torch.bfloat16), low
