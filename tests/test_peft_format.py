"""Adapters as PEFT keeps them: what is written here loads there, and the other way round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import relora
from relora.errors import CheckpointError, ConfigError

IDS = torch.arange(24).view(2, 12) % 50


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
        )
    ).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    ).eval()


class Pixels(nn.Module):
    """Convolutions of one and two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.row = nn.Conv1d(8, 6, 3, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.row(self.image(x).flatten(2))


def train_a_little(model: Any, *inputs: Tensor) -> None:
    """So that neither A nor B is what it began as."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def output(model: Any, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(inputs)
    return found if isinstance(found, Tensor) else found.logits


CASES: dict[str, tuple[Any, Tensor, dict[str, Any]]] = {
    "llama": (llama, IDS, {"rank": 4, "alpha": 12}),
    "rslora": (llama, IDS, {"rank": 4, "alpha": 12, "scaling": "rslora"}),
    "patterns": (
        llama,
        IDS,
        {
            "rank": 4,
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8},
            "alpha_pattern": {"down_proj": 5.0},
        },
    ),
    "embedding": (llama, IDS, {"rank": 4, "targets": ["embed_tokens", "o_proj"]}),
    "gpt2": (gpt2, IDS, {"rank": 4, "alpha": 12}),
    "convolutions": (
        Pixels,
        torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0)),
        {"rank": 2, "targets": ["image", "row"]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_loads_in_peft_with_the_same_outputs(case: str, tmp_path: Path) -> None:
    make, inputs, settings = CASES[case]
    model = make()
    relora.add_adapters(model, relora.LoRAConfig(**settings))
    train_a_little(model)
    relora.save_adapter(model, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(make(), str(tmp_path / "adapter"))
    torch.testing.assert_close(output(theirs, inputs), output(model, inputs), atol=1e-5, rtol=0)
    # Nothing of the base goes with it.
    held = sum(
        tensor.numel()
        for tensor in load_file(tmp_path / "adapter/adapter_model.safetensors").values()
    )
    assert held == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_loads_here_and_trains_on(case: str, tmp_path: Path) -> None:
    make, inputs, settings = CASES[case]
    model = make()
    relora.add_adapters(model, relora.LoRAConfig(**settings))
    train_a_little(model)
    relora.save_adapter(model, tmp_path)
    again = make()
    relora.load_adapter(again, tmp_path)
    assert torch.equal(output(again, inputs), output(model, inputs))
    output_again = again(inputs)
    (output_again if isinstance(output_again, Tensor) else output_again.logits).sum().backward()
    assert all(layer.lora_A.grad is not None for _, layer in relora.adapted_layers(again))


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (llama, {"target_modules": ["q_proj", "up_proj"], "lora_alpha": 7}),
        (llama, {"target_modules": "all-linear", "use_rslora": True}),
        (llama, {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}}),
        (llama, {"target_modules": ["o_proj"], "alpha_pattern": {"layers.0.self_attn.o_proj": 3}}),
        (llama, {"target_modules": ["embed_tokens", "k_proj"]}),
        (llama, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
        (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
        (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ],
)
def test_what_peft_wrote_loads_here_with_the_same_outputs(
    make: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    theirs = get_peft_model(make(), LoraConfig(r=4, **settings)).eval()
    train_a_little(theirs)
    for name, parameter in theirs.named_parameters():
        if "modules_to_save" in name:
            parameter.data.mul_(1.1)
    theirs.save_pretrained(str(tmp_path))
    model = make()
    relora.load_adapter(model, tmp_path)
    torch.testing.assert_close(output(model, IDS), output(theirs, IDS), atol=1e-5, rtol=0)
    # And there is a merge: the plain model computes the same.
    relora.merge_adapters(model)
    torch.testing.assert_close(output(model, IDS), output(theirs, IDS), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "use_dora: True"),
        ({"bias": "lora_only"}, "bias: lora_only"),
        ({"lora_bias": True}, "lora_bias: True"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa"),
        ({"peft_type": "LOHA"}, "peft_type is LOHA"),
        ({"of_tomorrow": 1}, "of_tomorrow: 1"),
    ],
)
def test_what_is_more_than_a_and_b_is_refused_by_name(
    settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    model = llama()
    relora.add_adapters(model, relora.LoRAConfig(rank=2))
    relora.save_adapter(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(ConfigError, match=named):
        relora.load_adapter(llama(), tmp_path)


def test_what_is_missing_or_of_another_model_is_said(tmp_path: Path) -> None:
    model = llama()
    with pytest.raises(ConfigError, match="no adapters"):
        relora.save_adapter(model, tmp_path / "none")
    relora.add_adapters(model, relora.LoRAConfig(rank=2))
    relora.save_adapter(model, tmp_path / "a")
    with pytest.raises(ConfigError, match=r"no layer model\.layers\.0"):
        relora.load_adapter(gpt2(), tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        relora.load_adapter(llama(), tmp_path / "nowhere")
    (tmp_path / "a/adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="cannot be read"):
        relora.load_adapter(llama(), tmp_path / "a")
    blocks = llama()
    relora.add_adapters(blocks, relora.LoRAConfig(blocks=2))
    with pytest.raises(ConfigError, match="blocks of W are no A and B"):
        relora.save_adapter(blocks, tmp_path / "b")


def test_adapters_take_turns_on_one_base_in_memory(tmp_path: Path) -> None:
    expected = []
    for number, rank in enumerate((2, 5)):
        model = llama()
        relora.add_adapters(model, relora.LoRAConfig(rank=rank, alpha=9), seed=number)
        train_a_little(model)
        relora.save_adapter(model, tmp_path / str(number))
        expected.append(output(model, IDS))
    model = llama()
    relora.load_adapter(model, tmp_path / "0")
    base = {name: p.data_ptr() for name, p in model.named_parameters() if "lora_" not in name}
    second = relora.read_adapter(tmp_path / "1")
    for _ in range(2):
        assert torch.equal(output(model, IDS), expected[0])
        with relora.using_adapter(model, second):
            assert torch.equal(output(model, IDS), expected[1])
            assert base == {
                n: p.data_ptr() for n, p in model.named_parameters() if "lora_" not in n
            }
    with (
        pytest.raises(ConfigError, match="is not adapted in both"),
        relora.using_adapter(model, second._replace(factors={})),
    ):
        pass


@pytest.mark.parametrize("make", [llama, gpt2])
def test_merged_it_costs_what_the_plain_model_costs_and_the_base_comes_back(make: Any) -> None:
    """The same kernels in the same order, and after the way back the same bits."""
    plain, model = make(), make()
    relora.add_adapters(model, relora.LoRAConfig(rank=4))
    train_a_little(model)
    adapted, base = output(model, IDS), {k: v.clone() for k, v in model.state_dict().items()}
    relora.merge_adapters(model, keep=True)
    torch.testing.assert_close(output(model, IDS), adapted, atol=1e-5, rtol=0)
    assert operations(model) == operations(plain)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    relora.unmerge_adapters(model)
    assert torch.equal(output(model, IDS), adapted)
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())


def operations(model: Any) -> list[str]:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Seen():
        output(model, IDS)
    return seen
