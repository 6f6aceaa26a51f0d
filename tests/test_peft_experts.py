"""Adapters of experts as PEFT keeps them: what is written here loads there, and back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import relora
from relora.errors import CheckpointError, ConfigError
from runs import relora as run_relora
from runs import train
from test_experts import ALPHA, EXPERTS, RANK, adapted, plain, tokens
from test_export_adapters import logits
from test_peft_format import output, train_a_little
from tiny_models import tiny_values

# Beside those of (E, out, in) and (E, in, out): one with dense layers and shared experts, whose
# names PEFT takes for parts of experts.
KINDS = ["mixtral", "qwen3_moe", "gpt_oss", "glm4_moe"]
WRITTEN: dict[str, dict[str, Any]] = {
    "by default": {},
    "rslora": {"scaling": "rslora"},
    "one of two": {"targets": ["down_proj", "q_proj"]},
    "experts alone": {"targets": ["experts.gate_up_proj", "experts.down_proj"]},
    "patterns": {
        "rank_pattern": {"experts.down_proj": 5},
        "alpha_pattern": {r"layers.1.mlp.experts.gate_up_proj": 9.0},
    },
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", WRITTEN)
def test_experts_written_here_load_in_peft_and_here(case: str, kind: str, tmp_path: Path) -> None:
    model = adapted(kind, **WRITTEN[case]).eval()
    relora.save_adapter(model, tmp_path)
    expected = output(model, tokens())
    assert (output(plain(kind).eval(), tokens()) - expected).abs().max() > 1e-3
    theirs = PeftModel.from_pretrained(plain(kind), str(tmp_path)).eval()
    torch.testing.assert_close(output(theirs, tokens()), expected, atol=1e-5, rtol=0)
    again = plain(kind).eval()
    relora.load_adapter(again, tmp_path)
    assert torch.equal(output(again, tokens()), expected)
    again(tokens(), labels=tokens()).loss.backward()
    assert all(layer.lora_B.grad is not None for _, layer in relora.adapted_layers(again))


BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PEFTS: dict[str, dict[str, Any]] = {
    "both": {"target_parameters": BOTH},
    "both, by their own names": {"target_parameters": ["gate_up_proj", "down_proj"]},
    "the inner": {"target_parameters": BOTH[:1]},
    "the outer": {"target_parameters": ["down_proj"], "use_rslora": True},
    "of one block": {"target_parameters": ["layers.1.mlp.experts.down_proj"]},
    # As many rows as a plain layer's A.
    "a rank for all experts together": {
        "r": EXPERTS * RANK,
        "target_parameters": ["down_proj"],
        "rank_pattern": {"down_proj": RANK},
        "alpha_pattern": {"experts.down_proj": 3},
    },
    "no module": {"target_modules": [], "target_parameters": BOTH},
}


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("case", PEFTS)
def test_experts_that_peft_wrote_load_here(case: str, kind: str, tmp_path: Path) -> None:
    check_pefts(kind, {"r": RANK, "target_modules": ["q_proj"], **PEFTS[case]}, tmp_path)


def check_pefts(kind: str, settings: dict[str, Any], directory: Path) -> None:
    """PEFT's adapters of a model compute here what they do there, adapted and merged."""
    theirs = get_peft_model(plain(kind), LoraConfig(lora_alpha=7, **settings)).eval()
    train_a_little(theirs)
    theirs.save_pretrained(str(directory))
    expected = output(theirs, tokens())
    model = plain(kind).eval()
    assert (output(model, tokens()) - expected).abs().max() > 1e-3
    relora.load_adapter(model, directory)
    torch.testing.assert_close(output(model, tokens()), expected, atol=1e-5, rtol=0)
    relora.merge_adapters(model)
    torch.testing.assert_close(output(model, tokens()), expected, atol=1e-5, rtol=0)


