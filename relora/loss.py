"""The loss of next tokens without all logits at once.

The output head and its loss are computed for a chunk of tokens at a time, forward and backward
pass together, so that no more than chunk × vocabulary logits ever lie in memory, at ten bytes each;
the backward pass only multiplies. Products are as many as without chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # a label that is no target, as everywhere in torch and transformers


class ChunkedHead(nn.Module):
    """Mixed into an output head: within `measuring` it gives the loss in place of logits."""

    loss_labels: Tensor | None = None
    loss_of_rows: list[Tensor] | None = None  # takes each row's loss too, where there is a list
    loss_chunk: int

    @contextmanager
    def measuring(self, labels: Tensor) -> Iterator[None]:
        """Within it the head gives the mean loss of predicting labels (rows, tokens), a scalar.

        They are as transformers takes them: those of the input, not shifted, −100 where none is.
        """
        self.loss_labels = labels
        try:
            yield
        finally:
            self.loss_labels = None

    def forward(self, states: Tensor) -> Tensor:
        """(rows, tokens, d) → logits (rows, tokens, vocabulary), or the loss."""
        if self.loss_labels is None:
            return super().forward(states)
        following = F.pad(self.loss_labels, (0, 1), value=IGNORED)[..., 1:]
        head, params, chunk = super().forward, list(self.parameters()), self.loss_chunk
        if self.loss_of_rows is not None:
            pairs = zip(states.split(1), following.split(1), strict=True)
            self.loss_of_rows += [next_token_loss(*pair, head, params, chunk) for pair in pairs]
        return next_token_loss(states, following, head, params, chunk)


class ChunkedModel(nn.Module):
    """Mixed into a causal language model whose logits are those of its `ChunkedHead`."""

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """The model's own output; with labels it has a loss and no logits."""
        if labels is None:
            return super().forward(*args, **kwargs)
        head: Any = self.get_output_embeddings()  # type: ignore[operator]
        with head.measuring(labels):
            output = super().forward(*args, **kwargs)
        values = dict(output)
        return type(output)(loss=values.pop("logits"), **values)


def next_token_loss(
    states: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    params: Sequence[Tensor],
    chunk: int,
) -> Tensor:
    """Mean cross-entropy in nats of `head(states)` over the targets that are not −100.

    Args:
        states: (…, d).
        targets: (…), token ids.
        head: gives logits (n, vocabulary) of states (n, d).
        params: of the head, whose gradients are wanted where they require any.
        chunk: tokens at a time.
    """
    rows, ids = states.reshape(-1, states.shape[-1]), targets.reshape(-1)
    loss: Tensor = _Chunked.apply(rows, ids, head, chunk, torch.is_grad_enabled(), *params)
    return loss


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        targets: Tensor,
        head: Callable[[Tensor], Tensor],
        chunk: int,
        training: bool,
        *params: Tensor,
    ) -> Tensor:
        wanted = [p for p in params if p.requires_grad]
        d_states = torch.empty_like(states) if training else None
        d_params: list[Tensor] = []
        wide = torch.promote_types(states.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=states.device)
        for start in range(0, len(states), chunk):
            piece, ids = states[start : start + chunk], targets[start : start + chunk]
            if d_states is None:
                total += _log_probabilities(head(piece), ids)[1]
                continue
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_same, _same):
                piece = piece.detach().requires_grad_(True)
                logits = head(piece)
            d_logits, loss = _log_probabilities(logits.detach(), ids)
            total += loss
            d_logits.exp_()
            d_logits[torch.arange(len(ids), device=ids.device), ids.clamp_min(0)] -= 1
            d_logits.mul_((ids != IGNORED).unsqueeze(-1))
            d_logits = d_logits.to(logits.dtype)
            found = torch.autograd.grad(logits, [piece, *wanted], d_logits)
            del logits, d_logits
            d_states[start : start + chunk] = found[0]
            if not d_params:
                d_params = list(found[1:])
            else:
                for sum_, more in zip(d_params, found[1:], strict=True):
                    sum_.add_(more)
        count = (targets != IGNORED).sum()
        ctx.wanted = [p.requires_grad for p in params]
        ctx.save_for_backward(count, d_states, *d_params)
        return total / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # The mean's divisor and the loss scale come last, so that half precision's smallest
        # gradients of logits are those of single tokens.
        count, d_states, *d_params = ctx.saved_tensors
        factor = gradient / count
        found = iter(d_params)
        of_params = [next(found) * factor if wanted else None for wanted in ctx.wanted]
        return d_states * factor.to(d_states.dtype), None, None, None, None, *of_params


def _log_probabilities(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probabilities in fp32 or finer, the sum of the targets' losses)."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    found = F.log_softmax(logits, dim=-1, dtype=wide)
    return found, F.nll_loss(found, targets, ignore_index=IGNORED, reduction="sum")


def _same(tensor: Tensor) -> Tensor:
    # Nothing of a chunk outlives it, whatever hooks the forward pass runs under.
    return tensor
