"""A step without its memory: what it multiplies, and what it would keep.

Both come from the real modules, built and run on tensors that have shapes and no storage, so any
architecture that trains here is counted here, in seconds, at any size. What cannot be run so, since
its steps depend on numbers, is named and not guessed.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_flop_count
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.moe import ExpertsInterface, batched_mm_experts_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer

from relora.config import Config
from relora.engine.codec import store_base_
from relora.engine.precision import Name, dtype_of, precision_of
from relora.errors import ConfigError, UserError
from relora.lean import make_lean
from relora.lora.config import LoRAConfig
from relora.lora.inject import add_adapters, quantise_base
from relora.lora.layers import adapted_layers, constant_weights, parameter_roles
from relora.lora.names import names_of
from relora.model import ModelConfig, build_meta_model, load_model_config
from relora.plan.shape import linear_modules, model_key
from relora.structure import one_line

# Layers that go through a sequence step by step, by the ends of their classes' names.
RECURRENT = re.compile(
    r"(Mamba2?|Ssm|SSM|RgLru|xLSTM|mLSTM|GatedDeltaNet|KimiDelta|Lightning)\w*"
    r"(Mixer|Attention|Layer|Net|Cell)$|RgLru$|RwkvSelfAttention$|MambaMixer$|DeltaNet$"
)

# What running without numbers raises where a model's steps depend on them.
DEPENDS_ON_NUMBERS = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedOperatorException,
    fake_tensor.UnsupportedFakeTensorException,
    GuardOnDataDependentSymNode,
    NotImplementedError,
)


class Kept(NamedTuple):
    """What one micro-batch takes: bytes kept for its backward pass, logits apart, and products."""

    activations: float
    weight_copies: float  # in half precision, which autocast makes of fp32 weights
    logits: int  # number of them that there are at once
    chunked: bool  # the loss comes in chunks, and with it the gradients of logits
    forward: float  # FLOPs of all products of matrices, for one token
    backward: float
    uses: tuple[float, ...]  # rows that go through each of `Shape.matrices`, for one token
    uncounted: tuple[str, ...]  # what the figures leave out, in words


def dry_run(config: Config, adapters: bool) -> Kept:
    """What one micro-batch keeps and multiplies, with or without adapters."""
    model, content, lora = model_key(config)
    batch, section = config.batch, config.deepspeed
    step = Step(
        (batch.micro_batch_size, config.data.sequence_length),
        config.micro_batches,
        section.zero_stage == 3,
        section.precision,
    )
    return _dry_run(model, content, lora if adapters else "", step)


class Step(NamedTuple):
    """What of a config a dry run depends on, beside the model."""

    batch: tuple[int, int]  # sequences, tokens of each
    micro_batches: int  # on one rank
    partitioned: bool  # weights are whole only where they are used
    precision: Name


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks that transformers' gradient checkpointing runs again in the backward pass."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


@cache
def _dry_run(model_config: ModelConfig, content: str, lora: str, step: Step) -> Kept:
    where = f"model: {model_config.config or model_config.pretrained}"
    problem: Exception | None = None
    # Some models look at their masks, which the first way does without.
    for masks in (False, True):
        try:
            return _run(model_config, lora, step, masks)
        except DEPENDS_ON_NUMBERS as error:
            return _guess(model_config, lora, step.batch, one_line(error))
        except UserError:
            raise
        except Exception as error:
            problem = problem or error
    assert problem is not None
    shape = f"a batch of {step.batch[0]} sequences of {step.batch[1]} tokens"
    raise ConfigError(f"{where}: cannot be run on {shape}: {one_line(problem)}") from problem


def _run(model_config: ModelConfig, lora: str, step: Step, masks: bool) -> Kept:
    autocast = precision_of(step.precision).autocast
    with FakeTensorMode(), contextlib.ExitStack() as stack:
        model = _fake_model(model_config, lora, step, masks)
        tally = _Tally(model, step.batch)
        if not step.partitioned:
            stack.enter_context(constant_weights(model))
        if model_config.gradient_checkpointing:
            tally.watch_blocks(model)
        tokens = torch.zeros(step.batch, dtype=torch.long)
        half = dtype_of(autocast) if autocast else None
        context = torch.autocast("cpu", half, enabled=half is not None)
        saved = torch.autograd.graph.saved_tensors_hooks(tally.pack, lambda tensor: tensor)
        with saved, context:
            model(input_ids=tokens, labels=tokens)
        tally.done = True
        if model_config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        passes = [FlopCounterMode(display=False, custom_mapping=flop_formulas()) for _ in range(2)]
        with context, passes[0]:
            loss = model(input_ids=tokens, labels=tokens).loss
        with passes[1]:
            loss.backward()
        made = [
            made for _, layer in adapted_layers(model) for made in tree_leaves(layer.made or {})
        ]
        tally.copies += sum(tensor.nbytes for tensor in made)
    counted, backward = (counter.get_total_flops() for counter in passes)
    # Formed in the first run here, and in the first micro-batch of a step.
    forward = counted + sum(
        layer.forming_flops / step.micro_batches
        for _, layer in adapted_layers(model)
        if layer.keeps_effective and not step.partitioned
    )
    return tally.kept(forward, backward, _left_out(model, model_config))


def flop_formulas() -> dict[Any, Any]:
    """FLOPs of products that torch's counter does not know, or takes for others."""

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
        return 2 * sdpa_flop_count(query, key, value)  # scores that it computes again left out

    def convolution(gradient: Any, x: Any, weight: Any, *arguments: Any, **_: Any) -> int:
        # torch takes a backward pass through a grouped convolution for one through a full one.
        return 2 * conv_flop_count(x, weight, gradient, transposed=arguments[4])

    ops = torch.ops.aten
    return {
        ops._scaled_dot_product_flash_attention_for_cpu: forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        ops.convolution_backward: convolution,
    }


