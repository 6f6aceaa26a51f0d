"""One optimizer step of each method beside the others, in one process, on random numbers.

Rounds are interleaved, so that whatever else the machine does falls on all arms alike, and arms are
compared within each round. An arm is the config's own model, batch and precision: there is no
engine, no traffic and no data, and one micro-batch is a step.
"""

from __future__ import annotations

import gc
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from relora.config import Config
from relora.engine.deepspeed import build_optimizer
from relora.engine.muon import Muon
from relora.engine.precision import dtype_of, precision_of
from relora.engine.state import EngineState
from relora.lora.inject import quantise_base
from relora.lora.layers import constant_weights
from relora.plan.dryrun import blocks_of, flop_formulas
from relora.restart.restart import merge_and_restart
from relora.training.bench_arms import Variant, build_variant
from relora.training.compiled import compile_blocks

WARM_UP = 2  # rounds that do not count: Adam makes its state, and caches fill
MERGES = 3
REFERENCES = ("full_lean", "full")  # the arms that others are compared with

# What GPUs multiply at most, dense, in half precision: FLOPs per second, by a part of their name.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
}


class Timing(NamedTuple):
    """What a step of an arm takes. A step is one micro-batch; a token's share, of all its tokens.

    `reached` is the share of FLOPs saved against `full_lean` (or gained) that is time saved: FLOPs
    as a share of its, over time as a share of its. None where that arm was not measured.
    """

    arm: str
    ms: float  # median
    spread_ms: float  # between the quartiles
    ratios: dict[str, float]  # of time, to other arms: medians of the rounds' ratios
    tokens_per_s: float
    flops: float  # of a token
    reached: float | None
    mfu: float | None  # FLOPs per second of what the GPU can do; None where that is not known
    saved_bytes: float  # of a token, for the backward pass; half precision's weights among it
    peak_bytes: int  # at once: weights and Adam's state among it
    launches: int  # of kernels
    block_launches: int | None  # of one block, both passes; None if its blocks are not known
    merge_ms: float | None  # median; None if it does not merge
    merge_share: float | None  # of a cycle of such steps


def measure_steps(
    arms: dict[str, Variant], rounds: int, blocks_only: bool = False
) -> dict[str, Timing]:
    """Time a step of each arm `rounds` times, interleaved.

    Args:
        blocks_only: without embeddings, head and loss.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    steps = {name: _Step(arm, device, blocks_only) for name, arm in arms.items()}
    one = next(iter(steps.values()))
    torch.compiler.reset()  # it compiles one function for so many models only
    for step in steps.values():
        step.count(one.draw(generator))
        step.compile()
    gc.collect()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(WARM_UP + rounds):
        batch = one.draw(generator)
        for name, step in steps.items():
            took = step.take(batch)
            if number >= WARM_UP:
                seconds[name].append(took)
    merges = {name: step.merge(one.draw(generator)) for name, step in steps.items()}
    return {
        name: _timing(name, steps, seconds, merges[name], _peak(device, arm.config))
        for name, arm in arms.items()
    }


def _timing(
    arm: str,
    steps: dict[str, _Step],
    seconds: dict[str, list[float]],
    merge: float | None,
    at_most: float | None,
) -> Timing:
    step, took = steps[arm], seconds[arm]
    median = statistics.median(took)
    quarters = statistics.quantiles(took, n=4) if len(took) > 1 else [median] * 3
    references = [name for name in REFERENCES if name in steps] or [next(iter(steps))]
    ratios = {
        other: statistics.median(a / b for a, b in zip(took, seconds[other], strict=True))
        for other in references
    }
    lean, relora = steps.get("full_lean"), step.config.relora
    cycle = None if merge is None or relora is None else relora.cycle_steps * median
    return Timing(
        arm,
        1e3 * median,
        1e3 * (quarters[2] - quarters[0]),
        ratios,
        step.tokens / median,
        step.flops / step.tokens,
        step.flops / lean.flops / ratios["full_lean"] if lean else None,
        at_most and step.flops / median / at_most,
        step.saved / step.tokens,
        step.peak,
        step.launches,
        step.block_launches,
        merge and 1e3 * merge,
        merge and cycle and merge / (cycle + merge),
    )


def _peak(device: torch.device, config: Config) -> float | None:
    """FLOPs per second that the device can do in the config's precision, if that is known."""
    if device.type != "cuda" or precision_of(config.deepspeed.precision).product_bytes == 4:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)


