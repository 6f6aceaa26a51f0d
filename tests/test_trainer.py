"""transformers' Trainer with the callback: against the float64 reference; stopped and resumed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import relora
from ranks import Outcomes, Scenario, run_ranks
from relora.data.loader import train_batches
from relora.errors import CheckpointError, ConfigError
from relora.lora.config import ADAPTER_GROUPS
from relora.model import build_model
from test_library import CHANGES, MUON, compare_with_reference
from test_method_reference import GLOBAL_BATCH, SEQUENCE, settings, shards

STEPS = 17


class InOrder(Trainer):
    """Batches in the order of the data, and the loss of each step."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's own, which is kept."""
        loss = model(**inputs).loss
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


def sequences(seed: int) -> torch.Tensor:
    """What the reference's updates are of, in order: ids (updates × global batch, length)."""
    count = STEPS * GLOBAL_BATCH
    (rows,) = next(
        train_batches(
            shards().train, sequence_length=SEQUENCE, global_batch=count, micro_batch=count,
            rank=0, world=1, seed=seed,
        )
    )  # fmt: skip
    return rows


def make_trainer(
    place: Path,
    model: Any,
    config: Any,
    world: int = 1,
    accumulation: int = 1,
    muon: dict[str, Any] | None = None,
    **changes: Any,
) -> tuple[InOrder, relora.ReLoRACallback]:
    """The Trainer that does what `config` says, with the callback."""
    values: dict[str, Any] = {
        "output_dir": str(place), "max_steps": STEPS, "use_cpu": True, "seed": config.seed,
        "per_device_train_batch_size": GLOBAL_BATCH // world // accumulation,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": config.optimizer.lr, "weight_decay": config.optimizer.weight_decay,
        "adam_beta1": config.optimizer.betas[0], "adam_beta2": config.optimizer.betas[1],
        "adam_epsilon": config.optimizer.eps, "max_grad_norm": 1.0, "optim": "adamw_torch",
        "lr_scheduler_type": "cosine_with_min_lr", "warmup_steps": config.schedule.warmup_steps,
        "lr_scheduler_kwargs": {"min_lr_rate": config.schedule.min_lr_ratio},
        "report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
        "dataloader_pin_memory": False, "bf16": False,
    }  # fmt: skip
    trainer = InOrder(
        model,
        TrainingArguments(**values | changes),
        train_dataset=[{"input_ids": row, "labels": row} for row in sequences(config.seed)],
        optimizer_cls_and_kwargs=(relora.Muon, muon) if muon else None,
    )
    callback = relora.ReLoRACallback(trainer, config.relora)
    trainer.add_callback(callback)
    return trainer, callback


def adapted(config: Any) -> Any:
    model = build_model(config.model, config.seed)
    relora.add_adapters(model, config.lora, config.seed)
    return model


def zero(stage: int, micro: int) -> dict[str, Any]:
    """A DeepSpeed config for the Trainer."""
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 1.0,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
    }


