"""Estimates are what real models and engines do: counted by torch, tensor by tensor, by message."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ranks import Outcomes, Scenario, on_ranks, run_ranks
from relora.config import Config
from relora.engine.codec import store_base_
from relora.engine.muon import orthogonalise, work_entries
from relora.engine.precision import precision_of
from relora.load import build_config, load_config
from relora.lora.config import GROUPS
from relora.lora.inject import quantise_base
from relora.lora.layers import adapted_layers, constant_weights
from relora.model import build_model
from relora.plan.dryrun import dry_run
from relora.plan.estimate import (
    PARTS,
    break_even,
    bytes_per_step,
    flops_per_token,
    full_rank_twin,
    memory_by_part,
    merge_flops,
    peak_memory,
    speedup_ceiling,
    training_flops,
)
from relora.plan.muon_step import muon_step_bytes
from relora.plan.shape import shape_of
from relora.training.start import equip

ROOT = Path(__file__).parent.parent
LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}
GPT2 = {"model_type": "gpt2", "vocab_size": 512, "n_embd": 32, "n_layer": 3, "n_head": 2,
        "n_positions": 64, **NO_TOKENS}  # fmt: skip
MODELS = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "gpt2 without dropout": {**GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {
        **LLAMA, "model_type": "gpt_neox", "num_key_value_heads": 4, **NO_TOKENS
    },
}  # fmt: skip


def config_of(directory: Path, model: dict[str, Any], **changes: Any) -> Config:
    """A ReLoRA run of a model: 100 steps of 8 × 32 tokens, 20 of them in full rank."""
    path = directory / "model.json"
    path.write_text(json.dumps(model))
    values = {
        "run_dir": str(directory / "run"),
        "model": {"config": str(path), "gradient_checkpointing": changes.pop("again", False)},
        "data": {"source": "python", "tokenizer": {"path": "none"}, "sequence_length": 32},
        "batch": {"global_batch_size": 8, "micro_batch_size": 2},
        "train": {"steps": 100},
        "optimizer": {"lr": 0.001},
        "lora": {"rank": 4},
        "relora": {"cycle_steps": 30, "rewarm_steps": 5},
        "warm_start": {"steps": 20},
        "deepspeed": {"precision": "fp32"},
        **changes,
    }
    return build_config(values, "test")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for all: a model file is run through once for each path that it has."""
    return tmp_path_factory.mktemp("estimate")


