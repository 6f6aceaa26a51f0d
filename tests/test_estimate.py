"""Estimates are what real models and engines do: counted by torch, tensor by tensor, by message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from relora.config import Config, build_config, load_config
from relora.estimate import (
    break_even,
    flops_per_token,
    full_rank_twin,
    merge_flops,
    speedup_ceiling,
    training_flops,
)
from relora.lora.inject import add_adapters
from relora.model import build_model

ROOT = Path(__file__).parent.parent
LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}
GPT2 = {"model_type": "gpt2", "vocab_size": 512, "n_embd": 32, "n_layer": 3, "n_head": 2,
        "n_positions": 64, **NO_TOKENS}  # fmt: skip
MODELS = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "gpt2 without dropout": {**GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {
        **LLAMA, "model_type": "gpt_neox", "num_key_value_heads": 4, **NO_TOKENS
    },
}  # fmt: skip


def config_of(directory: Path, model: dict[str, Any], **changes: Any) -> Config:
    """A ReLoRA run of a model: 100 steps of 8 × 32 tokens, 20 of them in full rank."""
    path = directory / "model.json"
    path.write_text(json.dumps(model))
    values = {
        "run_dir": str(directory / "run"),
        "model": {"config": str(path), "gradient_checkpointing": changes.pop("again", False)},
        "data": {"source": "python", "tokenizer": {"path": "none"}, "sequence_length": 32},
        "batch": {"global_batch_size": 8, "micro_batch_size": 2},
        "train": {"steps": 100},
        "optimizer": {"lr": 0.001},
        "lora": {"rank": 4},
        "relora": {"cycle_steps": 30, "rewarm_steps": 5},
        "warm_start": {"steps": 20},
        "deepspeed": {"precision": "fp32"},
        **changes,
    }
    return build_config(values, "test")


@pytest.mark.parametrize("again", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("adapters", [False, True], ids=["full rank", "adapters"])
@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_that_torch_counts(
    name: str, adapters: bool, again: bool, tmp_path: Path
) -> None:
    config = config_of(tmp_path, MODELS[name], again=again)
    model = build_model(config.model, 0)
    model.set_attn_implementation("eager")  # torch does not count the fused kernel of CPUs
    if adapters:
        assert config.lora is not None
        add_adapters(model, config.lora)
    model.train()
    tokens = torch.zeros(2, 32, dtype=torch.long)
    with FlopCounterMode(display=False) as forward:
        loss = model(input_ids=tokens, labels=tokens).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    flops = flops_per_token(config, adapters)
    assert flops.forward == pytest.approx(forward.get_total_flops() / tokens.numel(), rel=0.01)
    assert flops.backward == pytest.approx(backward.get_total_flops() / tokens.numel(), rel=0.01)
    assert flops.total == flops.forward + flops.backward


@pytest.mark.parametrize(
    ("name", "ceiling", "published"),
    [
        ("60m", 1.04, 0.97),
        ("130m", 1.13, 1.05),
        ("250m", 1.16, 1.08),
        ("350m", 1.21, 1.13),
        ("1b3", 1.33, 1.28),
        ("7b", 1.41, 1.38),
    ],
)
def test_the_ceiling_is_that_of_the_design(
    name: str, ceiling: float, published: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """r = 128, 512 tokens a sequence; the second number is for the layers as the paper has them."""
    monkeypatch.chdir(ROOT)
    overrides = ["data.sequence_length=512", "model.gradient_checkpointing=false"]
    config = load_config(Path(f"configs/llama_{name}_relora.yaml"), overrides)
    assert speedup_ceiling(config) == pytest.approx(ceiling, abs=0.015)
    assert 1 / break_even(config).step == pytest.approx(published, abs=0.015)
    assert speedup_ceiling(full_rank_twin(config)) == 1


def test_training_flops_add_up_over_phases_and_merges(tmp_path: Path) -> None:
    config = config_of(tmp_path, LLAMA)  # merges after 50 and 80
    full = flops_per_token(config, False).total * 256
    step = flops_per_token(config, True).total * 256
    merge = merge_flops(config)
    # 3 blocks of q, o: 32 × 32, k, v: 32 × 16, gate, up, down: 32 × 80.
    weights = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 80)
    assert merge == (2 * 4 + 1) * weights
    for steps, expected in {
        0: 0,
        20: 20 * full,
        49: 20 * full + 29 * step,
        50: 20 * full + 30 * step + merge,
        100: 20 * full + 80 * step + 2 * merge,
    }.items():
        assert training_flops(config, steps) == pytest.approx(expected, rel=1e-12)
    twin = full_rank_twin(config)
    assert training_flops(twin, 100) == pytest.approx(100 * full, rel=1e-12)
    even = break_even(config)
    assert even.flops == pytest.approx(training_flops(config, 100) / (100 * full))
    assert even.step == pytest.approx(step / full)
    # At that share of a full-rank step's time, both are through at once.
    time = 20 * full + 80 * even.time_limit * full + 2 * merge
    assert time == pytest.approx(100 * full)
    assert break_even(twin) == (1, 1, 1)


def test_a_model_file_that_changes_is_read_again(tmp_path: Path) -> None:
    before = flops_per_token(config_of(tmp_path, LLAMA), False).forward
    after = flops_per_token(config_of(tmp_path, {**LLAMA, "num_hidden_layers": 6}), False).forward
    head, blocks = 2 * 512 * 32, before - 2 * 512 * 32
    assert after == head + 2 * blocks
