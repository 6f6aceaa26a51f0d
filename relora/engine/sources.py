"""Where weights and optimizer state come from when an engine is filled: rank 0, an earlier engine,
or (see `checkpoint.py`) files. No rank but the first holds a whole model beside its engine's."""

from __future__ import annotations

from collections import defaultdict
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from relora.engine.distributed import Ranks
from relora.lora.draws import draw_a
from relora.lora.layers import adapted_layers
from relora.lora.names import names_of


class Source(Protocol):
    """Tensors by parameter name and kind (`value`, `exp_avg`, `exp_avg_sq`), read in pieces."""

    def fetch(self, name: str) -> None:
        """Make ready what there is of a parameter, which is read next and not again. Collective."""

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor | None:
        """fp32 entries start..stop of the flattened tensor, or None if the source has none."""

    def adam_step(self, name: str) -> float | None:
        """Updates that Adam has counted for this parameter, or None."""


class Fetched:
    """A source that holds one parameter at a time as whole tensors, by kind."""

    def __init__(self) -> None:
        self.whole: dict[tuple[str, str], Tensor] = {}

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor | None:
        """Entries start..stop of the flattened tensor, or None."""
        whole = self.whole.get((name, kind))
        return None if whole is None else whole[start:stop]

    def adam_step(self, name: str) -> float | None:
        """None: nothing has been trained."""
        return None


class FromMain(Fetched):
    """Weights of a model that rank 0 alone has built, handed out and let go of one by one.

    Making one is collective.

    Args:
        model: on rank 0; it loses its weights. None on other ranks.
    """

    def __init__(self, model: nn.Module | None, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks
        self.left: dict[str, Tensor] = {}
        for name, param in model.named_parameters() if model is not None else ():
            self.left[name] = param.data
            param.data = param.data.new_empty(0)
        kinds = {name: (tensor.shape, tensor.dtype) for name, tensor in self.left.items()}
        self.kinds: dict[str, tuple[torch.Size, torch.dtype]] = ranks.share(kinds)
        # One for all: of memory taken and given back weight by weight the C library keeps pieces.
        largest = max((shape.numel() * dtype.itemsize for shape, dtype in self.kinds.values()))
        size = 0 if ranks.is_main else largest
        self.received = torch.empty(size, dtype=torch.uint8, device=ranks.device)

    def fetch(self, name: str) -> None:
        """Send it to all ranks. Collective."""
        self.whole.clear()
        if name not in self.kinds:
            return
        shape, dtype = self.kinds[name]
        if self.ranks.is_main:
            whole = self.left.pop(name)
        else:
            whole = self.received[: shape.numel() * dtype.itemsize].view(dtype)
        if self.ranks.world > 1:
            whole = whole.to(self.ranks.device)
            dist.broadcast(whole, 0)
        self.whole[name, "value"] = whole.flatten()


class InParts(Fetched):
    """Whole tensors of which each rank keeps an equal part in host memory, 1 / world of all."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks
        self.sizes: dict[tuple[str, str], int] = {}
        self.kinds: dict[str, list[str]] = defaultdict(list)
        self.parts: dict[tuple[str, str], Tensor] = {}
        self.adam_steps: dict[str, float] = {}

    def keep(self, name: str, kind: str, whole: Tensor) -> None:
        """Keep this rank's part of a tensor that all ranks hold."""
        part = torch.zeros(-(-whole.numel() // self.ranks.world), dtype=whole.dtype)
        own = whole.flatten()[self.ranks.rank * part.numel() :][: part.numel()]
        part[: own.numel()] = own
        self.kinds[name].append(kind)
        self.sizes[name, kind], self.parts[name, kind] = whole.numel(), part

    def fetch(self, name: str) -> None:
        """Put together the parts of all ranks. Collective."""
        self.whole.clear()
        for kind in self.kinds.pop(name, ()):
            whole = self.parts.pop((name, kind))
            if self.ranks.world > 1:
                part = whole.to(self.ranks.device)
                whole = part.new_empty(self.ranks.world * part.numel())
                dist.all_gather_into_tensor(whole, part)
            self.whole[name, kind] = whole[: self.sizes[name, kind]]

    def adam_step(self, name: str) -> float | None:
        """The count kept for this parameter, or None."""
        return self.adam_steps.get(name)


class Births(Fetched):
    """Adapters at their birth: A as its key draws it, B zero.

    Args:
        model: with its adapters, whole or without memory.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.drawn: dict[str, tuple[torch.Size, str, int | None]] = {}  # shape, key, fan-in
        self.zero: dict[str, int] = {}
        for name, layer in adapted_layers(model):
            _, a, b = names_of(name)
            self.drawn[a] = model.get_parameter(a).shape, layer.shared_a or a, layer.fan_in
            self.zero[b] = model.get_parameter(b).numel()

    def fetch(self, name: str) -> None:
        """Draw it, on each rank the same."""
        self.whole.clear()
        if name in self.drawn:
            shape, key, fan_in = self.drawn[name]
            a = draw_a(shape, self.seed, 0, key, fan_in)  # as `add_adapters` does
            self.whole[name, "value"] = a.flatten()
        elif name in self.zero:
            self.whole[name, "value"] = torch.zeros(self.zero[name])


class Layered:
    """Several sources as one: the first that has a tensor gives it."""

    def __init__(self, *sources: Source) -> None:
        self.sources = sources

    def fetch(self, name: str) -> None:
        """In each source. Collective."""
        for source in self.sources:
            source.fetch(name)

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor | None:
        """Entries start..stop of the flattened tensor, or None."""
        pieces = (source.read(name, kind, start, stop) for source in self.sources)
        return next((piece for piece in pieces if piece is not None), None)

    def adam_step(self, name: str) -> float | None:
        """The first source's count for this parameter, or None."""
        steps = (source.adam_step(name) for source in self.sources)
        return next((step for step in steps if step is not None), None)
