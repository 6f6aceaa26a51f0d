"""`import relora` in other people's loops: plain torch, DDP, and DeepSpeed engines of their own."""

from __future__ import annotations

import contextlib
import io
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import relora
from ranks import Outcomes, Scenario, run_ranks
from relora.data.loader import train_batches
from relora.data.shards import open_shards
from relora.errors import CheckpointError, ConfigError, NumericsError
from relora.load import load_config
from relora.model import build_model
from runs import make_config, metric_lines, series, train, undisturbed
from runs import relora as run_relora
from test_method_reference import SEQUENCE, run_reference, settings, shards

PAGE = (Path(relora.__file__).parent / "README.md").read_text()


# --- what it is -----------------------------------------------------------------------------------


def test_it_is_imported_in_no_time_and_its_names_are_there_and_explained() -> None:
    code = "import relora, sys; assert not {'torch', 'pydantic'} & sys.modules.keys(); dir(relora)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(relora.__all__) == {"__version__", *relora._HOMES}
    assert set(relora.__all__) <= set(dir(relora))
    for name in set(relora.__all__) - {"__version__"}:
        assert getattr(relora, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'merge'"):
        relora.merge  # noqa: B018
    assert (Path(relora.__file__).parent / "py.typed").is_file()


def test_training_from_python_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    """Whether it comes to a good end or not: a notebook goes on, and Ctrl-C is its own again."""
    full = {"lora": None, "relora": None, "warm_start": None}
    good = load_config(make_config(tmp_path / "good", **full), ["train.stop_after=1"])
    bad = load_config(
        make_config(tmp_path / "bad", **full),
        ["optimizer.lr=1e30", "schedule.warmup_steps=0", "train.max_skipped=1"],
    )
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    with undisturbed():
        assert relora.train(good) == 75
        assert {number: signal.getsignal(number) for number in numbers} == before
        with pytest.raises(NumericsError, match="not finite"):
            relora.train(bad)
        assert {number: signal.getsignal(number) for number in numbers} == before


# --- the example of relora/README.md --------------------------------------------------------------


def example() -> tuple[str, str]:
    """The page's Python block: what it sets up, and its loop."""
    (text,) = re.findall(r"```python\n(import torch\n.*?)```", PAGE, flags=re.DOTALL)
    before, after = text.split("# --- the loop\n")
    return before, after


@pytest.mark.parametrize("matrices", ["adamw", "muon"])
def test_the_readmes_loop_is_relora_train_bit_for_bit(
    matrices: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it stands, and with `relora.Muon` in place of torch's optimizer, as the page says."""
    monkeypatch.chdir(tmp_path)
    changes = {
        "batch": {"global_batch_size": 4, "micro_batch_size": 4},
        "train": {"steps": 60, "log_every": 1},
        "optimizer": {"lr": 1e-3, "matrices": matrices},
        "schedule": {"warmup_steps": 5},
        "lora": {"rank": 4, "alpha": 8},
        "relora": {"cycle_steps": 20, "rewarm_steps": 5},
        "warm_start": None,
        "seed": 0,
        "deepspeed__zero_stage": 0,
    }
    assert train(tmp_path / "run", **changes) == 0
    config = load_config(make_config(tmp_path / "run", **changes))
    tokens = open_shards(config.data).train
    stream = train_batches(
        tokens,
        sequence_length=config.data.sequence_length,
        global_batch=4,
        micro_batch=4,
        rank=0,
        world=1,
        seed=config.seed,
    )
    names: dict[str, Any] = {
        "torch": torch,
        "relora": relora,
        "model": build_model(config.model, config.seed),
        "batches": (next(stream)[0] for _ in range(60)),
        "lora": config.lora,
        "clock": config.clock,
    }
    loop = example()[1]
    if matrices == "muon":
        assert "torch.optim.AdamW(" in loop
        loop = loop.replace("torch.optim.AdamW(", "relora.Muon(")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(loop, names)
    losses = dict(line.split() for line in printed.getvalue().splitlines())
    assert {int(step): float(loss) for step, loss in losses.items()} == series(
        tmp_path / "run", "train/loss"
    )
    assert [line["step"] for line in metric_lines(tmp_path / "run") if "relora/merge" in line] == [
        20,
        40,
    ]
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained("merged")
    for name, value in names["model"].state_dict().items():
        assert torch.equal(merged.state_dict()[name], value), name


def test_the_readmes_example_runs_as_it_stands(tmp_path: Path) -> None:
    text = "# --- the loop\n".join(example())
    assert len([line for line in text.splitlines() if line.strip()]) < 30
    root = Path(__file__).parent.parent
    text = text.replace('"merged"', repr(str(tmp_path / "merged")))
    text = text.replace("range(60)", "range(22)")  # one merge
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^\d+ [\d.]+$", done.stdout, flags=re.MULTILINE)) == 22


def test_a_run_is_loaded_and_merged_in_python(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert train(tmp_path / "run", "train.stop_after=15") == 75
    loaded = relora.load_run(str(tmp_path / "run"))
    assert (loaded.checkpoint.step, loaded.config.method) == (15, "ReLoRA")
    model = loaded.merged_model()
    assert not list(relora.adapted_layers(model))
    assert run_relora("export", tmp_path / "run", "--to", tmp_path / "export") == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export").state_dict()
    assert all(torch.equal(exported[name], value) for name, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match="is no checkpoint and no run directory"):
        relora.load_run(tmp_path)


# --- against the reference in float64 -------------------------------------------------------------

CHANGES: dict[str, Any] = {"warm_start": None}
MUON = {"optimizer.matrices": "muon", "optimizer.momentum": 0.9}


def own_loop(
    ranks: Any, kind: str, model_json: str, run_dir: str, muon: bool = False
) -> dict[str, Any]:
    """Seventeen updates with merges after 4, 8, 12 and 16: losses, and the weights at the end."""
    config = settings(model_json, run_dir, CHANGES | (MUON if muon else {}))
    assert config.lora is not None
    assert config.relora is not None
    model: Any = build_model(config.model, config.seed)
    relora.add_adapters(model, config.lora, config.seed)
    groups = relora.parameter_groups(model, config.optimizer.weight_decay)
    usual: dict[str, Any] = {"betas": config.optimizer.betas, "eps": config.optimizer.eps}
    optimizer = relora.Muon(groups, 0.9, **usual) if muon else torch.optim.AdamW(groups, **usual)
    engine, state = wrap(kind, model, optimizer, ranks)
    rows = config.batch.global_batch_size // ranks.world
    stream = train_batches(
        shards().train,
        sequence_length=SEQUENCE,
        global_batch=config.batch.global_batch_size,
        micro_batch=rows,
        rank=ranks.rank,
        world=ranks.world,
        seed=config.seed,
    )
    losses = []
    for step in range(config.total_steps):
        for group in (optimizer if kind in ("plain", "ddp") else engine.optimizer).param_groups:
            group["lr"] = config.rates(step)[group["name"]]
        (batch,) = next(stream)
        loss = engine(input_ids=batch, labels=batch).loss
        if kind in ("plain", "ddp"):
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        else:
            engine.backward(loss)
            engine.step()
        losses.append(ranks.sum([loss.item() / ranks.world])[0])
        if config.clock.is_merge(step + 1):
            number = config.clock.merges_before(step + 1)
            report = relora.merge_and_restart(state, number, config.seed, config.relora.reset)
            assert report.layers == 14
    values = {view.name: state.gather([view], "value")[0].double().numpy() for view in state}
    return {"losses": losses, "values": values}


def wrap(kind: str, model: Any, optimizer: Any, ranks: Any) -> tuple[Any, relora.EngineState]:
    """What takes the forward pass, and the state, as their users would make them."""
    if kind == "plain":
        return model, relora.EngineState(model, optimizer)
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
        return wrapped, relora.EngineState(wrapped, optimizer)
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 4,
            "gradient_clipping": 1.0,
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": int(kind)},
        },
        dist_init_required=False,
    )
    return engine, relora.EngineState(engine)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Outcomes:
    """Every kind of loop on two ranks."""
    directory = tmp_path_factory.mktemp("library")
    return run_ranks(
        2,
        [
            Scenario(kind, own_loop, (kind, str(tiny_llama), str(directory / kind)))
            for kind in ("ddp", "1", "2", "3")
        ]
        + [
            Scenario(f"{kind} muon", own_loop, (kind, str(tiny_llama), str(directory), True))
            for kind in ("ddp", "2")
        ],
        timeout=300,
    )


@pytest.mark.parametrize("kind", ["ddp", "1", "2", "3", "ddp muon", "2 muon"])
def test_loops_of_others_on_two_ranks_are_the_reference(
    kind: str, two_ranks: Outcomes, tiny_llama: Path
) -> None:
    for found in two_ranks[kind]:
        compare_with_reference(found, tiny_llama, MUON if "muon" in kind else {})


def test_a_plain_loop_is_the_reference(tiny_llama: Path) -> None:
    from relora.engine.distributed import lone_rank

    compare_with_reference(own_loop(lone_rank(), "plain", str(tiny_llama), "unused"), tiny_llama)


def compare_with_reference(
    found: dict[str, Any], tiny_llama: Path, changes: dict[str, Any] | None = None
) -> None:
    """Losses and every parameter: also those of the updates that follow a merge."""
    truth = run_reference(str(tiny_llama), CHANGES | (changes or {}))
    assert found["losses"] == pytest.approx(truth.losses, rel=2e-6)
    end = truth.states[-1].values
    assert found["values"].keys() == end.keys()
    for name, expected in end.items():
        error = abs(found["values"][name] - expected.numpy()).max()
        assert error < 2e-4 * float(expected.abs().max().clamp_min(1e-3)), name


# --- any module -----------------------------------------------------------------------------------


class Net(nn.Module):
    """No model of transformers: an embedding, two layers of a kind, and a head."""

    def __init__(self, kind: type[nn.Module] = nn.Linear) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 8)
        self.first, self.second = kind(8, 6), kind(6, 8)
        self.head = nn.Linear(8, 11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        return self.head(x + self.second(self.first(x).tanh()))


def test_of_any_module_all_linear_layers_but_the_head_are_adapted() -> None:
    model = Net()
    x = torch.arange(11)
    before = model(x)
    assert relora.add_adapters(model, relora.LoRAConfig(rank=2)) == ["first", "second"]
    assert torch.equal(model(x), before)
    assert [name for name, _ in relora.adapted_layers(model)] == ["first", "second"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: torch.optim.SGD(m.parameters(), lr=0.1), "moments of SGD"),
        (lambda m: torch.optim.AdamW(m.parameters(), amsgrad=True), "without amsgrad"),
        (lambda m: torch.optim.AdamW(m.head.parameters()), "does not hold embedding.weight"),
        (lambda m: None, "needs its optimizer"),
    ],
)
def test_an_optimizer_that_restarts_would_not_reach_is_refused(make: Any, message: str) -> None:
    model = Net()
    relora.add_adapters(model, relora.LoRAConfig(rank=2))
    with pytest.raises(ConfigError, match=message):
        relora.EngineState(model, make(model))


