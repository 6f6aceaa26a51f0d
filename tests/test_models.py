"""Models beyond Llama: what is adapted, what is measured, what trains, what is exported."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from relora.errors import ConfigError
from relora.lora.choose import describe_left, find_targets, left_in_full
from relora.lora.config import LoRAConfig
from relora.lora.inject import add_adapters, merge_adapters
from relora.lora.layers import LoRALinear, adapted_layers
from relora.lora.names import names_of
from relora.model import ModelConfig, build_model, check_causal
from runs import make_config, metric_lines, relora, train, workshop

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
EXPERTS: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 24,
    "max_position_embeddings": 64,
}
KINDS = {
    "falcon": {},
    "mpt": {"d_model": 16, "n_layers": 2, "n_heads": 2},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "mixtral": EXPERTS,
    "qwen2_moe": {**EXPERTS, "decoder_sparse_step": 1},
    "gpt_oss": EXPERTS,
    "mamba": {"state_size": 4},
}


def structure(kind: str, **changes: Any) -> dict[str, Any]:
    """The JSON of a small model of a type."""
    return {"model_type": kind, **SIZES, **KINDS.get(kind, {}), **changes}


def written(tmp_path: Path, values: dict[str, Any]) -> ModelConfig:
    """A model section that names such a JSON."""
    path = tmp_path / f"{values['model_type']}.json"
    path.write_text(json.dumps(values))
    return ModelConfig(config=path)


def build(tmp_path: Path, kind: str, **changes: Any) -> Any:
    return build_model(written(tmp_path, structure(kind, **changes)), seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_computes_a_product_is_adapted_and_all_else_is_said(kind: str, tmp_path: Path) -> None:
    """A merge changes no output, every adapter is used, and every matrix is accounted for."""
    model = build(tmp_path, kind)
    plain = copy.deepcopy(model)
    config = LoRAConfig(rank=2)
    names = set(add_adapters(model, config))
    assert names
    tokens = torch.arange(24).view(2, 12) * 7 % 300
    for number, (_, layer) in enumerate(adapted_layers(model)):
        layer.lora_A.data.normal_(generator=torch.Generator().manual_seed(number))
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens).logits, plain.eval()(tokens).logits)
    model(input_ids=tokens, labels=tokens).loss.backward()
    for name, layer in adapted_layers(model):
        assert layer.lora_B.grad is not None, name
        layer.lora_B.data.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.05)
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        assert (before - plain(tokens).logits).abs().max() > 1e-3
        merge_adapters(model)
        torch.testing.assert_close(model(input_ids=tokens).logits, before, rtol=1e-4, atol=1e-4)
    assert {n: type(m) for n, m in model.named_modules()} == {
        n: type(m) for n, m in plain.named_modules()
    }
    left = {name for reason in left_in_full(plain, config) for name in reason.names}
    embeddings = {f"{n}.weight" for n, m in plain.named_modules() if isinstance(m, nn.Embedding)}
    head = {n for n, p in plain.named_parameters() if p is plain.get_output_embeddings().weight}
    matrices = {n for n, p in plain.named_parameters() if p.ndim > 1} - embeddings - head
    assert left == matrices - {names_of(name).weight for name in names}


def test_shares_of_what_trains_in_full_are_counted(tmp_path: Path) -> None:
    model = build(tmp_path, "mixtral")
    config = LoRAConfig(rank=2, targets=["q_proj", "k_proj", "v_proj", "o_proj"])
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    total = sum(p.numel() for p in model.parameters())
    add_adapters(model, config)  # what is said is the same with them
    [line] = [line for line in describe_left(model, config) if ".experts." in line]
    assert line.startswith(f"{experts / total:.1%} of the model trains in full without adapters: ")
    assert "not among lora.targets" in line


def test_a_gate_of_one_output_is_left_alone_by_name(tmp_path: Path) -> None:
    model = build(tmp_path, "qwen2_moe")
    config = LoRAConfig(rank=4)
    assert not any("shared_expert_gate" in name for name in find_targets(model, config))
    [small] = [left for left in left_in_full(model, config) if left.why == "smaller than rank 4"]
    assert small.names == [f"model.layers.{n}.mlp.shared_expert_gate.weight" for n in (0, 1)]
    with pytest.raises(ConfigError, match="shared_expert_gate"):
        find_targets(model, LoRAConfig(rank=4, targets=["q_proj", "shared_expert_gate"]))


class Doubled(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Spelled(nn.Linear):
    """A subclass that computes the same in its own words."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + (0 if self.bias is None else self.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_subclass_is_asked_what_it_computes(bias: bool, device: str) -> None:
    before = torch.get_rng_state()
    with torch.device(device):
        layers = nn.Linear(7, 5, bias), Spelled(7, 5, bias), Doubled(7, 5, bias)
    drawn = torch.get_rng_state()
    assert [LoRALinear.fits(layer) for layer in layers] == [True, True, False]
    assert torch.equal(torch.get_rng_state(), drawn if device == "cpu" else before)


