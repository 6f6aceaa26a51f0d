"""`relora evaluate`: loss, perplexity and bits per byte of a run or a checkpoint, on any text."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from relora.config import Config
from relora.data.config import DataConfig, TokenizerConfig
from relora.data.corpus import source_name
from relora.data.loader import count_sequences, eval_batches
from relora.data.prepare import prepare_shards
from relora.data.shards import SPLITS, TokenShards, open_shards, shard_directory
from relora.data.text_bytes import CountedBytes
from relora.engine import deepspeed
from relora.engine.distributed import Ranks, environment_kept, lone_rank, read_ranks, read_world
from relora.engine.evaluation import Evaluation, evaluate_loss, perplexity
from relora.errors import CheckpointError, ConfigError, DataError
from relora.files import is_file, read_json
from relora.load import build_config
from relora.record.layout import RunDirectory
from relora.record.loaded import LoadedRun, load_run
from relora.record.moved import data_candidates
from relora.structure import check_context
from relora.training.preflight import check_same_shards
from relora.yaml_config import apply_override

KINDS_OF_SOURCE = tuple(f"data.source.{k}" for k in ("builtin", "files", "dataset", "saved"))
WHAT_SHARDS_HOLD = ("source", "validation_fraction")


class Text(NamedTuple):
    """What is evaluated on."""

    shards: TokenShards
    data: DataConfig
    own: bool  # the run's

    @property
    def usual_split(self) -> str:
        """What is evaluated if nothing is said: another text was held out as a whole."""
        return "validation" if self.own else "all"


class Extent(NamedTuple):
    """How much is evaluated, and how."""

    split: str  # train, validation or all
    max_sequences: int | None
    batch_size: int  # sequences of a rank's forward pass


def evaluate(
    path: Path,
    split: str | None,
    max_sequences: int | None,
    batch_size: int,
    overrides: Sequence[str] = (),
) -> int:
    """Print the token-weighted loss of the merged model in fp32.

    On one device, or as one rank of as many as the launcher's environment says: each takes its
    share of the batches, which are those of a single process.

    Args:
        split: train, validation or all; None for validation of the run's own text, and all of
            another.
        overrides: settings of the data section: where the run's shards lie (`data.dir=DIR`), or
            another text, which is then prepared with the run's tokenizer.
    """
    run, alone = load_run(path), read_world() == 1
    with environment_kept():
        ranks = lone_rank() if alone else read_ranks()
        text = find_text(run, overrides, ranks)  # may take longer than ranks wait for each other
        extent = Extent(split or text.usual_split, max_sequences, batch_size)
        if alone:
            _evaluate(run, text, extent, ranks)
            return 0
        try:
            deepspeed.init_distributed(ranks, run.config.deepspeed.timeout_minutes)
            check_same_shards(text.shards, ranks)
            newest = ranks.share(run.checkpoint.directory)  # one that trains may save in between
            with ranks.together():
                if newest != run.checkpoint.directory:
                    run = load_run(newest)
            _evaluate(run, text, extent, ranks)
        finally:
            deepspeed.leave(together=sys.exc_info()[0] is None)
    return 0


def _evaluate(run: LoadedRun, text: Text, extent: Extent, ranks: Ranks) -> None:
    """Measure, and print one line on rank 0; collective."""
    (loss, tokens, error), size, exact = measure_text(run, text, extent, ranks)
    what = extent.split if text.own else f"{source_name(text.data.source)} ({extent.split})"
    margin = f" (standard error {error:.4f})" if math.isfinite(error) else ""
    about = "" if exact else "about "  # the tokens' own bytes are not known
    bits = f"{about}{bits_per_byte(loss * tokens, size):.4f}" if size else "unknown"
    ranks.say(
        f"{run.checkpoint.directory}: {what} loss {loss:.4f} nats per token{margin}, "
        f"perplexity {perplexity(loss):.2f}, on {tokens:,} tokens; bits per byte {bits}, on "
        f"{about}{round(size):,} bytes"
    )


def measure_text(
    run: LoadedRun, text: Text, extent: Extent, ranks: Ranks
) -> tuple[Evaluation, float, bool]:
    """The loss, the bytes that the predicted tokens stand for, and whether these are exact.

    Collective; the same on every rank, and up to the order of fp64 sums for any number of them.
    """
    counted = CountedBytes(text.shards)
    model: Any = run.merged_model()
    batches = counted.watch(_batches(text, extent, ranks))
    found = evaluate_loss(model.to(ranks.device), batches, ranks)
    return found, ranks.sum([counted.bytes])[0], counted.exact


def bits_per_byte(nats: float, size: float) -> float:
    """What a text of `size` bytes costs, whatever the tokenizer: a loss in nats, summed."""
    return nats / math.log(2) / size


def _batches(text: Text, extent: Extent, ranks: Ranks) -> Iterator[tuple[Tensor, int]]:
    """Those of this rank: see `eval_batches`; `max_sequences` of all splits together."""
    length = text.data.sequence_length
    splits = [
        getattr(text.shards, name)
        for name in (SPLITS if extent.split == "all" else (extent.split,))
    ]
    long_enough = [tokens for tokens in splits if len(tokens) >= length] or splits[-1:]
    left = [count_sequences(tokens, length) for tokens in long_enough]
    most = extent.max_sequences or sum(left)
    for number, tokens in enumerate(long_enough):
        share = round(min(most, sum(left[number:])) * left[number] / sum(left[number:]))
        most -= share
        if share:
            yield from eval_batches(
                tokens,
                sequence_length=length,
                micro_batch=extent.batch_size,
                rank=ranks.rank,
                world=ranks.world,
                max_sequences=share,
            )


# --- which text -----------------------------------------------------------------------------------


def find_text(run: LoadedRun, overrides: Sequence[str], ranks: Ranks) -> Text:
    """The text to evaluate on: the run's own shards, or another text with the run's tokenizer.

    Raises:
        ConfigError: the overrides are not of the data section, or change the tokenizer.
        DataError: the text is not there, or cannot be read.
    """
    data = _data_section(run.config, overrides)
    structure = read_json(RunDirectory(run.run_dir).model_json, CheckpointError)
    check_context(structure, data.sequence_length, str(run.run_dir))
    moved = any(_key(override) == "data.dir" for override in overrides)
    if all(getattr(data, key) == getattr(run.config.data, key) for key in WHAT_SHARDS_HOLD):
        return Text(find_shards(run, data.dir if moved else None), data, own=True)
    tokenizer = TokenizerConfig(path=str(run.tokenizer_dir.resolve()))
    data = data.model_copy(update={"tokenizer": tokenizer})
    # Ranks of one machine wait for the first of them at the shards' lock.
    prepare_shards(data, seed=run.config.seed, quiet=ranks.local_rank > 0)
    return Text(open_shards(data), data, own=False)


def _data_section(config: Config, overrides: Sequence[str]) -> DataConfig:
    """The run's data section with what the overrides say; another kind of source replaces all of
    the run's own."""
    values = config.model_dump(mode="json")
    if any(_key(override) in KINDS_OF_SOURCE for override in overrides):
        values["data"]["source"] = {}
    for override in overrides:
        key = _key(override)
        if not key.startswith("data.") or key == "data.num_workers":
            raise ConfigError(
                f"{override}: relora evaluate takes where the shards are (data.dir=DIR), or "
                "another text (data.source=…), and nothing that is not about data"
            )
        if key.startswith("data.tokenizer"):
            raise ConfigError(
                f"{override}: a text is evaluated with the tokenizer that the run has; remove it"
            )
        apply_override(values, override)
    return build_config(values, "relora evaluate", read_model=False).data


def _key(override: str) -> str:
    return override.partition("=")[0].strip()


def find_shards(run: LoadedRun, directory: Path | None) -> TokenShards:
    """The shards that a checkpoint was trained on, wherever they and the run have been moved to.

    Args:
        directory: what the user calls `data.dir`.

    Raises:
        ConfigError: there are none.
        DataError: those that are there hold other tokens.
    """
    candidates = data_candidates(run.config, run.run_dir)
    if directory is not None:
        candidates = [c.model_copy(update={"dir": directory}) for c in candidates]
    by_place = {shard_directory(data): data for data in candidates}
    others = []
    for place, data in by_place.items():
        if is_file(place / "index.json"):
            shards = open_shards(data)
            if shards.fingerprint == run.checkpoint.state.data:
                return shards
            others.append(place)
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
