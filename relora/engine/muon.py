"""AdamW whose matrices take Muon's steps, under any ZeRO stage.

Muon (Jordan et al. 2024; arXiv 2502.16982) moves a matrix along its momentum with all singular
values made one: the same step in every direction that the gradients know, and one moment to keep
where Adam keeps two. It needs whole matrices, where ZeRO cuts what trains into equal parts. Those
that lie in one part are worked on there; of others every rank that has a part gathers the whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from relora.errors import ConfigError
from relora.lora.config import ADAPTER_GROUPS, GROUPS

if TYPE_CHECKING:
    from relora.engine.state import EngineState
    from relora.engine.views import ParameterView

    Block = list[tuple[Tensor, ParameterView]]  # each in the tensor that the optimizer steps

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # x ↦ ax + bx³ + cx⁵ takes what is in (0, 1] near one
ITERATIONS = 5
MATRIX_GROUPS = ("matrices", *ADAPTER_GROUPS)
WORKED_AT_ONCE = 2**24  # entries of matrices that are worked on together
UPDATE = "update"  # under which `gather_each` finds what is to be made orthogonal


def orthogonalise(matrices: Tensor) -> Tensor:
    """Matrices (…, m, n) with their singular values near one: in 0.68 … 1.14 after five iterations,
    but for those far below the largest one."""
    x = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    a, b, c = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        square = wide @ wide.mT
        product = (b * square + c * square @ square) @ wide
        wide.mul_(a).add_(product)  # that is x, in place
        del product  # or the next one would lie beside it
    return x


def work_entries(shape: Sequence[int]) -> int:
    """How many entries, of what it gives among them, `orthogonalise` holds at most for a shape."""
    small, large = sorted(shape[-2:])
    whole = math.prod(shape)
    square = whole // large * small
    return max(2 * whole + 2 * square, whole + 4 * square)


def step_size(shape: Sequence[int]) -> float:
    """What makes a step as large as one of AdamW is by experience: its RMS is 0.2 · the rate."""
    return 0.2 * max(shape[-2:]) ** 0.5


class Muon(torch.optim.AdamW):
    """AdamW, but for W where it trains and for A and B, which take Muon's steps.

        m ← μ·m + g,   W ← (1 − ηλ)·W − η · 0.2·√max(m, n) · orthogonalise(g + μ·m)

        optimizer = relora.Muon(relora.parameter_groups(model), lr=1e-3)
        state = relora.EngineState(model, optimizer)  # says where each matrix lies; before any step

    Attributes:
        matrices: ids of the parameters that Muon moves. Their state is `step` and `exp_avg`.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], momentum: float = 0.95, **defaults: Any
    ) -> None:
        """Groups as `parameter_groups` makes them; defaults as AdamW's.

        Raises:
            ConfigError: no group has a name of theirs, so nothing says what is a matrix.
        """
        super().__init__(groups, **defaults)
        # Of a GradScaler fused steps would take scaled gradients, which it else unscales before.
        self._step_supports_amp_scaling = False
        if not any(group.get("name") in GROUPS for group in self.param_groups):
            raise ConfigError(
                "Muon: its groups say by their names which parameters are matrices; take "
                "relora.parameter_groups(model)"
            )
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
    def step(self, closure: Any = None) -> Any:
        """One update; returns what the closure does. Collective where ZeRO has cut a matrix.

        Raises:
            ConfigError: no EngineState has been made of the model and this optimizer.
        """
        if self._state is None:
            raise ConfigError(
                "Muon: make relora.EngineState(model, optimizer), or of the engine, before the "
                "first step: it says where each matrix lies"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        spectral = [group for group in self.param_groups if group.get("momentum") is not None]
        held = [group["params"] for group in spectral]
        for group in spectral:
            group["params"] = []
        super().step()
        for group, params in zip(spectral, held, strict=True):
            group["params"] = params
            self._move([flat for flat in params if flat.grad is not None], group)
        return loss

    def _move(self, flats: list[Tensor], group: dict[str, Any]) -> None:
        """Update a group's tensors: a matrix each, or ZeRO's part of many."""
        assert self._state is not None
        if not flats:
            return
        momentum, rate = group["momentum"], group["lr"]
        gradients = [flat.grad for flat in flats if flat.grad is not None]
        moments = self._moments(flats)
        torch._foreach_mul_(moments, momentum)
        torch._foreach_add_(moments, gradients)
        torch._foreach_mul_(flats, 1 - rate * group["weight_decay"])
        whole, cut = self._by_holders(flats)
        for block in _blocks(whole):
            update = torch.stack([_part(flat.grad, view).view(view.shape) for flat, view in block])
            moment = [_part(self.state[f]["exp_avg"], v).view(v.shape) for f, v in block]
            self._apply(block, update.add_(torch.stack(moment), alpha=momentum), rate)
        has_cut = {id(flat) for flat, _ in cut}
        for flat, gradient, mean in zip(flats, gradients, moments, strict=True):
            if id(flat) in has_cut:
                # ZeRO's own copy, which nobody reads again.
                self.state[flat][UPDATE] = gradient.add_(mean, alpha=momentum)
        for block in _blocks(cut):
            gathered = self._state.gather_each([view for _, view in block], UPDATE)
            here = [(at, x) for at, x in zip(block, gathered, strict=True) if at[1].count]
            if here:
                self._apply([at for at, _ in here], torch.stack([x for _, x in here]), rate)
        for flat in flats:
            self.state[flat].pop(UPDATE, None)

    def _moments(self, flats: list[Tensor]) -> list[Tensor]:
        """Of a step that is now counted."""
        for flat in flats:
            if not self.state[flat]:
                self.state[flat] |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(flat)}
            self.state[flat]["step"] += 1
        return [self.state[flat]["exp_avg"] for flat in flats]

    def _by_holders(self, flats: list[Tensor]) -> tuple[Block, Block]:
        """Matrices that are whole on this rank, and those of which several ranks have parts."""
        views = [(flat, view) for flat in flats for view in self._views[id(flat)]]
        whole = [(f, v) for f, v in views if v.name not in self._cut and v.count]
        return whole, [(f, v) for f, v in views if v.name in self._cut]

    def _apply(self, block: Block, updates: Tensor, rate: float) -> None:
        """Move what this rank has of matrices of one shape, whose updates (matrices, …) are made
        orthogonal as one batch: on a GPU each product is a launch."""
        targets = [_part(flat, view) for flat, view in block]
        own = [
            x.flatten()[view.start : view.start + view.count].to(target.device)
            for (_, view), x, target in zip(block, orthogonalise(updates), targets, strict=True)
        ]
        torch._foreach_add_(targets, own, alpha=-rate * step_size(updates.shape))


def _part(flat: Tensor | None, view: ParameterView) -> Tensor:
    """What a tensor laid out as `flat` holds of a matrix."""
    assert flat is not None
    return flat.view(-1).narrow(0, view.offset, view.count)


def _blocks(views: Block) -> list[Block]:
    together = worked_together([view.shape for _, view in views])
    return [[views[number] for number in block] for block in together]


def worked_together(shapes: Sequence[Sequence[int]]) -> list[list[int]]:
    """Matrices of one shape, by number, that are worked on together: as many as there is room for,
    the same ones on every rank where ZeRO has cut them."""
    blocks: list[list[int]] = []
    room, last = 0, None
    for number in sorted(range(len(shapes)), key=lambda number: tuple(shapes[number])):
        shape = shapes[number]
        if math.prod(shape) > room or shape != last:
            blocks.append([])
            room, last = WORKED_AT_ONCE, shape
        blocks[-1].append(number)
        room -= math.prod(shape)
    return blocks