@pytest.mark.parametrize("again", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("adapters", [False, True], ids=["full rank", "adapters"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])  # dropout multiplies no matrices
def test_flops_are_those_that_torch_counts(
    name: str, adapters: bool, again: bool, place: Path
) -> None:
    config = config_of(place, MODELS[name], again=again)
    model = build_model(config.model, 0)
    model.set_attn_implementation("eager")  # torch does not count the fused kernel of CPUs
    equip(model, config, adapters)
    model.train()
    tokens = torch.zeros(2, 32, dtype=torch.long)
    counters = [FlopCounterMode(display=False) for _ in range(2)]
    found = [0.0, 0.0]
    with constant_weights(model):
        for _ in range(config.micro_batches):
            with counters[0]:
                loss = model(input_ids=tokens, labels=tokens).loss
            with counters[1]:
                loss.backward()
            for number, counter in enumerate(counters):
                found[number] += counter.get_total_flops() / tokens.numel() / config.micro_batches
    flops = flops_per_token(config, adapters)
    assert flops.forward == pytest.approx(found[0], rel=0.01)
    assert flops.backward == pytest.approx(found[1], rel=0.01)
    assert flops.total == flops.forward + flops.backward


@pytest.mark.parametrize(
    ("name", "ceiling", "published", "ours", "frozen_a"),
    [
        ("60m", 1.04, 0.97, 1.04, 1.14),
        pytest.param("130m", 1.13, 1.05, 1.12, 1.23, marks=pytest.mark.slow),
        pytest.param("250m", 1.16, 1.08, 1.15, 1.27, marks=pytest.mark.slow),
        pytest.param("350m", 1.21, 1.13, 1.20, 1.30, marks=pytest.mark.slow),
        pytest.param("1b3", 1.33, 1.28, 1.29, 1.39, marks=pytest.mark.slow),
        pytest.param("7b", 1.41, 1.38, 1.39, 1.44, marks=pytest.mark.slow),
    ],
)
def test_the_ceiling_is_that_of_the_design(
    name: str,
    ceiling: float,
    published: float,
    ours: float,
    frozen_a: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """r = 128, 512 tokens; the second number is for the layers as the paper has them, the
    last for B alone and shared A."""
    monkeypatch.chdir(ROOT)
    overrides = ["data.sequence_length=512", "model.gradient_checkpointing=false"]
    config_path = Path(f"configs/published/llama_{name}.yaml")
    config = load_config(config_path, overrides)
    assert speedup_ceiling(config) == pytest.approx(ceiling, abs=0.015)
    assert 1 / break_even(config).step == pytest.approx(ours, abs=0.015)
    low_rank = load_config(config_path, [*overrides, "lora.graph=low_rank"])
    assert 1 / break_even(low_rank).step == pytest.approx(published, abs=0.015)
    shared = "lora.share_a=[[q_proj,k_proj,v_proj],[gate_proj,up_proj]]"
    only_b = load_config(config_path, [*overrides, "lora.train=b", shared])
    assert speedup_ceiling(only_b) == pytest.approx(frozen_a, abs=0.015)
    assert speedup_ceiling(full_rank_twin(config)) == 1


def test_training_flops_add_up_over_phases_and_merges(place: Path) -> None:
    config = config_of(place, LLAMA)  # merges after 50 and 80
    full = flops_per_token(config, False).total * 256
    step = flops_per_token(config, True).total * 256
    merge = merge_flops(config)
    # 3 blocks of q, o: 32 × 32, k, v: 32 × 16, gate, up, down: 32 × 80.
    weights = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 80)
    assert merge == (2 * 4 + 1) * weights
    for steps, expected in {
        0: 0,
        20: 20 * full,
        49: 20 * full + 29 * step,
        50: 20 * full + 30 * step + merge,
        100: 20 * full + 80 * step + 2 * merge,
    }.items():
        assert training_flops(config, steps) == pytest.approx(expected, rel=1e-12)
    twin = full_rank_twin(config)
    assert training_flops(twin, 100) == pytest.approx(100 * full, rel=1e-12)
    even = break_even(config)
    assert even.flops == pytest.approx(training_flops(config, 100) / (100 * full))
    assert even.step == pytest.approx(step / full)
    # At that share of a full-rank step's time, both are through at once.
    time = 20 * full + 80 * even.time_limit * full + 2 * merge
    assert time == pytest.approx(100 * full)
    assert break_even(twin) == (1, 1, 1)


def test_a_model_file_that_changes_is_read_again(tmp_path: Path) -> None:
    one, two, three = (
        flops_per_token(config_of(tmp_path, {**LLAMA, "num_hidden_layers": n}), False).total
        for n in (1, 2, 3)
    )
    head = 3 * 2 * 512 * 32
    assert three - two == two - one > 0
    # Beside blocks and head, torch 2.6 counts the angles of the positions.
    assert 0 <= one - head - (two - one) < 8


class Ring(TorchDispatchMode):
    """Bytes that this rank receives in collectives if they go round in a ring."""

    def __init__(self, world: int) -> None:
        super().__init__()
        self.world, self.received = world, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d" and "barrier" not in str(func):
            # The first argument holds what arrives.
            size = sum(t.nbytes for t in tree_leaves(args[0]) if isinstance(t, Tensor))
            name = str(func)
            if "reduce_scatter" in name:
                self.received += size * (self.world - 1)
            else:
                times = 2 if "allreduce" in name else 1
                self.received += times * size * (self.world - 1) / self.world
        return result


class Live(TorchDispatchMode):
    """Bytes of the storages that are made under it, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    @property
    def size(self) -> int:
        """Of those that live now."""
        self.made = {at: pair for at, pair in self.made.items() if not pair[0].expired()}
        return sum(size for _, size in self.made.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t.untyped_storage() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in {of._cdata for of in given}:
                    self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.size)
        return result


def bytes_of(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Bytes of the storages behind some tensors, those seen before not again."""
    size = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            size += storage.nbytes()
    return size


def gradients_of(engine: Any) -> list[Tensor]:
    """What waits for the optimizer after the backward pass."""
    if engine.zero_optimization_stage() == 0:
        return [p.grad for p in engine.module.parameters() if p.grad is not None]
    return [g for group in engine.optimizer.averaged_gradients.values() for g in group]


def start_engine(ranks: Any, config: Config) -> tuple[Any, list[Tensor]]:
    """A run on made-up tokens, and this rank's micro-batches of a step."""
    from relora.training.start import start_run

    config.run_dir.mkdir(parents=True, exist_ok=True)
    tokens = np.random.default_rng(0).integers(0, 500, 4000).astype(np.uint16)
    shards: Any = SimpleNamespace(
        train=tokens, validation=tokens, vocab_size=500, fingerprint="", directory=Path()
    )
    run = start_run(config, shards, ranks)
    accumulation = config.batch.global_batch_size // (2 * ranks.world)
    return run, [torch.from_numpy(tokens[:64].astype("int64")).view(2, 32)] * accumulation


def measure_muon(ranks: Any, config: Config) -> dict[str, float]:
    """Bytes that an update makes, at most and while Muon moves matrices; what stays is older."""
    from relora.engine import deepspeed
    from relora.engine.evaluation import loss_of

    run, batches = start_engine(ranks, config)
    rates = dict.fromkeys(GROUPS, 1e-4)
    for _ in range(3):
        deepspeed.train_step(run.engine, batches, loss_of, rates, 1.0)
    muon, tries = run.state.adam, []
    # Of three updates the smallest: gloo's own thread may let go of what it has gathered too late.
    for _ in range(3):
        live, found = Live(), {"step": 0.0, "work": 0.0}
        muon.step = functools.partial(_watched_step, muon, live, found)
        with live:
            deepspeed.train_step(run.engine, batches, loss_of, rates, 1.0)
        tries.append({**found, "update": live.peak})
    run.state.release_()
    deepspeed.destroy(run.engine)
    return min(tries, key=lambda each: each["work"])


def _watched_step(muon: Any, live: Live, found: dict[str, float], closure: Any = None) -> None:
    others, live.peak, before = live.peak, 0, live.size
    type(muon).step(muon, closure)
    if live.peak - before > found["work"]:
        found.update(step=live.peak, work=live.peak - before)
    live.peak = max(live.peak, others)


def measure(ranks: Any, config: Config) -> dict[str, float]:
    """Each part of a real engine on this rank, in bytes, and what a step of it receives."""
    from relora.engine import deepspeed
    from relora.engine.evaluation import loss_of

    run, batches = start_engine(ranks, config)
    stage = config.deepspeed.zero_stage
    for _ in range(3 if stage == 3 else 0):  # it learns the order of the layers
        deepspeed.train_step(run.engine, batches, loss_of, dict.fromkeys(GROUPS, 1e-4), 1.0)
    with Ring(ranks.world) as ring:
        deepspeed.train_step(run.engine, batches, loss_of, dict.fromkeys(GROUPS, 1e-4), 1.0)
    with run.engine.coalesce_grad_reduction() if stage else contextlib.nullcontext():
        for batch in batches:
            run.engine.backward(loss_of(run.engine, batch).total)
    seen: set[int] = set()
    places = list(run.state)
    remainders = [p.remainder for p in places if p.remainder is not None]
    # Of a quantised weight products read codes, and the exact values are for the host.
    quantised = [n for _, n in adapted_layers(run.engine.module) if n.quantised is not None]
    exact = {id(layer.weight) for layer in quantised}
    remainders += [p.live for p in places if id(p.param) in exact]
    read = [p.live for p in places if id(p.param) not in exact]
    read += [buffer for layer in quantised for buffer in layer.buffers()]
    moments = [run.state.moment(p, k) for p in places if p.count for k in p.moments]
    found = {
        "weights": bytes_of(read, seen),
        "masters": bytes_of((p.master for p in places if p.master is not None), seen),
        "moments": bytes_of(moments, seen),
        # Not their storages: a parameter whose gradient two ranks share lies there on both.
        "gradients": sum(gradient.nbytes for gradient in gradients_of(run.engine)),
        "remainder or host": bytes_of(remainders, seen),
        "received": ring.received,
    }
    run.state.release_()
    deepspeed.destroy(run.engine)
    return found


MATRIX = [*itertools.product((0, 1, 2, 3), ("fp32", "bf16"), (False, True))]
# Each stage with each precision and each method, and not all three with each other.
RARE = [(s, p, adapters) for s, p, adapters in MATRIX if adapters == (s % 2 == (p == "bf16"))]
ENGINES = [
    *(cell for cell in MATRIX if cell not in RARE),
    (1, "deepspeed_bf16", True),
    (2, "deepspeed_bf16", True),
    (3, "deepspeed_bf16", True),
    *itertools.product((1, 3), ("bf16", "deepspeed_bf16"), ("b",)),  # whose A does not train
    (0, "bf16", "int8"),
    (1, "fp32", "fp8"),
    (2, "bf16", "nf4"),
    (0, "bf16", "muon"),
    (3, "fp32", "muon"),
    (2, "bf16", "blocks"),
    (3, "fp32", "blocks"),
]
CELLS = [*ENGINES, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in RARE)]
# ZeRO 3 as it is with a model of billions: little stays, weights go between forward and backward.
LARGE = {"zero_optimization": {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 3000,  # or all would be fetched ahead, and stay
    "stage3_max_reuse_distance": 3000,
}}  # fmt: skip


