"""The search for a learning rate: a grid that grows while the best lies on its edge."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Search:
    """What was tried, and what came of it; a run that diverged has an infinite loss."""

    losses: dict[float, float]  # by factor, ascending
    added: int  # factors that the search has added by itself

    @property
    def best(self) -> float:
        """The factor of the lowest loss; the smallest where all have diverged."""
        return min(self.losses, key=lambda factor: self.losses[factor])

    @property
    def edge(self) -> bool:
        """Whether nothing beyond the best was tried."""
        return self.best in (min(self.losses), max(self.losses))

    @property
    def diverged(self) -> bool:
        """Whether all have."""
        return not math.isfinite(self.losses[self.best])

    def sentence(self, whose: str, key: str, rate: float, of: str = "") -> str:
        """Which rate was taken, and every one that was tried with its loss.

        Args:
            rate: what factors are of.
            of: what losses are, unless they are of one run.
        """
        tried = ", ".join(
            f"{rate * factor:.4g} ({f'{loss:.4f}' if math.isfinite(loss) else 'diverged'})"
            for factor, loss in self.losses.items()
        )
        text = f"{whose}: {key} {rate * self.best:.4g}, the best of {tried}{of}"
        if self.added:
            text += f"; {self.added} of them added because the best was at the edge"
        return text + ("; it is the edge of what was tried" if self.edge else "")


def search(factors: Sequence[float], loss_of: Callable[[float], float], extend: int) -> Search:
    """Try all factors, then as many more as needed for the best to lie between two others.

    Args:
        factors: at least two different ones.
        extend: how many may be added, each as far from the edge as the edge is from the next.
    """
    losses = {factor: loss_of(factor) for factor in sorted(set(factors))}
    found = Search(losses, 0)
    while found.edge and found.added < extend:
        tried = list(found.losses)
        edge, inner = tried[:2] if found.best == tried[0] else tried[:-3:-1]
        beyond = edge * edge / inner
        losses = {**found.losses, beyond: loss_of(beyond)}
        found = Search({factor: losses[factor] for factor in sorted(losses)}, found.added + 1)
    return found
