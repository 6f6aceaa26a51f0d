"""Compiled blocks: the same losses, one graph a phase, and nothing compiled anew at a merge."""

from __future__ import annotations

import functools
import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from conftest import TINY_GPT2
from ranks import Scenario, Unasked, run_ranks
from relora.engine import deepspeed
from relora.errors import ConfigError
from relora.model import build_model
from relora.structure import ModelConfig
from relora.training.compiled import compile_blocks, find_blocks
from relora.training.loop import train_run
from relora.training.phases import Phases, update
from relora.training.start import start_run
from test_method_reference import make_run_dir, settings, shards

BIRTH, MERGES, STEPS = 3, (7, 11, 15), 17  # of `settings`


class Trained(NamedTuple):
    """What a run has left."""

    losses: list[float]
    graphs: list[int]  # compiled so far, after each update
    breaks: dict[str, int]


def trained(
    ranks: Any, model: str, run_dir: str, changes: dict[str, Any], backend: str = "aot_eager"
) -> Trained:
    """A run with or without `train.compile`, evaluated and merged on its way."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    from relora.training import start

    torch._dynamo.reset()
    counters.clear()
    start.compile_blocks = functools.partial(compile_blocks, backend=backend)
    config = settings(model, run_dir, changes)
    make_run_dir(config, ranks)
    losses, graphs = [], []

    def watching(*arguments: Any) -> Any:
        result = update(*arguments)
        losses.append(result.loss)
        graphs.append(counters["stats"]["unique_graphs"])
        return result

    run = start_run(config, shards(), ranks)  # type: ignore[arg-type]
    train_run(run, Unasked(), Phases(update=watching))  # type: ignore[arg-type]
    run.metrics.close()
    deepspeed.destroy(run.engine)
    return Trained(losses, graphs, dict(counters["graph_break"]))


CELLS: dict[str, dict[str, Any]] = {
    "effective": {"lora.graph": "effective"},
    "low rank": {"lora.graph": "low_rank"},
    "sharded": {"deepspeed.zero_stage": 2, "lora.graph": "effective"},
    "bf16": {"deepspeed.precision": "bf16", "lora.graph": "effective"},
    "checkpointed": {"lora.graph": "effective", "model.gradient_checkpointing": True},
}
DECAY = {"lora.decay": "merged", "optimizer.weight_decay": 0.1}


def scenario(
    name: str, model: Path, root: Path, compiled: bool, backend: str = "aot_eager"
) -> Scenario:
    changes = {
        "deepspeed.zero_stage": 0,
        "batch.micro_batch_size": 1,
        "train": {"steps": STEPS, "compile": "blocks" if compiled else None, "eval_every": 5},
        **DECAY,
        **CELLS[name],
    }
    run_dir = root / f"{name}_{compiled}".replace(" ", "_")
    return Scenario(f"{name} {compiled}", trained, (str(model), str(run_dir), changes, backend))


@pytest.fixture(scope="module")
def runs(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name → the run without a compiler, and the one with it."""
    root = tmp_path_factory.mktemp("compiled")

    @cache
    def launch(name: str) -> list[Trained]:
        cells = [scenario(name, tiny_llama, root, c) for c in (False, True)]
        outcomes = run_ranks(1, cells, 300)
        return [outcomes[cell.name][0] for cell in cells]

    return launch


def check(plain: Trained, compiled: Trained, tolerance: float) -> None:
    assert set(plain.graphs) == {0}
    # One for the blocks of full rank, another once they have adapters; merges, decays, evaluations
    # and micro-batches bring none.
    assert compiled.graphs == [1] * BIRTH + [2] * (STEPS - BIRTH)
    assert compiled.breaks == {}
    assert len(compiled.losses) == STEPS
    assert compiled.losses == pytest.approx(plain.losses, rel=tolerance)


@pytest.mark.parametrize(
    "name",
    [n if n in ("sharded", "bf16") else pytest.param(n, marks=pytest.mark.slow) for n in CELLS],
)
def test_a_merge_and_a_decay_compile_nothing_and_losses_stay(name: str, runs: Any) -> None:
    plain, compiled = runs(name)
    check(plain, compiled, 5e-3 if name == "bf16" else 1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_torchs_own_compiler_on_two_ranks(tiny_llama: Path, tmp_path: Path) -> None:
    names = ("effective", "low rank", "sharded", "bf16")
    cells = [
        scenario(name, tiny_llama, tmp_path, compiled, "inductor")
        for name in names
        for compiled in (False, True)
    ]
    found = run_ranks(2, cells, 900)
    for name in names:
        for plain, compiled in zip(found[f"{name} False"], found[f"{name} True"], strict=True):
            check(plain, compiled, 1e-2 if name == "bf16" else 1e-5)


def test_blocks_that_are_not_known_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.compile: the blocks of Linear are not known"):
        find_blocks(nn.Linear(2, 2))
    path = tmp_path / "gpt2.json"
    path.write_text(json.dumps(TINY_GPT2))
    model = build_model(ModelConfig(config=path), seed=0)
    compile_blocks(model, torch.float32, "eager")
    assert len(find_blocks(model)) == TINY_GPT2["n_layer"]
