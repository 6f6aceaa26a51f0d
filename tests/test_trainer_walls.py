"""transformers' Trainer with the callback beside our own loop; updates that it skips; its walls."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import relora
from ranks import Outcomes, Scenario, run_ranks
from relora.errors import ConfigError
from test_library import CHANGES
from test_method_reference import GLOBAL_BATCH, run_reference, settings, train_recorded
from test_trainer import STEPS, InOrder, adapted, forget, make_trainer, sequences, zero

STAGES = (0, 3)
EVEN = {"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": {}}


def losses_of_both(ranks: Any, stage: int, model_json: str, place: str) -> list[list[float]]:
    """Of seventeen updates under one ZeRO stage: the Trainer's losses, and those of our loop."""
    forget()
    config = settings(model_json, f"{place}/trainer", CHANGES)
    stages = {"deepspeed": zero(stage, GLOBAL_BATCH // ranks.world)}
    trainer, _ = make_trainer(config.run_dir, adapted(config), config, ranks.world, **stages)
    trainer.train()
    theirs = [loss / ranks.world for loss in ranks.sum(trainer.losses)]
    forget()  # or the next model would be cut up as it is made
    changes = {
        **CHANGES,
        "deepspeed.zero_stage": stage,
        "batch.micro_batch_size": GLOBAL_BATCH // ranks.world,
    }
    return [theirs, train_recorded(ranks, model_json, f"{place}/ours", changes)["losses"]]


class Spoilt(InOrder):
    """The losses of some batches, counted from 0, have no finite gradient on the first rank."""

    bad: tuple[int, ...] = ()

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Of a batch, spoilt or not."""
        loss = super().compute_loss(*args, **kwargs)
        spoil = len(self.losses) - 1 in self.bad and self.args.process_index == 0
        return loss * math.inf if spoil else loss


def skipping(ranks: Any, stage: int, model_json: str, place: str) -> dict[str, Any]:
    """A run that skips two updates, and one whose data never had their batches."""
    config = settings(model_json, place, CHANGES)
    # The update that a merge would have followed, and the one right after the merge.
    bad = (3, 5)
    rows = sequences(config.seed)
    found = {}
    for name, spoil in (("skipped", bad), ("never had", ())):
        forget()
        good = [i for i in range(STEPS) if spoil or i not in bad]
        data = [row for i in good for row in rows[i * GLOBAL_BATCH : (i + 1) * GLOBAL_BATCH]]
        trainer, callback = make_trainer(
            Path(place), adapted(config), config, ranks.world,
            deepspeed=zero(stage, GLOBAL_BATCH // ranks.world), max_steps=len(good), **EVEN,
        )  # fmt: skip
        trainer.__class__ = Spoilt
        trainer.bad = spoil  # type: ignore[attr-defined]
        rows_of: Any = [{"input_ids": row, "labels": row} for row in data]
        trainer.train_dataset = rows_of
        trainer.train()
        state = callback._state
        assert state is not None
        values = {view.name: state.gather([view], "value")[0].clone() for view in state}
        scheduler: Any = trainer.lr_scheduler
        found[name] = (values, list(callback.reports), scheduler.last_epoch)
    (values, *counts), (expected, *counted) = found["skipped"], found["never had"]
    same = all(torch.equal(values[name], value) for name, value in expected.items())
    return {"same": same, "counts": counts, "counted": counted}


def autocast(ranks: Any, model_json: str, place: str) -> list[float]:
    """Losses under DistributedDataParallel in bf16, two micro-batches an update."""
    forget()
    config = settings(model_json, place, CHANGES)
    trainer, callback = make_trainer(
        Path(place), adapted(config), config, ranks.world, accumulation=2, bf16=True
    )
    trainer.train()
    assert list(callback.reports) == [4, 8, 12, 16]
    pairs = zip(trainer.losses[::2], trainer.losses[1::2], strict=True)
    return [loss / 2 / ranks.world for loss in ranks.sum([a + b for a, b in pairs])]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Outcomes:
    """ZeRO 0 and 3 beside our own loop; skipped updates; bf16."""
    place = tmp_path_factory.mktemp("walls")
    scenarios = [
        Scenario(f"both {s}", losses_of_both, (s, str(tiny_llama), str(place / f"both_{s}")))
        for s in STAGES
    ]
    scenarios += [
        Scenario("skip", skipping, (2, str(tiny_llama), str(place / "skip"))),
        Scenario("bf16", autocast, (str(tiny_llama), str(place / "bf16"))),
    ]
    return run_ranks(2, scenarios, timeout=300)


@pytest.mark.parametrize("stage", STAGES)
def test_its_losses_are_those_of_our_own_loop(stage: int, two_ranks: Outcomes) -> None:
    for theirs, ours in two_ranks[f"both {stage}"]:
        assert len(theirs) == STEPS
        assert theirs == pytest.approx(ours, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_so_they_are_on_the_other_stages(stage: int, tiny_llama: Path, tmp_path: Path) -> None:
    scenario = Scenario("both", losses_of_both, (stage, str(tiny_llama), str(tmp_path)))
    for theirs, ours in run_ranks(2, [scenario], timeout=300)["both"]:
        assert theirs == pytest.approx(ours, rel=1e-6)


def test_skipped_updates_move_no_restart_and_leave_no_trace(two_ranks: Outcomes) -> None:
    for found in two_ranks["skip"]:
        assert found["counts"] == found["counted"] == [[4, 8, 12], STEPS - 2]
        assert found["same"]


def test_in_bf16_with_accumulation_it_is_near_the_reference(
    two_ranks: Outcomes, tiny_llama: Path
) -> None:
    truth = run_reference(str(tiny_llama), CHANGES)
    for losses in two_ranks["bf16"]:
        assert losses == pytest.approx(truth.losses, rel=1e-2)


# --- walls ----------------------------------------------------------------------------------------


def test_settings_that_would_do_nothing_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    forget()
    config = settings(str(tiny_llama), str(tmp_path), CHANGES)
    model = adapted(config)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], max_steps=4)
    trainer = Trainer(model, arguments)
    with pytest.raises(ConfigError, match=r"tolerance: 0\.1 would do nothing"):
        relora.ReLoRACallback(trainer, relora.ReLoRAConfig(cycle_steps=200, tolerance=0.1))
    with pytest.raises(ConfigError, match="rewarm_steps: 100 must be below cycle_steps 20"):
        relora.ReLoRACallback(trainer, relora.ReLoRAConfig(cycle_steps=20, rewarm_steps=100))
    own = torch.optim.AdamW(relora.parameter_groups(model))
    with pytest.raises(ConfigError, match=r"lr: 0\.01 would do nothing"):
        relora.ReLoRACallback(Trainer(model, arguments, optimizers=(own, None)), config.relora)
    trainer, _ = make_trainer(tmp_path, model, config, max_steps=4)
    with pytest.raises(ConfigError, match="cycle_steps: 4 leaves no merge in 4 updates"):
        trainer.train()
    trainer, _ = make_trainer(tmp_path, model, config, optim="adafactor")
    with pytest.raises(ConfigError, match="moments of Adafactor are not known"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_a_deepspeed_config_that_makes_what_the_trainer_makes_is_refused(
    section: str, tiny_llama: Path, tmp_path: Path
) -> None:
    forget()
    config = settings(str(tiny_llama), str(tmp_path), CHANGES)
    own = {"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}}[section]
    model = adapted(config)

    class Sharding:
        """As a Trainer is under DeepSpeed, whose process group a unit test does not start."""

        is_fsdp_enabled, is_deepspeed_enabled = False, True
        plugin = SimpleNamespace(deepspeed_config={section: own, "zero_optimization": {}})
        accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))

    trainer: Any = Sharding()
    trainer.model = model
    with pytest.raises(ConfigError, match=f"section of its own for the {section}"):
        relora.ReLoRACallback(trainer, config.relora)