class _Step:
    """A model, its optimizer, and one step of them."""

    def __init__(self, variant: Variant, device: torch.device, blocks_only: bool) -> None:
        self.config = config = variant.config
        formats = precision_of(config.deepspeed.precision)
        self.model: Any = build_variant(variant)
        torch.nn.Module.to(self.model, device)
        if variant.adapters and config.lora and config.lora.base:
            quantise_base(self.model, config.lora.base)
        self.blocks_only = blocks_only
        self.shape = config.batch.micro_batch_size, config.data.sequence_length
        self.tokens = self.shape[0] * self.shape[1]
        self.optimizer = build_optimizer(self.model, config.optimizer, config.decays_merged)
        if isinstance(self.optimizer, Muon):
            EngineState(self.model, self.optimizer, None)  # tells it where matrices lie
        self.half = dtype_of(formats.autocast) if formats.autocast else None
        self.device = device
        self.merges = variant.merges
        self.flops = self.saved = self.peak = self.launches = 0
        self.block_launches: int | None = None

    def draw(self, generator: torch.Generator) -> Tensor:
        """Token ids; or what goes into the first block."""
        vocabulary, width = self.model.get_input_embeddings().weight.shape
        if self.blocks_only:
            return torch.randn(*self.shape, width, generator=generator).to(self.device)
        return torch.randint(vocabulary, self.shape, generator=generator).to(self.device)

    def take(self, batch: Tensor) -> float:
        """Seconds of one step."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            others = torch.cuda.memory_allocated() - sum(t.nbytes for t in self._held())
        began = time.perf_counter()
        with constant_weights(self.model):
            self._pass(batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated() - others
        return time.perf_counter() - began

    def _held(self) -> list[Tensor]:
        """What is there between steps."""
        adam = (x for x in tree_leaves(dict(self.optimizer.state)) if isinstance(x, Tensor))
        return [*self.model.parameters(), *self.model.buffers(), *adam]

    def _pass(self, batch: Tensor) -> None:
        autocast = torch.autocast(self.device.type, self.half, enabled=self.half is not None)
        if self.blocks_only:
            states = batch.detach().requires_grad_()
            with autocast:
                output = self.model.base_model(inputs_embeds=states).last_hidden_state
            output.backward(batch.to(output.dtype))
        else:
            with autocast:
                loss = self.model(input_ids=batch, labels=batch).loss
            loss.backward()

    def count(self, batch: Tensor) -> None:
        """FLOPs, bytes that the backward pass finds saved (parameters apart), kernels, and on a
        CPU the most bytes at once, each of one step."""
        seen = {p.untyped_storage()._cdata: p for p in self.model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in seen:
                seen[storage._cdata] = tensor
                self.saved += storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter, hooks:
            self.take(batch)
        self.flops = counter.get_total_flops()
        with _Tally(self._held()) as tally, _watched_block(self.model, tally):
            self.take(batch)
        self.launches, self.block_launches = tally.launches, tally.block_launches or None
        self.peak = self.peak or tally.peak

    def compile(self) -> None:
        """As the config says; after all is counted, for what is compiled shows no operations."""
        if self.config.train.compile:
            compile_blocks(self.model, self.half or torch.float32)

    def merge(self, batch: Tensor) -> float | None:
        """Seconds of a merge with all that belongs to it, after a step each; None if none is."""
        relora, took = self.config.relora, []
        if not self.merges or relora is None:
            return None
        place = None if relora.precision == "rounded" else relora.remainder
        state = EngineState(self.model, self.optimizer, place)
        for number in range(1, MERGES + 1):
            self.take(batch)
            began = time.perf_counter()
            merge_and_restart(state, number, self.config.seed, relora.reset)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            took.append(time.perf_counter() - began)
        return statistics.median(took)


# Operations that only look at a tensor otherwise, or make room for one.
VIEWS = re.compile(
    r"(view|t|transpose|detach|_unsafe_view|expand|slice|select|unsqueeze_?|alias|as_strided"
    r"|permute|reshape|split|squeeze|empty_like|empty|lift_fresh)$"
)


class _Tally(TorchDispatchMode):
    """Counts what is computed, and the bytes that are there at once."""

    def __init__(self, held: Sequence[Any]) -> None:
        super().__init__()
        self.launches = self.block_launches = self.peak = 0
        self.in_block = False
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._note(held)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not VIEWS.match(func._schema.name.split("::")[1]):
            self.launches += 1
            self.block_launches += self.in_block
        self._note(tree_leaves(result))
        return result

    def _note(self, tensors: Sequence[Any]) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        for key in [key for key, (reference, _) in self.alive.items() if reference.expired()]:
            del self.alive[key]
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))


@contextmanager
def _watched_block(model: Any, tally: _Tally) -> Iterator[None]:
    """Within it the tally counts apart what the second block computes (or the only one)."""

    def enter(*_: Any) -> None:
        tally.in_block = True

    def leave(*_: Any) -> None:
        tally.in_block = False

    def before(_: Any, inputs: Any, named: dict[str, Any]) -> None:
        # Gradients of what goes in are complete when the block's backward pass is.
        states = inputs[0] if inputs else named["hidden_states"]
        states.register_hook(leave)
        enter()

    def after(_: Any, __: Any, output: Any) -> None:
        leave()
        (output[0] if isinstance(output, tuple) else output).register_hook(enter)

    hooks = []
    for block in blocks_of(model)[:2][-1:]:
        hooks += [block.register_forward_pre_hook(before, with_kwargs=True)]
        hooks += [block.register_forward_hook(after)]
    yield
    for hook in hooks:
        hook.remove()