def forget() -> None:
    """What the Trainers of a process share."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    for name in ("USE_DEEPSPEED", "MIXED_PRECISION"):
        os.environ.pop(f"ACCELERATE_{name}", None)


def trained(ranks: Any, kind: str, model_json: str, place: str) -> dict[str, Any]:
    """Seventeen updates of a kind of Trainer: losses, and all parameters at the end."""
    forget()
    config = settings(model_json, place, CHANGES)
    changes: dict[str, Any] = {"accumulation": 2} if kind == "accumulated" else {}
    if kind[0].isdigit():
        changes["deepspeed"] = zero(int(kind[0]), GLOBAL_BATCH // ranks.world)
    if "muon" in kind:
        changes["muon"] = {"momentum": 0.9, "betas": config.optimizer.betas, "eps": 1e-6}
    trainer, callback = make_trainer(Path(place), adapted(config), config, ranks.world, **changes)
    trainer.train()
    state = callback._state
    assert state is not None
    assert list(callback.reports) == [4, 8, 12, 16]
    count = len(trainer.losses) // STEPS
    losses = [sum(trainer.losses[i : i + count]) / count for i in range(0, STEPS * count, count)]
    values = {view.name: state.gather([view], "value")[0].double().numpy() for view in state}
    return {"losses": [x / ranks.world for x in ranks.sum(losses)], "values": values}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Outcomes:
    """The Trainer under DDP and under its own DeepSpeed."""
    directory = tmp_path_factory.mktemp("trainer")
    kinds = ("ddp", "1", "2", "3", "2 muon")
    arguments = {kind: (kind, str(tiny_llama), str(directory / kind)) for kind in kinds}
    return run_ranks(2, [Scenario(k, trained, arguments[k]) for k in kinds], timeout=300)


@pytest.mark.parametrize("kind", ["ddp", "1", "2", "3", "2 muon"])
def test_on_two_ranks_it_is_the_reference(kind: str, two_ranks: Outcomes, tiny_llama: Path) -> None:
    for found in two_ranks[kind]:
        compare_with_reference(found, tiny_llama, MUON if "muon" in kind else {})


@pytest.mark.parametrize(
    "kind", [pytest.param("plain", marks=pytest.mark.slow), "accumulated", "plain muon"]
)
def test_it_is_the_reference(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Losses and weights of every update, also those that follow a merge."""
    alone = SimpleNamespace(world=1, sum=lambda values: values)
    found = trained(alone, kind, str(tiny_llama), str(tmp_path))
    compare_with_reference(found, tiny_llama, MUON if "muon" in kind else {})


# --- stopped and resumed --------------------------------------------------------------------------


