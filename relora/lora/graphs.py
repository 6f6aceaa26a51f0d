"""How an adapted layer is computed: which products, and what is kept for the backward pass.

    low rank    y = d·x Wᵀ + b + s·(drop(x) Aᵀ) Bᵀ
    effective   y = x (d·W + s·B·A)ᵀ + b

Both are the same function of x, A and B and have the same gradients. Of T tokens through a weight
(m, n) at rank r, W frozen, forward and backward pass multiply 4Tmn + 6Tr(m + n) by the first way
and 4Tmn + 4Tr(m + n) by the second, with 2mnr for each time that its weight is formed; where A is
frozen, 4Tr(m + n) and 2Tr(m + n). The effective graph keeps x alone, of a frozen A only x Aᵀ, and
neither where x can be made again from what is kept anyhow (`Recomputed`). Dropout acts on the
adapter's input alone, so it needs the low-rank graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from relora.lora.blocks import gradient_of_blocks

Graph = Literal["low_rank", "effective"]

# Share of a layer's products that forming W + s·B·A for each micro-batch may take before it is kept
# for the whole step instead.
WORTH_KEEPING = 0.05
# Attributes of tensors.
_SOURCE, _CAST, _INNER = "_relora_source", "_relora_cast", "_relora_inner"
# Of weights, in another dtype, while `casts_are_kept`: by the weight's id, with the weight.
_casts: dict[tuple[int, torch.dtype, bool], tuple[Tensor, Tensor]] | None = None


def cheaper_graph(outputs: int, inputs: int, tokens: int | None) -> Graph:
    """The graph with fewer products for a micro-batch of so many tokens; None for very many.

    It does not ask how many micro-batches a step has, so that a run computes alike on any number
    of ranks.
    """
    if tokens is None or tokens * (inputs + outputs) > inputs * outputs:
        return "effective"
    return "low_rank"


def forming_share(rank: int, tokens: int, micro_batches: int) -> float:
    """FLOPs of forming W + s·B·A in both passes of every micro-batch and not once a step, as a
    share of the layer's own 4·tokens·inputs·outputs a micro-batch."""
    return rank * (1 - 1 / (2 * micro_batches)) / tokens


def worth_keeping(rank: int, tokens: int | None, micro_batches: int) -> bool:
    """Whether W + s·B·A is better formed once a step and kept; tokens as in `cheaper_graph`."""
    return tokens is not None and forming_share(rank, tokens, micro_batches) > WORTH_KEEPING


class Recomputed:
    """How a tensor is made again from others, once for all that need it in the backward pass.

    It holds no tensor between the passes, so gradient checkpointing frees what it would free.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        """`function` gives the tensor first, bit for bit; what else it gives is for its maker."""
        self._function = function
        self._made: tuple[Tensor, ...] | None = None

    def again(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the function gives, as in the forward pass; the same tensors until `forget`."""
        if self._made is None:
            self._made = self._function(*inputs)
        return self._made

    def forget(self) -> None:
        """The maker of the tensor has its gradient: nobody needs it any more."""
        self._made = None


class _Source(NamedTuple):
    """What is kept of a layer's input x: what it is made of by a recipe, or itself, or x·(s·A)ᵀ."""

    inputs: tuple[Tensor, ...]
    recipe: Recomputed | None = None
    is_inner: bool = False


def mark_recomputed(tensor: Tensor, recipe: Recomputed, *inputs: Tensor) -> None:
    """Note on a tensor that a recipe makes it of `inputs`; layers that read it keep those alone."""
    setattr(tensor, _SOURCE, _Source(tuple(x.detach() for x in inputs), recipe))


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products with a tensor are computed: autocast's, or its own."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def multiply(tensor: Tensor, other: Tensor | float, dtype: torch.dtype) -> Tensor:
    """tensor · other, computed in their own dtype and rounded to another, in one pass."""
    return torch.mul(tensor, other, out=torch.empty_like(tensor, dtype=dtype))


@contextmanager
def casts_are_kept() -> Iterator[None]:
    """Within it no weight changes, so each is cast once, by functions here and by autocast."""
    global _casts
    before, _casts = _casts, {}
    torch.autocast_increment_nesting()  # it forgets its casts where its outermost context ends
    try:
        yield
    finally:
        _casts = before
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


def cast(weight: Tensor, dtype: torch.dtype, gradient: bool = False) -> Tensor:
    """A weight in a dtype; of transposed ones, which autocast would cast anew, with a gradient."""
    source = weight if gradient else weight.detach()
    if _casts is None or weight.dtype == dtype or gradient > torch.is_grad_enabled():
        return source.to(dtype)
    key = id(weight), dtype, gradient
    if key not in _casts:
        _casts[key] = weight, source.to(dtype)
    return _casts[key][1]


def linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    bias: Tensor | None = None,
    effective: Callable[[torch.dtype], Tensor] | None = None,
    factors: Callable[[torch.dtype], tuple[Tensor, Tensor]] | None = None,
    shared_a: str | None = None,
    bands: Tensor | None = None,
) -> Tensor:
    """x (…, n) times the transpose of a weight (m, n), or of what A (r, n) and B (m, r) make of it:
    (…, m).

    Under autocast all products are in its dtype.

    Args:
        effective: gives the matrix (m, n) that x is multiplied with, W + s·B·A or W as it is read,
            in a dtype, also in the backward pass.
        factors: s·A and s·B in a dtype, asked likewise.
        shared_a: what layers of the same A have in common; those that read one x multiply it with A
            once.
        bands: where B's blocks lie, if it has blocks; then there is no A.
    """
    if torch.compiler.is_compiling():  # which decides by itself what to keep
        return F.linear(x, weight, bias)
    dtype = compute_dtype(x)
    source, x_cast = _source(x, dtype)
    keeps_inner = a is not None and not a.requires_grad and source.recipe is None
    if factors and keeps_inner and torch.is_grad_enabled():
        source = _Source((_inner(x, x_cast, factors(dtype)[0], shared_a),), is_inner=True)
    return _Linear.apply(
        x, x_cast, weight, a, b, bias, effective, factors, shared_a, bands, source, *source.inputs
    )


def _source(x: Tensor, dtype: torch.dtype) -> tuple[_Source, Tensor]:
    """What to keep of x, and x in a dtype without a gradient; cast once for all that read it."""
    if x.dtype == dtype:
        plain = x.detach()
        return getattr(x, _SOURCE, None) or _Source((plain,)), plain
    if x.is_inference():  # nobody would see it change
        own = x.to(dtype)
        return _Source((own,)), own
    known = getattr(x, _CAST, None)
    if known is None or known[0] != x._version or known[1].dtype != dtype:
        known = (x._version, x.detach().to(dtype))
        setattr(x, _CAST, known)
    return _Source((known[1],)), known[1]


@torch.no_grad()
def _inner(holder: Tensor, x: Tensor, scaled_a: Tensor, shared_a: str | None) -> Tensor:
    """x·(s·A)ᵀ as rows (T, r); kept on a tensor that layers of a shared A have in common."""
    key = holder._version, shared_a, x.dtype
    known: tuple[Any, Tensor] | None = getattr(holder, _INNER, None)
    if shared_a is not None and known is not None and known[0] == key:
        return known[1]
    inner = x.reshape(-1, x.shape[-1]).mm(scaled_a.t())
    if shared_a is not None:
        setattr(holder, _INNER, (key, inner))
    return inner


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x_cast: Tensor,
        weight: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        bias: Tensor | None,
        effective: Callable[[torch.dtype], Tensor] | None,
        factors: Callable[[torch.dtype], tuple[Tensor, Tensor]] | None,
        shared_a: str | None,
        bands: Tensor | None,
        source: _Source,
        *inputs: Tensor,
    ) -> Tensor:
        dtype = x_cast.dtype
        matrix = effective(dtype) if effective else cast(weight, dtype)
        if not any(ctx.needs_input_grad[2:5]):  # of weight, A and B: none asks for x
            inputs = ()
        ctx.save_for_backward(weight, a, b, None if effective else matrix, *inputs)
        ctx.effective, ctx.factors, ctx.shared_a, ctx.bands = effective, factors, shared_a, bands
        ctx.recipe, ctx.is_inner = source.recipe, source.is_inner
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.dtype = x.dtype
        return F.linear(x_cast, matrix, None if bias is None else cast(bias, dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        weight, a, b, matrix, *inputs = ctx.saved_tensors
        for_x, _, for_weight, for_a, for_b, for_bias = ctx.needs_input_grad[:6]
        dtype = gradient.dtype
        rows = gradient.reshape(-1, gradient.shape[-1])
        x: Any = None
        if for_weight or for_a or (for_b and not ctx.is_inner):
            whole = ctx.recipe.again(*inputs)[0] if ctx.recipe else inputs[0]
            x = whole.reshape(-1, whole.shape[-1])
        d_x = d_weight = d_a = d_b = d_bias = None
        if for_x:
            matrix = ctx.effective(dtype) if ctx.effective else matrix
            assert matrix is not None
            d_x = rows.mm(matrix).view(*gradient.shape[:-1], matrix.shape[1]).to(ctx.dtype)
        if for_weight:
            d_weight = rows.t().mm(x).to(weight.dtype)
        if for_b and ctx.bands is not None:
            d_b = gradient_of_blocks(rows, x, ctx.bands, b.shape).to(b.dtype)
        elif for_a or for_b:
            scaled_a, scaled_b = ctx.factors(dtype)
            if for_b:
                inner = inputs[0] if x is None else _inner(whole, x, scaled_a, ctx.shared_a)
                d_b = rows.t().mm(inner).to(b.dtype)
            if for_a:
                d_a = rows.mm(scaled_b).t().mm(x).to(a.dtype)
        if for_bias:
            d_bias = rows.sum(0).to(ctx.bias_dtype)
        return d_x, None, d_weight, d_a, d_b, d_bias, *(None,) * (len(ctx.needs_input_grad) - 6)