def engine_config(
    directory: Path, stage: int, precision: str, adapters: bool | str, extra: Any = None
) -> Config:
    """A run that is in one phase from its first step on."""
    changes: dict[str, Any] = {"warm_start": None}
    if not adapters:
        changes |= {"lora": None, "relora": None}
    elif isinstance(adapters, str):
        key = "train" if adapters == "b" else "base"
        changes["lora"] = {"rank": 4} if adapters == "muon" else {"rank": 4, key: adapters}
        if adapters == "blocks":
            changes |= {
                "lora": {"blocks": 2},
                "relora": {"cycle_steps": 30, "rewarm_steps": 5, "reset": {"mode": "zero"}},
            }
        changes["optimizer"] = {"lr": 1e-3, "matrices": "muon" if adapters == "muon" else "adamw"}
    section = {"zero_stage": stage, "precision": precision, "extra": extra or {}}
    return config_of(directory, LLAMA, deepspeed=section, **changes)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(world, whether rare) → outcomes of `measure` for every engine."""

    @cache
    def launch(world: int, rare: bool = False) -> Outcomes:
        directory = tmp_path_factory.mktemp("engines")
        wanted = RARE if rare else ENGINES
        cells = [(cell, engine_config(directory, *cell)) for cell in wanted]
        if world > 1 and not rare:
            cells += [
                ((3, "large", adapters), engine_config(directory, 3, "bf16", adapters, LARGE))
                for adapters in (False, True)
            ]
        scenarios = [Scenario(str(cell), measure, (config,)) for cell, config in cells]
        if world > 1:
            stepping = [(cell, muon_config(directory, *cell)) for cell in MUON_STEPS]
            scenarios += [Scenario(f"muon {c}", measure_muon, (config,)) for c, config in stepping]
        return run_ranks(world, scenarios, 280)

    return launch


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(("stage", "precision", "adapters"), CELLS)
def test_each_part_is_that_of_a_real_engine(
    stage: int, precision: str, adapters: bool | str, world: int, measured: Any, place: Path
) -> None:
    config = engine_config(place, stage, precision, adapters)
    parts = memory_by_part(config, world, bool(adapters))
    parts["remainder or host"] = parts["remainder"] + parts["host"]
    cell = (stage, precision, adapters)
    ranks = measured(world, cell in RARE)[str(cell)]
    names = ("weights", "masters", "moments", "gradients", "remainder or host")
    cells = [f"{parts[part]:,.0f} / {ranks[0][part]:,.0f}" for part in names]
    method = "adapters" if adapters else "full rank"
    print(f"| {stage} | {precision} | {method} | {world} | {' | '.join(cells)} |")  # with -s
    for part in names:
        for found in ranks:
            assert found[part] == pytest.approx(parts[part], rel=0.05), part


@pytest.mark.parametrize(("stage", "precision", "adapters"), CELLS)
def test_traffic_is_that_of_two_ranks(
    stage: int, precision: str, adapters: bool | str, measured: Any, place: Path
) -> None:
    config = engine_config(place, stage, precision, adapters)
    expected = bytes_per_step(config, 2, bool(adapters))
    cell = (stage, precision, adapters)
    for found in measured(2, cell in RARE)[str(cell)]:
        assert found["received"] == pytest.approx(expected, rel=0.05)
    assert bytes_per_step(config, 1, bool(adapters)) == 0


@pytest.mark.parametrize("adapters", [False, True])
def test_traffic_of_a_large_model_is_that_of_two_ranks(
    adapters: bool, measured: Any, place: Path
) -> None:
    config = engine_config(place, 3, "bf16", adapters, LARGE)
    expected = bytes_per_step(config, 2, adapters)
    for found in measured(2, False)[str((3, "large", adapters))]:
        assert found["received"] == pytest.approx(expected, rel=0.05)


MUON_STEPS = [(0, False), (0, True), (2, False), (3, False), (3, True)]


def muon_config(directory: Path, stage: int, adapters: bool, **changes: Any) -> Config:
    """A run in one phase whose matrices Muon moves."""
    changes |= {"warm_start": None, "optimizer": {"lr": 1e-3, "matrices": "muon"}}
    if not adapters:
        changes |= {"lora": None, "relora": None}
    section = {"zero_stage": stage, "precision": "fp32", **changes.pop("deepspeed", {})}
    return config_of(directory, changes.pop("model", LLAMA), deepspeed=section, **changes)


@pytest.mark.parametrize("shape", [(64, 64), (8, 300), (300, 8), (77, 129), (3, 40, 20)], ids=str)
def test_muons_work_on_a_matrix_is_what_torch_allocates(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape)
    with Live() as live:
        orthogonalise(matrices)
    assert live.peak == pytest.approx(4 * work_entries(shape), rel=0.005)


@pytest.mark.parametrize(("stage", "adapters"), MUON_STEPS)
def test_muons_step_is_that_of_a_real_engine(
    stage: int, adapters: bool, measured: Any, place: Path
) -> None:
    """Those of one shape together; what ranks share is gathered: one under ZeRO 2, all under 3."""
    config = muon_config(place, stage, adapters)
    beside = muon_step_bytes(config, 2, adapters)
    # ZeRO copies gradients of matrices first; under ZeRO 3 those that wait lie there all the time.
    copied = 4 * shape_of(config).of_one_moment(config, adapters) / 2 if stage else 0
    waiting = memory_by_part(config, 2, adapters)["gradients"] if stage < 3 else 0
    found = measured(2)[f"muon {(stage, adapters)}"]  # a rank may have fewer of one shape
    assert max(rank["work"] for rank in found) == pytest.approx(beside - copied, rel=0.01)
    assert max(rank["step"] for rank in found) == pytest.approx(waiting + beside, rel=0.05)


def test_where_muons_step_is_the_peak_it_is_the_planners(place: Path) -> None:
    """With one micro-batch of few tokens and a small bucket nothing before it takes as much."""
    config = muon_config(
        place,
        2,
        adapters=False,
        batch={"global_batch_size": 2, "micro_batch_size": 2},
        model={**LLAMA, "hidden_size": 128, "intermediate_size": 128},
        deepspeed={"extra": {"zero_optimization": {"reduce_bucket_size": 1000}}},
    )
    parts = memory_by_part(config, 1, False)
    stays = sum(parts[part] for part in ("weights", "masters", "moments"))
    (found,) = on_ranks(1, measure_muon, config)
    assert (
        found["step"] == found["update"] == pytest.approx(peak_memory(config, 1) - stays, rel=0.01)
    )
    usual = config.model_copy(update={"optimizer": type(config.optimizer)(lr=1e-3)})
    assert muon_step_bytes(usual, 1, False) == 0


class Saved:
    """Bytes that autograd saves, each storage once, parameters and logits apart."""

    def __init__(self, model: Any, logits: int) -> None:
        self.seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.kept: list[Tensor] = []  # or another one could get the same address
        self.logits, self.size = logits, 0

    def pack(self, tensor: Tensor) -> Tensor:
        """What autograd calls for every tensor it saves."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.kept.append(tensor)
            self.size += 0 if tensor.numel() == self.logits else storage.nbytes()
        return tensor


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("adapters", [False, True], ids=["full rank", "adapters"])
@pytest.mark.parametrize("name", MODELS)
def test_activations_are_what_autograd_saves(
    name: str, adapters: bool, precision: str, place: Path
) -> None:
    config = config_of(place, MODELS[name], deepspeed={"precision": precision})
    model = build_model(config.model, 0)
    equip(model, config, adapters)
    store_base_(model, precision_of(config.deepspeed.precision))
    model.train()
    tokens = torch.zeros(2, 32, dtype=torch.long)
    saved = Saved(model, tokens.numel() * 512)
    half = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor)
    with constant_weights(model), hooks, half:
        model(input_ids=tokens, labels=tokens)
        made = [made for _, layer in adapted_layers(model) for made in tree_leaves(layer.made)]
    kept = dry_run(config, adapters)
    size = saved.size + sum(tensor.nbytes for tensor in made)
    assert kept.activations + kept.weight_copies == pytest.approx(size, rel=0.02)
    assert kept.logits == saved.logits


