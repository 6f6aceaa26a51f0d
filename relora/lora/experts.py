"""The experts of a mixture as layers: one three-dimensional weight (E, out, in) of all of them.

Models of transformers keep the weights of all experts in two tensors, as parameters of one module
whose code reads them by name. So an adapted one has no forward pass to replace: its layer makes

    W[e] + s·B[e]·A[e]        A (E, r, in), B (E, out, r)

of all experts once a forward pass, and hands it to its owner's code in place of the parameter,
whichever way that multiplies. What is made lives as long as the backward pass wants it, which takes
the weights' bytes once more; gradient checkpointing makes it again. The gradient of A and B comes
through that of W, so there is no dropout of x, and no graph but this one.

The layer is a module without parameters beside the tensor that it stands for, and is named after
it: `experts.down_proj_of_experts`, with the parameters `experts.down_proj_of_experts.lora_A` and
`lora_B`; the weight keeps its own name, `experts.down_proj`.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from relora.lora.config import OF_EXPERTS
from relora.lora.layers import AdaptedLayer

WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


class Experts(nn.Module):
    """A weight (E, out, in) as a layer that could have an adapter.

    Attributes:
        holder: the module that has it as a parameter, and the parameter's name there.
    """

    holder: tuple[Any, str]

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self.holder = (owner, name)  # in a tuple: a module would become a child

    @property
    def weight(self) -> Any:
        """The parameter."""
        owner, name = self.holder
        return owner._parameters[name]

    def forward(self, weight: Tensor) -> Tensor:
        """What products read in its place."""
        return weight


class TransposedExperts(Experts):
    """A weight (E, in, out)."""


class LoRAExperts(AdaptedLayer, Experts):
    """The weight of all experts with an update of each."""

    plain = Experts
    noun = "weights of experts"
    is_linear = False

    @classmethod
    def fits(cls, layer: Any) -> bool:
        """Found by its owner's ways alone, see `name_experts`."""
        return True

    def add_lora_(self, rank: int, scale: float, dropout: float, train_a: bool = True) -> None:
        """As the base class, of each expert."""
        assert not dropout
        super().add_lora_(rank, scale, dropout, train_a)
        self.put_on_()

    def put_on_(self) -> None:
        """From now on the owner's code reads what `forward` makes."""
        owner = self.holder[0]
        if not isinstance(owner, _Owner):
            plain: Any = type(owner)
            owner.__class__ = _owner_class(plain, tuple(_weights(owner)))

    def take_off_(self) -> None:
        """As the base class; the owner's code reads the parameter again."""
        super().take_off_()
        owner: Any = self.holder[0]
        if isinstance(owner, _Owner) and not _adapted(owner):
            owner.__class__ = owner.plain_class  # type: ignore[assignment]
        if getattr(self, "before_merge", None) is None:
            del owner._modules[self.holder[1] + OF_EXPERTS]

    @property
    def forming_flops(self) -> int:
        """None that are saved: B·A is formed in each forward pass."""
        return 0

    def delta(self, a: Tensor, b: Tensor, shape: torch.Size, start: int, stop: int) -> Tensor:
        """As the base class; only the experts that these entries touch are computed."""
        size = shape[-2:].numel()
        first, last = start // size, -(-stop // size)
        a, b = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])
        left, right = self.factors_of_stored(a[first:last], b[first:last])
        return (left @ right * self.scale).flatten().narrow(0, start - first * size, stop - start)

    @classmethod
    def factors_of_stored(cls, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """What multiplies to B·A as it lies in the weight."""
        return b, a

    def forward(self, weight: Tensor) -> Tensor:
        """d·W + s·B·A in the shape and dtype of W, formed in one pass."""
        left, right = self.factors_of_stored(
            self.lora_A.to(weight.dtype), self.lora_B.to(weight.dtype)
        )
        with torch.autocast(weight.device.type, enabled=False):
            if torch.compiler.is_compiling() and self.ready:  # d as a tensor
                weight = (weight * self.ready[0]).to(weight.dtype)
                return weight + left @ right * self.scale
            return torch.baddbmm(weight, left, right, beta=self.shrink, alpha=self.scale)


class LoRATransposedExperts(LoRAExperts, TransposedExperts):
    """The same, of a weight (E, in, out)."""

    plain = TransposedExperts

    @classmethod
    def matrix(cls, weight: Tensor) -> Tensor:
        """(…, in, out) → (…, out, in)."""
        return weight.mT

    @classmethod
    def factors_of_stored(cls, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """(B·A)ᵀ = Aᵀ·Bᵀ."""
        return a.mT, b.mT


class _Owner(nn.Module):
    """What has the weights, while some have adapters: its code finds other ones by their names."""

    plain_class: type[nn.Module]
    made: dict[str, Tensor] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As its own, with what the adapted layers make in place of the parameters."""
        self.made = {x.holder[1]: x(self._parameters[x.holder[1]]) for x in _adapted(self)}
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.made = None

    def read(self, name: str) -> Any:
        """A weight; within the forward pass what products read in its place."""
        return (self.made or {}).get(name, self._parameters.get(name))


@cache
def _owner_class(plain: Any, names: tuple[str, ...]) -> Any:
    reads = {name: property(partial(_Owner.read, name=name)) for name in names}
    return type(plain.__name__, (_Owner, plain), {"plain_class": plain, **reads})


def _adapted(owner: nn.Module) -> list[LoRAExperts]:
    return [child for child in owner.children() if isinstance(child, LoRAExperts)]


def name_experts(model: nn.Module) -> None:
    """Give every three-dimensional weight of experts a module that stands for it, in place.

    Those are parameters of classes that transformers' `use_experts_implementation` has made, whose
    code finds them by their names in the module. The new modules have no parameters.
    """
    for module in list(model.modules()):
        transposed = getattr(module, "is_transposed", None)
        if not isinstance(transposed, bool) or not hasattr(module, "_apply_gate"):
            continue
        kind = TransposedExperts if transposed else Experts
        for name in _weights(module):
            if name + OF_EXPERTS not in module._modules:
                module.add_module(name + OF_EXPERTS, kind(module, name))


def _weights(owner: nn.Module) -> list[str]:
    """Names of its parameters that are weights of all experts; without a shape under ZeRO 3."""
    found = ((name, owner._parameters.get(name)) for name in WEIGHTS)
    return [name for name, w in found if w is not None and (w.dim() == 3 or not w.numel())]
