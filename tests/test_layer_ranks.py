"""Embeddings and convolutions with adapters on two ranks, under each ZeRO stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import relora
from ranks import Outcomes, Scenario, run_ranks
from relora.lora.draws import draw_a

RANK, ALPHA, LR, STEPS, CYCLE = 2, 4.0, 1e-2, 9, 3
TARGETS = ["words", "mix", "up", "image"]
LAYERS = {"words": nn.Embedding, "mix": nn.Conv1d, "up": nn.Linear, "image": nn.Conv2d}


class Mixed(nn.Module):
    """A layer of each kind, then a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(11, 8)
        self.mix = nn.Conv1d(8, 8, 3, padding="same", groups=2)
        self.up = nn.Linear(8, 12)
        self.image = nn.Conv2d(1, 4, (2, 3), stride=2, padding=1, padding_mode="circular")
        self.head = nn.Linear(4 * 4 * 6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x)
        h = h + self.mix(h.transpose(1, 2)).transpose(1, 2).tanh()
        return self.head(self.image(self.up(h).tanh().unsqueeze(1)).flatten(1))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """(ids (8, 6), classes (8,)) of all ranks."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randint(0, 11, (8, 6), generator=generator)
    return x, (x.sum(1) + x[:, 0]) % 5


def begin(stage: int, base: torch.dtype) -> tuple[Any, relora.EngineState]:
    """An engine with adapters on a layer of each kind."""
    import deepspeed

    model = Mixed()
    assert relora.add_adapters(
        model, relora.LoRAConfig(rank=RANK, alpha=ALPHA, targets=TARGETS)
    ) == list(LAYERS)
    for _, layer in relora.adapted_layers(model):
        layer.weight.data = layer.weight.data.to(base)
    optimizer = torch.optim.AdamW(relora.parameter_groups(model), lr=LR)
    autocast = {"enabled": base is torch.bfloat16, "dtype": "bfloat16"}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 4,
            "gradient_clipping": 0.0,  # else it is 1
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage},
            "torch_autocast": autocast,
        },
        dist_init_required=False,
    )
    return engine, relora.EngineState(engine)


def held(state: relora.EngineState, kind: str = "value") -> dict[str, Tensor]:
    """Whole values, or moments where there are some."""
    views = [view for view in state if kind == "value" or view.flat is not None]
    return {view.name: state.gather([view], kind)[0].clone() for view in views}


def go_on(engine: Any, state: Any, ranks: Any, first: int, last: int) -> None:
    """Updates first + 1 … last, with a merge after each cycle."""
    for step in range(first, last):
        x, classes = (part[ranks.rank :: ranks.world] for part in batch(step))
        engine.backward(F.cross_entropy(engine(x).float(), classes))
        engine.step()
        if (step + 1) % CYCLE == 0 and step + 1 < STEPS:
            reset = relora.ResetConfig(mode="zero")
            report = relora.merge_and_restart(state, (step + 1) // CYCLE, 0, reset)
            assert report.layers == len(LAYERS)
            assert report.rounding_loss == 0


class Snapshot:
    """Everything that an engine holds, as a checkpoint has it."""

    def __init__(self, state: relora.EngineState) -> None:
        kinds = ("value", "exp_avg", "exp_avg_sq")
        self.whole = {kind: held(state, kind) for kind in kinds}
        self.steps = {v.name: state.adam_step(v) for v in state if v.flat is not None}

    def fetch(self, name: str) -> None:
        """All is there."""

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor | None:
        """Entries start..stop of the flattened tensor, or None."""
        whole = self.whole[kind].get(name)
        return None if whole is None else whole.flatten()[start:stop]

    def adam_step(self, name: str) -> float | None:
        """How many updates Adam has counted."""
        return self.steps.get(name)


def train_each_kind(ranks: Any, stage: int) -> dict[str, Any]:
    """A whole run, and one that goes on in another engine from the merge after update 6."""
    engine, state = begin(stage, torch.float32)
    go_on(engine, state, ranks, 0, 2 * CYCLE)
    snapshot = Snapshot(state)
    go_on(engine, state, ranks, 2 * CYCLE, STEPS)
    whole = held(state)
    engine.destroy()
    engine, state = begin(stage, torch.float32)
    state.restore_(snapshot)
    go_on(engine, state, ranks, 2 * CYCLE, STEPS)
    resumed = held(state)
    engine.destroy()
    same = [name for name in whole if torch.equal(whole[name], resumed[name])]
    return {"values": whole, "same": same}


def merge_into_bf16(ranks: Any, stage: int) -> float:
    """The largest relative error of ten merged cycles in a bf16 base, beside sums in float64."""
    engine, state = begin(stage, torch.bfloat16)
    exact = {name: held(state)[f"{name}.weight"].double() for name in LAYERS}
    for merge in range(1, 11):
        x, classes = (part[ranks.rank :: ranks.world] for part in batch(merge))
        engine.backward(F.cross_entropy(engine(x).float(), classes))
        engine.step()
        values = held(state)
        for name in LAYERS:
            exact[name] += delta(name, values[f"{name}.lora_A"], values[f"{name}.lora_B"])
        relora.merge_and_restart(state, merge)
    values = held(state)
    engine.destroy()
    errors = [(values[f"{n}.weight"].double() - exact[n]).norm() / exact[n].norm() for n in LAYERS]
    return float(max(errors))


def delta(name: str, a: Tensor, b: Tensor) -> Tensor:
    """s·B·A in the shape of the weight, in float64."""
    matrix = ALPHA / RANK * b.double() @ a.double()
    if name == "words":
        return matrix.t()
    return matrix.view(Mixed().get_parameter(f"{name}.weight").shape)


def reference() -> dict[str, Tensor]:
    """The same in float64, in plain PyTorch."""
    model = Mixed().double()
    base = {name: model.get_parameter(f"{name}.weight").detach().clone() for name in LAYERS}
    draw = {
        name: lambda merge, name=name: draw_a(
            torch.Size([RANK, base[name].shape[0] if name == "words" else base[name][0].numel()]),
            0,
            merge,
            f"{name}.lora_A",
            8 if name == "words" else None,
        ).double()
        for name in LAYERS
    }
    a = {name: draw[name](0).requires_grad_(True) for name in LAYERS}
    outputs = {n: w.shape[1] if n == "words" else w.shape[0] for n, w in base.items()}
    b = {n: torch.zeros(size, RANK).double().requires_grad_(True) for n, size in outputs.items()}
    others = {name: param for name, param in model.named_parameters() if name[:-7] not in LAYERS}
    adam = torch.optim.AdamW([*a.values(), *b.values(), *others.values()], LR, weight_decay=0.0)
    for step in range(STEPS):
        x, classes = batch(step)
        weights = {f"{name}.weight": base[name] + delta(name, a[name], b[name]) for name in LAYERS}
        adam.zero_grad()
        F.cross_entropy(torch.func.functional_call(model, weights, (x,)), classes).backward()
        adam.step()
        if (step + 1) % CYCLE == 0 and step + 1 < STEPS:
            for name in LAYERS:
                base[name] += delta(name, a[name], b[name]).detach()
                a[name].data = draw[name]((step + 1) // CYCLE)
                b[name].data.zero_()
                for factor in (a[name], b[name]):
                    for key in ("exp_avg", "exp_avg_sq"):
                        adam.state[factor][key].zero_()
    found = {f"{name}.weight": base[name] for name in LAYERS}
    for letter, factors in (("A", a), ("B", b)):
        found |= {f"{name}.lora_{letter}": x.detach() for name, x in factors.items()}
    return found | {name: param.detach() for name, param in others.items()}


STAGES = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def two_ranks() -> Outcomes:
    """Each stage on two ranks."""
    wanted = [Scenario(f"train {stage}", train_each_kind, (stage,)) for stage in STAGES]
    wanted += [Scenario(f"bf16 {stage}", merge_into_bf16, (stage,)) for stage in STAGES]
    return run_ranks(2, wanted, 200)


@pytest.mark.parametrize("stage", STAGES)
def test_each_kind_trains_and_merges_on_two_ranks_as_in_float64(
    stage: int, two_ranks: Outcomes
) -> None:
    expected = reference()
    for found in two_ranks[f"train {stage}"]:
        assert found["values"].keys() == expected.keys()
        for name, right in expected.items():
            error = (found["values"][name].double() - right).abs().max() / right.abs().max()
            assert error < 2e-5, (name, float(error))


@pytest.mark.parametrize("stage", STAGES)
def test_each_kind_goes_on_from_a_merge_bit_for_bit(stage: int, two_ranks: Outcomes) -> None:
    for found in two_ranks[f"train {stage}"]:
        assert found["same"] == list(found["values"])


@pytest.mark.parametrize("stage", STAGES)
def test_merges_into_a_bf16_base_of_each_kind_are_exact(stage: int, two_ranks: Outcomes) -> None:
    assert max(two_ranks[f"bf16 {stage}"]) < 1e-6