def test_muon_says_what_it_lacks_and_steps_with_a_closure() -> None:
    model = Net()
    relora.add_adapters(model, relora.LoRAConfig(rank=2))
    with pytest.raises(ConfigError, match=r"take relora\.parameter_groups"):
        relora.Muon([{"params": list(model.parameters())}])
    groups = relora.parameter_groups(model)
    optimizer = relora.Muon(groups, lr=1e-2)
    x = torch.arange(11)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), x.flip(0))
        loss.backward()
        return loss

    with pytest.raises(ConfigError, match=r"make relora\.EngineState"):
        optimizer.step(closure)
    relora.EngineState(model, optimizer)
    losses = [float(optimizer.step(closure)) for _ in range(2)]
    by_closure = {name: p.detach().clone() for name, p in model.named_parameters()}
    model = Net()
    relora.add_adapters(model, relora.LoRAConfig(rank=2))
    optimizer = relora.Muon(relora.parameter_groups(model), lr=1e-2)
    relora.EngineState(model, optimizer)
    for loss in losses:
        assert float(closure()) == loss
        optimizer.step()
    assert all(torch.equal(by_closure[name], p) for name, p in model.named_parameters())
    assert {k for p in optimizer.param_groups[-1]["params"] for k in optimizer.state[p]} == {
        "step",
        "exp_avg",
    }


