"""`relora evaluate`: loss and perplexity of a run or a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from relora.data.loader import eval_batches
from relora.data.shards import TokenShards, open_shards, shard_directory
from relora.engine.distributed import lone_rank
from relora.engine.evaluation import evaluate_loss, perplexity
from relora.errors import ConfigError, DataError
from relora.files import is_file
from relora.record.loaded import LoadedRun, load_run
from relora.record.moved import data_candidates


def evaluate(
    path: Path,
    split: str,
    max_sequences: int | None,
    batch_size: int,
    overrides: Sequence[str] = (),
) -> int:
    """Print the token-weighted loss of the merged model in fp32, on one device.

    Args:
        overrides: `data.dir=DIR`, where the run's shards lie if they are not found.
    """
    run = load_run(path)
    ranks = lone_rank()
    batches = eval_batches(
        getattr(find_shards(run, overrides), split),
        sequence_length=run.config.data.sequence_length,
        micro_batch=batch_size,
        rank=0,
        world=1,
        max_sequences=max_sequences,
    )
    model: Any = run.merged_model()
    loss, tokens, error = evaluate_loss(model.to(ranks.device), batches, ranks)
    margin = f" (standard error {error:.4f})" if math.isfinite(error) else ""
    print(
        f"{run.checkpoint.directory}: {split} loss {loss:.4f} nats per token{margin}, "
        f"perplexity {perplexity(loss):.2f}, on {tokens:,} tokens"
    )
    return 0


def find_shards(run: LoadedRun, overrides: Sequence[str]) -> TokenShards:
    """The shards that a checkpoint was trained on, wherever they and the run have been moved to.

    Raises:
        ConfigError: there are none, or the overrides are more than `data.dir`.
        DataError: those that are there hold other tokens.
    """
    candidates = data_candidates(run.config, run.run_dir)
    for override in overrides:
        key, _, value = override.partition("=")
        if key != "data.dir" or not value:
            raise ConfigError(f"{override}: relora evaluate takes data.dir=DIR and nothing else")
        candidates = [c.model_copy(update={"dir": Path(value)}) for c in candidates]
    by_place = {shard_directory(data): data for data in candidates}
    others = []
    for directory, data in by_place.items():
        if is_file(directory / "index.json"):
            shards = open_shards(data)
            if shards.fingerprint == run.checkpoint.state.data:
                return shards
            others.append(directory)
    name = run.checkpoint.directory
    if others:
        raise DataError(
            f"{others[0]}: holds other tokens than {name} was trained on; put the old shards back, "
            "or say where they are: data.dir=DIR"
        )
    raise ConfigError(
        f"data: there are no token shards of {name} at {', '.join(map(str, by_place))}; say where "
        "they are (data.dir=DIR), or make them anew from the same text: relora prepare CONFIG"
    )
