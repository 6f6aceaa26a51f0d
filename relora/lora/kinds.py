"""Embeddings and convolutions as adapted layers, and the list of all kinds.

    embedding     y = d·W[x] + s · drop(A[:, x])ᵀ Bᵀ        W (in, out): a row for each token
    convolution   y = d·(W ∗ x) + b + s · (B ∗ (A ∗ drop(x)))

An embedding is a linear layer that reads one of `in` numbers, 1; its A (r, in) is drawn as that of
a linear layer with its width of inputs; dropout drops that 1, and so the update of a whole token.
The matrix of a
convolution (out, in/groups·kernel) is its weight, flattened: A (r, in/groups·kernel) is r filters
with its kernel, stride, padding, dilation, for each group of channels the same, and B (out, r) a
convolution of kernel 1. Both have the low-rank graph alone.

Another kind is a class with `plain`, `computes` and `forward`, with `matrix` and `stored` where
the weight is no matrix (out, in), and its name in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relora.lora.experts import LoRAExperts, LoRATransposedExperts
from relora.lora.layers import AdaptedLayer, ByRows, LoRAConv1D, LoRALinear, Transposed


class _Other(ByRows):
    """What is no linear layer."""

    is_linear = False

    def _shrunk(self, output: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and self.ready:
            return output * self.ready[0].to(output.dtype)
        return output if self.shrink == 1 else output * self.shrink


class LoRAEmbedding(_Other, Transposed, nn.Embedding):
    """nn.Embedding with an update; weight is (in, out): a row of it for each token."""

    plain = nn.Embedding
    computes = "a look-up and no more (no factor, max_norm, scale_grad_by_freq or sparse)"
    noun = "nn.Embedding"

    @property
    def fan_in(self) -> int | None:
        """Its width: so an update moves it as far as one of the linear layers behind it."""
        return self.embedding_dim

    @classmethod
    def fits(cls, layer: Any) -> bool:
        """A look-up, which `max_norm` would write to, with gradients that A can have too."""
        plain = layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse
        return super().fits(layer) and plain

    def forward(self, x: Tensor) -> Tensor:
        """Token ids (…) → (…, out)."""
        dtype = self.weight.dtype
        if torch.is_autocast_enabled(x.device.type):
            # What blocks add up is as exact as after an embedding that trains.
            dtype = torch.promote_types(dtype, self.lora_B.dtype)
        output = self._shrunk(F.embedding(x, self.weight).to(dtype))
        inner = F.embedding(x, self.lora_A.t()).to(self.lora_B.dtype) * self.scale
        if self.lora_dropout and self.training:
            inner = inner * F.dropout(inner.new_ones(*x.shape, 1), self.lora_dropout)
        return output + F.linear(inner, self.lora_B).to(dtype)


class _Convolution(_Other):
    """What slides W over x."""

    computes = "a convolution of its input with its weight alone"
    convolve: ClassVar[Callable[..., Tensor]]
    _conv_forward: Callable[..., Tensor]
    bias: Any
    groups: int

    @classmethod
    def matrix(cls, weight: Tensor) -> Tensor:
        """(out, in/groups, kernel…) → (out, in/groups·kernel)."""
        return weight.flatten(1)

    @classmethod
    def fits(cls, layer: Any) -> bool:
        """Its own code is what the kind calls."""
        plain: Any = cls.plain
        return super().fits(layer) and type(layer)._conv_forward is plain._conv_forward

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in, places…) → (…, out, places…)."""
        kernels, ones = self.weight.shape[1:], (1,) * (self.weight.dim() - 2)
        if not torch.compiler.is_compiling() and self.shrink == 1:
            output = self._conv_forward(x, self.weight, self.bias)
        else:  # d is no factor of the bias
            output = self._shrunk(self._conv_forward(x, self.weight, None))
            if self.bias is not None:
                output = output + self.bias.to(output.dtype).view(-1, *ones)
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        filters = a.view(-1, *kernels).repeat(self.groups, 1, *ones)
        inner = self._conv_forward(F.dropout(x, self.lora_dropout, self.training), filters, None)
        update = self.convolve(inner * self.scale, b.view(*b.shape, *ones), groups=self.groups)
        return output + update


class LoRAConv1d(_Convolution, nn.Conv1d):
    """nn.Conv1d with an update; weight is (out, in/groups, kernel)."""

    plain = nn.Conv1d
    noun = "nn.Conv1d"
    convolve = staticmethod(F.conv1d)


class LoRAConv2d(_Convolution, nn.Conv2d):
    """nn.Conv2d with an update; weight is (out, in/groups, height, width)."""

    plain = nn.Conv2d
    noun = "nn.Conv2d"
    convolve = staticmethod(F.conv2d)


KINDS: tuple[type[AdaptedLayer], ...] = (
    LoRALinear,
    LoRAConv1D,
    LoRAEmbedding,
    LoRAConv1d,
    LoRAConv2d,
    LoRATransposedExperts,  # a subclass of the next
    LoRAExperts,
)


def kind_of(layer: nn.Module) -> type[AdaptedLayer] | None:
    """The kind of adapted layer that a layer is or could become by its class; None if it has none.

    Whether it really computes what its class does, `AdaptedLayer.fits` tells.
    """
    if isinstance(layer, AdaptedLayer):
        return type(layer)
    return next((kind for kind in KINDS if isinstance(layer, kind.plain)), None)


def linear_kind_of(layer: nn.Module) -> type[AdaptedLayer] | None:
    """As `kind_of`, of linear layers alone."""
    kind = kind_of(layer)
    return kind if kind is not None and kind.is_linear else None
