"""Token-weighted loss over a split, the same for any world size and batch size."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from relora.runtime.distributed import Ranks


def loss_of(model: Any, batch: Tensor) -> Tensor:
    """Mean next-token loss in nats of a batch (rows, tokens); the model shifts the labels."""
    return model(input_ids=batch, labels=batch).loss


@torch.no_grad()
def evaluate_loss(
    model: Any, batches: Iterable[tuple[Tensor, int]], ranks: Ranks
) -> tuple[float, int]:
    """(mean loss per predicted token in nats, number of predicted tokens), over all ranks.

    Args:
        model: a model, or an engine (then this is collective).
        batches: (rows, tokens) with the number of real rows; as many batches on every rank.
    """
    was_training = model.training
    model.eval()
    total = tokens = 0.0
    for batch, real in batches:
        # A rank without rows left still takes part in the forward pass, with one that counts 0.
        rows = batch[: max(real, 1)].to(ranks.device)
        predicted = real * (rows.shape[1] - 1)
        total += loss_of(model, rows).item() * predicted
        tokens += predicted
    model.train(was_training)
    total, tokens = ranks.sum([total, tokens])
    return total / tokens, int(tokens)


@torch.no_grad()
def continue_greedily(model: Any, ids: Tensor, count: int) -> Tensor:
    """`count` times the likeliest next token after ids (1, tokens): (1, tokens + count).

    Without a cache of keys and values, so that an engine of any stage can do it (collective then).
    """
    was_training = model.training
    model.eval()
    for _ in range(count):
        following = model(input_ids=ids).logits[:, -1:].argmax(dim=-1)
        ids = torch.cat([ids, following], dim=1)
    model.train(was_training)
    return ids


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