def _guess(model_config: ModelConfig, lora: str, batch: tuple[int, int], why: str) -> Kept:
    """Every linear layer once a token, for a model that cannot be run without numbers."""
    model = build_meta_model(model_config)
    linear = linear_modules(model)
    matrices = sum(m.weight.numel() for m in linear)
    if lora:
        add_adapters(model, LoRAConfig.model_validate_json(lora), seed=None)
    adapted = {p for n, x in adapted_layers(model) if x.is_linear for p in names_of(n)}
    roles, frozen, factors = parameter_roles(model), 0, 0
    for name in adapted:
        param = model.get_parameter(name)
        frozen += 0 if param.requires_grad else param.numel()
        factors += param.numel() if roles[name] in ("A", "B") else 0
    return Kept(
        0.0,
        0.0,
        batch[0] * batch[1] * _vocabulary(model),
        False,
        2.0 * (matrices + factors),
        4.0 * (matrices + factors) - 2.0 * frozen,
        (1.0,) * len(linear),
        (
            "activations, attention and all products outside linear layers (each of which counts "
            f"once a token), since the model cannot be run without numbers: {why}",
        ),
    )


def _left_out(model: nn.Module, model_config: ModelConfig) -> tuple[str, ...]:
    """What a run without numbers does not count."""
    kinds = [type(module).__name__ for module in model.modules()]
    mixers = Counter(kind for kind in kinds if RECURRENT.search(kind))
    left = []
    if mixers:
        names = ", ".join(f"{n} {kind}" for kind, n in mixers.items())
        left.append(f"FLOPs of recurrences that are no products of matrices ({names})")
    if model_config.gradient_checkpointing and not blocks_of(model):
        left.append("what gradient checkpointing saves, since this model's blocks are not known")
    return tuple(left)


def _vocabulary(model: Any) -> int:
    """How many logits a token has."""
    head = model.get_output_embeddings()
    if head is not None and getattr(head, "weight", None) is not None:
        return int(head.weight.shape[0])
    return int(model.config.get_text_config(decoder=True).vocab_size)


def _fake_model(model_config: ModelConfig, lora: str, step: Step, masks: bool) -> Any:
    model = AutoModelForCausalLM.from_config(load_model_config(model_config))
    model.config.use_cache = False
    if model.config._attn_implementation == "sdpa" and not masks:
        # As in training, where transformers sees that the mask is causal and no more; it will not
        # look at tensors that hold nothing, and would make masks of all of them.
        AttentionInterface.register("causal", sdpa_attention_forward)
        AttentionMaskInterface.register("causal", lambda *_, **__: None)
        model.set_attn_implementation("causal")
    if getattr(model.config, "_experts_implementation", None) == "grouped_mm":
        ExpertsInterface.register("by_shape", _experts_by_shape)
        model.set_experts_implementation("by_shape")
    formats = precision_of(step.precision)
    residual = formats.residual(model_config.half_residual)
    make_lean(model, model_config.lean, model_config.loss_chunk, residual)
    section = LoRAConfig.model_validate_json(lora) if lora else None
    if section:
        add_adapters(model, section, None, math.prod(step.batch), step.micro_batches)
    store_base_(model, formats)
    if formats.is_deepspeeds:
        for param in model.parameters():
            param.data = param.data.to(dtype_of(formats.trained))
    if section and section.base:
        quantise_base(model, section.base)
    return model.train()


