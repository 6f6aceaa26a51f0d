"""Rotary embeddings by halves in three passes: queries and keys turned by their positions.

    y = x · cos + (−x₂, x₁) · sin, for the halves x₁, x₂ of the last axis

cos and sin alone are kept, and y is rounded once. Attention modules of transformers call a function
for it by its name; those whose function does this are given a class that calls `rotate`.
"""

from __future__ import annotations

import contextlib
from functools import cache, wraps
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from relora.lora.graphs import compute_dtype

ROTARY = "apply_rotary_pos_emb"  # what transformers' modules call, by its name in their files


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Any, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Queries and keys (…, D) turned by their positions, in the dtype of products.

    Args:
        cos, sin: without the axis `unsqueeze_dim`; they have no gradient.
    """
    turn = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotation.apply(q, *turn), _Rotation.apply(k, *turn)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        own = compute_dtype(x)
        dtype = own if own != x.dtype else torch.result_type(x, cos)
        first, second = sin.chunk(2, dim=-1)
        return _turned(x, cos, first, second, -1, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, dim=-1)
        return _turned(gradient, cos, second, first, 1, ctx.dtype), None, None


def _turned(
    x: Tensor, cos: Tensor, first: Tensor, second: Tensor, sign: int, dtype: torch.dtype
) -> Tensor:
    """(x₁ cos₁ + sign · x₂ first, x₂ cos₂ − sign · x₁ second) for the halves x₁, x₂ of the last
    axis, rounded once."""
    product = x * cos
    output = torch.empty_like(product, dtype=dtype)
    halves = zip(*(tensor.chunk(2, dim=-1) for tensor in (product, output)), strict=True)
    others = (x.chunk(2, dim=-1)[1], first, sign), (x.chunk(2, dim=-1)[0], second, -sign)
    for (own, into), (other, factor, value) in zip(halves, others, strict=True):
        torch.addcmul(own, other, factor, value=value, out=into)
    return output


@cache
def turning_class(plain: Any) -> Any:
    """A class whose forward pass is that of another, but for how it turns queries and keys."""
    own = plain.forward
    world = {**own.__globals__, ROTARY: rotate}
    turning = FunctionType(own.__code__, world, own.__name__, own.__defaults__, own.__closure__)
    turning.__kwdefaults__ = own.__kwdefaults__

    @wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        compiling = torch.compiler.is_compiling()  # a compiler fuses by itself
        return (own if compiling else turning)(*args, **kwargs)

    return type(plain.__name__, (plain,), {"__module__": plain.__module__, "forward": forward})


def turns_by_halves(kind: Any) -> bool:
    """Whether a class turns queries and keys by a function that gives what `rotate` does."""
    code = getattr(kind.forward, "__code__", None)
    if code is None or ROTARY not in code.co_names:
        return False
    function: Any = kind.forward.__globals__.get(ROTARY)
    with _disable_current_modes(), torch.device("cpu"), torch.no_grad():
        q, k = (torch.linspace(-1, n, 48).view(2, 2, 3, 4).sin() for n in (2, 3))
        for dim, shape in ((1, (2, 3, 4)), (2, (2, 2, 4))):
            cos, sin = (torch.linspace(-2, n, 4 * shape[0] * shape[1]).view(shape) for n in (1, 4))
            expected = rotate(q, k, cos, sin, unsqueeze_dim=dim)
            try:
                found = function(q, k, cos, sin, unsqueeze_dim=dim)
                alike = all(map(torch.allclose, found, expected))
            except Exception:  # whatever else it may want, it is another function
                return False
            if not alike:
                return False
        with contextlib.suppress(RuntimeError):
            function(q, k, cos[..., :2], sin[..., :2], unsqueeze_dim=2)
            return False  # it turns a part of each head, as long as cos and sin are
    return True