def test_what_an_adapter_would_be_passed_by_is_left_alone(tmp_path: Path) -> None:
    """Weights that are shared, that another module reads, or of another kind of layer."""
    model = build(tmp_path, "llama")
    layers = model.model.layers
    layers[0].mlp.up_proj.__class__ = Doubled
    layers[0].mlp.gate_proj.weight = layers[1].mlp.gate_proj.weight
    layers[0].attention = nn.MultiheadAttention(16, 2)
    chosen = find_targets(model, LoRAConfig(rank=2))
    assert "model.layers.1.mlp.up_proj" in chosen
    whys = {
        name: left.why for left in left_in_full(model, LoRAConfig(rank=2)) for name in left.names
    }
    assert "does not compute" in whys["model.layers.0.mlp.up_proj.weight"]
    assert "shared" in whys["model.layers.0.mlp.gate_proj.weight"]
    assert "MultiheadAttention itself" in whys["model.layers.0.attention.out_proj.weight"]
    assert not {name.removesuffix(".weight") for name in whys} & set(chosen)
    with pytest.raises(ConfigError, match=r"up_proj\) can take no adapter: a Doubled"):
        find_targets(model, LoRAConfig(rank=2, targets=["layers.0.mlp.up_proj"]))


def test_a_model_in_which_nothing_is_adapted_is_refused(tmp_path: Path) -> None:
    model = build(tmp_path, "llama")
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Doubled
    with pytest.raises(ConfigError, match="no layer of this llama can take an adapter"):
        find_targets(model, LoRAConfig(rank=2))


def test_a_run_with_experts_merges_them_and_says_what_trains_in_full(tmp_path: Path) -> None:
    model = written(tmp_path, structure("mixtral"))
    assert train(tmp_path / "run", f"model.config={model.config}", "train.steps=14") == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "of the model trains in full without adapters: model.layers.0.mlp.gate.weight" in log
    assert "MERGE 1" in log


# --- what is measured -----------------------------------------------------------------------------


