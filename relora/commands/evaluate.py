"""`relora evaluate`: loss and perplexity of a run or a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from relora.errors import DataError
from relora.subject import merged_model, open_subject


def evaluate(subject: Path, split: str, max_sequences: int | None, batch_size: int) -> int:
    """Print the token-weighted loss of the merged model in fp32, on one device."""
    opened = open_subject(subject)

    from relora.data.loader import eval_batches
    from relora.data.shards import open_shards
    from relora.runtime.distributed import lone_rank
    from relora.runtime.evaluation import evaluate_loss, perplexity

    shards = open_shards(opened.config.data)
    if opened.checkpoint.state["data"] != shards.fingerprint:
        raise DataError(
            f"{shards.directory}: holds other tokens than {opened.checkpoint.directory} was "
            "trained on; put the old shards back"
        )
    ranks = lone_rank()
    batches = eval_batches(
        getattr(shards, split),
        sequence_length=opened.config.data.sequence_length,
        micro_batch=batch_size,
        rank=0,
        world=1,
        max_sequences=max_sequences,
    )
    model: Any = merged_model(opened)
    loss, tokens = evaluate_loss(model.to(ranks.device), batches, ranks)
    print(
        f"{opened.checkpoint.directory}: {split} loss {loss:.4f} nats per token, "
        f"perplexity {perplexity(loss):.2f}, on {tokens:,} tokens"
    )
    return 0
