"""Where weights and optimizer state come from when an engine is filled: memory, an earlier engine,
or (see `checkpoint.py`) files."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn


class Source(Protocol):
    """Tensors by parameter name and kind (`value`, `exp_avg`, `exp_avg_sq`), read in pieces."""

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor | None:
        """fp32 entries start..stop of the flattened tensor, or None if the source has none."""

    def adam_step(self, name: str) -> float | None:
        """Updates that Adam has counted for this parameter, or None."""


class Tensors:
    """A source in memory: whole tensors by (name, kind), Adam steps by name."""

    def __init__(
        self, tensors: dict[tuple[str, str], Tensor], adam_steps: dict[str, float] | None = None
    ) -> None:
        self.tensors = tensors
        self.adam_steps = adam_steps or {}

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor | None:
        """Entries start..stop of the flattened tensor, or None."""
        whole = self.tensors.get((name, kind))
        return None if whole is None else whole.flatten()[start:stop]

    def adam_step(self, name: str) -> float | None:
        """The count kept for this parameter, or None."""
        return self.adam_steps.get(name)


class Layered:
    """Several sources as one: the first that has a tensor gives it."""

    def __init__(self, *sources: Source) -> None:
        self.sources = sources

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor | None:
        """Entries start..stop of the flattened tensor, or None."""
        pieces = (source.read(name, kind, start, stop) for source in self.sources)
        return next((piece for piece in pieces if piece is not None), None)

    def adam_step(self, name: str) -> float | None:
        """The first source's count for this parameter, or None."""
        steps = (source.adam_step(name) for source in self.sources)
        return next((step for step in steps if step is not None), None)


def weights_of(model: nn.Module) -> Tensors:
    """The weights of a model that no engine holds yet, as a source (no copies)."""
    return Tensors({(name, "value"): p.detach() for name, p in model.named_parameters()})
