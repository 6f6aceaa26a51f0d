"""How A and B start again after a merge: pure functions of what a layer was.

A rule is a function `Context → (A, B)`. One that leaves the model's function as the merge left it
returns B = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from relora.lora.draws import draw_a


class Context(NamedTuple):
    """What a rule may know of a layer at its restart. Tensors are whole and fp32 on every rank."""

    name: str  # of A, in full; with seed and merge it keys every draw
    seed: int
    merge: int  # number of this merge, from 1
    scale: float  # s
    a: Tensor  # (r, in) as it was merged
    b: Tensor  # (out, r)
    # (k, in) right directions of the gradient of W, for rules that follow it; None unless the
    # caller has measured them
    directions: Tensor | None = None


Reinit = Callable[[Context], tuple[Tensor, Tensor]]


def kaiming(context: Context) -> tuple[Tensor, Tensor]:
    """A as at its birth, drawn anew; B = 0. The rule of ReLoRA (arXiv 2307.05695)."""
    a = draw_a(context.a.shape, context.seed, context.merge, context.name)
    return a, torch.zeros(context.b.shape)