def test_experts_by_the_names_of_transformers_4_load_here(tmp_path: Path) -> None:
    """PEFT turns them into parameters with twice the rank where two of them lie in one tensor."""
    check_pefts("mixtral", {"r": RANK, "target_modules": ["q_proj", "w1", "w2", "w3"]}, tmp_path)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"target_modules": ["gate"]}, r"mlp\.gate is a MixtralTopKRouter, which has no"),
        ({"target_parameters": ["experts.gate_up_proj_bias"]}, r"gate_up_proj_bias is no weight"),
    ],
)
def test_parameters_that_are_no_weights_of_experts_are_refused_by_name(
    settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    kind = "gpt_oss" if "target_parameters" in settings else "mixtral"
    settings = {"target_modules": ["q_proj"], **settings}
    get_peft_model(plain(kind), LoraConfig(r=2, **settings)).save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match=named):
        relora.load_adapter(plain(kind), tmp_path)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"peft_version": "0.19.1"}, r"PEFT 0\.19\.1 wrote in other shapes than since 0\.20"),
        ({"peft_version": None}, r"PEFT 0\.17 wrote in other shapes"),
        ({"target_parameters": ["experts.down_proj"]}, r"experts has 2 adapters, and .* down_proj"),
    ],
)
def test_settings_that_do_not_say_what_the_tensors_are_are_refused(
    settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    relora.save_adapter(adapted("mixtral"), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(ConfigError, match=named):
        relora.read_adapter(tmp_path)


def test_tensors_of_other_shapes_are_refused(tmp_path: Path) -> None:
    relora.save_adapter(adapted("mixtral", targets=["down_proj"]), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    turned = {
        name: (tensors[name.replace(x, y)].t().contiguous())
        for name in tensors
        for x, y in [("lora_A", "lora_B") if "lora_A" in name else ("lora_B", "lora_A")]
    }
    save_file(turned, path)
    with pytest.raises(ConfigError, match=r"are of no matrix \(4, 32, 64\), which the model has"):
        relora.load_adapter(plain("mixtral"), tmp_path)
    save_file({name: tensor[:7] for name, tensor in tensors.items()}, path)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.experts: A .* none of rank 2"):
        relora.load_adapter(plain("mixtral"), tmp_path)


def test_one_expert_alone_is_refused_where_peft_computes_it_otherwise(tmp_path: Path) -> None:
    for kind in ("mixtral", "gpt_oss"):
        values = tiny_values(kind, num_local_experts=1, num_experts_per_tok=1)
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(values.pop("model_type"), **values)
        )
        base = copy.deepcopy(model)
        relora.add_adapters(model, relora.LoRAConfig(rank=RANK))
        train_a_little(model)
        if kind == "gpt_oss":
            with pytest.raises(ConfigError, match=r"experts\.gate_up_proj: PEFT takes one expert"):
                relora.save_adapter(model, tmp_path / kind)
            assert not (tmp_path / kind).exists()
        else:
            relora.save_adapter(model, tmp_path / kind)
            theirs = PeftModel.from_pretrained(base, str(tmp_path / kind))
            found, right = output(theirs, tokens()), output(model, tokens())
            torch.testing.assert_close(found, right, atol=1e-5, rtol=0)


# --- of runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def stopped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with experts, within its second cycle."""
    place = tmp_path_factory.mktemp("experts")
    (place / "model.json").write_text(json.dumps(tiny_values(request.param)))
    options = [f"model.config={place / 'model.json'}", "warm_start=null", "train.stop_after=9"]
    lora = f"lora={{rank: {RANK}, alpha: {ALPHA}}}"
    assert train(place / "run", *options, lora) == 75
    return place / "run"


def test_peft_loads_a_runs_experts_on_the_runs_base(stopped: Path, tmp_path: Path) -> None:
    assert run_relora("export", stopped, "--to", tmp_path / "e", "--format", "peft") == 0
    loaded = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "e"))
    expected = logits(relora.load_run(stopped).merged_model())
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=0)
    assert (logits(loaded.unload()) - expected).abs().max() > 1e-3


def test_a_delta_of_experts_is_the_truncated_svd_of_each(stopped: Path, tmp_path: Path) -> None:
    run, errors = relora.load_run(stopped), {}
    start, end = run.first_model().state_dict(), run.merged_model().state_dict()
    for rank in (1, 32):
        to = tmp_path / str(rank)
        command = ("export", stopped, "--to", to, "--format", "delta", "--rank", rank)
        assert run_relora(*command) == 0
        loaded = AutoPeftModelForCausalLM.from_pretrained(str(to))
        errors[rank] = (logits(loaded) - logits(run.merged_model())).abs().max().item()
        found = loaded.merge_and_unload().state_dict()
        for name in start:
            if "experts" in name and start[name].dim() == 3:
                check_nearest(found[name] - start[name], end[name] - start[name], rank)
    assert errors[32] < 1e-5 < errors[1]


def check_nearest(found: Tensor, change: Tensor, rank: int) -> None:
    """Each expert's change is missed by its smaller singular values."""
    for one, whole in zip(found.double(), change.double(), strict=True):
        tail = torch.linalg.svdvals(whole)[rank:].norm()
        assert float((one - whole).norm()) == pytest.approx(float(tail), rel=1e-3, abs=1e-5)


def test_a_tolerance_is_kept_by_all_experts_together(stopped: Path, tmp_path: Path) -> None:
    run = relora.load_run(stopped)
    start, end = run.first_model().state_dict(), run.merged_model().state_dict()
    command = ("export", stopped, "--to", tmp_path / "e", "--format", "delta", "--tolerance", 0.3)
    assert run_relora(*command) == 0
    adapter = relora.read_adapter(tmp_path / "e")
    for name, (a, b) in adapter.factors.items():
        if name.endswith("_of_experts"):
            weight = name.removesuffix("_of_experts")
            sizes = torch.linalg.svdvals((end[weight] - start[weight]).double()).square()
            left = sizes.sum(0).flip(0).cumsum(0).flip(0)
            rank = a.shape[1]
            assert rank == b.shape[2] < sizes.shape[1]
            assert left[rank] <= 0.3**2 * left[0] < left[rank - 1]