def test_evaluations_are_cross_entropy_whatever_else_is_trained_on(tmp_path: Path) -> None:
    values = structure("mixtral", output_router_logits=True, router_aux_loss_coef=10.0)
    model = written(tmp_path, values)
    run_dir = tmp_path / "run"
    assert train(run_dir, f"model.config={model.config}", "train.eval_sequences=null") == 0
    lines = metric_lines(run_dir)
    evaluated = [line["eval/loss"] for line in lines if "eval/loss" in line]
    assert relora("export", run_dir, "--to", tmp_path / "export") == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    [shard] = (workshop() / "data").glob("*/validation.bin")
    tokens = np.fromfile(shard, np.uint16).astype(np.int64)
    rows = torch.from_numpy(tokens[: len(tokens) // 32 * 32].reshape(-1, 32))
    with torch.no_grad():
        logits = exported(rows, output_router_logits=False).logits.double().numpy()
    shifted = logits[:, :-1] - logits[:, :-1].max(axis=-1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    by_hand = -np.take_along_axis(logs, rows[:, 1:, None].numpy(), axis=-1).mean()
    assert evaluated[-1] == pytest.approx(by_hand, rel=1e-5)
    trained = [line for line in lines if "train/loss" in line]
    # Two experts of four a token: the balanced loss is 2 (per layer, times 10).
    assert all(15 < line["train/auxiliary_loss"] < 60 for line in trained)
    assert all(line["train/loss"] < 8 for line in trained)


def test_a_model_without_auxiliary_loss_logs_none(tmp_path: Path) -> None:
    assert train(tmp_path / "run", "train.steps=14") == 0
    assert not any("train/auxiliary_loss" in line for line in metric_lines(tmp_path / "run"))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "roberta", *KINDS])
def test_a_model_is_asked_whether_it_looks_ahead(kind: str, tmp_path: Path) -> None:
    values = structure(kind, is_decoder=True, pad_token_id=0)
    if kind == "gpt2":
        values |= {"n_embd": 16, "n_layer": 2, "n_head": 2}
    check_causal(written(tmp_path, values))
    if kind in ("bert", "roberta"):
        with pytest.raises(ConfigError, match="logits change with tokens that come later"):
            check_causal(written(tmp_path, {**values, "is_decoder": False}))


def test_a_decoder_that_would_learn_to_copy_is_refused(tmp_path: Path) -> None:
    """BART's decoder is causal, and compares each token with itself."""
    sizes = {"d_model": 16, "decoder_layers": 1, "decoder_ffn_dim": 24, "vocab_size": 320}
    values = {"model_type": "bart", **sizes, "decoder_attention_heads": 2, "is_decoder": True}
    with pytest.raises(ConfigError, match="another loss than that of the next token"):
        check_causal(written(tmp_path, {**values, "is_encoder_decoder": False}))


def test_asking_does_not_disturb_the_initial_weights(tmp_path: Path) -> None:
    model = written(tmp_path, structure("llama"))
    before = torch.get_rng_state()
    check_causal(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_training_a_model_that_looks_ahead_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = written(tmp_path, structure("bert"))
    assert train(tmp_path / "run", f"model.config={model.config}") == 2
    assert "bert as configured is no causal language model" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- rows of the embeddings -----------------------------------------------------------------------


def test_the_row_of_the_padding_token_trains(tmp_path: Path) -> None:
    model = build(tmp_path, "llama", pad_token_id=2)
    rows = model.get_input_embeddings().weight.detach()
    assert float(rows[2].norm()) == pytest.approx(float(rows.norm()) / math.sqrt(320), rel=0.6)
    tokens = torch.tensor([[5, 2, 7, 8]])
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert model.get_input_embeddings().weight.grad[2].norm() > 0


def test_a_padding_token_changes_no_other_weight(tmp_path: Path) -> None:
    one, other = (build(tmp_path, "llama", pad_token_id=n) for n in (None, 3))
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        same = [n for n in range(len(a)) if torch.equal(a[n], b[n])]
        assert len(same) == len(a) - (name == "model.embed_tokens.weight"), name


@pytest.mark.parametrize("verb", ["plan", "train"])
@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("pad_token_id", 320, "320"),
        ("pad_token_id", -1, "-1"),
        ("eos_token_id", [2, 999], "999"),
        ("bos_token_id", 10**6, "1000000"),
    ],
)
def test_ids_beyond_the_vocabulary_are_refused(
    verb: str, key: str, value: Any, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = written(tmp_path, structure("llama", **{key: value}))
    config = make_config(tmp_path / "run", model__config=str(model.config))
    assert relora(verb, config) == 2
    told = capsys.readouterr().err
    assert f"{key}: {named} is not in the vocabulary; it must be 0 … 319, or null" in told


def test_an_export_and_its_run_are_the_same_start(tmp_path: Path) -> None:
    model = written(tmp_path, structure("llama", pad_token_id=2))
    run_dir = tmp_path / "run"
    assert train(run_dir, f"model.config={model.config}", "train.steps=14") == 0
    assert relora("export", run_dir, "--to", tmp_path / "export") == 0
    told = []
    for name, start in {"a": run_dir, "b": tmp_path / "export"}.items():
        overrides = ("model.config=null", f"model.pretrained={start}", "train.steps=14")
        assert train(tmp_path / name, *overrides) == 0
        lines = [line for line in metric_lines(tmp_path / name) if "train/loss" in line]
        told.append([(line["train/loss"], line["train/grad_norm"]) for line in lines])
    assert told[0] == told[1]


def test_an_export_keeps_the_generation_settings_it_started_from(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    start = tmp_path / "start"
    built = AutoModelForCausalLM.from_config(AutoConfig.for_model(**structure("llama")))
    built.save_pretrained(start)
    settings = {"eos_token_id": [2, 5], "temperature": 0.6, "top_p": 0.9, "do_sample": True}
    GenerationConfig(**settings).save_pretrained(start)
    overrides = ("model.config=null", f"model.pretrained={start}", "train.steps=14")
    assert train(tmp_path / "run", *overrides) == 0
    start.rename(tmp_path / "gone")
    assert relora("export", tmp_path / "run", "--to", tmp_path / "export") == 0
    kept = json.loads((tmp_path / "export" / "generation_config.json").read_text())
    assert settings.items() <= kept.items()
    assert kept["bos_token_id"] == 1  # the tokenizer's: nothing was given
