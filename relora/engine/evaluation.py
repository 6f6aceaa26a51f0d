"""Token-weighted loss over a split, the same for any world size and batch size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from relora.engine.distributed import Ranks
from relora.loss import ChunkedHead


class Loss(NamedTuple):
    """What a micro-batch is trained on, and what it is measured by; all are scalars."""

    total: Tensor  # with the model's own auxiliary losses
    cross_entropy: Tensor  # mean over predicted tokens in nats, without a gradient
    auxiliary: Tensor | None = None  # the rest, such as the balance of experts; most have none


def loss_of(model: Any, batch: Tensor) -> Loss:
    """The losses of a batch (rows, tokens); the model shifts the labels."""
    output = model(input_ids=batch, labels=batch)
    total = output.loss
    if getattr(output, "aux_loss", None) is None:
        return Loss(total, total.detach())
    measured = cross_entropy(output.logits.detach(), batch)
    return Loss(total, measured, total.detach() - measured)


def cross_entropy(logits: Tensor, batch: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats: logits (rows, tokens, vocabulary), batch their input.

    transformers' own function, which models call: equal to their loss bit for bit where they add
    nothing to it.
    """
    return ForCausalLMLoss(logits, batch, vocab_size=logits.shape[-1])


class Evaluation(NamedTuple):
    """Over all ranks."""

    loss: float  # mean cross-entropy per predicted token in nats
    tokens: int  # predicted ones
    error: float  # standard error of the loss, from how far batches differ; NaN for fewer than two


@torch.no_grad()
def evaluate_loss(
    model: Any,
    batches: Iterable[tuple[Tensor, int]],
    ranks: Ranks,
    by_sequence: list[float] | None = None,
) -> Evaluation:
    """The loss of a split, or of some sequences of it.

    Auxiliary losses that a model is trained on are no part of it.

    Args:
        model: a model, or an engine (then this is collective).
        batches: (rows, tokens) with the number of real rows; as many batches on every rank.
        by_sequence: a list that gets the loss of each sequence, in their order in the split, the
            same on every rank. Nothing of a model that gives neither logits nor such losses.
    """
    rows_of = _RowLosses(model) if by_sequence is not None else None
    was_training = model.training
    model.eval()
    total = tokens = 0.0
    parts: list[tuple[float, int]] = []  # of batches: loss, predicted tokens
    for batch, real in batches:
        # A rank without rows left still takes part in the forward pass, with one that counts 0.
        rows = batch[: max(real, 1)].to(ranks.device)
        predicted = real * (rows.shape[1] - 1)
        output = model(input_ids=rows, labels=rows)
        if rows_of:
            rows_of.take(output.logits, rows, real)
        whole = output.logits is not None  # a model that chunks its loss has no other
        loss = cross_entropy(output.logits, rows) if whole else output.loss
        mean = loss.item()
        total += mean * predicted
        tokens += predicted
        if real:
            parts.append((mean, predicted))
    model.train(was_training)
    if by_sequence is not None and rows_of:
        # Each batch lies over the ranks, in their order.
        for at_once in zip(*ranks.gather(rows_of.close()), strict=True):
            by_sequence += itertools.chain(*at_once)
    total, tokens = ranks.sum([total, tokens])
    return Evaluation(total / tokens, int(tokens), _error(parts, total / tokens, tokens, ranks))


class _RowLosses:
    """The loss of each real row, batch by batch: from logits, or from a head that chunks them."""

    def __init__(self, model: Any) -> None:
        module = getattr(model, "module", model)
        head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
        self.head = head if isinstance(head, ChunkedHead) else None
        self.found: list[list[float]] = []
        if self.head is not None:
            self.head.loss_of_rows = []

    def take(self, logits: Tensor | None, rows: Tensor, real: int) -> None:
        """Those of the batch that the model has just been given."""
        losses: Iterable[Tensor] = []
        if logits is not None:
            losses = map(cross_entropy, logits.split(1), rows.split(1))
        elif self.head is not None and self.head.loss_of_rows is not None:
            losses, self.head.loss_of_rows = self.head.loss_of_rows, []
        made = list(losses)[:real]
        self.found.append(torch.stack(made).tolist() if made else [])

    def close(self) -> list[list[float]]:
        """All of them; the head gives no more."""
        if self.head is not None:
            self.head.loss_of_rows = None
        return self.found


def _error(parts: list[tuple[float, int]], mean: float, tokens: float, ranks: Ranks) -> float:
    """Standard error of a mean over parts, each weighted by its tokens.

    Of batches and not of single sequences: a model that chunks its loss gives no more, and
    sequences of a batch, which lie side by side in the split, need not be independent.
    """
    squares = sum((n / tokens * (loss - mean)) ** 2 for loss, n in parts)
    squares, count = ranks.sum([squares, float(len(parts))])
    return math.sqrt(squares * count / (count - 1)) if count > 1 else math.nan


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