def test_a_scaler_of_gradients_unscales_them_before_muon_steps() -> None:
    """Fused Adam alone would unscale its own, and take matrices' with the scale in them."""
    ends = []
    for scale in (1.0, 2.0**10):
        model, x = Net(), torch.arange(11)
        optimizer = relora.Muon(relora.parameter_groups(model), lr=1e-2, fused=True)
        relora.EngineState(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for _ in range(3):
            scaler.scale(nn.functional.cross_entropy(model(x), x.flip(0))).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        ends.append([p.detach() for p in model.parameters()])
        moments = [optimizer.state[p]["exp_avg"] for p in (model.first.weight,)]
        ends[-1] += [moment.clone() for moment in moments]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_moments_are_reset_alone_and_before_the_first_step() -> None:
    model = Net()
    relora.add_adapters(model, relora.LoRAConfig(rank=2))
    optimizer = torch.optim.AdamW(relora.parameter_groups(model), lr=1e-2)
    state = relora.EngineState(model, optimizer)
    zero = relora.ResetConfig(mode="zero")
    assert relora.reset_moments(state, merge=1, reset=zero) == 1
    model(torch.arange(11)).square().mean().backward()
    optimizer.step()
    assert relora.reset_moments(state, merge=1, reset=zero) == 1
    moments = {
        n: optimizer.state[p]["exp_avg_sq"]
        for n, p in model.named_parameters()
        if p.grad is not None
    }
    assert not moments["first.lora_B"].any()
    assert moments["embedding.weight"].any()


def test_merges_into_a_bf16_base_lose_nothing() -> None:
    """Updates far below what bf16 resolves: a remainder keeps them, and plain rounding does not."""
    model = Net()
    relora.add_adapters(model, relora.LoRAConfig(rank=2, alpha=2))
    layer: Any = model.first
    layer.weight.data = layer.weight.data.bfloat16()
    start = layer.weight.detach().double()
    optimizer = torch.optim.AdamW(relora.parameter_groups(model))
    exact = relora.EngineState(model, optimizer)
    total = torch.zeros_like(start)
    for merge in range(1, 21):
        with torch.no_grad():
            layer.lora_B.fill_(1e-4)
        total += layer.lora_B.double() @ layer.lora_A.double()
        relora.merge_and_restart(exact, merge)
    (held,) = exact.gather([exact["first.weight"]], "value")
    error = (held.double() - start - total).norm() / total.norm()
    lost = (layer.weight.double() - start - total).norm() / total.norm()
    assert error < 1e-3 < 0.05 < lost


# --- another kind of layer ------------------------------------------------------------------------


class Scaled(nn.Module):
    """A layer that is none of torch's: weight (heads, in, out / heads), y = x W."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, inputs, outputs // 2) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,hio->...ho", x, self.weight).flatten(-2)


def toy_kind() -> Any:
    """The ten lines that another kind takes."""
    from relora.lora.layers import AdaptedLayer

    class LoRAScaled(AdaptedLayer, Scaled):
        plain = Scaled

        @classmethod
        def matrix(cls, weight: Tensor) -> Tensor:
            return weight.transpose(1, 2).flatten(0, 1)

        @classmethod
        def stored(cls, matrix: Tensor, shape: torch.Size) -> Tensor:
            return matrix.view(shape[0], shape[2], shape[1]).transpose(1, 2)

        def forward(self, x: Tensor) -> Tensor:
            return Scaled.forward(self, x) + self.update(x)

    return LoRAScaled


def test_another_kind_of_layer_is_merged_exported_and_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from relora.lora import kinds
    from relora.training.spectra import measure_layer

    monkeypatch.setattr(kinds, "KINDS", (*kinds.KINDS, toy_kind()))
    model, x = Net(Scaled), torch.arange(11)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert relora.add_adapters(model, relora.LoRAConfig(rank=2, alpha=3)) == ["first", "second"]
    optimizer = torch.optim.AdamW(relora.parameter_groups(model), lr=1e-2)
    state = relora.EngineState(model, optimizer)
    for step in range(1, 8):
        nn.functional.cross_entropy(model(x), x.flip(0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 3 == 0:
            before = model(x)
            report = relora.merge_and_restart(state, merge=step // 3)
            assert report.layers == 2
            assert report.update_ratio > 0
            assert not model.second.lora_B.any()
            torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    layer: Any = model.first
    held = [layer.weight.detach(), layer.lora_A.detach(), layer.lora_B.detach()]
    figures, _ = measure_layer(layer, held, start["first.weight"], None, count=2)
    ours = layer.merged(*held) - start["first.weight"]
    assert figures["total_norm"] == pytest.approx(float(ours.norm()), rel=1e-5)
    assert 1 < figures["total_effective_rank"] <= 6
    before = model(x)
    relora.merge_adapters(model)
    assert type(model.first) is Scaled
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
