"""What trains few numbers at a time and still comes near full rank: a screen in plain PyTorch.

    python configs/experiments/screen.py "full lr=1.4e-3" "lora r=16 lr=4e-3 C=200" …

An arm is a line of words: what trains of each matrix W of attention and MLP, then settings.

    full           W
    lora r=R       B·A beside W, A drawn as in loralib; s is 1
    block k=K      K dense blocks of W, one for each band of rows, each in another band of columns;
                   a restart moves every block on by one band (perm=random: permutes W's rows and
                   columns anew)
    rows k=K       a K-th of W's rows (cols=1: columns), another one after each restart
    mask k=K       a random K-th of W's entries, another one after each restart
    turn k=K       W, in every K-th cycle, and nothing of it in the others

    lr= of matrices · opt=adam|muon · C= steps a cycle (none: no restarts) · w= steps of rewarm ·
    keep= share of moments that a restart keeps, the largest · until= share of the run after which
    no restart comes · ratio= of B's rate to lr · mu= of Muon

At a restart what was trained is added to W, what trains now starts at zero, and so do its moments.
Embeddings, head and norms have AdamW and a rate of their own, the same in all arms, without
restarts. All arms see the same batches. Losses are of the same validation sequences, with their
standard error; that of a difference is smaller. Results are appended to a file, a line each, and
what it has already is not run again; `--table` makes a table of them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from relora.data.config import DataConfig
from relora.data.loader import eval_batches, train_batches
from relora.data.prepare import prepare_shards
from relora.data.shards import TokenShards, open_shards

LENGTH, BATCH, WARMUP = 128, 8, 50
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
OF_A_KIND = ("r", "k", "train", "perm", "cols")


class Part:
    """What trains of a matrix, or beside it: `params`, and W with what they add."""

    def __init__(self, shape: torch.Size, options: dict[str, str], seed: int) -> None:
        self.shape, self.options, self.seed, self.merges = shape, options, seed, 0
        self.params = {name: nn.Parameter(value) for name, value in self.draw().items()}

    def draw(self) -> dict[str, Tensor]:
        """The numbers that a cycle starts with, of which those added to W are zero."""
        return {"d": torch.zeros(self.shape)}

    def add(self, w: Tensor) -> Tensor:
        """W with what has been trained in this cycle."""
        return w + self.params["d"]

    @torch.no_grad()
    def merge(self, w: Tensor) -> None:
        """Add it to W, and begin the next cycle."""
        w.copy_(self.add(w))
        self.merges += 1
        for name, value in self.draw().items():
            self.params[name].copy_(value)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1000003 + self.merges * 7919 + 17)


class Lora(Part):
    def draw(self) -> dict[str, Tensor]:
        (n, m), r = self.shape, int(self.options["r"])
        a = (torch.rand(r, m, generator=self.generator()) * 2 - 1) / math.sqrt(m)
        return {"a": a, "b": torch.zeros(n, r)}

    def add(self, w: Tensor) -> Tensor:
        return torch.addmm(w, self.params["b"], self.params["a"])


class Block(Part):
    def draw(self) -> dict[str, Tensor]:
        (n, m), k = self.shape, int(self.options["k"])
        self.shift = (self.merges + self.seed) % k
        generator = self.generator()
        self.rows, self.columns = (
            torch.randperm(size, generator=generator).argsort() for size in (n, m)
        )
        return {"d": torch.zeros(k, n // k, m // k)}

    def add(self, w: Tensor) -> Tensor:
        d = self.params["d"]
        k, _, width = d.shape
        if self.options.get("perm") == "random":
            return w + torch.block_diag(*d)[self.rows][:, self.columns]
        bands = [(i + self.shift) % k * width for i in range(k)]
        padded = [F.pad(x, (at, w.shape[1] - at - width)) for x, at in zip(d, bands, strict=True)]
        return w + torch.cat(padded)


class Rows(Part):
    def draw(self) -> dict[str, Tensor]:
        k, self.dim = int(self.options["k"]), int("cols" in self.options)
        size = self.shape[self.dim]
        self.chosen = torch.randperm(size, generator=self.generator())[: size // k]
        shape = list(self.shape)
        shape[self.dim] = size // k
        return {"d": torch.zeros(shape)}

    def add(self, w: Tensor) -> Tensor:
        return w.index_add(self.dim, self.chosen, self.params["d"])


class Mask(Part):
    def draw(self) -> dict[str, Tensor]:
        numbers = torch.rand(self.shape, generator=self.generator())
        self.mask = (numbers < 1 / float(self.options["k"])).float()
        return super().draw()

    def add(self, w: Tensor) -> Tensor:
        return w + self.mask * self.params["d"]


class Turn(Part):
    def add(self, w: Tensor) -> Tensor:
        is_on = (self.seed // 3 + self.merges) % int(self.options["k"]) == 0
        return super().add(w) if is_on else w


KINDS = {"full": Part, "lora": Lora, "block": Block, "rows": Rows, "mask": Mask, "turn": Turn}


class Matrix(nn.Module):
    """x Wᵀ with W as its parts make it."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().clone())
        self.parts: list[Part] = []

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        for part in self.parts:
            w = part.add(w)
        return F.linear(x, w)


