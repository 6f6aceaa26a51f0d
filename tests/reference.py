"""The whole algorithm once more, in float64 and plain PyTorch: what the runs are measured against.

Written from the formulas and from nothing else: its own Llama forward (transformers computes norms
and losses in fp32 whatever the weights are), the update W + s·B·A as one matrix, AdamW and clipping
by hand, its own clock. Data it shares with the run: the weights at the start, the tokens of each
batch, and the numbers that A is drawn as.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


def lr_factor(
    t: int, total: int, warmup: int, cycle: int | None, rewarm: int, low: float, birth: int | None
) -> float:
    """The jagged cosine, for the update that follows t finished ones; float64."""
    pi = np.float64(np.pi)

    def cos(step: int) -> float:
        return low + (1 - low) * 0.5 * (1 + np.cos(pi * (step - warmup) / max(1, total - warmup)))

    if t < warmup:
        return t / warmup
    restarts = []
    if birth is not None:
        restarts = [birth] if cycle is None else list(range(birth, t + 1, cycle))
    for b in restarts:
        if 0 < b <= t < b + rewarm:
            return (t - b) / rewarm * cos(b + rewarm)
    return cos(t)


def llama_logits(
    tokens: Tensor,
    values: Mapping[str, Tensor],
    project: Callable[[str, Tensor], Tensor],
    config: Mapping,
) -> Tensor:
    """Logits (rows, tokens, vocabulary) of a Llama, in the dtype of `values`.

    Args:
        values: embedding, norms and head by parameter name.
        project: (name of a linear layer, input) → its output.
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    size, length = hidden // heads, tokens.shape[1]

    def norm(x: Tensor, name: str) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"])
        return x * scale * values[f"{name}.weight"]

    def split(x: Tensor, count: int) -> Tensor:
        return x.view(*x.shape[:2], count, size).transpose(1, 2)

    h = values["model.embed_tokens.weight"][tokens]
    frequencies = 10000.0 ** (-torch.arange(0, size, 2, dtype=h.dtype) / size)
    angles = torch.outer(torch.arange(length, dtype=h.dtype), frequencies).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    hidden_later = torch.ones(length, length, dtype=torch.bool).triu(1)
    for index in range(config["num_hidden_layers"]):
        at = f"model.layers.{index}"
        x = norm(h, f"{at}.input_layernorm")
        q = rotate(split(project(f"{at}.self_attn.q_proj", x), heads))
        k = rotate(split(project(f"{at}.self_attn.k_proj", x), kv_heads))
        v = split(project(f"{at}.self_attn.v_proj", x), kv_heads)
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
        scores = (q @ k.transpose(2, 3) / math.sqrt(size)).masked_fill(hidden_later, -math.inf)
        mixed = (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2)
        h = h + project(f"{at}.self_attn.o_proj", mixed)
        x = norm(h, f"{at}.post_attention_layernorm")
        gate = torch.nn.functional.silu(project(f"{at}.mlp.gate_proj", x))
        h = h + project(f"{at}.mlp.down_proj", gate * project(f"{at}.mlp.up_proj", x))
    return norm(h, "model.norm") @ values["lm_head.weight"].t()


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of tokens 1… given those before them, in nats."""
    log_p = torch.log_softmax(logits[:, :-1], dim=-1)
    return -log_p.gather(-1, tokens[:, 1:, None]).mean()


@dataclass
class Method:
    """The settings of a run, in the words of the method."""

    total: int
    warmup: int
    low: float  # final factor of the learning rate
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip: float
    birth: int = 0
    cycle: int | None = None
    rewarm: int = 0
    relora_lr: float | None = None
    lr_embeddings: float | str | None = None  # of embeddings, head, norms; None: lr
    muon: float | None = None  # its momentum, where matrices of blocks take its steps
    rank: int = 1
    blocks: int | None = None  # in place of a rank
    scale: float = 1.0
    share: float = 0.9  # of the moments of A and B that a reset zeroes, by magnitude
    adam_step: bool = False
    merged_decay: bool = False  # weight decay acts on W + s·B·A: so on W and B, and not on A
    trains_a: bool = True
    drawn_as: Mapping[str, str] = field(default_factory=dict)  # the layer that A is drawn for

    def key(self, target: str) -> str:
        """The name under which a layer's A is drawn."""
        return f"{self.drawn_as.get(target, target)}.lora_A"

    def learning_rate(self, t: int) -> float:
        """Of the update that follows t finished ones."""
        factor = lr_factor(
            t, self.total, self.warmup, self.cycle, self.rewarm, self.low, self.birth
        )
        return factor * (self.relora_lr if self.relora_lr and t >= self.birth else self.lr)

    def rate_of(self, name: str, t: int) -> float:
        """The same for one parameter: what is no matrix of a block does not restart."""
        if self.lr_embeddings == "adapters" or "lora_" in name:
            return self.learning_rate(t)
        smooth = lr_factor(t, self.total, self.warmup, None, 0, self.low, None)
        return smooth * (self.lr if is_of_a_block(name) else self.lr_embeddings or self.lr)


