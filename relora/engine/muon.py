"""AdamW whose matrices take Muon's steps, under any ZeRO stage.

Muon (Jordan et al. 2024; arXiv 2502.16982) moves a matrix along its momentum with all singular
values made one: the same step in every direction that the gradients know, and one moment to keep
where Adam keeps two. It needs whole matrices, where ZeRO cuts what trains into equal parts. Those
that lie in one part are worked on there; of others every rank that has a part gathers the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from relora.lora.config import ADAPTER_GROUPS

if TYPE_CHECKING:
    from relora.engine.state import EngineState
    from relora.engine.views import ParameterView

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # x ↦ ax + bx³ + cx⁵ takes what is in (0, 1] near one
ITERATIONS = 5
MATRIX_GROUPS = ("matrices", *ADAPTER_GROUPS)
AT_ONCE = 2**24  # entries of matrices that are worked on together
UPDATE = "update"  # under which `gather_each` finds what is to be made orthogonal


def orthogonalise(matrices: Tensor) -> Tensor:
    """Matrices (…, m, n) with their singular values near one: in 0.68 … 1.14 after five iterations,
    but for those far below the largest one."""
    x = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    a, b, c = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        square = wide @ wide.mT
        wide = a * wide + (b * square + c * square @ square) @ wide
    return wide if wide.shape == x.shape else wide.mT


def step_size(shape: Sequence[int]) -> float:
    """What makes a step as large as one of AdamW is by experience: its RMS is 0.2 · the rate."""
    return 0.2 * max(shape[-2:]) ** 0.5


class Muon(torch.optim.AdamW):
    """AdamW, but for W where it trains and for A and B, which take Muon's steps.

        m ← μ·m + g,   W ← (1 − ηλ)·W − η · 0.2·√max(m, n) · orthogonalise(g + μ·m)

    Attributes:
        matrices: ids of the parameters that Muon moves. Their state is `step` and `exp_avg`.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], momentum: float = 0.95, **defaults: Any
    ) -> None:
        """Groups as `parameter_groups` makes them; defaults as AdamW's."""
        super().__init__(groups, **defaults)
        for group in self.param_groups:
            if group.get("name") in MATRIX_GROUPS:
                group["momentum"] = momentum
        self.matrices = {
            id(param)
            for group in self.param_groups
            for param in group["params"]
            if group.get("momentum") is not None
        }
        self._state: EngineState | None = None
        self._views: dict[int, list[ParameterView]] = {}  # of matrices, by the tensor they lie in
        self._cut: set[str] = set()  # names of those that several ranks have parts of

    def attach(self, state: EngineState) -> None:
        """Tell it where every matrix lies on which rank. Collective, before the first step."""
        self._state = state
        views = [view for view in state if id(view.param) in self.matrices]
        self._views = {id(view.flat): [] for view in views}
        for view in views:
            self._views[id(view.flat)].append(view)
        if state.sharded and views:
            holders = torch.tensor([int(view.count > 0) for view in views], device=state.device)
            dist.all_reduce(holders)
            self._cut = {v.name for v, n in zip(views, holders.tolist(), strict=True) if n > 1}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update. Collective where ZeRO has cut a matrix."""
        spectral = [group for group in self.param_groups if group.get("momentum") is not None]
        held = [group["params"] for group in spectral]
        for group in spectral:
            group["params"] = []
        super().step(closure)
        for group, params in zip(spectral, held, strict=True):
            group["params"] = params
            for flat in params:
                if flat.grad is not None:
                    self._move(flat, flat.grad, group)

    def _move(self, flat: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Update what lies in one tensor of a group: a matrix, or ZeRO's part of many."""
        assert self._state is not None, "attach() comes before the first step"
        views = self._views[id(flat)]
        momentum, rate = group["momentum"], group["lr"]
        state: dict[str, Tensor] = self.state[flat]
        if not state:
            state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(flat)}
        state["step"] += 1
        state["exp_avg"].mul_(momentum).add_(gradient)
        state[UPDATE] = gradient.add(state["exp_avg"], alpha=momentum)
        flat.mul_(1 - rate * group["weight_decay"])
        for block in _blocks([v for v in views if v.name not in self._cut and v.count]):
            update = state[UPDATE].view(-1)
            whole = [update.narrow(0, v.offset, v.count).view(v.shape) for v in block]
            self._apply(flat, block, whole, rate)
        for block in _blocks([view for view in views if view.name in self._cut]):
            self._apply(flat, block, list(self._state.gather_each(block, UPDATE)), rate)
        del state[UPDATE]

    def _apply(
        self, flat: Tensor, block: list[ParameterView], whole: list[Tensor], rate: float
    ) -> None:
        """Move what this rank has of matrices of one shape: made orthogonal in one batch, for a
        product each is a launch each."""
        here = [(view, x) for view, x in zip(block, whole, strict=True) if view.count]
        if not here:
            return
        size = rate * step_size(block[0].shape)
        for (view, _), made in zip(
            here, orthogonalise(torch.stack([x for _, x in here])), strict=True
        ):
            own = made.flatten()[view.start : view.start + view.count]
            target = flat.view(-1).narrow(0, view.offset, view.count)
            target.add_(own.to(target.device), alpha=-size)


def _blocks(views: Sequence[ParameterView]) -> list[list[ParameterView]]:
    """Matrices of one shape that are worked on together: as many as there is room for, the same
    ones on every rank where ZeRO has cut them."""
    blocks: list[list[ParameterView]] = []
    room, shape = 0, None
    for view in sorted(views, key=lambda view: tuple(view.shape)):
        if view.numel > room or view.shape != shape:
            blocks.append([])
            room, shape = AT_ONCE, view.shape
        blocks[-1].append(view)
        room -= view.numel
    return blocks
