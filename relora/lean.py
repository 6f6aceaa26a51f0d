"""Blocks of Llama's shape that keep less for the backward pass, with the same function.

    RMSNorm    y = w · x / √(mean(x²) + ε)     keeps x, and writes y once, in the products' dtype
    SwiGLU     z = silu(g) · u                  keeps g and u
    rotary     y = x · cos + turned x · sin     see `rotary`
    linear     y Wᵀ                             keeps nothing of y and z: see `graphs.Recomputed`

Of a model of transformers the modules that compute these are found by trying them, whatever they
are called; what computes anything else stays as it is. Parameters keep their names.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from relora.lora.graphs import Recomputed, compute_dtype, linear, mark_recomputed, multiply
from relora.loss import ChunkedHead, ChunkedModel
from relora.rotary import turning_class, turns_by_halves


class Lean(NamedTuple):
    """What of a model was made to keep less."""

    norms: int
    mlps: int
    rotary: int
    loss: bool

    def describe(self) -> str:
        """In words."""
        found = {"norms": self.norms, "SwiGLU MLPs": self.mlps, "rotary embeddings": self.rotary}
        parts = [f"{number} {what}" for what, number in found.items() if number]
        parts = parts or ["blocks are transformers' own, and keep more"]
        return ", ".join([*parts, f"the loss {'in chunks' if self.loss else 'whole'}"])


class LeanLinear(nn.Linear):
    """nn.Linear that keeps nothing of an input that can be made again."""

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out)."""
        return linear(x, self.weight, bias=self.bias)


class CastEmbedding(nn.Module):
    """Mixed into the input embeddings: what they give, and so all that blocks add to it."""

    output_dtype: torch.dtype

    def forward(self, ids: Tensor) -> Tensor:
        """ids (…) → (…, d) in `output_dtype`."""
        return super().forward(ids).to(self.output_dtype)


class LeanRMSNorm(nn.Module):
    """Mixed into a norm that has `weight` and `variance_epsilon`."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """x (…, d) → (…, d) in the dtype of products, each entry rounded once."""
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class LeanMLP(nn.Module):
    """Mixed into an MLP down(silu(gate(x)) · up(x))."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """x (…, d) → (…, d)."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """w · x / √(mean(x²) + ε) over the last axis, in the dtype of products; keeps x alone."""
    dtype = compute_dtype(x)
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    if torch.compiler.is_compiling():  # which decides by itself what to keep
        x = x.to(wide)
        return (x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight).to(dtype)

    def make(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        x = x.to(wide)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        least = norm.new_full((), epsilon)
        inverse = least.addcmul(norm, norm, value=1 / x.shape[-1]).rsqrt_()
        normed = x * inverse
        return multiply(normed, weight, dtype), normed, inverse

    recipe = Recomputed(make)
    output: Tensor = _RMSNorm.apply(recipe, x, weight)
    mark_recomputed(output, recipe, x, weight)
    return output


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up; keeps both and not the product."""
    if torch.compiler.is_compiling():
        return F.silu(gate) * up
    recipe = Recomputed(_swiglu)
    output: Tensor = _SwiGLU.apply(recipe, gate, up)
    mark_recomputed(output, recipe, gate, up)
    return output


