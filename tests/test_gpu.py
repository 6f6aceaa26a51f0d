"""What the CPU tests claim, on a CUDA device: run with `bash launch/test.sh -m gpu`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from relora.lora.layers import constant_weights
from test_graphs import IDS, adapt, error, lean, make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(3600),
]

DEVICE = "cuda"
CONFIG = """
run_dir: {directory}/run
model: {{config: {directory}/model.json}}
data:
  source: {{builtin: python, max_documents: 60}}
  tokenizer: {{train: bpe, vocab_size: 512}}
  sequence_length: 64
  dir: {directory}/data
  validation_fraction: 0.2
batch: {{global_batch_size: 16, micro_batch_size: 4}}
train: {{steps: 30, log_every: 1, eval_every: 10, eval_sequences: 64, save_every: 10}}
optimizer: {{lr: 2e-3, weight_decay: 0.1}}
schedule: {{warmup_steps: 3}}
lora: {{rank: 8}}
relora: {{cycle_steps: 6, rewarm_steps: 2, lr: 4e-3}}
warm_start: {{steps: 8}}
deepspeed: {{zero_stage: 0, precision: fp32}}
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and 60 files of Python, prepared."""
    from relora.cli import main

    directory = tmp_path_factory.mktemp("gpu")
    shape = {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    }
    (directory / "model.json").write_text(json.dumps(shape))
    (directory / "config.yaml").write_text(CONFIG.format(directory=directory))
    assert main(["prepare", str(directory / "config.yaml")]) == 0
    return directory


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_reach_the_device_without_a_wait(workers: int) -> None:
    from itertools import islice

    from relora.data.loader import train_batches

    tokens = np.random.default_rng(0).integers(0, 2**16, 4000).astype(np.uint16)
    options = {"global_batch": 8, "micro_batch": 2, "rank": 0, "world": 1, "seed": 0}

    def batches(device: str) -> torch.Tensor:
        found = train_batches(
            tokens,
            sequence_length=32,
            num_workers=workers,
            device=torch.device(device),
            **options,  # type: ignore[arg-type]
        )
        return torch.stack([torch.stack(step) for step in islice(found, 5)])

    torch.cuda.set_sync_debug_mode("error")
    try:
        there = batches("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(there.cpu(), batches("cpu"))


def losses(workspace: Path, name: str, *overrides: str) -> list[float]:
    """Train (or go on with) the run `name`; returns the losses of all its steps."""
    from relora.cli import main

    run = workspace / name
    code = main(["train", str(workspace / "config.yaml"), f"run_dir={run}", *overrides])
    assert code in (0, 75)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_every_engine_follows_the_float64_reference(tmp_path: Path) -> None:
    """The matrix on one rank by nccl: all stages, precisions, offload, accumulation; resumes too.

    `configs/experiments/matrix.py --gpu --to gpu.json` writes the figures down.
    """
    import matrix

    cells = matrix.all_cells((1,))
    results = matrix.measure_all(cells, tmp_path)
    print(matrix.markdown(results))
    bad = {cell.name: matrix.shortcomings(cell, results[cell]) for cell in cells}
    assert {name: texts for name, texts in bad.items() if texts} == {}


def on_device(graph: str, kept: bool, bf16: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a small lean model with adapters, on the device."""
    model = adapt(lean(make(), loss_chunk=7), graph, kept, torch.bfloat16 if bf16 else None)
    model.to(DEVICE)
    with constant_weights(model):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            loss = model(input_ids=IDS.to(DEVICE), labels=IDS.to(DEVICE)).loss
        loss.backward()
    return loss.item(), {n: p.grad.cpu() for n, p in model.named_parameters() if p.requires_grad}


def apart_from_float64(graph: str, kept: bool, bf16: bool) -> tuple[float, float]:
    """Relative errors of the loss and of the worst gradient."""
    exact = adapt(make(), "low_rank", store=torch.bfloat16 if bf16 else None).double()
    right = exact(input_ids=IDS, labels=IDS).loss
    right.backward()
    loss, found = on_device(graph, kept, bf16)
    wanted = {n: p.grad for n, p in exact.named_parameters() if p.requires_grad}
    assert found.keys() == wanted.keys()
    return abs(loss / right.item() - 1), max(error(found[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize("kept", [False, True], ids=["formed", "kept"])
@pytest.mark.parametrize("graph", ["low_rank", "effective"])
def test_each_graph_has_the_float64_gradients(graph: str, kept: bool) -> None:
    loss, gradients = apart_from_float64(graph, kept, bf16=False)
    assert loss < 1e-6
    assert gradients < 1e-5


@pytest.mark.parametrize("kept", [False, True], ids=["formed", "kept"])
def test_in_bf16_the_effective_graph_errs_as_the_low_rank_one(kept: bool) -> None:
    low_rank, effective = (
        apart_from_float64(g, kept, bf16=True) for g in ("low_rank", "effective")
    )
    assert effective[0] < max(1.6 * low_rank[0], 1e-3)
    assert effective[1] < 1.6 * low_rank[1]


def test_the_remainder_costs_the_device_nothing(workspace: Path) -> None:
    """2 bytes a frozen parameter less with it in host memory than on the device; same losses."""
    peaks, found = {}, {}
    for place in ("host", "device"):
        torch.cuda.reset_peak_memory_stats()
        options = ["deepspeed.precision=bf16", f"relora.remainder={place}", "train.steps=16"]
        found[place] = losses(workspace, f"remainder-{place}", *options)
        peaks[place] = torch.cuda.max_memory_allocated()
    assert found["host"] == found["device"]
    assert peaks["host"] <= peaks["device"]


def test_zero_stages_agree_in_fp32(workspace: Path) -> None:
    reference = losses(workspace, "fp32-0")
    assert len(reference) == 30
    for stage in (1, 2, 3):
        other = losses(workspace, f"fp32-{stage}", f"deepspeed.zero_stage={stage}")
        np.testing.assert_allclose(other, reference, rtol=1e-4)


def test_bf16_follows_fp32_on_every_stage(workspace: Path) -> None:
    reference = losses(workspace, "fp32-0")
    for stage in (0, 1, 2, 3):
        other = losses(
            workspace,
            f"bf16-{stage}",
            f"deepspeed.zero_stage={stage}",
            "deepspeed.precision=bf16",
        )
        np.testing.assert_allclose(other, reference, rtol=2e-2)
        assert other != reference, "bf16 had no effect"


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("stop", [5, 8, 14, 15])
def test_resuming_gives_the_losses_of_never_having_stopped(
    workspace: Path, stage: int, stop: int
) -> None:
    options = [f"deepspeed.zero_stage={stage}", "deepspeed.precision=bf16"]
    straight = losses(workspace, f"bf16-{stage}", *options)
    losses(workspace, f"stopped-{stage}-{stop}", *options, f"train.stop_after={stop}")
    resumed = losses(workspace, f"stopped-{stage}-{stop}", *options)
    np.testing.assert_allclose(resumed, straight, rtol=1e-6)