def orthogonalise(g: Tensor) -> Tensor:
    """Singular values near one, by five iterations of Newton and Schulz."""
    a, b, c = NEWTON_SCHULZ
    x = g / (g.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    for _ in range(5):
        y = x @ x.mT
        x = a * x + (b * y + c * y @ y) @ x
    return x.mT if is_tall else x


class Optimizer:
    """AdamW (0.9, 0.95) or Muon, without decay."""

    def __init__(self, params: list[Tensor], kind: str = "adam", mu: float = 0.95) -> None:
        self.params, self.kind, self.mu, self.keep = params, kind, mu, 0.0
        self.reset()

    def reset(self) -> None:
        """Zero the moments, but for the largest ones of a share `keep`."""
        if self.keep:
            for m, v in zip(self.m, self.v, strict=True):
                size = m.abs()
                kept = size > size.flatten().kthvalue(int((1 - self.keep) * m.numel()))[0]
                m.mul_(kept)
                v.mul_(kept)
            return
        self.m, self.v = ([torch.zeros_like(p) for p in self.params] for _ in range(2))
        self.steps = 0

    @torch.no_grad()
    def step(self, rates: list[float]) -> None:
        """One update of those that have a gradient, each at its rate."""
        self.steps += 1
        for p, m, v, rate in zip(self.params, self.m, self.v, rates, strict=True):
            g, p.grad = p.grad, None
            if g is None:
                continue
            if self.kind == "adam":
                m.lerp_(g, 0.1)
                v.mul_(0.95).addcmul_(g, g, value=1 - 0.95)
                first, second = 1 - 0.9**self.steps, 1 - 0.95**self.steps
                p.addcdiv_(m, (v / second).sqrt_().add_(1e-8), value=-rate / first)
            else:
                m.mul_(self.mu).add_(g)
                size = 0.2 * math.sqrt(max(p.shape[-2:]))
                p.add_(orthogonalise(g.add(m, alpha=self.mu)), alpha=-rate * size)


def parse(arm: str) -> tuple[list[tuple[str, dict[str, str]]], dict[str, str]]:
    """The kinds of an arm with their options, and its settings."""
    kinds: list[tuple[str, dict[str, str]]] = []
    settings: dict[str, str] = {}
    for word in arm.split():
        name, equals, value = word.partition("=")
        if not equals:
            kinds.append((word, {}))
        else:
            (kinds[-1][1] if name in OF_A_KIND else settings)[name] = value
    return kinds, settings


def curve(step: int, total: int) -> float:
    """Warm-up, then a cosine down to a tenth."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - WARMUP) / (total - WARMUP)))


def build(width: int, layers: int, vocabulary: int, seed: int) -> tuple[Any, list[Matrix]]:
    """A Llama whose matrices of attention and MLP are `Matrix`."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=int(width * 8 / 3 + 31) // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    matrices = []
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            owner, _, last = name.rpartition(".")
            matrices.append(Matrix(module.weight))
            setattr(model.get_submodule(owner), last, matrices[-1])
    return model, matrices


def train(arm: str, seed: int, args: argparse.Namespace, shards: TokenShards) -> dict[str, Any]:
    """One run; returns its line of the results."""
    torch.set_num_threads(1)
    kinds, settings = parse(arm)
    model, matrices = build(args.width, args.layers, args.vocabulary, seed)
    rest = [p for p in model.parameters() if p.requires_grad]
    rate, ratio = float(settings["lr"]), float(settings.get("ratio", 1))
    groups = []
    for i, matrix in enumerate(matrices):
        for j, (kind, options) in enumerate(kinds):
            part = KINDS[kind](matrix.weight.shape, options, seed * 100 + i * 3 + j)
            matrix.parts.append(part)
            mu = float(settings.get("mu", 0.95))
            optimizer = Optimizer([*part.params.values()], settings.get("opt", "adam"), mu)
            optimizer.keep = float(settings.get("keep", 0))
            rates = [rate * (ratio if name == "b" else 1) for name in part.params]
            groups.append((matrix, part, optimizer, rates))
    others = Optimizer(rest)
    trained = [p for _, part, _, _ in groups for p in part.params.values()]
    cycle, rewarm = int(settings.get("C", 0)), int(settings.get("w", 0))
    last = float(settings.get("until", 1)) * args.steps
    batches = train_batches(
        shards.train,
        sequence_length=LENGTH,
        global_batch=BATCH,
        micro_batch=BATCH,
        rank=0,
        world=1,
        seed=seed,
    )
    began = time.time()
    for step in range(args.steps):
        (ids,) = next(batches)
        model(input_ids=ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(rest + trained, 1.0)
        factor = curve(step, args.steps)
        others.step([factor * args.lr_rest] * len(rest))
        since = step % cycle if cycle else step
        up = min(1.0, (since + 1) / rewarm) if rewarm and cycle <= step else 1.0
        restarts = cycle and (step + 1) % cycle == 0 and step + 1 < last
        for matrix, part, optimizer, rates in groups:
            optimizer.step([factor * up * x for x in rates])
            if restarts:
                part.merge(matrix.weight)
                optimizer.reset()
    losses = evaluate(model, shards, args.eval)
    entries = sum(matrix.weight.numel() for matrix in matrices)
    return {
        "arm": arm,
        "seed": seed,
        "loss": round(losses.mean().item(), 4),
        "error": round((losses.std() / len(losses) ** 0.5).item(), 4),
        "share": round(sum(p.numel() for p in trained) / entries, 3),
        "parameters": entries + sum(p.numel() for p in rest),
        "steps": args.steps,
        "width": args.width,
        "layers": args.layers,
        "source": args.source,
        "seconds": round(time.time() - began),
    }


@torch.no_grad()
def evaluate(model: nn.Module, shards: TokenShards, sequences: int) -> Tensor:
    """The loss of each of so many validation sequences."""
    losses = []
    for ids, real in eval_batches(
        shards.validation,
        sequence_length=LENGTH,
        micro_batch=32,
        rank=0,
        world=1,
        max_sequences=sequences,
    ):
        logits = model.eval()(input_ids=ids[:real]).logits[:, :-1]
        losses.append(F.cross_entropy(logits.mT, ids[:real, 1:], reduction="none").mean(1))
    return torch.cat(losses)


def table(results: Path) -> list[str]:
    """The results as Markdown: an arm a line, the best first, for each length and width."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in map(json.loads, results.read_text().splitlines()):
        key = (line["source"], line["width"], line["steps"], line["arm"])
        found.setdefault(key, []).append(line)
    lines = ["| source, width, steps | arm | loss (seed) | mean | trains of W | state |"]
    lines.append("|" + "---|" * 6)
    means = {k: sum(x["loss"] for x in runs) / len(runs) for k, runs in found.items()}
    for key in sorted(found, key=lambda k: (*k[:3], means[k])):
        runs, (source, width, steps, arm) = found[key], key
        losses = ", ".join(f"{x['loss']:.3f} ({x['seed']})" for x in runs)
        # Values and moments, in bytes of fp32 an entry of W.
        state = runs[0]["share"] * (8 if "opt=muon" in arm else 12)
        if arm.startswith(("mask", "turn")):  # what is held is not all that trains
            state /= float(arm.split("k=")[1].split()[0])
        where = f"{source}, {width}, {steps:,}"
        share = f"{state / (8 if 'opt=muon' in arm else 12):.3f}"
        lines.append(
            f"| {where} | `{arm}` | {losses} | {means[key]:.3f} | {share} | {state:.1f} B |"
        )
    return lines


def main() -> None:
    """Run what has not been run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("arms", nargs="*")
    parser.add_argument("--table", action="store_true", help="print the results there are")
    parser.add_argument("--to", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--eval", type=int, default=1024, help="validation sequences")
    parser.add_argument("--source", default="python")
    parser.add_argument("--lr-rest", type=float, default=4e-3, help="of embeddings, head and norms")
    args = parser.parse_args()
    if args.table:
        print("\n".join(table(args.to)))
        return
    data = DataConfig.model_validate(
        {
            "source": args.source,
            "tokenizer": {
                "train": "bpe",
                "vocab_size": args.vocabulary,
                "training_megabytes": 10,
            },
            "sequence_length": LENGTH,
            "validation_fraction": 0.03,
        }
    )
    prepare_shards(data, quiet=True)
    shards = open_shards(data)
    for arm in args.arms:
        key = {"arm": arm} | {
            k: getattr(args, k) for k in ("seed", "steps", "width", "layers", "source")
        }
        lines = args.to.read_text().splitlines() if args.to.exists() else []
        if any(key.items() <= json.loads(line).items() for line in lines):
            continue
        found = train(arm, args.seed, args, shards)
        with args.to.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(*(found[k] for k in ("arm", "seed", "loss", "error", "share", "seconds")), flush=True)


if __name__ == "__main__":
    main()