def _swiglu(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    active = F.silu(gate)
    return active * up, active


class _Recomputing(torch.autograd.Function):
    """Keeps its inputs alone; what a recipe makes of them is made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, recipe: Recomputed, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.recipe = recipe
        output = recipe.again(*inputs)[0]
        recipe.forget()
        return output

    @staticmethod
    def made(ctx: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(the inputs, what the recipe makes), for the last that needs them."""
        inputs = ctx.saved_tensors  # once: gradient checkpointing makes them at that moment
        made = ctx.recipe.again(*inputs)
        ctx.recipe.forget()
        return inputs, made


class _RMSNorm(_Recomputing):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (_, normed, inverse) = _Recomputing.made(ctx)
        product = gradient * normed
        d_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
        total = (product @ weight.to(product.dtype)).unsqueeze_(-1)
        d_x = gradient * weight.to(normed.dtype)
        d_x = d_x.addcmul_(normed, total, value=-1 / x.shape[-1]).mul_(inverse)
        return None, d_x.to(x.dtype), d_weight


class _SwiGLU(_Recomputing):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (gate, up), (_, active) = _Recomputing.made(ctx)
        d_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return None, d_gate, gradient * active


def make_lean(
    model: nn.Module,
    blocks: bool = True,
    loss_chunk: int | None = 1024,
    residual: torch.dtype | None = None,
) -> Lean:
    """Let a model keep less for its backward pass, in place; before adapters are added.

    Args:
        blocks: norms and MLPs make again what they give, and rotary embeddings take fewer passes.
        loss_chunk: tokens that the output head and the loss are computed for at a time, None for
            all. Only where logits are what the head gives, and the loss is their cross-entropy.
        residual: dtype of what the blocks add to, if other than that of the embeddings.

    Returns:
        What was found to be one of these.
    """
    modules: list[Any] = list(model.modules())
    norms = [m for m in modules if blocks and _is_rms_norm(m)]
    mlps = [m for m in modules if blocks and _is_swiglu_mlp(m)]
    kinds: set[Any] = {type(m) for m in modules} if blocks else set()
    turning = {kind: turning_class(kind) for kind in kinds if turns_by_halves(kind)}
    attentions = [m for m in modules if type(m) in turning]
    head: Any = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    chunked = loss_chunk is not None and head is not None and _is_plain_loss(model)
    for norm in norms:
        _mix_in(norm, LeanRMSNorm)
    for mlp in mlps:
        _mix_in(mlp, LeanMLP)
    for attention in attentions:
        attention.__class__ = turning[type(attention)]
    for module in modules if norms or mlps else ():
        if type(module) is nn.Linear and module is not head:
            module.__class__ = LeanLinear
    if residual is not None and norms:
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        _mix_in(embeddings, CastEmbedding)
        embeddings.output_dtype = residual
    if chunked:
        _mix_in(head, ChunkedHead)
        head.loss_chunk = loss_chunk
        _mix_in(model, ChunkedModel)
    return Lean(len(norms), len(mlps), len(attentions), chunked)


@cache
def _mixed(lean: Any, plain: Any) -> Any:
    # Under its own name, which transformers writes into what it saves.
    return type(plain.__name__, (lean, plain), {"__module__": plain.__module__})


def _mix_in(module: nn.Module, lean: Any) -> None:
    plain: Any = type(module)
    module.__class__ = _mixed(lean, plain)


def _is_rms_norm(module: Any) -> bool:
    if set(module.state_dict()) != {"weight"} or not hasattr(module, "variance_epsilon"):
        return False
    with _disable_current_modes(), torch.device("cpu"), torch.no_grad():
        x = torch.linspace(-1, 2, 12).view(2, 2, 3)
        weight = torch.linspace(1, 2, 3)
        return _gives(module, {"weight": weight}, x, rms_norm(x, weight, module.variance_epsilon))


def _is_swiglu_mlp(module: nn.Module) -> bool:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if [*module.children()][:3] != parts or not all(type(part) is nn.Linear for part in parts):
        return False
    if any(part.bias is not None for part in parts):
        return False
    with _disable_current_modes(), torch.device("cpu"), torch.no_grad():
        x = torch.linspace(-1, 2, 12).view(2, 2, 3)
        gate, up, down = (torch.linspace(-1, k, 15).view(5, 3) for k in (1, 2, 3))
        held = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down.t()}
        expected = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down.t())
        return _gives(module, held, x, expected)


def _gives(module: nn.Module, held: dict[str, Tensor], x: Tensor, expected: Tensor) -> bool:
    try:
        found = torch.func.functional_call(module, held, (x,))
    except Exception:  # whatever else it may want, it is another kind of module
        return False
    alike = isinstance(found, Tensor) and found.shape == expected.shape
    return alike and torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def _is_plain_loss(model: Any) -> bool:
    """Whether a model's logits are what its head gives, and its loss is their cross-entropy and no
    more; found by running it without numbers."""
    seen: list[Any] = []

    def loss(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(ForCausalLMLoss(*args, **kwargs))
        return seen[-1]

    if model.loss_function is not ForCausalLMLoss:
        return False
    try:
        with _disable_current_modes(), torch.device("meta"), torch.no_grad():
            twin = type(model)(model.config)
            twin.loss_function = loss
            head = twin.get_output_embeddings()
            head.register_forward_hook(lambda _, __, output: seen.append(output))
            ids = torch.zeros(1, 2, dtype=torch.long)
            # Of a mask with four axes transformers does not ask for numbers.
            mask = torch.zeros(1, 1, 2, 2)
            output = twin(input_ids=ids, labels=ids, attention_mask=mask, use_cache=False)
    except Exception:  # of any code of any architecture: then its own loss stays
        return False
    return len(seen) == 2 and output.logits is seen[0] and output.loss is seen[1]
