"""Adapters of each cycle, kept as they are merged: `relora.keep_adapters`."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import SafetensorError

from relora.errors import CheckpointError
from relora.files import making
from relora.lora.layers import adapted_layers
from relora.lora.names import names_of
from relora.lora.peft_format import TASKS, AdapterWeights, write_adapter
from relora.record.layout import RunDirectory
from relora.training.run import Run


def keep_adapters(run: Run, cycle: int) -> None:
    """Write what A and B are now, as those of a cycle, from 1. Collective; rank 0 writes.

    Raises:
        CheckpointError: they cannot be written.
    """
    layers = dict(adapted_layers(run.state.model))
    names = [names_of(name) for name in layers]
    factors = run.state.gather([run.state[x] for n in names for x in (n.a, n.b)], "value")
    pairs = zip(factors[::2], factors[1::2], strict=True)
    weights = AdapterWeights(
        dict(zip(layers, pairs, strict=True)),
        {name: layer.scale for name, layer in layers.items()},
        {},
    )
    directory = RunDirectory(run.config.run_dir).cycle(cycle)
    with run.ranks.together():
        if run.ranks.is_main:
            try:
                directory.parent.mkdir(exist_ok=True)
                with making(directory, replace=True) as temporary:
                    write_adapter(weights, run.state.model, temporary, None, TASKS["CausalLM"])
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{directory}: cannot be written: {error}; the checkpoints are intact; make "
                    "room, and run the same command again, or take relora.keep_adapters: false"
                ) from None


def drop_later_cycles(run_dir: Path, merges: int) -> None:
    """Remove adapters of cycles that come again: all but those of so many merges. Rank 0 only."""
    files = RunDirectory(run_dir)
    if files.adapters.is_dir():
        kept = {files.cycle(number + 1).name for number in range(merges)}
        for directory in files.adapters.glob("cycle_*"):
            if directory.name not in kept:
                shutil.rmtree(directory)