def stopped(
    ranks: Any, kind: str, model_json: str, place: str, steps: tuple[int, ...]
) -> dict[str, Any]:
    """A run with its checkpoints, and runs that go on from some: losses and the bits at the end."""
    config = settings(model_json, place, CHANGES)
    changes: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    if kind[:1].isdigit():
        stage = zero(int(kind[0]), GLOBAL_BATCH // ranks.world)
        # DeepSpeed's own engine in bf16, as args.bf16 has it: frozen weights are bf16 in it.
        changes |= {"deepspeed": stage | ({"bf16": {"enabled": True}} if "bf16" in kind else {})}
    changes["bf16"] = "bf16" in kind

    def run(checkpoint: int | None) -> tuple[list[float], dict[str, Any]]:
        forget()
        model = adapted(config)
        if kind == "plain bf16":
            for _, layer in relora.adapted_layers(model):
                layer.weight.data = layer.weight.data.bfloat16()
        trainer, callback = make_trainer(Path(place), model, config, ranks.world, **changes)
        trainer.train(resume_from_checkpoint=checkpoint and f"{place}/checkpoint-{checkpoint}")
        state = callback._state
        assert state is not None
        values = {view.name: state.gather([view], "value")[0].clone() for view in state}
        return trainer.losses, values

    whole = run(None)
    found = {}
    for step in steps:
        losses, values = run(step)
        same = all(torch.equal(values[name], value) for name, value in whole[1].items())
        found[str(step)] = (losses == whole[0][step:], same)
    return found


STOPS = (5 + 1, 8)  # within a cycle; on a merge


@pytest.mark.parametrize(
    "kinds",
    [("ddp", "2", "3 bf16"), pytest.param(("1", "3", "2 bf16"), marks=pytest.mark.slow)],
)
def test_on_two_ranks_a_stop_leaves_no_trace(
    kinds: tuple[str, ...], tiny_llama: Path, tmp_path: Path
) -> None:
    arguments = {kind: (kind, str(tiny_llama), str(tmp_path / kind), STOPS) for kind in kinds}
    outcomes = run_ranks(2, [Scenario(k, stopped, arguments[k]) for k in kinds], timeout=300)
    for kind in kinds:
        for found in outcomes[kind]:
            assert found == {str(step): (True, True) for step in STOPS}, kind


@pytest.mark.parametrize("kind", ["plain", "plain bf16"])
def test_a_stop_leaves_no_trace(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Nor where weights are bf16, and merges leave a remainder that no Trainer saves."""
    alone = SimpleNamespace(world=1, sum=lambda values: values)
    found = stopped(alone, kind, str(tiny_llama), str(tmp_path), STOPS)
    assert found == {str(step): (True, True) for step in STOPS}
    kept = tmp_path / "checkpoint-8/merge_remainder_00000.safetensors"
    assert kept.is_file() == (kind == "plain bf16")
    if kind == "plain bf16":
        assert any(part.any() for part in load_file(kept).values())


# --- what it refuses, and what it leaves ----------------------------------------------------------


def test_what_it_cannot_do_is_said_before_any_step(tiny_llama: Path, tmp_path: Path) -> None:
    forget()
    config = settings(str(tiny_llama), str(tmp_path), CHANGES)
    model = build_model(config.model, config.seed)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], max_steps=4)
    with pytest.raises(ConfigError, match=r"has no adapters; call relora\.add_adapters"):
        relora.ReLoRACallback(Trainer(model, arguments), config.relora)
    model = adapted(config)
    own = torch.optim.AdamW(model.parameters())
    with pytest.raises(ConfigError, match=r"make it of relora\.parameter_groups"):
        relora.ReLoRACallback(Trainer(model, arguments, optimizers=(own, None)), config.relora)
    trainer = Trainer(model, arguments)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ConfigError, match="take DDP, or DeepSpeed"):
        relora.ReLoRACallback(trainer, config.relora)
    trainer, _ = make_trainer(tmp_path, model, config)
    trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.create_optimizer())
    with pytest.raises(ConfigError, match="for a ConstantLR; choose such a one, or set rewarm"):
        trainer.train()


def test_without_what_bf16_cannot_hold_it_does_not_go_on(tiny_llama: Path, tmp_path: Path) -> None:
    config = settings(str(tiny_llama), str(tmp_path), CHANGES)
    alone = SimpleNamespace(world=1, sum=lambda values: values)
    for file in ("", "merge_remainder_00000.safetensors"):
        stopped(alone, "plain bf16", str(tiny_llama), str(tmp_path), ())
        checkpoint = tmp_path / "checkpoint-8"
        if file:
            (checkpoint / file).unlink()
        forget()
        model = adapted(config)
        for _, layer in relora.adapted_layers(model):
            layer.weight.data = layer.weight.data.bfloat16()
        trainer, _ = make_trainer(tmp_path, model, config, bf16=True)
        with (
            pytest.raises(CheckpointError, match="what half precision rounds")
            if file
            else (contextlib.nullcontext())
        ):
            trainer.train(resume_from_checkpoint=str(checkpoint))


def test_weights_that_are_cut_up_already_are_refused_and_the_order_is_said() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)
            self.inner.weight.data = torch.empty(0)

    with pytest.raises(ConfigError, match="make model and adapters first"):
        relora.add_adapters(Cut(), relora.LoRAConfig(rank=2))


def test_what_it_has_trained_is_a_model_of_transformers(tiny_llama: Path, tmp_path: Path) -> None:
    forget()
    config = settings(str(tiny_llama), str(tmp_path), CHANGES)
    trainer, callback = make_trainer(tmp_path, adapted(config), config)
    trainer.train()
    merges = [line for line in trainer.state.log_history if "relora/update_ratio" in line]
    assert [line["step"] for line in merges] == [4, 8, 12, 16]
    assert callback.reports[4].update_ratio == merges[0]["relora/update_ratio"] > 0
    ids = torch.arange(12)[None]
    model: Any = trainer.model
    expected = model(input_ids=ids).logits
    relora.merge_adapters(model)
    trainer.save_model(str(tmp_path / "merged"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-5, rtol=0)


def test_adapters_climb_after_a_restart_and_the_rest_follows_the_trainers_own_curve(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """With any scheduler: here a line, down to nothing, which the clock of relora has too."""
    forget()
    config = settings(str(tiny_llama), str(tmp_path), CHANGES)
    changes = {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {}}
    trainer, _ = make_trainer(tmp_path, adapted(config), config, **changes)
    trainer.train()
    scheduler: Any = trainer.lr_scheduler
    clock = relora.Clock(17, warmup=2, base="linear", min_ratio=0.0, cycle=4, rewarm=2)
    for group, curve in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        found = [curve(step) for step in range(STEPS)]
        assert found == pytest.approx([clock.factors(t)[group["name"]] for t in range(STEPS)])
        assert (0.0 in found[1:]) == (group["name"] in ADAPTER_GROUPS)
