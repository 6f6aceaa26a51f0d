"""Linear layers with a frozen weight and a trainable low-rank update.

    y = d · x Wᵀ + b + s · (drop(x) Aᵀ) Bᵀ        A (r, in), B (out, r)

d is 1 unless weight decay acts on the frozen weight too; then it is what decay has left of it since
the last merge, so that no step has to touch W.

The layers keep their base class's parameter names (`weight`, `bias`), so a state dict of the plain
model and one of the adapted model name the same tensors. At birth B = 0: the function is unchanged
and B has a gradient (A's is zero until B has moved). LoRA: arXiv 2106.09685; ReLoRA: 2307.05695.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class LoRALayer(nn.Module):
    """What the adapted layers share. Mixed into a layer class that has `weight` and `bias`.

    Attributes:
        lora_A: (r, in) trainable, kept in fp32.
        lora_B: (out, r) trainable, kept in fp32.
        scale: s, the factor of the update.
        shrink: d, what weight decay has left of the frozen weight since the last merge.
        transposed: whether `weight` is (in, out), as in GPT-2's Conv1D.
        plain: the class that the layer had before.
    """

    weight: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scale: float
    shrink: float
    lora_dropout: float
    transposed: bool
    plain: type[nn.Module]

    def add_lora_(self, rank: int, scale: float, dropout: float) -> None:
        """Freeze the weight and add A and B beside it; B is zero, A is left for `reinit`."""
        out_features, in_features = self.weight.shape[:: -1 if self.transposed else 1]
        device = self.weight.device
        self.weight.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=device))
        self.scale = scale
        self.shrink = 1.0
        self.lora_dropout = dropout

    def update(self, x: Tensor) -> Tensor:
        """s · (drop(x) Aᵀ) Bᵀ for x (…, in); returns (…, out)."""
        x = F.dropout(x, self.lora_dropout, self.training)
        # The scale where the tensor is smallest: r is far below in and out.
        return F.linear(F.linear(x, self.lora_A) * self.scale, self.lora_B)

    def sum(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output for x (…, in), its weight as (out, in) and its bias."""
        if self.shrink == 1:
            return F.linear(x, weight, bias) + self.update(x)
        # One kernel adds and multiplies, so d costs nothing; the bias is not to shrink.
        output = torch.add(self.update(x), F.linear(x, weight), alpha=self.shrink)
        return output if bias is None else output + bias


class LoRALinear(LoRALayer, nn.Linear):
    """nn.Linear with an update; weight is (out, in)."""

    transposed = False
    plain = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out)."""
        return self.sum(x, self.weight, self.bias)


class LoRAConv1D(LoRALayer, Conv1D):
    """GPT-2's Conv1D, a linear layer whose weight is (in, out), with an update."""

    transposed = True
    plain = Conv1D

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out)."""
        # addmm under autocast wants one dtype for all three; linear casts each by itself.
        return self.sum(x, self.weight.t(), self.bias)


def delta_rows(
    a: Tensor, b: Tensor, scale: float, transposed: bool, start: int, stop: int
) -> Tensor:
    """Rows start..stop of s·B·A as it lies in the weight, in the dtype of A and B.

    Args:
        a: (r, in), b: (out, r).
        transposed: the weight is (in, out), so these are rows of (B·A)ᵀ.
    """
    if transposed:
        return (a[:, start:stop].t() @ b.t()) * scale
    return (b[start:stop] @ a) * scale


def kaiming_bound(in_features: int) -> float:
    """A ~ U(−bound, bound): Kaiming uniform with a = √5, which is 1/√in, as loralib and PEFT do."""
    return math.sqrt(6 / ((1 + 5) * in_features))
