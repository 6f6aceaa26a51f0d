"""What the host reads of a step: one tensor, whatever the stage, the ranks and the accumulation."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from host_reads import HostReads
from ranks import Outcomes, Scenario, Unasked, run_ranks
from relora.engine import deepspeed
from relora.engine.evaluation import loss_of
from relora.training.loop import train_run
from relora.training.phases import Phases, update
from relora.training.start import start_run
from test_method_reference import make_run_dir, settings, shards

# Stage and micro-batches of a step; one that reads once with four of them does so with one.
OFTEN, RARE = [(0, 1), (0, 4), (1, 4), (2, 4), (3, 4)], [(1, 1), (2, 1), (3, 1)]
STEPS = 6


def count_reads(
    ranks: Any, model: str, run_dir: str, changes: dict[str, Any], curious: bool = False
) -> list[list[str]]:
    """Places of the reads from each update of a run to the next, with all that the loop does."""
    config = settings(model, run_dir, changes)
    make_run_dir(config, ranks)
    starts: list[int] = []
    run = start_run(config, shards(), ranks)  # type: ignore[arg-type]
    with HostReads() as reads:

        def counting(*arguments: Any) -> Any:
            starts.append(len(reads.places))
            return update(*arguments, *([curious_loss] if curious else []))

        train_run(run, Unasked(), Phases(update=counting))  # type: ignore[arg-type]
    run.metrics.close()
    deepspeed.destroy(run.engine)
    return [reads.places[a:b] for a, b in pairwise(starts)]


def curious_loss(model: Any, batch: Tensor) -> Any:
    """A loss that looks at itself."""
    loss = loss_of(model, batch)
    assert loss.total.item() > 0
    return loss


class CountCasts(TorchDispatchMode):
    """How often each parameter is rounded to half precision, by its place in memory."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.names = {(p.data_ptr(), p.numel()): name for name, p in model.named_parameters()}
        self.casts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.mul.out):
            name = self.names.get((args[0].data_ptr(), args[0].numel()))
            if name and args[0].dtype == torch.float32 and result.dtype == torch.bfloat16:
                self.casts[name] += 1
        return result


def count_casts(
    ranks: Any, model: str, run_dir: str, changes: dict[str, Any]
) -> tuple[Counter[str], set[str]]:
    """The casts of the second step of a run, and the names of all matrices that train."""
    config = settings(model, run_dir, changes)
    make_run_dir(config, ranks)
    counters = []
    run = start_run(config, shards(), ranks)  # type: ignore[arg-type]

    def counting(*arguments: Any) -> Any:
        with CountCasts(run.engine.module) as counter:
            counters.append(counter)
            return update(*arguments)

    train_run(run, Unasked(), Phases(update=counting))  # type: ignore[arg-type]
    run.metrics.close()
    trained = {
        n for n, p in run.engine.module.named_parameters() if p.requires_grad and p.dim() > 1
    }
    deepspeed.destroy(run.engine)
    return counters[1].casts, trained


FULL: dict[str, Any] = {"lora": None, "relora": None}
CASTING: dict[str, dict[str, Any]] = {
    "full": {**FULL},
    "full, not lean": {**FULL, "model.lean": False, "model.loss_chunk": None},
    "full, checkpointed": {**FULL, "model.gradient_checkpointing": True},
    "effective": {"lora.graph": "effective", "model.gradient_checkpointing": True},
    "effective, kept": {"lora.graph": "effective", "lora.keep_effective": True},
    "low rank": {"lora.graph": "low_rank"},
    "low rank, checkpointed": {"lora.graph": "low_rank", "model.gradient_checkpointing": True},
    "sharded": {"deepspeed.zero_stage": 2, "model.gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def casts(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Steps of 4 micro-batches on one rank."""
    root = tmp_path_factory.mktemp("casts")
    wanted = []
    for name, more in CASTING.items():
        changes = {
            "deepspeed.zero_stage": 0,
            "deepspeed.precision": "bf16",
            "batch": {"global_batch_size": 4, "micro_batch_size": 1},
            "warm_start": None,
            "relora": None,
            "train": {"steps": 3},
            "model.loss_chunk": 4,
            **more,
        }
        args = (str(tiny_llama), str(root / name.replace(" ", "_")), changes)
        wanted.append(Scenario(name, count_casts, args))
    return run_ranks(1, wanted, 300)


@pytest.mark.parametrize("name", CASTING)
def test_a_weight_is_cast_once_a_step(name: str, casts: Outcomes) -> None:
    """Not for each micro-batch, chunk of the loss or block that is computed again."""
    found, trained = casts[name][0]
    assert set(found.values()) == {1}, found
    assert trained - set(found) == {"model.embed_tokens.weight"}


@pytest.fixture(scope="module")
def counts(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Runs on 2 ranks, with adapters from the start, that log each step."""
    cells = [(stage, accumulation, False) for stage, accumulation in OFTEN]
    return run_counting([*cells, (2, 4, True)], tiny_llama, tmp_path_factory.mktemp("reads"))


@pytest.fixture(scope="module")
def counts_too(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    cells = [(stage, accumulation, False) for stage, accumulation in RARE]
    return run_counting(cells, tiny_llama, tmp_path_factory.mktemp("reads_too"))


def run_counting(cells: list[tuple[int, int, bool]], model: Path, root: Path) -> Outcomes:
    wanted = []
    for stage, accumulation, curious in cells:
        name = f"{stage} {accumulation}{' curious' * curious}"
        changes = {
            "deepspeed.zero_stage": stage,
            "deepspeed.precision": "bf16",
            "batch": {"global_batch_size": 2 * accumulation, "micro_batch_size": 1},
            "warm_start": None,
            "relora": None,
            "train": {"steps": STEPS, "log_every": 1},
        }
        args = (str(model), str(root / name.replace(" ", "_")), changes, curious)
        wanted.append(Scenario(name, count_reads, args))
    return run_ranks(2, wanted, 300)


@pytest.mark.process
@pytest.mark.parametrize(
    ("stage", "accumulation", "outcomes"),
    [
        *((*cell, "counts") for cell in OFTEN),
        *(pytest.param(*cell, "counts_too", marks=pytest.mark.slow) for cell in RARE),
    ],
)
def test_a_step_reads_the_device_once(
    stage: int, accumulation: int, outcomes: str, request: pytest.FixtureRequest
) -> None:
    for steps in request.getfixturevalue(outcomes)[f"{stage} {accumulation}"]:
        assert len(steps) == STEPS - 1
        # Under ZeRO 3 DeepSpeed learns the order of the layers first.
        for places in steps[3:] if stage == 3 else steps:
            assert len(places) == 1, places
            assert "reading.py:take" in places[0]


def test_a_read_in_each_micro_batch_is_counted(counts: Outcomes) -> None:
    for steps in counts["2 4 curious"]:
        assert [len(places) for places in steps] == [1 + 4] * (STEPS - 1)


def test_what_is_the_hosts_own_is_not_counted() -> None:
    with HostReads() as reads:
        own = torch.tensor([1.0, 2.0])
        assert (own * 2 + 1).sum().item() == 8
        assert reads.places == []
        device = torch.full((2,), 3.0)
        own += device
        for read in (device.tolist, partial(bool, device[0]), device.sum().item, own.tolist):
            before = len(reads.places)
            read()
            assert len(reads.places) == before + 1, read