@pytest.mark.parametrize("keep", [None, True], ids=["", "kept"])
def test_activations_beside_a_quantised_base_are_what_autograd_saves(
    keep: bool | None, place: Path
) -> None:
    lora = {"rank": 4, "base": "nf4", "graph": "effective" if keep else "low_rank"}
    lora |= {"keep_effective": keep}
    config = config_of(place, LLAMA, lora=lora, deepspeed={"precision": "bf16"})
    model = build_model(config.model, 0)
    equip(model, config, True)
    store_base_(model, precision_of("bf16"))
    quantise_base(model, "nf4")
    tokens = torch.zeros(2, 32, dtype=torch.long)
    saved = Saved(model.train(), tokens.numel() * 512)
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor)
    with constant_weights(model), hooks, torch.autocast("cpu", torch.bfloat16):
        model(input_ids=tokens, labels=tokens)
        made = [made for _, layer in adapted_layers(model) for made in tree_leaves(layer.made)]
    kept = dry_run(config, True)
    size = saved.size + sum(tensor.nbytes for tensor in made)
    assert kept.activations + kept.weight_copies == pytest.approx(size, rel=0.02)


def test_checkpointing_keeps_inputs_of_blocks_and_one_block(place: Path) -> None:
    plain = dry_run(config_of(place, LLAMA), False)
    again = dry_run(config_of(place, LLAMA, again=True), False)
    more = dry_run(config_of(place, {**LLAMA, "num_hidden_layers": 5}, again=True), False)
    # Two blocks more cost two inputs of 2 × 32 tokens of 32 fp32 numbers.
    assert more.activations - again.activations == 2 * (2 * 32 * 32 * 4)
    assert again.activations < plain.activations


