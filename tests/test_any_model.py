"""`relora plan` counts any causal model that transformers builds, or says what it leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from relora.config import Config
from relora.errors import ConfigError, UserError
from relora.load import build_config
from relora.lora.config import LoRAConfig
from relora.lora.inject import add_adapters
from relora.model import (
    ModelConfig,
    build_empty_model,
    build_meta_model,
    build_model,
    count_parameters,
)
from relora.plan.estimate import flops_per_token, peak_memory, uncounted
from relora.training.arms import write_control
from runs import make_config, relora
from tiny_models import VOCABULARY, tiny_values

LENGTH, BATCH = 32, 2
# One of each kind: dense, positions by other names, other linear layers, experts fused and shared,
# latent attention, state spaces, hybrids, a decoder with cross-attention.
KINDS = (
    "llama", "gpt2", "falcon", "mpt", "mixtral", "deepseek_v3", "gpt_oss", "mamba", "jamba", "bart",
    "gemma3_text",
)  # fmt: skip


def counted_by_running(values: dict[str, Any]) -> float:
    """FLOPs of a trained token, as torch counts them in a real forward and backward pass."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    structure = AutoConfig.for_model(**values)
    try:  # whose backward pass is counted, unlike that of fused kernels
        model: Any = AutoModelForCausalLM.from_config(structure, attn_implementation="eager")
    except ValueError:
        model = AutoModelForCausalLM.from_config(structure)
    model.set_experts_implementation("eager")
    model.config.use_cache = False
    tokens = torch.randint(4, VOCABULARY - 4, (BATCH, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model.train()(input_ids=tokens, labels=tokens).loss.backward()
    found = counter.get_flop_counts()["Global"]
    # torch takes a backward pass through a grouped convolution for one through a full one.
    forward, backward = (
        found.get(op, 0) for op in (torch.ops.aten.convolution, torch.ops.aten.convolution_backward)
    )
    return (counter.get_total_flops() - backward + 2 * forward) / tokens.numel()


def full_rank_config(model: Path) -> Config:
    """A run of the model in full rank."""
    return build_config(
        {
            "run_dir": "none",
            "model": {"config": str(model)},
            "data": {
                "source": {"files": ["*.txt"]},
                "tokenizer": {"train": "bpe", "vocab_size": VOCABULARY},
                "sequence_length": LENGTH,
            },
            "batch": {"global_batch_size": BATCH, "micro_batch_size": BATCH},
            "train": {"steps": 10},
            "optimizer": {"lr": 1e-3},
            "deepspeed": {"precision": "fp32"},
        },
        "test",
    )


def check_counted(model_type: str, directory: Path) -> list[str]:
    """Compare the planner's FLOPs with those of a real run; returns what it says it leaves out."""
    values = tiny_values(model_type)
    path = directory / f"{model_type}.json"
    path.write_text(json.dumps(values))
    config = full_rank_config(path)
    left_out = uncounted(config)
    planned, real = flops_per_token(config, False).total, counted_by_running(values)
    if not any("cannot be run without numbers" in what for what in left_out):
        assert planned == pytest.approx(real, rel=0.05 if left_out else 0.01), left_out
    assert peak_memory(config, 1) > 0
    return left_out


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(kind, marks=pytest.mark.slow if n % 2 else []) for n, kind in enumerate(KINDS)],
)
def test_flops_of_any_kind_of_model_are_those_of_a_real_step(
    model_type: str, tmp_path: Path
) -> None:
    check_counted(model_type, tmp_path)


def test_experts_count_as_often_as_a_token_chooses_them(tmp_path: Path) -> None:
    """By hand, for one token of a Mixtral: two of four experts, and a router of four rows."""
    values = tiny_values("mixtral")
    path = tmp_path / "model.json"
    path.write_text(json.dumps(values))
    attention = 32 * (32 + 2 * 16 + 32)
    experts = 2 * (32 * 2 * 64 + 64 * 32)
    scores = 2 * LENGTH * 32
    forward = 2 * (2 * (attention + experts + 4 * 32 + scores) + VOCABULARY * 32)
    assert flops_per_token(full_rank_config(path), False).total == 3 * forward


def test_a_model_that_cannot_be_run_without_numbers_says_what_is_not_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(tiny_values("jetmoe")))
    config = make_config(tmp_path / "run")
    full = ("lora=null", "relora=null", "warm_start=null")
    assert relora("plan", config, f"model.config={path}", *full) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert "not counted activations, attention and all products outside linear layers" in page
    path.write_text(json.dumps(tiny_values("mamba")))
    assert relora("plan", config, f"model.config={path}", *full) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert "not counted FLOPs of recurrences that are no products of matrices (2 Mamba" in page
    assert relora("plan", config, *full) == 0
    assert "not counted" not in capsys.readouterr().out


@pytest.mark.slow
def test_flops_of_every_model_that_can_be_built_small_are_those_of_a_real_step(
    tmp_path: Path,
) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    compared, wrong = [], {}
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            counted_by_running(tiny_values(model_type))
        except Exception:
            continue  # not every type is made small by one set of rules
        try:
            check_counted(model_type, tmp_path)
        except (AssertionError, UserError) as error:
            wrong[model_type] = str(error)
        compared.append(model_type)
    assert wrong == {}
    assert len(compared) > 150


@pytest.mark.parametrize("model_type", ["mpt", "opt"])
def test_a_control_is_derived_whatever_the_sizes_are_called(
    model_type: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(tiny_values(model_type)))
    config = full_rank_config(path).model_copy(update={"lora": LoRAConfig(rank=2)})
    model = build_meta_model(config.model)
    full = count_parameters(model)[0]
    add_adapters(model, config.lora)  # type: ignore[arg-type]
    wanted = count_parameters(model)[0]
    control = build_meta_model(ModelConfig(config=write_control(config, tmp_path)))
    assert abs(count_parameters(control)[0] - wanted) < abs(full - wanted) / 2


def test_no_control_is_made_up_for_a_model_of_several_parts(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(tiny_values("gemma3")))
    config = full_rank_config(path).model_copy(update={"lora": LoRAConfig(rank=2)})
    with pytest.raises(ConfigError, match="name the arms in a file"):
        write_control(config, tmp_path)


@pytest.mark.parametrize("name", KINDS)
def test_a_model_without_weights_has_all_else_of_the_real_one(name: str, tmp_path: Path) -> None:
    """Names, shapes and sharing of parameters, and every buffer: a start fills in weights alone."""
    path = tmp_path / "model.json"
    path.write_text(json.dumps(tiny_values(name)))
    real, empty = (build(ModelConfig(config=path)) for build in (with_weights, build_empty_model))
    of_real, of_empty = (dict(model.named_parameters()) for model in (real, empty))
    assert list(of_real) == list(of_empty)
    for key, param in of_real.items():
        other = of_empty[key]
        assert other.is_meta
        assert (other.shape, other.dtype, other.requires_grad) == (param.shape, param.dtype, True)
    buffers = dict(empty.named_buffers())
    assert buffers.keys() == dict(real.named_buffers()).keys()
    assert all(torch.equal(buffer, buffers[key]) for key, buffer in real.named_buffers())


def with_weights(config: ModelConfig) -> Any:
    return build_model(config, 0)
