"""The blocks of relora/integrations/README.md, run as they stand."""

from __future__ import annotations

import base64
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import relora
from ranks import Outcomes, Scenario, run_ranks
from relora.lora.layers import adapted_layers
from relora.model import build_model
from test_library import CHANGES, compare_with_reference
from test_method_reference import GLOBAL_BATCH, SEQUENCE, settings
from test_trainer import STEPS, forget, sequences

PAGE = (Path(relora.__file__).parent / "integrations/README.md").read_text()
# As the page has them, and one rate for all.
AS_ON_THE_PAGE = CHANGES | {
    "relora.lr": None,
    "optimizer.betas": [0.9, 0.95],
    "optimizer.eps": 1e-8,
}


def block(title: str) -> str:
    """The Python under a heading."""
    (found,) = re.findall(rf"^## {title}\n.*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
    return str(found)


def names(model_json: str, ranks: Any) -> dict[str, Any]:
    """What the blocks find there already; batches as the reference has them."""
    config = settings(model_json, "unused", AS_ON_THE_PAGE)
    rows = sequences(config.seed)
    micro = GLOBAL_BATCH // ranks.world
    data = [{"input_ids": row, "labels": row} for row in rows]
    return {
        "relora": relora,
        "torch": torch,
        "model": build_model(config.model, config.seed),
        "lora": config.lora,
        "clock": config.clock,
        "rate": config.optimizer.lr,
        "seed": config.seed,
        "loader": DataLoader(data, micro, shuffle=False),  # type: ignore[arg-type]
    }


def run_block(ranks: Any, title: str, model_json: str, stage: int) -> dict[str, Any]:
    """All parameters after the seventeen updates of a block, and the losses on the way."""
    forget()
    os.environ["ACCELERATE_USE_CPU"] = "true"  # as `accelerate launch --cpu` says it
    found = names(model_json, ranks)
    config = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // ranks.world,
        "gradient_clipping": 1.0,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
    }
    model, losses = found["model"], list[float]()
    forward = model.forward

    def kept(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        losses.append(output.loss.item())
        return output

    model.forward = kept
    if title.startswith("A DeepSpeed"):
        micro = GLOBAL_BATCH // ranks.world
        data = found["loader"].dataset
        found["loader"] = [
            {
                key: torch.stack([x[key] for x in data[at : at + micro]])
                for key in ("input_ids", "labels")
            }
            for at in range(ranks.rank * micro, STEPS * GLOBAL_BATCH, GLOBAL_BATCH)
        ]
        found["config"] = config
    elif stage:  # as `accelerate launch --use_deepspeed --deepspeed_config_file FILE` says it
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        # Accelerate reads a file, or its text in base64.
        text = base64.urlsafe_b64encode(json.dumps(config).encode()).decode()
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = text
    exec(block(title), found)
    state = found["state"] if "state" in found else found["module"].restarts
    assert len(list(adapted_layers(state.model))) == 14
    values = {v.name: state.gather([v], "value")[0].double().cpu().numpy() for v in state}
    return {"losses": [x / ranks.world for x in ranks.sum(losses)], "values": values}


@pytest.fixture(scope="module")
def two_ranks(tiny_llama: Path) -> Outcomes:
    scenarios = [("Accelerate", 0), ("Accelerate", 2)]
    scenarios += [("A DeepSpeed engine", 1), ("A DeepSpeed engine", 3)]
    return run_ranks(
        2,
        [Scenario(f"{t} {z}", run_block, (t, str(tiny_llama), z)) for t, z in scenarios],
        timeout=300,
    )


@pytest.mark.parametrize(
    "name", ["Accelerate 0", "Accelerate 2", "A DeepSpeed engine 1", "A DeepSpeed engine 3"]
)
def test_on_two_ranks_a_block_is_the_reference(
    name: str, two_ranks: Outcomes, tiny_llama: Path
) -> None:
    for found in two_ranks[name]:
        compare_with_reference(found, tiny_llama, AS_ON_THE_PAGE)


@pytest.mark.parametrize("title", ["Accelerate", "Lightning"])
def test_a_block_is_the_reference(
    title: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if title == "Lightning":
        pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    alone = SimpleNamespace(world=1, rank=0, sum=lambda values: values)
    found = run_block(alone, title, str(tiny_llama), 0)
    compare_with_reference(found, tiny_llama, AS_ON_THE_PAGE)


def test_the_block_of_the_trainer_leaves_a_model_of_transformers(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget()
    monkeypatch.chdir(tmp_path)
    shape = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    data = [{"input_ids": row % 64, "labels": row % 64} for row in sequences(0)]
    arguments = TrainingArguments("out", use_cpu=True, report_to=[], max_steps=42)
    found = {"relora": relora, "Trainer": Trainer, "dataset": data, "arguments": arguments}
    found["model"] = LlamaForCausalLM(shape)
    exec(block("transformers' Trainer"), found)
    assert list(found["trainer"].callback_handler.callbacks[-1].reports) == [20, 40]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(SEQUENCE)[None]
    expected = found["model"](input_ids=ids).logits
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_trls_trainer_takes_it_too(tmp_path: Path) -> None:
    trl: Any = pytest.importorskip("trl")
    forget()
    words = {"<pad>": 0, "<eos>": 1, **{chr(ord("a") + i): i + 2 for i in range(26)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    shape = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(shape)
    relora.add_adapters(model, relora.LoRAConfig(rank=4))
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(str(tmp_path), max_steps=12, use_cpu=True, report_to=[], bf16=False),
        train_dataset=Dataset.from_list([{"input_ids": row} for row in [[2, 3, 4, 5] * 3] * 99]),
        processing_class=tokenizer,
    )
    callback = relora.ReLoRACallback(trainer, relora.ReLoRAConfig(cycle_steps=5, rewarm_steps=2))
    trainer.add_callback(callback)
    trainer.train()
    assert list(callback.reports) == [5, 10]
    assert all(report.update_ratio > 0 for report in callback.reports.values())


def test_what_the_loops_share_is_the_librarys() -> None:
    found: dict[str, Any] = {}
    exec(block("What the loops below share"), found)
    assert found["clock"].merge_steps() == range(20, 60, 20)