def _experts_by_shape(self: Any, states: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """Each token through its experts, whichever they are: the grouped kernel wants to know.

    Like that kernel not under autocast, in the precision of the experts' weights.
    """

    kind = next(p.dtype for p in self.parameters() if p.dim() == 3)
    with torch.autocast("cpu", enabled=False):
        return batched_mm_experts_forward(self, states.to(kind), experts, weights).to(states.dtype)


class _Tally:
    """Counts each storage that autograd saves once, parameters not at all."""

    def __init__(self, model: Any, batch: tuple[int, int]) -> None:
        self.seen: dict[int, Tensor] = {p.untyped_storage()._cdata: p for p in model.parameters()}
        self.shapes = {tuple(p.shape) for p in model.parameters()}
        self.shapes |= {shape[::-1] for shape in self.shapes}
        # Of experts, what is gathered for each token is a detail of running without numbers.
        self.experts = {tuple(p.shape[1:]): len(p) for p in model.parameters() if p.dim() == 3}
        self.experts |= {shape[::-1]: count for shape, count in self.experts.items()}
        self.tokens = batch[0] * batch[1]
        chunk = getattr(model.get_output_embeddings(), "loss_chunk", None)
        self.chunked = chunk is not None
        self.logits = min(chunk or self.tokens, self.tokens) * _vocabulary(model)
        self.rows: list[int] = []
        self.done = False  # with its forward pass; others follow
        for number, module in enumerate(linear_modules(model)):
            self.rows.append(0)
            module.register_forward_hook(lambda _, inputs, __, n=number: self._count(n, inputs))
        self.outside = self.copies = self.inputs = 0.0
        self.block: int | None = None  # inside which one we are
        self.blocks: dict[int, float] = {}

    def watch_blocks(self, model: nn.Module) -> None:
        """Count apart what each checkpointed block saves, and what goes into it."""
        for index, block in enumerate(blocks_of(model)):
            self.blocks[index] = 0.0
            block.register_forward_pre_hook(lambda _, inputs, n=index: self._enter(n, inputs))
            block.register_forward_hook(lambda *_: self._leave())

    def pack(self, tensor: Tensor) -> Tensor:
        """What autograd calls for every tensor it saves."""
        storage = tensor.untyped_storage()
        if storage._cdata in self.seen:
            return tensor
        self.seen[storage._cdata] = tensor
        size = storage.nbytes() * self._kept_of(tensor)
        if self._is_weight_copy(tensor):
            if tuple(tensor.shape) in self.shapes:
                self.copies += size
        elif tensor.numel() == self.logits:
            pass  # see `estimate`, which knows what the loss does with them
        elif self.block is None:
            self.outside += size
        else:
            self.blocks[self.block] += size
        return tensor

    def kept(self, forward: float, backward: float, uncounted: tuple[str, ...]) -> Kept:
        """The sums; of checkpointed blocks their inputs, and all of one at a time."""
        inside = self.inputs + max(self.blocks.values(), default=0.0)
        uses = tuple(rows / self.tokens for rows in self.rows)
        kept = self.outside + inside
        flops = forward / self.tokens, backward / self.tokens
        return Kept(kept, self.copies, self.logits, self.chunked, *flops, uses, uncounted)

    def _count(self, number: int, inputs: tuple[Tensor, ...]) -> None:
        if not self.done:
            self.rows[number] += inputs[0].numel() // inputs[0].shape[-1]

    def _enter(self, block: int, inputs: tuple[Any, ...]) -> None:
        if self.done:
            return
        self.block = block
        self.inputs += inputs[0].untyped_storage().nbytes()

    def _leave(self) -> None:
        self.block = None

    def _kept_of(self, tensor: Tensor) -> float:
        """Which share of a tensor is kept where numbers are there: of what adapters make of the
        weights of experts, and is gathered here for each token, that of all experts once."""
        node, gathered = tensor.grad_fn, False
        while node is not None and len(node.next_functions) == 1:
            gathered |= node.name().startswith("Index")
            node = node.next_functions[0][0]
        formed = node is not None and node.name().startswith("Baddbmm")
        return (
            self.experts.get(tuple(tensor.shape[1:]), 0) / len(tensor) if formed and gathered else 1
        )

    def _is_weight_copy(self, tensor: Tensor) -> bool:
        """Whether it is a parameter in another precision: nothing else entered into it."""
        if tuple(tensor.shape) not in self.shapes and tuple(tensor.shape[1:]) not in self.experts:
            return False
        node: torch.autograd.graph.Node | None = tensor.grad_fn
        if node is None:
            return not tensor.requires_grad
        while len(node.next_functions) == 1 and node.next_functions[0][0] is not None:
            node = node.next_functions[0][0]
        return node.name().endswith("AccumulateGrad")
