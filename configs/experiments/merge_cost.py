"""What a merge costs against gathering everything.

    PYTHONPATH=tests python configs/experiments/merge_cost.py

Two gloo ranks, ZeRO 3, a 250M-parameter Llama with adapters of rank 128 on 168 layers. Both ways
merge, draw A anew, zero B and zero the moments; the other way is DeepSpeed's public one, layer by
layer: GatheredParameters with a modifier rank and safe_get/set calls. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ranks import Scenario, run_ranks
from relora.engine import deepspeed
from relora.engine.evaluation import loss_of
from relora.load import build_config
from relora.lora.draws import draw_a
from relora.lora.layers import adapted_layers
from relora.restart.config import ResetConfig
from relora.restart.restart import merge_and_restart

SEQUENCE = 256
CYCLE = 1000


class Meter(TorchDispatchMode):
    """Collectives, the bytes each rank receives in them, and the peak of tensors made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.received = self.now = self.peak = 0
        self.owners: dict[int, int] = {}  # storage → tensors that still see it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self.calls += 1
            # The first argument holds what arrives; what a rank sends of its own is part of it.
            self.received += sum(t.numel() * t.element_size() for t in _tensors(args[0]))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            key, size = storage.data_ptr(), storage.nbytes()
            if key in self.owners:
                self.owners[key] += 1
            elif key in known or not size:
                continue
            else:
                self.owners[key] = 1
                self.now += size
                self.peak = max(self.peak, self.now)
            weakref.finalize(tensor, self._gone, key, size)
        return result

    def _gone(self, key: int, size: int) -> None:
        self.owners[key] -= 1
        if not self.owners[key]:
            del self.owners[key]
            self.now -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def gather_everything_(run: Any, merge: int) -> None:
    """The same restart by DeepSpeed's public calls, one layer after the other."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param as get
    from deepspeed.utils import safe_set_full_fp32_param as put
    from deepspeed.utils import safe_set_full_optimizer_state as put_state

    for name, layer in adapted_layers(run.engine.module):
        a, b = get(layer.lora_A), get(layer.lora_B)
        new_a = draw_a(a.shape, 0, merge, name).to(a.device)
        matrices = [layer.weight, layer.lora_A, layer.lora_B]
        with torch.no_grad(), deepspeed.zero.GatheredParameters(matrices, modifier_rank=0):
            layer.weight.data.add_(layer.scale * (b @ a))
            layer.lora_A.data.copy_(new_a)
            layer.lora_B.data.zero_()
        put(layer.lora_A, new_a)
        put(layer.lora_B, torch.zeros_like(b))
        for param, like in ((layer.lora_A, a), (layer.lora_B, b)):
            for kind in ("exp_avg", "exp_avg_sq"):
                put_state(param, torch.zeros_like(like), kind)


def measure(ranks: Any, config: dict[str, Any], repeats: int) -> dict[str, Any]:
    """On each rank: a step's time, and both ways' times, bytes and memory."""
    from relora.training.start import start_run

    settings = build_config(config, "merge_cost")
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    tokens = np.random.default_rng(0).integers(0, 1000, 40 * SEQUENCE).astype(np.uint16)
    shards = SimpleNamespace(
        train=tokens, validation=tokens, vocab_size=1000, fingerprint="", directory=Path()
    )
    run = start_run(settings, shards, ranks)  # type: ignore[arg-type]
    batch = torch.from_numpy(tokens[:SEQUENCE].astype("int64"))[None].to(ranks.device)

    def timed(work: Callable[[], object]) -> float:
        ranks.barrier()
        began = time.perf_counter()
        work()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        ranks.barrier()
        return time.perf_counter() - began

    def step() -> None:
        deepspeed.train_step(run.engine, [batch], loss_of, 1e-4, 1.0)

    def restart(reset: ResetConfig) -> Callable[[], object]:
        return lambda: merge_and_restart(run.state, 1, 0, reset)

    steps = [timed(step) for _ in range(3)]
    ways = {
        "gather everything, zero all moments": lambda: gather_everything_(run, 1),
        "relora, zero all moments": restart(ResetConfig(mode="zero")),
        "relora, keep the largest tenth": restart(ResetConfig(mode="magnitude")),
    }
    if settings.deepspeed.zero_stage != 3:
        del ways["gather everything, zero all moments"]
    found: dict[str, Any] = {}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):  # interleaved, since the machine's speed drifts
        for name, work in ways.items():
            step()  # moments and B that are not zero
            times[name].append(timed(work))
    for name, work in ways.items():
        step()
        meter = Meter()
        with meter:
            work()
        found[name] = {
            "seconds": statistics.median(times[name]),
            "all seconds": times[name],
            "collectives": meter.calls,
            "received": meter.received,
            "extra": meter.peak,
        }
    layers = [layer for _, layer in adapted_layers(run.engine.module)]
    shapes = [getattr(x.weight, "ds_shape", x.weight.shape) for x in layers]
    return {
        "step": statistics.median(steps),
        "ways": found,
        "layers": len(layers),
        "parameters": sum(p.numel for p in run.state),
        "largest": max(shape.numel() for shape in shapes) * 4,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="configs/models/llama_250m.json")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--to", type=Path, help="also write the figures there, as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        config = {
            "run_dir": f"{directory}/run",
            "model": {"config": options.model},
            "data": {
                "source": "python",
                "tokenizer": {"path": "none"},
                "sequence_length": SEQUENCE,
            },
            "batch": {"global_batch_size": options.ranks, "micro_batch_size": 1},
            "train": {"steps": 10 * CYCLE},
            "optimizer": {"lr": 1e-3},
            "lora": {"rank": options.rank},
            "relora": {"cycle_steps": CYCLE},
            "deepspeed": {"zero_stage": options.stage, "precision": options.precision},
            "spectra": None,
        }
        scenario = Scenario("it", measure, (config, options.repeats))
        results = run_ranks(options.ranks, [scenario], 1800)["it"]
    first = results[0]
    print(
        f"{first['parameters'] / 1e6:.0f}M parameters with adapters of rank {options.rank} on "
        f"{first['layers']} layers, ZeRO {options.stage}, {options.precision}, {options.ranks} "
        f"ranks; a step of {SEQUENCE} tokens a rank takes {first['step']:.2f} s; ΔW of the largest "
        f"layer is {first['largest'] / 1e6:.1f} MB\n"
    )
    print(f"| merge | time | of a cycle of {CYCLE} steps | collectives | MB received | extra MB |")
    print("|---|---|---|---|---|---|")
    for name, figures in first["ways"].items():
        share = figures["seconds"] / (CYCLE * first["step"])
        extra = max(result["ways"][name]["extra"] for result in results)
        print(
            f"| {name} | {figures['seconds']:.2f} s | {share:.3%} | {figures['collectives']} | "
            f"{figures['received'] / 1e6:.0f} | {extra / 1e6:.0f} |"
        )
    if options.to:
        options.to.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
