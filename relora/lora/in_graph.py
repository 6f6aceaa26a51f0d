"""An adapted layer as a compiler sees it: tensors, and no numbers of Python that change.

A compiler compiles anew for each number that it has read and that is another one now, as d is after
each decay. What it keeps for the backward pass, and what it makes again, it decides by itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def made_for_compiler(layer: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What `forward_in_graph` reads of an adapted layer's weights, while they are constant:
    d·W + s·B·A, s·A and s·B in a dtype; in the low-rank graph d."""
    if layer.graph == "effective":
        return (layer.effective(dtype), *layer.factors(dtype))
    return (layer.weight.new_full((), layer.shrink, dtype=torch.float32),)


def forward_in_graph(layer: Any, x: Tensor) -> Tensor:
    """x (…, in) → (…, out) by what an adapted layer has ready."""
    bias = layer.bias
    if layer.graph == "effective":
        matrix, scaled_a, scaled_b = layer.ready
        bias = None if bias is None else bias.to(matrix.dtype)
        arguments = matrix, scaled_a, scaled_b, layer.lora_A, layer.lora_B, bias
        output: Tensor = _InGraph.apply(x.to(matrix.dtype), *arguments)
        return output
    output = F.linear(x, layer.matrix(layer.weight)) * layer.ready[0] + layer.update(x)
    return output if bias is None else output + bias


class _InGraph(torch.autograd.Function):
    """x (…, n) → (…, m), with the gradients of A and B that `graphs.linear` gives them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        matrix: Tensor,
        scaled_a: Tensor,
        scaled_b: Tensor,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, matrix, scaled_a, scaled_b)
        ctx.biased = bias is not None
        return F.linear(x, matrix, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, matrix, scaled_a, scaled_b = ctx.saved_tensors
        rows, x_rows = gradient.reshape(-1, matrix.shape[0]), x.reshape(-1, matrix.shape[1])
        d_x = rows.mm(matrix).view(x.shape)
        d_a = rows.mm(scaled_b).t().mm(x_rows).float() if ctx.needs_input_grad[4] else None
        d_b = rows.t().mm(x_rows.mm(scaled_a.t()))
        d_bias = rows.sum(0) if ctx.biased else None
        return d_x, None, None, None, d_a, d_b.float(), d_bias
