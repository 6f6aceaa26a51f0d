"""What trains few numbers at a time and still comes near full rank: a screen in plain PyTorch.

    python configs/experiments/screen.py "full lr=1e-3,1.4e-3,2e-3" "lora r=16 C=200 lr=4e-3" …

An arm is a line of words, what trains of each matrix W of attention and MLP and then settings;
`lr=` takes several rates, and all rates and seeds of an arm are trained at once, as one batch.

    full           W
    lora r=R       s·B·A beside W; s is 1
    block k=K      K dense blocks of W, one for each band of rows, each in another band of columns;
                   a restart moves every block on by one band
    layer k=K      W of every K-th layer, of others after a restart
    lora r=R layer k=K   both

Restarts, every C= steps (grow=G: cycles G times longer each time):
    a=        rows of A: kaiming · orthonormal · top, sampled, mixed (singular vectors of W's
              gradient, exactly) · keep (as it is)
    b=        zero · rebalance (the top half of B·A's spectrum stays) · gradient (as LoRA-GA)
    m=        moments: zero · magnitude, random (0.9 and 0.99 of them become zero) · none (stay) ·
              transport (as LDAdam, with the overlap's correction) · full (blocks: all W has one)
    train=b   A does not train
    turns=1   a layer at a time, evenly over the cycle · slots=Q: Q of the R rank-1 parts each time
    share=S   an adaptive clock: of the matrices those whose A spans less than S of the energy of
              W's gradient; the others go on
    until=    share of the run after which no restart comes · w= steps of rewarm
    matched=1 rates of A and B such that W moves as at full rank's rate `lr` (static: at restarts)
    ratio=    of B's rate to A's · hold=N: A holds still for the first N steps of a cycle
    warm=     share of the run at full rank first, at AdamW's wlr= · dead=1: nothing trains in the
              first cycle, as in the public code
Optimizer: opt=adam (0.9, 0.95) · muon (mu=0.95, Nesterov's) · spectral (LoRA-Muon's factor steps)

Embeddings, head and norms have AdamW at a rate of their own, the same in all arms, and no restarts.
No weight decay. All arms see the same batches. W's whole gradient is at hand in each step, which
makes any rule a few lines; what a rule would cost in earnest is not measured here. Results are
appended to a file, a line for each run, and what it has already is not run again; `--table` makes
a table of them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LENGTH, WARMUP = 128, 50
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
RUN = ("seed", "steps", "batch", "width", "layers", "source")


# ── the model: Llama, for several runs at once; tensors are (matrices, runs, …) or (runs, …)


class Model:
    """Weights of `runs` Llamas, and their loss."""

    def __init__(
        self, width: int, layers: int, vocabulary: int, seeds: list[int], device: str
    ) -> None:
        self.heads, self.layers = width // 32, layers
        inner = int(width * 8 / 3 + 31) // 32 * 32
        # For each shape its matrices, layer by layer: q k v o; gate up; down.
        shapes = {
            "attention": (4, width, width),
            "up": (2, inner, width),
            "down": (1, width, inner),
        }
        self.per_layer = {name: count for name, (count, _, _) in shapes.items()}

        def drawn(*shape: int) -> Tensor:
            return torch.stack([torch.randn(*shape, generator=g) * 0.02 for g in generators])

        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        runs = len(seeds)
        self.matrices = {
            name: torch.stack([drawn(n, m) for _ in range(count * layers)]).to(device)
            for name, (count, n, m) in shapes.items()
        }
        self.rest = [
            drawn(vocabulary, width).to(device),
            drawn(vocabulary, width).to(device),
            torch.ones(2 * layers + 1, runs, 1, width, device=device),
        ]
        angles = torch.outer(torch.arange(LENGTH), 1e4 ** (-torch.arange(0, 32, 2) / 32))
        angles = torch.cat([angles, angles], 1).to(device)
        self.cos, self.sin = angles.cos(), angles.sin()
        for leaf in self.leaves():
            leaf.requires_grad_()

    def leaves(self) -> list[Tensor]:
        return [*self.matrices.values(), *self.rest]

    def losses(self, ids: Tensor) -> Tensor:
        """ids (runs, sequences, LENGTH) -> the loss of each sequence (runs, sequences)."""
        runs, batch, length = ids.shape
        embeddings, head, norms = self.rest
        at = iter(norms.unbind(0))
        of = {name: iter(stacked.unbind(0)) for name, stacked in self.matrices.items()}
        first = torch.arange(runs, device=ids.device)[:, None] * embeddings.shape[1]
        x = F.embedding(ids.flatten(1) + first, embeddings.flatten(0, 1))
        for _ in range(self.layers):
            q, k, v, o = (next(of["attention"]) for _ in range(4))
            h = rms_norm(x) * next(at)
            q, k, v = (
                torch.bmm(h, w.mT).view(runs * batch, length, self.heads, 32).transpose(1, 2)
                for w in (q, k, v)
            )
            q, k = self.rotate(torch.stack([q, k])).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + torch.bmm(y.transpose(1, 2).reshape(x.shape), o.mT)
            h = rms_norm(x) * next(at)
            gate, up = (torch.bmm(h, next(of["up"]).mT) for _ in range(2))
            x = x + torch.bmm(F.silu(gate) * up, next(of["down"]).mT)
        logits = torch.bmm(rms_norm(x) * next(at), head.mT).view(runs * batch, length, -1)[:, :-1]
        targets = ids.view(runs * batch, length)[:, 1:]
        losses = F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none"
        )
        return losses.view(runs, batch, length - 1).mean(2)

    def rotate(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat([-second, first], -1) * self.sin


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


# ── what trains of a stack of matrices W (matrices, runs, n, m), given their gradients


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


def inverse_root(gram: Tensor) -> Tensor:
    """(gram + δ)^(-1/2) of positive matrices, by Newton and Schulz's coupled iteration."""
    r = gram.shape[-1]
    eye = torch.eye(r, device=gram.device)
    gram = gram + (1e-4 * gram.diagonal(dim1=-2, dim2=-1).mean(-1) + 1e-12)[..., None, None] * eye
    size = gram.norm(dim=(-2, -1), keepdim=True)
    y, z = gram / size, eye.expand_as(gram)
    for _ in range(15):
        t = 0.5 * (3 * eye - z @ y)
        y, z = y @ t, t @ z
    return z / size.sqrt()


