"""A frozen weight in one byte an entry or half of one, for products; its exact values lie beside.

In blocks of 64 entries, as they follow each other in the weight, each with one scale in fp32:

    int8   w ≈ scale · c, c = −127 … 127, scale = max|w| / 127
    fp8    w ≈ scale · c, c in 4 bits of exponent and 3 of mantissa (e4m3fn), scale = max|w| / 448
    nf4    w ≈ scale · level[c], 16 levels for normal weights (QLoRA, arXiv 2305.14314, appendix E),
           two a byte, scale = max|w|

W changes only where adapters are merged, so it is quantised then and never in between, always anew
from its exact values: no error adds up. Those stay under the parameter's own name, in fp32 and in
host memory, where merges, checkpoints and exports find them; nothing else reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind = Literal["int8", "fp8", "nf4"]
BLOCK = 64
# What stands for max|w|.
FULL_SCALE: dict[Kind, float] = {"int8": 127.0, "fp8": 448.0, "nf4": 1.0}
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
AT_A_TIME = 2**14  # blocks that are quantised together, of a weight of any size


class FrozenBase(nn.Module):
    """A layer's weight while it is frozen, as it is or quantised.

    Attributes:
        weight: its exact values.
        quantised: what products read in place of them; None where they read the weight itself.
    """

    weight: Tensor
    quantised: QuantisedWeight | None

    def quantise_(self, kind: Kind) -> None:
        """From now on products read codes, where the weight lies now; that goes to host memory, in
        fp32 at least."""
        exact = torch.promote_types(self.weight.dtype, torch.float32)
        self.quantised = QuantisedWeight(self.weight, kind)
        self.weight.data = self.weight.data.to("cpu", exact)
        self.requantise_()

    def requantise_(self) -> None:
        """Follow a change of the weight."""
        if self.quantised is not None:
            self.quantised.take_(self.weight)

    def unquantise_(self) -> None:
        """From now on products read the weight, where its codes lay and in its old dtype."""
        if self.quantised is not None:
            codes, dtype = self.quantised.codes, self.quantised.dtype
            self.weight.data = self.weight.data.to(codes.device, dtype)
            self.quantised = None

    def base(self, dtype: torch.dtype) -> Tensor:
        """The weight as products read it, in a dtype."""
        if self.quantised is None:
            return self.weight.to(dtype)
        if self.quantised.bypassed:
            return self.weight.to(self.quantised.codes.device, dtype)
        return self.quantised.values(dtype)


class QuantisedWeight(nn.Module):
    """What products read of a frozen weight, on the weight's device.

    Attributes:
        codes: uint8 (blocks, 64), of nf4 (blocks, 32).
        scales: fp32 (blocks, 1).
        dtype: that the weight had.
        bypassed: whether products read the exact values for a while: see `exact_base`.
    """

    codes: Tensor
    scales: Tensor
    levels: Tensor

    def __init__(self, weight: Tensor, kind: Kind) -> None:
        super().__init__()
        self.kind, self.shape, self.dtype = kind, weight.shape, weight.dtype
        self.bypassed = False
        blocks, width = -(-weight.numel() // BLOCK), BLOCK // 2 if kind == "nf4" else BLOCK
        for name, shape, dtype in (
            ("codes", (blocks, width), torch.uint8),
            ("scales", (blocks, 1), torch.float32),
        ):
            empty = torch.zeros(shape, dtype=dtype, device=weight.device)
            self.register_buffer(name, empty, persistent=False)
        if kind == "nf4":  # of both codes in a byte
            levels = torch.tensor(NF4_LEVELS, device=weight.device)
            pairs = torch.cartesian_prod(levels, levels)
            self.register_buffer("levels", pairs, persistent=False)

    @torch.no_grad()
    def take_(self, weight: Tensor) -> None:
        """Quantise values of this shape, wherever they lie."""
        values, size = weight.reshape(-1), AT_A_TIME * BLOCK
        for index, part in enumerate(values.split(size)):
            part = part.to(self.codes.device, torch.float32)
            part = F.pad(part, (0, -part.numel() % BLOCK)).view(-1, BLOCK)
            rows = slice(index * AT_A_TIME, index * AT_A_TIME + len(part))
            self.codes[rows], self.scales[rows] = encode(part, self.kind)

    def values(self, dtype: torch.dtype) -> Tensor:
        """The weight that the codes stand for: products in fp32, rounded to a dtype."""
        units = self.codes
        if self.kind == "int8":
            units = units.view(torch.int8)
        elif self.kind == "fp8":
            units = units.view(torch.float8_e4m3fn).to(torch.bfloat16)  # exact
        else:
            units = F.embedding(units.int(), self.levels).view(-1, BLOCK)
        whole = torch.empty(units.shape, dtype=dtype, device=units.device)
        torch.mul(units, self.scales, out=whole)
        return whole.view(-1)[: self.shape.numel()].view(self.shape)

    def checksum(self) -> int:
        """A number that equal codes and scales have in common."""
        codes, scales = self.codes, self.scales.view(torch.int32)
        return int(codes.sum(dtype=torch.int64) * 31 + scales.sum(dtype=torch.int64))


@contextmanager
def exact_base(model: nn.Module) -> Iterator[None]:
    """Within it products read exact weights, also where codes stand for them."""
    weights = [module for module in model.modules() if isinstance(module, QuantisedWeight)]
    for weight in weights:
        weight.bypassed = True
    try:
        yield
    finally:
        for weight in weights:
            weight.bypassed = False


def encode(blocks: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """(codes, scales) of fp32 blocks (n, 64): each entry becomes what is nearest."""
    scales = blocks.abs().amax(dim=1, keepdim=True) / FULL_SCALE[kind]
    units = blocks / torch.where(scales > 0, scales, 1)  # a block of zeros stays one
    units.clamp_(-FULL_SCALE[kind], FULL_SCALE[kind])
    if kind == "int8":
        return units.round_().to(torch.int8).view(torch.uint8), scales
    if kind == "fp8":
        return units.to(torch.float8_e4m3fn).view(torch.uint8), scales
    levels = torch.tensor(NF4_LEVELS, device=blocks.device)
    nearest = torch.bucketize(units, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    return (nearest[:, ::2] << 4) | nearest[:, 1::2], scales


def quantised_bytes(entries: int, kind: str) -> int:
    """Of codes and scales of a weight, and of nf4 its table."""
    blocks = -(-entries // BLOCK)
    return blocks * (BLOCK // 2 + 4) + 2048 if kind == "nf4" else blocks * (BLOCK + 4)
