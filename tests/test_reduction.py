"""In which numbers gradients travel: against those of each rank, made without an engine."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ranks import Outcomes, Scenario, run_ranks
from relora.engine import deepspeed
from relora.engine.evaluation import loss_of
from relora.lora.config import GROUPS
from relora.model import build_model
from relora.plan.estimate import bytes_per_step
from relora.training.start import equip, start_run
from test_estimate import Ring
from test_method_reference import make_run_dir, settings, shards

STAGES = (0, 1, 2, 3)
DTYPES = (None, "fp32", "bf16")
MICRO_BATCHES = 2


class Reduced(NamedTuple):
    """What one step of a rank reduced, and what it made of it."""

    exact: float  # largest deviation from the mean of the ranks' gradients, of its largest entry
    rounded: float  # from the bf16 sum of their bf16 gradients, halved; likewise
    dtypes: set[str]  # that it was reduced in
    received: float  # bytes in all
    planned: float
    weights: float  # a sum that tells whether all ranks hold the same


class Traffic(Ring):
    """Also by dtype, of what is reduced."""

    def __init__(self) -> None:
        super().__init__(2)
        self.dtypes: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "reduce" in func.name():
            tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
            # Norms and notes apart.
            self.dtypes |= {str(x.dtype).removeprefix("torch.") for x in tensors if x.numel() > 8}
        return super().__torch_dispatch__(func, types, args, kwargs)


def reduce_once(ranks: Any, model: str, run_dir: str, changes: dict[str, Any]) -> Reduced:
    """One step of an engine; its gradients are read off Adam's first moment."""
    config = settings(model, run_dir, changes)
    make_run_dir(config, ranks)
    generator = torch.Generator().manual_seed(ranks.rank)
    batches = [torch.randint(61, (2, 12), generator=generator) for _ in range(MICRO_BATCHES)]
    plain = build_model(config.model, config.seed)
    equip(plain, config, True)
    for batch in batches:
        (loss_of(plain, batch).total / MICRO_BATCHES).backward()
    run = start_run(config, shards(), ranks)  # type: ignore[arg-type]
    with Traffic() as traffic:
        result = deepspeed.train_step(
            run.engine, batches, loss_of, dict.fromkeys(GROUPS, 1e-3), None
        )
    assert result.applied
    beta = config.optimizer.betas[0]
    exact = rounded = largest = weights = 0.0
    gradients = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    for view in run.state:
        weights += float(run.state.gather([view], "value")[0].double().abs().sum())
        if view.name not in gradients:
            continue
        found = run.state.gather([view], "exp_avg")[0].flatten() / (1 - beta)
        both = [torch.empty_like(gradients[view.name]) for _ in range(2)]
        dist.all_gather(both, gradients[view.name])
        mean = (both[0] + both[1]) / 2
        half = (both[0].bfloat16() + both[1].bfloat16()) / 2
        exact = max(exact, float((found - mean.flatten()).abs().max()))
        rounded = max(rounded, float((found - half.float().flatten()).abs().max()))
        largest = max(largest, float(mean.abs().max()))
    run.metrics.close()
    deepspeed.destroy(run.engine)
    planned = bytes_per_step(config, 2, True)
    traffic_of = traffic.dtypes, traffic.received, planned
    return Reduced(exact / largest, rounded / largest, *traffic_of, weights)


@pytest.fixture(scope="module")
def reduced(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    root = tmp_path_factory.mktemp("reduced")
    wanted = []
    for stage, dtype in product(STAGES, DTYPES):
        changes = {
            "deepspeed": {"zero_stage": stage, "precision": "fp32", "reduce_dtype": dtype},
            "batch": {"global_batch_size": 2 * 2 * MICRO_BATCHES, "micro_batch_size": 2},
            "optimizer.grad_clip": None,
            "warm_start": None,
        }
        args = (str(tiny_llama), str(root / f"{stage}_{dtype}"), changes)
        wanted.append(Scenario(f"{stage} {dtype}", reduce_once, args))
    return run_ranks(2, wanted, 300)


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_travel_in_the_dtype_that_is_asked_for(stage: int, reduced: Outcomes) -> None:
    for dtype in (None, "fp32"):
        for found in reduced[f"{stage} {dtype}"]:
            assert found.exact < 1e-6
            assert found.rounded > 1e-4  # so that the two can be told apart
            assert found.dtypes == {"float32"}
    for found in reduced[f"{stage} bf16"]:
        assert found.rounded < 1e-6  # each rank's gradient and the sum are rounded, nothing else
        assert 1e-4 < found.exact < 2**-8
        assert found.dtypes == {"bfloat16"}


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_halves_the_traffic_as_planned_and_all_ranks_agree(
    stage: int, reduced: Outcomes
) -> None:
    for full, half in zip(reduced[f"{stage} fp32"], reduced[f"{stage} bf16"], strict=True):
        saved = full.planned - half.planned
        assert full.received - half.received == pytest.approx(saved, rel=0.05)
        assert saved > 0.1 * full.planned
    for dtype in DTYPES:
        one, other = reduced[f"{stage} {dtype}"]
        assert one.weights == other.weights