def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """On the CPU, where a hundred small ones take less time than on a GPU."""
    u, s, v = torch.linalg.svd(x.cpu(), full_matrices=False)
    return u.to(x.device), s.to(x.device), v.to(x.device)


class Tensors:
    """Trained tensors (matrices, runs, …) with the moments of one optimizer."""

    def __init__(self, values: list[Tensor], options: dict[str, str]) -> None:
        self.values, self.kind = values, options.get("opt", "adam")
        self.mu = float(options.get("mu", 0.95))
        self.m = [torch.zeros_like(p) for p in values]
        self.v = [torch.zeros_like(p) for p in values]
        # Steps since a moment was zero, of each matrix and run.
        self.steps = [torch.zeros(*p.shape[:-2], 1, 1, device=p.device) for p in values]

    def step(self, gradients: list[Tensor], rates: list[Tensor]) -> None:
        """An update of each at its rate, which has the tensor's dimensions or is 1 there."""
        for p, g, m, v, n, rate in zip(
            self.values, gradients, self.m, self.v, self.steps, rates, strict=True
        ):
            n.add_(1)
            if self.kind == "adam":
                m.lerp_(g, 0.1)
                v.mul_(0.95).addcmul_(g, g, value=1 - 0.95)
                first, second = 1 - 0.9**n, 1 - 0.95**n
                p.sub_(rate / first * m / ((v / second).sqrt_().add_(1e-8)))
            else:
                m.mul_(self.mu).add_(g)
                size = 0.2 * math.sqrt(max(p.shape[-2:]))
                p.sub_(rate * size * orthogonalise(g.add(m, alpha=self.mu)))


class Rule:
    """Full rank, and what the others are made of."""

    trained: Tensors

    def __init__(self, w: Tensor, options: dict[str, str], seeds: list[int], layers: int) -> None:
        self.w, self.options, self.seeds, self.layers = w, options, seeds, layers
        self.merges = 0
        with torch.no_grad():
            self.build()
        self.share = sum(p.numel() for p in self.trained.values) / w.numel()

    def build(self) -> None:
        self.trained = Tensors([self.w], self.options)

    def gradients(self, g: Tensor) -> list[Tensor]:
        """Gradients of what trains, from those of W."""
        return [g]

    def step(self, gradients: list[Tensor], rate: Tensor, since: Tensor) -> None:
        """One update; rate (runs,), steps since the restart (1,)."""
        self.trained.step(gradients, [rate.view(1, -1, 1, 1)] * len(gradients))

    def restart(self, g: Tensor | None, at: Tensor) -> None:
        """Begin a cycle where `at` (matrices, runs); W holds all sums already."""

    def draw(self, make: Callable[[torch.Generator], Tensor]) -> Tensor:
        """(matrices, runs, …) of draws keyed by seed, merge and matrix."""
        shape = self.w.shape
        drawn = [
            make(torch.Generator().manual_seed(seed * 1000003 + self.merges * 7919 + i))
            for i in range(shape[0])
            for seed in self.seeds
        ]
        return torch.stack(drawn).view(*shape[:2], *drawn[0].shape).to(self.w.device)


