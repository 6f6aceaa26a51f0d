"""Layers with a frozen weight and a trainable low-rank update; one class a kind owns the adapted
weight W + s·B·A.

    y = d · x Wᵀ + b + s · (drop(x) Aᵀ) Bᵀ        A (r, in), B (out, r)

d is 1 unless weight decay acts on the frozen weight too; then it is what decay has left of it since
the last merge, so that no step has to touch W.

The layers keep their base class's parameter names (`weight`, `bias`), so a state dict of the plain
model and one of the adapted model name the same tensors. At birth B = 0: the function is unchanged
and B has a gradient (A's is zero until B has moved). LoRA: arXiv 2106.09685; ReLoRA: 2307.05695.

How W lies in memory, what its rows and columns are, and what its parameters are called is known
by its kind alone: merging, exporting, spectra and planning ask it. Linear layers are here,
embeddings and convolutions in `kinds`, with the list of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from relora.lora.blocks import rows_of_blocks, with_blocks
from relora.lora.graphs import (
    Graph,
    cast,
    casts_are_kept,
    cheaper_graph,
    compute_dtype,
    linear,
    multiply,
    worth_keeping,
)
from relora.lora.in_graph import forward_in_graph, made_for_compiler
from relora.lora.names import bias_of, names_of
from relora.lora.probe import computes_linear
from relora.lora.quantised import FrozenBase

Role = Literal["A", "B", "base", "other"]


class AdaptedLayer(FrozenBase):
    """What the adapted layers share. Mixed into a layer class that has `weight` and `bias`.

    Attributes:
        lora_A: (r, in) trainable, kept in fp32; or frozen, then in whatever the base is.
        lora_B: (out, r) trainable, kept in fp32.
        scale: s, the factor of the update.
        shrink: d, what weight decay has left of the frozen weight since the last merge.
        shared_a: the name under which the A of this layer and of others is drawn, the same for all;
            None if it is drawn under its own.
        has_blocks: blocks of the weight train, and no A and B, see `blocks`.
        graph: how the layer is computed, see `graphs`.
        keeps_effective: whether d·W + s·B·A is formed once for all of `constant_weights`, at two
            bytes an entry in half precision, or where it is used, at 2·out·in·r FLOPs each time.
        compiled: the dtype in which a compiled forward pass multiplies; None without a compiler.
        ready: what that reads of the weights, made once for all of `constant_weights`.
        before_merge: with which `unmerge_adapters` takes a merge back; None without one.
        plain: the class of layers that this kind adapts; of a layer, the class that it had before.
        computes: what that computes, in words.
        noun: what such layers are, in words.
        is_linear: whether it is x Wᵀ + b, which has all graphs, and adapters by default.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scale: float
    shrink: float
    lora_dropout: float
    shared_a: str | None
    has_blocks: bool  # no question to A: ZeRO 3 leaves it without a shape
    graph: Graph
    keeps_effective: bool
    made: dict[Any, Any] | None  # of the weights, while they are constant
    compiled: torch.dtype | None = None
    before_merge: Any = None
    ready: tuple[Tensor, ...] = ()
    plain: ClassVar[type[nn.Module]]
    computes: ClassVar[str] = "x Wᵀ + b"
    noun: ClassVar[str] = "linear layers"
    is_linear: ClassVar[bool] = True

    @property
    def fan_in(self) -> int | None:
        """Inputs of the layer that A is drawn as for; None for its own."""
        return None

    @classmethod
    def matrix(cls, weight: Tensor) -> Tensor:
        """The weight as the matrix (out, in) of the map x ↦ x Wᵀ: a view."""
        return weight

    @classmethod
    def stored(cls, matrix: Tensor, shape: torch.Size) -> Tensor:
        """A matrix (out, in) as it lies in a weight of this shape: the inverse of `matrix`."""
        return matrix.reshape(shape)

    @classmethod
    def fits(cls, layer: Any) -> bool:
        """Whether a plain layer, of whatever subclass, computes what this kind adapts."""
        return type(layer).forward is cls.plain.forward

    def add_lora_(self, rank: int, scale: float, dropout: float, train_a: bool = True) -> None:
        """Freeze the weight and add A and B beside it; B is zero, A is not yet drawn."""
        *experts, out_features, in_features = self.matrix(self.weight).shape
        device = self.weight.device
        self.weight.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.empty(*experts, rank, in_features, device=device), train_a)
        self.lora_B = nn.Parameter(torch.zeros(*experts, out_features, rank, device=device))
        self.scale, self.shrink, self.lora_dropout = scale, 1.0, dropout
        self.graph, self.keeps_effective = "low_rank", False
        self.has_blocks = False
        self.shared_a = self.made = self.quantised = None

    def put_on_(self) -> None:
        """What turns a plain layer into an adapted one beside its class and parameters: nothing."""

    def take_off_(self) -> None:
        """Become the plain layer again; what A and B hold is dropped."""
        del self.lora_A, self.lora_B
        self.__class__ = self.plain  # type: ignore[assignment]

    def add_blocks_(self, count: int) -> None:
        """Freeze the weight and add k blocks of it, which are zero; see `blocks`."""
        outputs, inputs = self.matrix(self.weight).shape
        self.add_lora_(1, 1.0, 0.0, train_a=False)
        self.has_blocks = True
        self.lora_A = nn.Parameter(self.lora_A.new_zeros(count), requires_grad=False)
        self.lora_B = nn.Parameter(self.lora_B.new_zeros(count, outputs // count, inputs // count))

    def frozen(self) -> list[Tensor]:
        """What does not train: the weight, and A and the bias if they do not."""
        rest = [x for x in (self.lora_A, bias_of(self)) if x is not None and not x.requires_grad]
        return [self.weight, *rest]

    def choose_graph_(
        self,
        graph: Literal["auto", "low_rank", "effective"],
        keep: bool | None,
        tokens: int | None,
        micro_batches: int,
    ) -> None:
        """Set how the layer is computed; arguments as in `LoRAConfig` and `add_adapters`."""
        outputs, inputs = self.matrix(self.weight).shape
        if self.has_blocks:
            graph, keep = "effective", bool(keep)
        if graph == "auto":
            graph = "low_rank" if self.lora_dropout else cheaper_graph(outputs, inputs, tokens)
        self.graph = graph
        rank = self.lora_A.shape[0]
        self.keeps_effective = worth_keeping(rank, tokens, micro_batches) if keep is None else keep

    def delta(self, a: Tensor, b: Tensor, shape: torch.Size, start: int, stop: int) -> Tensor:
        """Entries start..stop of s·B·A as it lies in the flattened weight, in the dtype of A and B.

        Args:
            a: (r, in), b: (out, r); of blocks as `blocks` has them.
            shape: of the whole weight, which this rank may hold a part of.
        """
        return self.stored((b @ a) * self.scale, shape).flatten()[start:stop]

    def merged(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """d·W + s·B·A in the shape of the weight, from whole tensors."""
        delta = self.delta(a, b, weight.shape, 0, weight.numel()).view(weight.shape)
        return delta.add_(weight, alpha=self.shrink)

    def update(self, x: Tensor) -> Tensor:
        """s · (drop(x) Aᵀ) Bᵀ for x (…, in); returns (…, out)."""
        # The scale where the tensor is smallest.
        return F.linear(self._inner(x) * self.scale, self.lora_B)

    def add_update(self, output: Tensor, x: Tensor, shrink: float = 1.0) -> Tensor:
        """d·output (…, out) + s · (drop(x) Aᵀ) Bᵀ for x (…, in), in one pass over the output."""
        inner, b = self._inner(x), cast(self.lora_B, compute_dtype(x), gradient=True)
        rows = torch.addmm(
            output.reshape(-1, b.shape[0]),
            inner.reshape(-1, b.shape[1]),
            b.t(),
            beta=shrink,
            alpha=self.scale,
        )
        return rows.view(output.shape)

    def _inner(self, x: Tensor) -> Tensor:
        """drop(x) Aᵀ."""
        return F.linear(F.dropout(x, self.lora_dropout, self.training), self.lora_A)

    def effective(self, dtype: torch.dtype) -> Tensor:
        """The matrix (out, in) of d·W + s·B·A in a dtype."""
        return self._once(("effective", dtype), self._form, dtype)

    @property
    def forming_flops(self) -> int:
        """Of B·A."""
        return 0 if self.has_blocks else 2 * self.lora_A.numel() * self.lora_B.shape[0]

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(s·A, s·B) in a dtype."""
        return self._once(("factors", dtype), self._cast, dtype)

    def _form(self, dtype: torch.dtype) -> Tensor:
        if self.has_blocks:
            return with_blocks(self._base(dtype), self.shrink, self.lora_A, self.lora_B)
        a, b = self.factors(dtype)
        return torch.addmm(self._base(dtype), b, a, beta=self.shrink, alpha=1 / self.scale)

    def _base(self, dtype: torch.dtype) -> Tensor:
        return self.matrix(self.base(dtype))

    def _cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        a, b = (multiply(factor, self.scale, dtype) for factor in (self.lora_A, self.lora_B))
        return a, b

    @torch.no_grad()
    def _once(self, key: tuple[str, torch.dtype], make: Callable[..., Any], *arguments: Any) -> Any:
        """What `make` gives; within `constant_weights` made once."""
        if self.made is None or (key[0] == "effective" and not self.keeps_effective):
            return make(*arguments)
        if key not in self.made:
            self.made[key] = make(*arguments)
        return self.made[key]


class ByRows(AdaptedLayer):
    """A layer of whose s·B·A some rows can be computed alone."""

    def delta(self, a: Tensor, b: Tensor, shape: torch.Size, start: int, stop: int) -> Tensor:
        """As the base class; only the rows that these entries touch are computed."""
        columns = shape[1:].numel()
        first, last = start // columns, -(-stop // columns)
        rows = self._rows(a, b, first, last) * self.scale
        return rows.flatten().narrow(0, start - first * columns, stop - start)

    def _rows(self, a: Tensor, b: Tensor, first: int, last: int) -> Tensor:
        """Rows of B·A as it lies in the weight."""
        return rows_of_blocks(a, b, first, last) if self.has_blocks else b[first:last] @ a


class Transposed(ByRows):
    """A layer whose weight is (in, out)."""

    @classmethod
    def matrix(cls, weight: Tensor) -> Tensor:
        """(in, out) → (out, in)."""
        return weight.t()

    @classmethod
    def stored(cls, matrix: Tensor, shape: torch.Size) -> Tensor:
        """(out, in) → (in, out)."""
        return matrix.t()

    def _rows(self, a: Tensor, b: Tensor, first: int, last: int) -> Tensor:
        """(B·A)ᵀ = Aᵀ·Bᵀ."""
        if self.has_blocks:
            return rows_of_blocks(a, b, 0, b.shape[0] * b.shape[1]).t()[first:last]
        return a.t()[first:last] @ b.t()


class _Linear(ByRows):
    """What computes x Wᵀ + b, however W lies."""

    bias: Any

    @classmethod
    def fits(cls, layer: Any) -> bool:
        """Its own forward pass is asked, with small weights in place of its own, which may lie
        nowhere."""
        return super().fits(layer) or computes_linear(layer, cls.stored)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out)."""
        if torch.compiler.is_compiling():
            return forward_in_graph(self, x)
        if self.graph == "effective":
            a, b, bias = self.lora_A, self.lora_B, self.bias
            if self.has_blocks:
                return linear(x, self.weight, None, b, bias, self.effective, bands=a)
            return linear(x, self.weight, a, b, bias, self.effective, self.factors, self.shared_a)
        # d is no factor of the bias.
        bias, later = (self.bias, None) if self.shrink == 1 else (None, self.bias)
        if self.quantised is not None:  # for the backward pass its values are made again
            output = linear(x, self.weight, bias=bias, effective=self._base)
        else:
            # Of a transposed weight too: addmm under autocast wants one dtype for all three; linear
            # casts each by itself.
            output = F.linear(x, self.matrix(self.weight), bias)
        output = self.add_update(output, x, self.shrink)
        return output if later is None else output + later


class LoRALinear(_Linear, nn.Linear):
    """nn.Linear with an update; weight is (out, in)."""

    plain = nn.Linear


class LoRAConv1D(Transposed, _Linear, Conv1D):
    """GPT-2's Conv1D, a linear layer whose weight is (in, out), with an update."""

    plain = Conv1D


@cache
def adapted_class(kind: Any, plain: Any) -> Any:
    """The class that a layer of a class becomes: a subclass of it, with the kind's forward."""
    if plain is kind.plain:
        return kind
    return type(f"LoRA{plain.__name__}", (kind, plain), {"plain": plain})


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """(name, layer) of every layer with an adapter, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLayer):
            yield name, module


@contextmanager
def constant_weights(model: nn.Module) -> Iterator[None]:
    """Within it no weight changes, as in the micro-batches of an optimizer step, so what is made of
    them is made once."""
    layers = [layer for _, layer in adapted_layers(model)]
    for layer in layers:
        layer.made = {}
        if layer.compiled is not None:
            layer.ready = made_for_compiler(layer, layer.compiled)
    try:
        with casts_are_kept():
            yield
    finally:
        for layer in layers:
            layer.made, layer.ready = None, ()


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """What every parameter of a model is, by name: A or B of an adapter, the base weight that an
    adapter freezes, or another."""
    roles: dict[str, Role] = {name: "other" for name, _ in model.named_parameters()}
    for layer, _ in adapted_layers(model):
        names = names_of(layer)
        roles |= {names.weight: "base", names.a: "A", names.b: "B"}
    return roles