def test_what_is_offloaded_leaves_the_device(place: Path) -> None:
    section = {"zero_stage": 2, "precision": "bf16"}
    config = config_of(place, LLAMA, deepspeed=section)
    here = memory_by_part(config, 2, True)
    there = memory_by_part(
        config_of(place, LLAMA, deepspeed={**section, "offload_optimizer": True}), 2, True
    )
    moved = ("gradients", "masters", "moments")
    assert [there[part] for part in moved] == [0, 0, 0]
    assert there["host"] - here["host"] == sum(here[part] for part in moved)
    relora = {"cycle_steps": 30, "rewarm_steps": 5, "remainder": "device"}
    config = config_of(place, LLAMA, deepspeed=section, relora=relora)
    assert memory_by_part(config, 2, True)["remainder"] == here["host"]


def test_the_larger_phase_is_shown_and_peaks_below_the_sum(place: Path) -> None:
    config = config_of(place, LLAMA)
    phases = [peak_memory(config, 1, adapters) for adapters in (False, True)]
    assert peak_memory(config, 1) == max(phases)
    larger = phases[1] > phases[0]
    parts = memory_by_part(config, 1)
    assert parts == memory_by_part(config, 1, larger)
    assert peak_memory(config, 1) <= sum(parts[part] for part in PARTS)
    assert peak_memory(full_rank_twin(config), 1) == phases[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("adapters", [False, True], ids=["full rank", "adapters"])
@pytest.mark.parametrize("again", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_peak_is_that_of_the_device(
    stage: int, precision: str, again: bool, adapters: bool, tmp_path: Path
) -> None:
    """A 60M Llama, 8 × 512 tokens a micro-batch, accumulated twice, on one rank."""
    found = on_ranks(1, device_peak, gpu_config(tmp_path, stage, precision, again, adapters))[0]
    expected = peak_memory(gpu_config(tmp_path, stage, precision, again, adapters), 1, adapters)
    assert found == pytest.approx(expected, rel=0.1)


def gpu_config(directory: Path, stage: int, precision: str, again: bool, adapters: bool) -> Config:
    """The 60M model in one phase from its first step on."""
    model = json.loads((ROOT / "configs/models/llama_60m.json").read_text())
    changes: dict[str, Any] = {"warm_start": None, "lora": {"rank": 128}}
    if not adapters:
        changes |= {"lora": None, "relora": None}
    return config_of(
        directory,
        model,
        again=again,
        data={"source": "python", "tokenizer": {"path": "none"}, "sequence_length": 512},
        batch={"global_batch_size": 16, "micro_batch_size": 8},
        deepspeed={"zero_stage": stage, "precision": precision},
        **changes,
    )


def device_peak(ranks: Any, config: Config) -> int:
    """Most bytes that two steps of a real engine have allocated on the device."""
    from relora.engine import deepspeed
    from relora.engine.evaluation import loss_of
    from relora.training.start import start_run

    config.run_dir.mkdir(parents=True, exist_ok=True)
    tokens = np.random.default_rng(0).integers(0, 32000, 20_000).astype(np.uint16)
    shards: Any = SimpleNamespace(
        train=tokens, validation=tokens, vocab_size=32100, fingerprint="", directory=Path()
    )
    run = start_run(config, shards, ranks)
    batch = torch.from_numpy(tokens[: 8 * 512].astype("int64")).view(8, 512).to(ranks.device)
    deepspeed.train_step(
        run.engine, [batch] * 2, loss_of, dict.fromkeys(GROUPS, 1e-4), 1.0
    )  # Adam makes its state
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        deepspeed.train_step(run.engine, [batch] * 2, loss_of, dict.fromkeys(GROUPS, 1e-4), 1.0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