class Lora(Rule):
    def build(self) -> None:
        (_, _, n, m), r = self.w.shape, int(self.options["r"])
        self.a = self.w.new_zeros(*self.w.shape[:2], r, m)
        self.b = self.w.new_zeros(*self.w.shape[:2], n, r)
        self.is_frozen = self.options.get("train") == "b"
        self.scale = self.w.new_ones(*self.w.shape[:2], 1, 1)  # of rates, where they are matched
        self.slots = int(self.options.get("slots", 0))
        self.next_slot = 0
        self.trained = Tensors([self.b] if self.is_frozen else [self.a, self.b], self.options)
        self.a.copy_(self.rows(None))
        self.match()

    def rows(self, g: Tensor | None) -> Tensor:
        """A as a cycle begins with it."""
        r, m = self.a.shape[-2:]
        kind = self.options.get("a", "kaiming")
        if kind == "keep" and self.merges:
            return self.a.clone()
        if kind in ("kaiming", "keep"):
            bound = 1 / math.sqrt(m)
            return self.draw(lambda key: (torch.rand(r, m, generator=key) * 2 - 1) * bound)
        basis = torch.linalg.qr(self.draw(lambda key: torch.randn(m, r, generator=key)))[0].mT
        if kind == "orthonormal" or g is None:
            return basis
        _, sizes, v = svd(g)
        if kind == "top":
            return v[..., :r, :]
        # Without replacement, in proportion to the singular values: Gumbel's top r.
        noise = self.draw(lambda key: torch.rand(sizes.shape[-1], generator=key))
        noise = -torch.log(-torch.log(noise))
        index = (sizes.clamp_min(1e-20).log() + noise).topk(r, -1).indices
        chosen = torch.take_along_dim(v, index[..., None], -2)
        if kind == "sampled":
            return chosen
        half = chosen[..., : r // 2, :]
        others = basis[..., r // 2 :, :]
        others = others - others @ half.mT @ half
        return torch.cat([half, torch.linalg.qr(others.mT)[0].mT], -2)

    def gradients(self, g: Tensor) -> list[Tensor]:
        of_b = g @ self.a.mT
        return [of_b] if self.is_frozen else [self.b.mT @ g, of_b]

    def match(self) -> None:
        """Rates whose first step moves W by full rank's RMS."""
        if "matched" in self.options:
            (r, m), n = self.a.shape[-2:], self.b.shape[-2]
            alpha = self.a.square().sum((-2, -1), keepdim=True) / (r * m)
            beta = self.b.square().sum((-2, -1), keepdim=True) / (n * r)
            beta = 0 * beta if self.is_frozen else beta
            self.scale.copy_(1 / (math.sqrt(r) * (alpha + beta).sqrt()))

    def step(self, gradients: list[Tensor], rate: Tensor, since: Tensor) -> None:
        if self.options.get("matched") == "each":
            self.match()
        before = self.b @ self.a
        if self.options.get("opt") == "spectral":
            self.spectral_step(gradients, rate.view(1, -1, 1, 1))
        else:
            of_a = of_b = rate.view(1, -1, 1, 1) * self.scale
            of_b = of_b * float(self.options.get("ratio", 1))
            of_a = of_a * (since >= int(self.options.get("hold", 0)))
            self.trained.step(gradients, [of_b] if self.is_frozen else [of_a, of_b])
        self.w.add_(self.b @ self.a - before)

    def captured(self, g: Tensor) -> Tensor:
        """The share of the energy of W's gradient that A's rows span (matrices, runs)."""
        basis = torch.linalg.qr(self.a.mT.cpu())[0].to(g.device)
        return (g @ basis).square().sum((-2, -1)) / g.square().sum((-2, -1))

    def spectral_step(self, gradients: list[Tensor], rate: Tensor) -> None:
        """LoRA-Muon: half the step by each factor, of spectral norm `rate` × Muon's size."""
        t = self.trained
        for m, g in zip(t.m, gradients, strict=True):
            m.mul_(t.mu).add_(g)
        of_a, of_b = (g.add(m, alpha=t.mu) for g, m in zip(gradients, t.m, strict=True))
        size = 0.2 * math.sqrt(max(self.w.shape[-2:])) * rate / 2
        root_a = inverse_root(self.a @ self.a.mT)
        root_b = inverse_root(self.b.mT @ self.b)
        # Where B is still zero A has no step, and B takes the whole.
        is_set = (self.b.square().sum((-2, -1), keepdim=True) > 1e-8).float()
        step_b = orthogonalise(of_b @ root_a) @ root_a
        step_a = root_b @ orthogonalise(root_b @ of_a)
        self.b.sub_(size * (2 - is_set) * step_b)
        self.a.sub_(size * is_set * step_a)

    def restart(self, g: Tensor | None, at: Tensor) -> None:
        self.merges += 1
        old_a = self.a.clone()
        new_a, new_b = self.rows(g), torch.zeros_like(self.b)
        r = self.a.shape[-2]
        if self.options.get("b") == "gradient" and g is not None:
            u, _, v = svd(g)
            size = self.w.shape[-2] ** 0.25 / 4
            new_a, new_b = v[..., :r, :] * size, u[..., r : 2 * r] * size
        elif self.options.get("b") == "rebalance":
            u, s, v = svd(self.b @ self.a)
            half, root = r // 2, s[..., : r // 2].sqrt()
            new_a = torch.cat([root[..., None] * v[..., :half, :], new_a[..., half:, :]], -2)
            new_b = torch.cat([u[..., :half] * root[..., None, :], new_b[..., half:]], -1)
        chosen = at[..., None, None]
        if self.slots:
            which = (torch.arange(self.slots) + self.next_slot) % r
            self.next_slot = (self.next_slot + self.slots) % r
            rows = torch.zeros(r, dtype=torch.bool)
            rows[which] = True
            chosen = chosen & rows.to(self.a.device)[:, None]
        self.a.copy_(torch.where(chosen, new_a, self.a))
        self.b.copy_(torch.where(chosen.mT, new_b, self.b))
        self.moments(chosen, old_a)
        self.match()

    def moments(self, chosen: Tensor, old_a: Tensor) -> None:
        """What the restart leaves of the moments of the rank-1 parts `chosen`."""
        t, kind = self.trained, self.options.get("m", "zero")
        if kind == "transport":
            self.transport(at=chosen, old_a=old_a)
            return
        for i, (m, v) in enumerate(zip(t.m, t.v, strict=True)):
            where = chosen if i == 0 and not self.is_frozen else chosen.mT
            if kind == "zero":
                kept = torch.zeros((), device=m.device)
                # SwitchLoRA's parts have no count of their own: v's bias is corrected by hand.
                if not self.slots:
                    t.steps[i].mul_(~where)
            elif kind == "magnitude":
                size = m.abs().flatten(-2)
                border = size.kthvalue(int(0.9 * size.shape[-1]), -1).values[..., None, None]
                kept = (m.abs() > border).float()
            elif kind == "random":
                kept = (torch.rand_like(m) < 0.01).float()
            else:
                continue
            m.copy_(torch.where(where, m * kept, m))
            v.copy_(torch.where(where, v * kept, v))

    def transport(self, at: Tensor, old_a: Tensor) -> None:
        """LDAdam's rule for B, with the overlap's correction; A's moments and steps are zeroed."""
        t = self.trained
        m, v, n = t.m[-1], t.v[-1], t.steps[-1]
        c = old_a @ self.a.mT @ torch.linalg.inv(self.a @ self.a.mT)
        first, second = 1 - 0.9**n, 1 - 0.95**n
        mean, square = m / first, v / second
        moved = ((square - mean**2) @ c**2 + (mean @ c) ** 2).abs() * second
        overlap = (c**2).sum(-2, keepdim=True).clamp(max=1)
        moved = moved + (1 - overlap) * v.mean(-1, keepdim=True)
        m.copy_(torch.where(at, m @ c, m))
        v.copy_(torch.where(at, moved, v))
        for i in range(len(t.m) - 1):
            t.m[i].mul_(~at)
            t.v[i].mul_(~at)
            t.steps[i].mul_(~at)


class Block(Rule):
    def build(self) -> None:
        (j, runs, n, m), k = self.w.shape, int(self.options["k"])
        self.k = k
        self.shift = self.draw(lambda g: torch.randint(k, (1,), generator=g))  # (j, runs, 1)
        self.shift = self.shift[:, :1].expand_as(self.shift)  # the same for all runs
        self.d = self.w.new_zeros(j, runs, k, n // k, m // k)
        self.trained = Tensors([self.d], self.options)
        self.has_full_moment = self.options.get("m") == "full"
        self.moment = torch.zeros_like(self.w) if self.has_full_moment else None
        self.index = torch.zeros(j, runs, k, n // k, m // k, dtype=torch.long, device=self.w.device)
        self.place()

    def place(self) -> None:
        """Where in W, as one row, the blocks' entries lie."""
        m = self.w.shape[-1]
        k, rows, columns = self.d.shape[-3:]
        i = torch.arange(k, device=self.w.device)
        band = (i + self.shift) % k  # (j, runs, k)
        row = (i[:, None] * rows + torch.arange(rows, device=i.device)) * m
        column = band[..., None] * columns + torch.arange(columns, device=i.device)
        self.index.copy_(row[:, :, None] + column[..., None, :])

    def of(self, w: Tensor) -> Tensor:
        """The blocks of W's shape."""
        return w.flatten(-2).gather(-1, self.index.flatten(2)).view_as(self.d)

    def gradients(self, g: Tensor) -> list[Tensor]:
        if self.moment is not None:
            self.moment.mul_(self.trained.mu).add_(g)
        return [self.of(g)]

    def step(self, gradients: list[Tensor], rate: Tensor, since: Tensor) -> None:
        t = self.trained
        if self.moment is not None:  # as if it had been momentum of the blocks all along
            t.m[0].copy_((self.of(self.moment) - gradients[0]) / t.mu)
        self.d.zero_()
        t.step(gradients, [rate.view(1, -1, 1, 1, 1)])
        self.w.flatten(-2).scatter_add_(-1, self.index.flatten(2), self.d.flatten(2))

    def restart(self, g: Tensor | None, at: Tensor) -> None:
        self.merges += 1
        self.shift = self.shift + at[..., None]
        self.place()
        t, at = self.trained, at[..., None, None, None]
        if self.options.get("m", "zero") == "zero":
            for x in (t.m[0], t.v[0], t.steps[0]):
                x.mul_(~at)


class Layer(Rule):
    """W of every K-th layer."""

    def build(self) -> None:
        self.k = int(self.options["k"])
        self.trained = Tensors([self.w], self.options)
        count = self.w.shape[0]
        self.layer = torch.arange(count, device=self.w.device) // (count // self.layers)
        self.on = self.w.new_zeros(count, 1, 1, 1)
        self.choose()

    def choose(self) -> None:
        self.on.copy_((self.layer % self.k == self.merges % self.k).float()[:, None, None, None])

    def gradients(self, g: Tensor) -> list[Tensor]:
        return [g * self.on]

    def step(self, gradients: list[Tensor], rate: Tensor, since: Tensor) -> None:
        self.trained.step(gradients, [rate.view(1, -1, 1, 1) * self.on])

    def restart(self, g: Tensor | None, at: Tensor) -> None:
        self.merges += 1
        self.choose()
        for x in (self.trained.m[0], self.trained.v[0], self.trained.steps[0]):
            x.zero_()


KINDS = {"full": Rule, "lora": Lora, "block": Block, "layer": Layer}


# ── a batch of runs


def parse(arm: str) -> tuple[list[tuple[str, dict[str, str]]], dict[str, str]]:
    """The kinds of an arm with their options, and its settings."""
    kinds: list[tuple[str, dict[str, str]]] = []
    settings: dict[str, str] = {}
    for word in arm.split():
        name, equals, value = word.partition("=")
        if not equals:
            kinds.append((word, {}))
        elif name in ("r", "k"):
            kinds[-1][1][name] = settings[name] = value
        else:
            settings[name] = value
    return [(kind, settings | options) for kind, options in kinds], settings


def restarts_of(settings: dict[str, str], begin: int, total: int, layers: int) -> list[int]:
    """The steps before which something restarts."""
    cycle, grow = float(settings.get("C", 0)), float(settings.get("grow", 1))
    if "slots" in settings:
        cycle *= int(settings["slots"]) / int(settings["r"])
    if "turns" in settings:
        cycle /= layers
    last = float(settings.get("until", 1)) * total
    found, at = [], begin + cycle
    while cycle and at < last:
        found.append(round(at))
        cycle *= grow
        at += cycle
    return found


def order_of(seed: int, rows: int, steps: int, batch: int) -> Tensor:
    """Which of so many sequences each step takes (steps, batch): all in turn, anew each epoch."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps // (rows // batch))
    order = [torch.randperm(rows, generator=generator) for _ in range(epochs)]
    return torch.cat([x[: rows // batch * batch].view(-1, batch) for x in order])[:steps]


class Stack:
    """All runs of an arm: rates × seeds."""

    def __init__(self, arm: str, args: argparse.Namespace, runs: list[tuple[str, int]]) -> None:
        kinds, self.settings = parse(arm)
        self.seeds = [seed for _, seed in runs]
        device = args.device
        self.model = Model(args.width, args.layers, args.vocabulary, self.seeds, device)
        rates = torch.tensor([float(lr) for lr, _ in runs])
        self.warm = round(float(self.settings.get("warm", 0)) * args.steps)
        self.restarts = restarts_of(self.settings, self.warm, args.steps, args.layers)
        self.restarted = 0.0  # restarts of a matrix, on average
        # What each step takes lies on the device, and a counter says which step it is: a step
        # asks nothing of the host, and can be replayed.
        self.rows = args.tokens[0][: len(args.tokens[0]) // LENGTH * LENGTH].view(-1, LENGTH)
        orders = {s: order_of(s, len(self.rows), args.steps, args.batch) for s in set(self.seeds)}
        self.order = torch.stack([orders[seed] for seed in self.seeds], 1).to(device)
        factors, rest, since = schedule(self.settings, self.warm, self.restarts, args.steps)
        warm_rate = float(self.settings.get("wlr", 0))
        own = torch.where(torch.arange(args.steps)[:, None] < self.warm, warm_rate, rates)
        self.rates = (own * factors[:, None]).to(device)
        self.rest_rates, self.since = (rest * args.lr_rest).to(device), since.to(device)
        self.counter = torch.zeros(1, dtype=torch.long, device=device)
        self.rest = Tensors(self.model.rest, {})
        stacks = [w.data for w in self.model.matrices.values()]
        self.rules = [
            KINDS[kind](w, options, self.seeds, args.layers)
            for kind, options in kinds
            for w in stacks
        ]
        self.first = [Rule(w, {}, self.seeds, args.layers) for w in stacks]
        self.active = self.first if self.warm else self.rules

    def share(self) -> float:
        """Entries that train, of all of W's."""
        total = sum(w.numel() for w in self.model.matrices.values())
        held = sum(rule.share * rule.w.numel() for rule in self.rules)
        for rule in self.rules:
            if isinstance(rule, Layer):
                held -= (1 - 1 / rule.k) * rule.w.numel()
        return held / total

    def backward(self, ids: Tensor) -> list[Tensor]:
        """Gradients of each run's mean loss, by leaf."""
        return list(torch.autograd.grad(self.model.losses(ids).mean(1).sum(), self.model.leaves()))

    def step(self) -> None:
        """The next step."""
        gradients = self.backward(self.ids())
        with torch.no_grad():
            rate, since = (x.index_select(0, self.counter) for x in (self.rates, self.since))
            rest_rate = self.rest_rates.index_select(0, self.counter)
            count = len(self.model.matrices)
            of_rules = [rule.gradients(gradients[i % count]) for i, rule in enumerate(self.active)]
            rest = gradients[count:]
            # Clipping at 1 of each run's own norm; dimension 0 is the run's but for stacks.
            squares: Any = sum(
                g.square().sum([i for i in range(g.dim()) if i != 1])
                for group in of_rules
                for g in group
            )
            squares = squares + sum(g.square().flatten(1).sum(1) for g in rest[:2])
            squares = squares + rest[2].square().sum((0, 2, 3))
            clip = (1 / (squares.sqrt() + 1e-6)).clamp(max=1)
            for rule, group in zip(self.active, of_rules, strict=True):
                for g in group:
                    g.mul_(clip.view(1, -1, *[1] * (g.dim() - 2)))
                rule.step(group, rate[0], since)
            for g in rest[:2]:
                g.mul_(clip[:, None, None])
            rest[2].mul_(clip[None, :, None, None])
            self.rest.step(rest, [rest_rate.view(1, 1, 1)] * 2 + [rest_rate.view(1, 1, 1, 1)])
            self.counter += 1

    def ids(self) -> Tensor:
        """Token ids (runs, batch, LENGTH) of the next step."""
        return self.rows[self.order.index_select(0, self.counter)[0]].long()

    def restart(self, number: int) -> None:
        """Merge, and begin the next cycle, of all layers or the next one."""
        needs = {self.settings.get("a"), self.settings.get("b")}
        asks = "share" in self.settings or needs & {"top", "sampled", "mixed", "gradient"}
        gradients = self.backward(self.ids()) if asks else None
        with torch.no_grad():
            for i, rule in enumerate(self.rules):
                g = gradients[i % len(self.model.matrices)] if gradients else None
                count = rule.w.shape[0]
                at = torch.ones(rule.w.shape[:2], dtype=torch.bool, device=rule.w.device)
                if "turns" in self.settings:
                    layer = torch.arange(count, device=at.device) // (count // rule.layers)
                    at = at & (layer == number % rule.layers)[:, None]
                if "share" in self.settings and isinstance(rule, Lora) and g is not None:
                    at = rule.captured(g) < float(self.settings["share"])
                self.restarted += at.float().mean().item() / len(self.rules)
                rule.restart(g, at)


def curve(step: int, total: int) -> float:
    """Warm-up, then a cosine down to a tenth."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - WARMUP) / (total - WARMUP)))


def schedule(
    settings: dict[str, str], warm: int, restarts: list[int], total: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of the matrices' rates, of the others, and steps since a restart, each (total,)."""
    rewarm, first = int(settings.get("w", 0)), restarts[0] if restarts else total
    begins = {warm, *restarts}
    own, rest, counts = [], [], []
    since = 0
    for step in range(total):
        since = 0 if step in begins else since
        up = min(1.0, (since + 1) / rewarm) if rewarm and (warm or step >= first) else 1.0
        if "dead" in settings and warm <= step < first:
            up = 0.0
        rest.append(curve(step, total))
        own.append(rest[-1] * up)
        counts.append(float(since))
        since += 1
    return torch.tensor(own), torch.tensor(rest), torch.tensor(counts)


class Replayed:
    """A step as one CUDA graph; on a CPU the step itself."""

    def __init__(self, stack: Stack) -> None:
        self.stack, self.warmed = stack, 0
        self.graph: Any = None

    def __call__(self) -> None:
        if self.stack.counter.device.type == "cpu":
            self.stack.step()
        elif self.graph is not None:
            self.graph.replay()
        else:
            self.stack.step()
            self.warmed += 1
            if self.warmed == 3:  # capture runs nothing
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                    self.stack.step()


def train(
    arm: str, runs: list[tuple[str, int]], args: argparse.Namespace
) -> Iterator[list[dict[str, Any]]]:
    """All runs (rate, seed) of an arm at once, a step at each turn; at last a line for each."""
    began = time.time()
    stack = Stack(arm, args, runs)
    do_step = Replayed(stack)
    number = 0
    for step in range(args.steps):
        if step and step == stack.warm:
            stack.active = stack.rules
            do_step = Replayed(stack)
        if number < len(stack.restarts) and step == stack.restarts[number]:
            stack.restart(number)
            number += 1
        do_step()
        yield []
    rows = evaluated(args.tokens[1], args.eval)
    losses = evaluate(stack.model, rows)
    eighths = by_repetition(rows)
    yield [
        {
            "arm": f"{arm} lr={rate}",
            "seed": seed,
            "loss": round(of_run.mean().item(), 4),
            "error": round((of_run.std() / len(of_run) ** 0.5).item(), 4),
            "by_repetition": [round(of_run[part].mean().item(), 3) for part in eighths],
            "share": round(stack.share(), 3),
            "restarts": round(stack.restarted, 1),
            "parameters": sum(p.numel() for p in stack.model.leaves()) // len(runs),
            **{k: getattr(args, k) for k in RUN[1:]},
            "seconds": round((time.time() - began) / len(runs), 1),
            "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        }
        for (rate, seed), of_run in zip(runs, losses, strict=True)
    ]


def evaluated(tokens: Tensor, sequences: int) -> Tensor:
    """So many validation sequences, evenly spread: ids (sequences, LENGTH)."""
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    return rows[torch.linspace(0, len(rows) - 1, min(sequences, len(rows))).long()].long()


def by_repetition(rows: Tensor) -> tuple[Tensor, ...]:
    """Numbers of the sequences in eighths, those first that zlib makes the smallest."""
    packed = [len(zlib.compress(row.tobytes(), 9)) for row in rows.cpu().numpy().astype(np.uint16)]
    return torch.tensor(packed).argsort().tensor_split(8)


@torch.no_grad()
def evaluate(model: Model, rows: Tensor) -> Tensor:
    """The loss of each sequence by each run: (runs, sequences)."""
    runs = model.rest[0].shape[0]
    return torch.cat(
        [model.losses(ids.expand(runs, -1, -1).contiguous()) for ids in rows.split(32)], 1
    )


def tokens_of(args: argparse.Namespace) -> list[np.ndarray[Any, Any]]:
    """Training and validation tokens: prepared by relora, or from a file where it is not."""
    if args.tokens_from:
        with np.load(args.tokens_from) as file:
            return [file["train"].astype(np.int32), file["validation"].astype(np.int32)]
    from relora.data.config import DataConfig
    from relora.data.prepare import prepare_shards
    from relora.data.shards import open_shards

    data = DataConfig.model_validate(
        {
            "source": args.source,
            "tokenizer": {"train": "bpe", "vocab_size": args.vocabulary, "training_megabytes": 10},
            "sequence_length": LENGTH,
            "validation_fraction": 0.05,
        }
    )
    prepare_shards(data, quiet=True)
    shards = open_shards(data)
    return [np.asarray(x).astype(np.int32) for x in (shards.train, shards.validation)]


# ── results


class Row(NamedTuple):
    """An arm of the results at its best rate; those with the most seeds count."""

    source: str
    width: int
    layers: int
    steps: int
    arm: str
    rate: str
    losses: list[float]  # by seed
    others: dict[str, float]  # mean loss by rate
    state: float  # bytes an entry of W

    @property
    def mean(self) -> float:
        return sum(self.losses) / len(self.losses)


def rows(results: Path) -> list[Row]:
    """The arms of a file of results, those of one setting together, the best first."""
    found: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = {}
    for line in map(json.loads, results.read_text().splitlines()):
        arm, _, rate = line["arm"].rpartition(" lr=")
        key = (line["source"], line["width"], line["layers"], line["steps"], arm)
        found.setdefault(key, {}).setdefault(rate, []).append(line)

    def mean(runs: list[dict[str, Any]]) -> float:
        return sum(x["loss"] for x in runs) / len(runs)

    made = []
    for key, rates in found.items():
        best = min(rates, key=lambda r: (-len(rates[r]), mean(rates[r])))
        runs, arm = rates[best], key[-1]
        one_moment = "opt=muon" in arm or "opt=spectral" in arm
        state = runs[0]["share"] * (8 if one_moment else 12)
        if "m=full" in arm:
            state = 4 * runs[0]["share"] + 4
        losses = [x["loss"] for x in sorted(runs, key=lambda x: x["seed"])]
        others = {r: mean(rates[r]) for r in sorted(rates, key=float) if r != best}
        made.append(Row(*key, best, losses, others, state))
    return sorted(made, key=lambda row: (*row[:4], row.mean))


def table(results: Path) -> list[str]:
    """The results as Markdown: an arm a line at its best rate, the best first."""
    lines = ["| source, width, layers, steps | arm | mean | by seed | rate | other rates | state |"]
    lines.append("|" + "---|" * 7)
    for row in rows(results):
        by_seed = " ".join(f"{loss:.3f}" for loss in row.losses)
        others = ", ".join(f"{rate}: {loss:.3f}" for rate, loss in row.others.items())
        lines.append(
            f"| {row.source}, {row.width}, {row.layers}, {row.steps:,} | `{row.arm}` "
            f"| {row.mean:.3f} | {by_seed} | {row.rate} | {others} | {row.state:.1f} B |"
        )
    return lines


def main() -> None:
    """Run what has not been run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("arms", nargs="*")
    parser.add_argument("--arms-from", type=Path, help="a file of arms, a line each")
    parser.add_argument("--table", action="store_true", help="print the results there are")
    parser.add_argument("--to", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--seeds", default="0", help="0,1,2")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2560)
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--together", type=int, default=1, help="arms at a time, on a GPU")
    parser.add_argument("--eval", type=int, default=2048, help="validation sequences")
    parser.add_argument("--source", default="python")
    parser.add_argument("--tokens-from", type=Path, help="a .npz of train and validation")
    parser.add_argument("--save-tokens", type=Path, help="make such a file, and train nothing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lr-rest", type=float, default=4e-3, help="of embeddings, head and norms")
    args = parser.parse_args()
    if args.table:
        print("\n".join(table(args.to)))
        return
    args.tokens = tokens_of(args)
    if args.save_tokens:
        train_tokens, validation = (x.astype(np.uint16) for x in args.tokens)
        np.savez_compressed(args.save_tokens, train=train_tokens, validation=validation)
        return
    args.tokens = [torch.from_numpy(x).to(args.device) for x in args.tokens]
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = True
    arms = args.arms + (args.arms_from.read_text().splitlines() if args.arms_from else [])
    todo = []
    known = list(map(json.loads, args.to.read_text().splitlines())) if args.to.exists() else []
    for line in filter(None, arms):
        arm, _, rates = line.rpartition(" lr=")
        runs = []
        for rate in rates.split(","):
            for seed in map(int, args.seeds.split(",")):
                key = {"arm": f"{arm} lr={rate}", "seed": seed}
                key |= {k: getattr(args, k) for k in RUN[1:]}
                if not any(key.items() <= other.items() for other in known):
                    runs.append((rate, seed))
        if runs:
            todo.append(train(arm, runs, args))
    for found in together(todo, args):
        with args.to.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(*(found[k] for k in ("arm", "seed", "loss", "share", "seconds")), flush=True)


def together(
    todo: list[Iterator[list[dict[str, Any]]]], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Results as they come, of so many arms at a time, each on a CUDA stream of its own."""
    going: list[tuple[Iterator[list[dict[str, Any]]], Any]] = []
    while todo or going:
        while todo and len(going) < args.together:
            stream = torch.cuda.Stream() if args.device == "cuda" else None
            going.append((todo.pop(0), stream))
        for arm, stream in list(going):
            with torch.cuda.stream(stream):
                lines = next(arm, None)
            if lines is None:
                going.remove((arm, stream))
            else:
                yield from lines


if __name__ == "__main__":
    main()
