"""One optimizer step of each method beside the others, in one process, on random tokens.

Rounds are interleaved, so that whatever else the machine does falls on all arms alike, and arms are
compared within each round. An arm is the config's own model, batch and precision: there is no
engine, no traffic and no data, and one micro-batch is a step.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from relora.config import Config
from relora.engine.codec import store_base_
from relora.engine.deepspeed import build_optimizer
from relora.engine.precision import dtype_of, precision_of
from relora.lora.inject import quantise_base
from relora.lora.layers import LoRALinear, adapted_layers, constant_weights, parameter_roles
from relora.model import build_model
from relora.plan.dryrun import flop_formulas
from relora.plan.estimate import full_rank_twin
from relora.training.start import equip

WARM_UP = 2  # rounds that do not count: Adam makes its state, and caches fill


class Variant(NamedTuple):
    """A way to train the config's model."""

    config: Config
    adapters: bool
    prepare: Callable[[Any], None] = lambda model: None  # what its config does not say


class Timing(NamedTuple):
    """What a step of an arm takes."""

    arm: str
    ms: float  # median
    spread_ms: float  # between the quartiles
    ratio: float  # to full rank as people run it: the median of the rounds' ratios
    tokens_per_s: float
    flops: float  # of a token
    saved_bytes: float  # of a token, for the backward pass; half precision's weights among it
    peak_gib: float | None  # allocated on a GPU; None on a CPU


def variants(config: Config) -> dict[str, Variant]:
    """Those that a config can be compared with, by name; full rank first."""
    plain = config.model.model_copy(update={"lean": False, "loss_chunk": None})
    lean_full = full_rank_twin(config)
    found = {
        "full": Variant(lean_full.model_copy(update={"model": plain}), False),
        "full-lean": Variant(lean_full, False),
    }
    if config.lora is not None:
        as_it_was = {"graph": "low_rank", "keep_effective": None, "base": None}
        low_rank = config.lora.model_copy(update=as_it_was)
        published = config.model_copy(update={"model": plain, "lora": low_rank})
        found |= {
            "published": Variant(published, True, _as_published),
            "relora": Variant(config, True),
            "relora-frozen-a": Variant(config, True, _freeze_a),
        }
    return found


def measure_steps(config: Config, names: Sequence[str], rounds: int) -> list[Timing]:
    """Time a step of each arm `rounds` times, interleaved.

    Args:
        names: of `variants(config)`, the first of which the others are compared with.
    """
    chosen = {name: variants(config)[name] for name in names}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    shape = config.batch.micro_batch_size, config.data.sequence_length
    steps = {name: _Step(arm, device) for name, arm in chosen.items()}
    vocabulary = next(iter(steps.values())).model.get_input_embeddings().weight.shape[0]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, float | None] = dict.fromkeys(names)
    first = torch.randint(vocabulary, shape, generator=generator).to(device)
    counts = {name: step.count(first) for name, step in steps.items()}
    gc.collect()
    for number in range(WARM_UP + rounds):
        batch = torch.randint(vocabulary, shape, generator=generator).to(device)
        for name in names:
            second, peak = steps[name].take(batch)
            if number >= WARM_UP:
                seconds[name].append(second)
                peaks[name] = peak
    timings = []
    for name, took in seconds.items():
        flops, saved = counts[name]
        quarters = statistics.quantiles(took, n=4) if len(took) > 1 else [took[0]] * 3
        timings.append(
            Timing(
                name,
                1e3 * statistics.median(took),
                1e3 * (quarters[2] - quarters[0]),
                statistics.median(a / b for a, b in zip(took, seconds[names[0]], strict=True)),
                first.numel() / statistics.median(took),
                flops / first.numel(),
                saved / first.numel(),
                peaks[name],
            )
        )
    return timings


class _Step:
    """A model, its optimizer, and one step of them."""

    def __init__(self, variant: Variant, device: torch.device) -> None:
        config = variant.config
        formats = precision_of(config.deepspeed.precision)
        self.model: Any = build_model(config.model, config.seed)
        equip(self.model, config, variant.adapters)
        for param in _of_role(self.model, "B"):
            nn.init.normal_(param, std=0.01)  # as in the middle of a cycle
        store_base_(self.model, formats)
        variant.prepare(self.model)
        nn.Module.to(self.model, device)
        if config.lora and config.lora.quantised:
            quantise_base(self.model, config.lora.quantised)
        self.model.train()
        self.optimizer = build_optimizer(self.model, config.optimizer, config.decays_merged)
        self.half = dtype_of(formats.autocast) if formats.autocast else None
        self.device = device

    def count(self, batch: Tensor) -> tuple[float, float]:
        """(FLOPs, bytes that the backward pass finds saved, parameters apart) of one step."""
        seen = {p.untyped_storage()._cdata: p for p in self.model.parameters()}
        size = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal size
            storage = tensor.untyped_storage()
            if storage._cdata not in seen:
                seen[storage._cdata] = tensor
                size += storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter, hooks:
            self.take(batch)
        return counter.get_total_flops(), size

    def take(self, batch: Tensor) -> tuple[float, float | None]:
        """(seconds, GiB at the peak on a GPU) of one step."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        autocast = torch.autocast(self.device.type, self.half, enabled=self.half is not None)
        with constant_weights(self.model):
            with autocast:
                loss = self.model(input_ids=batch, labels=batch).loss
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not cuda:
            return time.perf_counter() - began, None
        torch.cuda.synchronize()
        return time.perf_counter() - began, torch.cuda.max_memory_allocated() / 2**30


def _freeze_a(model: Any) -> None:
    for param in _of_role(model, "A"):
        param.requires_grad_(False)


def _of_role(model: nn.Module, role: str) -> list[nn.Parameter]:
    roles = parameter_roles(model)
    return [param for name, param in model.named_parameters() if roles[name] == role]


class _Published(LoRALinear):
    """The layer of the paper's code and of PEFT: base, and update, and their sum."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self.update(x)


def _as_published(model: Any) -> None:
    for _, layer in adapted_layers(model):
        if type(layer) is LoRALinear:
            layer.__class__ = _Published