def is_of_a_block(name: str) -> bool:
    """Whether a parameter is a matrix of attention or MLP: W, A or B."""
    return re.search(r"_proj\.(weight|lora_.)$", name) is not None


def made_orthogonal(matrix: Tensor) -> Tensor:
    """Five times x ↦ ax + bx³ + cx⁵ on the singular values of a matrix of Frobenius norm 1."""
    size = matrix.norm(dim=(-2, -1), keepdim=True)
    u, s, v = torch.linalg.svd(matrix / (size + 1e-7), full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s[..., None, :] @ v


@dataclass
class Moments:
    """Adam's state of one parameter."""

    m: Tensor
    v: Tensor
    steps: int = 0


@dataclass
class State:
    """Everything that training changes, in float64: values and moments by parameter name."""

    values: dict[str, Tensor]
    moments: dict[str, Moments]

    def copy(self) -> State:
        """A deep copy, detached."""
        return State(
            {n: t.detach().clone() for n, t in self.values.items()},
            {n: Moments(a.m.clone(), a.v.clone(), a.steps) for n, a in self.moments.items()},
        )


@dataclass
class History:
    """A run of the reference. `states[k]` is after update k and the birth or merge that follows."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    unmerged: dict[int, State] = field(default_factory=dict)  # just before a merge
    gaps: list[float] = field(default_factory=list)  # see `reset_by_magnitude_`


def train(
    start: Mapping[str, Tensor],
    targets: list[str],
    batches: list[Tensor],
    method: Method,
    config: Mapping,
    draw: Callable[[tuple[int, int], int, str], Tensor],
) -> History:
    """Run the method on global batches (rows, tokens), one per update.

    Args:
        draw: (shape, merge number, name) → A.
    """
    values = {name: t.detach().double().clone() for name, t in start.items()}
    state = State(values, {n: Moments(t * 0, t * 0) for n, t in values.items()})
    history = History()
    if method.birth == 0:
        give_birth_(state, targets, method, draw)
    history.states.append(state.copy())
    for done, batch in enumerate(batches[: method.total]):
        rate = method.learning_rate(done)
        loss, norm = update_(state, batch, done, targets, method, config)
        step = done + 1
        if step == method.birth:
            give_birth_(state, targets, method, draw)
        past = step - method.birth
        if method.cycle and past > 0 and past % method.cycle == 0 and step < method.total:
            history.unmerged[step] = state.copy()
            history.gaps.append(restart_(state, targets, method, past // method.cycle, draw))
        history.losses.append(loss)
        history.norms.append(norm)
        history.rates.append(rate)
        history.states.append(state.copy())
    return history


def effective(values: Mapping[str, Tensor], target: str, scale: float) -> Tensor:
    """W + s·B·A of a layer, or W where it has no adapter."""
    weight = values[f"{target}.weight"]
    if f"{target}.lora_A" not in values:
        return weight
    if values[f"{target}.lora_A"].dim() == 1:
        delta = torch.zeros_like(weight)
        blocks = values[f"{target}.lora_B"]
        _, height, width = blocks.shape
        for row, column in enumerate(values[f"{target}.lora_A"].int().tolist()):
            place = (
                slice(row * height, (row + 1) * height),
                slice(column * width, (column + 1) * width),
            )
            delta[place] = blocks[row]
        return weight + delta
    return weight + scale * values[f"{target}.lora_B"] @ values[f"{target}.lora_A"]


def logits_of(state: State, tokens: Tensor, method: Method, config: Mapping) -> Tensor:
    """What the model says in this state."""
    values = state.values
    return llama_logits(
        tokens, values, lambda n, x: x @ effective(values, n, method.scale).t(), config
    )


def give_birth_(state: State, targets: list[str], method: Method, draw: Callable) -> None:
    """Freeze the targets' weights; B = 0 and A as drawn, with empty moments; the rest stays."""
    for target in targets:
        out_features, in_features = state.values[f"{target}.weight"].shape
        del state.moments[f"{target}.weight"]
        shape, cut = (method.rank, in_features), (out_features, method.rank)
        if k := method.blocks:
            shape, cut = (k,), (k, out_features // k, in_features // k)
        a = draw(shape, 0, method.key(target)).double()
        b = torch.zeros(cut, dtype=torch.float64)
        for name, tensor in {"lora_A": a, "lora_B": b}.items():
            state.values[f"{target}.{name}"] = tensor
            if name == "lora_B" or method.trains_a:
                state.moments[f"{target}.{name}"] = Moments(tensor * 0, tensor * 0)


def update_(
    state: State, batch: Tensor, done: int, targets: list[str], method: Method, config: Mapping
) -> tuple[float, float]:
    """One update by AdamW; returns the loss before it and the gradient's norm before clipping."""
    names = list(state.moments)
    for name in names:
        state.values[name] = state.values[name].detach().requires_grad_(True)
    loss = next_token_loss(logits_of(state, batch, method, config), batch)
    gradients = torch.autograd.grad(loss, [state.values[name] for name in names])
    norm = math.sqrt(sum(float((g * g).sum()) for g in gradients))
    shrink = min(1.0, method.clip / (norm + 1e-6))
    beta1, beta2 = method.betas
    if method.merged_decay:
        for target in targets:
            if f"{target}.lora_A" in state.values:
                shrunk = 1 - method.learning_rate(done) * method.weight_decay
                state.values[f"{target}.weight"] *= shrunk
    for name, gradient in zip(names, gradients, strict=True):
        g, value, adam = gradient * shrink, state.values[name].detach(), state.moments[name]
        spared = value.ndim == 1 or (method.merged_decay and name.endswith(".lora_A"))
        decay = 0.0 if spared else method.weight_decay
        adam.steps += 1
        rate = method.rate_of(name, done)
        if method.muon is not None and is_of_a_block(name):
            adam.m = method.muon * adam.m + g
            step = made_orthogonal(g + method.muon * adam.m) * 0.2 * math.sqrt(max(g.shape[-2:]))
            state.values[name] = value - rate * (decay * value + step)
            continue
        adam.m = beta1 * adam.m + (1 - beta1) * g
        adam.v = beta2 * adam.v + (1 - beta2) * g * g
        m_hat = adam.m / (1 - beta1**adam.steps)
        v_hat = adam.v / (1 - beta2**adam.steps)
        state.values[name] = value - rate * (decay * value + m_hat / (v_hat.sqrt() + method.eps))
    return loss.item(), norm


def restart_(
    state: State, targets: list[str], method: Method, number: int, draw: Callable
) -> float:
    """Merge, reinit, reset; returns the smallest gap at the edge of a mask."""
    gaps = []
    for target in targets:
        a, b = f"{target}.lora_A", f"{target}.lora_B"
        state.values[f"{target}.weight"] = effective(state.values, target, method.scale)
        state.values[a] = draw(tuple(state.values[a].shape), number, method.key(target)).double()
        state.values[b] = torch.zeros_like(state.values[b])
        for name in (a, b) if method.trains_a else (b,):
            gaps.append(reset_by_magnitude_(state.moments[name], method.share))
            if method.adam_step:
                state.moments[name].steps = 0
    return min(gaps)


def reset_by_magnitude_(adam: Moments, share: float) -> float:
    """Zero both moments where |m| is smallest.

    Returns:
        The relative distance between the largest |m| that goes and the smallest that stays. If it
        is below the run's rounding errors, the run may rightly choose another mask.
    """
    count = round(share * adam.m.numel())
    order = adam.m.abs().flatten().argsort(stable=True)
    sizes = adam.m.abs().flatten()[order]
    for moment in (adam.m, adam.v):
        moment.view(-1)[order[:count]] = 0.0
    if not 0 < count < len(sizes):
        return math.inf
    return float((sizes[count] - sizes[count - 1]) / sizes[count])
