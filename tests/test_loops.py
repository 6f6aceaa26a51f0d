"""The blocks of relora/integrations/README.md, run as they stand."""

from __future__ import annotations

import base64
import contextlib
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
        "dataset": data,
        "batch_size": micro,
        "save_every": 5,
        "resume": None,
    }


def halved(model: Any, *arguments: Any) -> None:
    """`relora.add_adapters`, with a frozen base in bf16."""
    relora.add_adapters(model, *arguments)
    for _, layer in adapted_layers(model):
        layer.weight.data = layer.weight.data.bfloat16()


def run_block(
    ranks: Any, title: str, model_json: str, stage: int, half: bool = False, **changes: Any
) -> dict[str, Any]:
    """All parameters after the seventeen updates of a block, and the losses on the way.

    Args:
        half: frozen weights in bf16, which products are in too.
        changes: what the block finds there.
    """
    forget()
    os.environ["ACCELERATE_USE_CPU"] = "true"  # as `accelerate launch --cpu` says it
    found = names(model_json, ranks) | changes
    if half:
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
        found["relora"] = SimpleNamespace(**{**vars(relora), "add_adapters": halved})
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


def gone_on(
    ranks: Any, place: str, title: str, *settings: Any, **changes: Any
) -> dict[str, dict[str, Any]]:
    """A block whole, and one that has nothing but its checkpoint of update 5, in mid-cycle."""
    Path(place).mkdir(exist_ok=True)
    with contextlib.chdir(place):
        whole = run_block(ranks, title, *settings, **changes)
        (resume,) = (str(path) for path in Path("checkpoints").glob("*step[_=]5*"))
        rest = run_block(ranks, title, *settings, **changes, resume=resume)
    return {"whole": whole, "rest": rest}


def assert_bit_equal(found: dict[str, Any]) -> None:
    """All losses after update 5, over three merges, and all parameters at the end."""
    whole, rest = found["whole"], found["rest"]
    assert rest["losses"] == whole["losses"][5:]
    assert len(rest["losses"]) == STEPS - 5
    assert rest["values"].keys() == whole["values"].keys()
    for name, value in whole["values"].items():
        assert (value == rest["values"][name]).all(), name


@pytest.fixture(scope="module")
def two_ranks(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    place, model = tmp_path_factory.mktemp("loops"), str(tiny_llama)
    scenarios = [
        Scenario(f"A DeepSpeed engine {z}", run_block, ("A DeepSpeed engine", model, z))
        for z in (1, 3)
    ]
    for name, stage, half in (
        ("Accelerate 0", 0, False),
        ("Accelerate 0 bf16", 0, True),
        ("Accelerate 2", 2, False),
        ("Accelerate 3", 3, False),
    ):
        arguments = (str(place / name), "Accelerate", model, stage, half)
        scenarios.append(Scenario(name, gone_on, arguments))
    return run_ranks(2, scenarios, timeout=300)


@pytest.mark.parametrize(
    "name", ["Accelerate 0", "Accelerate 2", "A DeepSpeed engine 1", "A DeepSpeed engine 3"]
)
def test_on_two_ranks_a_block_is_the_reference(
    name: str, two_ranks: Outcomes, tiny_llama: Path
) -> None:
    for found in two_ranks[name]:
        compare_with_reference(found.get("whole", found), tiny_llama, AS_ON_THE_PAGE)


@pytest.mark.parametrize(
    "name", ["Accelerate 0", "Accelerate 0 bf16", "Accelerate 2", "Accelerate 3"]
)
def test_on_two_ranks_a_block_goes_on_bit_for_bit(name: str, two_ranks: Outcomes) -> None:
    for found in two_ranks[name]:
        assert_bit_equal(found)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("title", ["Accelerate", "Lightning"])
def test_a_block_is_the_reference_and_goes_on_bit_for_bit(
    title: str, half: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    if title == "Lightning":
        pytest.importorskip("lightning")
    alone = SimpleNamespace(world=1, rank=0, sum=lambda values: values)
    found = gone_on(alone, str(tmp_path), title, str(tiny_llama), 0, half)
    assert_bit_equal(found)
    if not half:
        compare_with_reference(found["whole"], tiny_llama, AS_ON_THE_PAGE)


@pytest.mark.parametrize("batches", [pytest.param(5, marks=pytest.mark.slow), 3])
def test_lightning_goes_on_from_the_end_of_an_epoch_and_within_a_later_one(
    batches: int, tiny_llama: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lightning")
    alone = SimpleNamespace(world=1, rank=0, sum=lambda values: values)
    data = [{"input_ids": row, "labels": row} for row in sequences(0)[: batches * GLOBAL_BATCH]]
    settings = (str(tiny_llama), 0, False)
    assert_bit_equal(gone_on(alone, str(tmp_path), "Lightning", *settings, dataset=data))


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
