"""A model without its memory: its matrices, and what a forward pass would keep for the backward.

Both come from the real modules, built and run on tensors that have shapes and no storage, so any
architecture that trains here is counted here, in seconds, at any size.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from relora.config import Config
from relora.lora.config import LoRAConfig
from relora.model import ModelConfig, build_meta_model, find_model_directory, load_model_config
from relora.subject import structure_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Matrix(NamedTuple):
    """The weight of a linear layer, by what multiplies with it."""

    inputs: int
    outputs: int
    adapted: bool  # has A and B beside it once adapters are born
    checkpointed: bool  # inside a block that gradient checkpointing runs again
    last: bool  # the last product of such a block


class Shape(NamedTuple):
    """What a model is made of."""

    matrices: tuple[Matrix, ...]  # of linear layers, the output head among them
    parameters: tuple[tuple[int, bool], ...]  # (entries, whether adapters freeze it)
    layers: int
    attention_width: int  # heads × width of a head
    vocabulary: int
    block_dropout: bool  # blocks end in dropout, which must be run again to its end

    def adapted(self) -> list[Matrix]:
        """The matrices with adapters."""
        return [matrix for matrix in self.matrices if matrix.adapted]

    def sizes(self, rank: int | None) -> list[tuple[int, bool]]:
        """(entries, trainable) of every parameter, with adapters of a rank or in full rank."""
        if rank is None:
            return [(size, True) for size, _ in self.parameters]
        sizes = [(size, not frozen) for size, frozen in self.parameters]
        for matrix in self.adapted():
            sizes += [(rank * matrix.inputs, True), (rank * matrix.outputs, True)]
        return sizes


class Kept(NamedTuple):
    """Bytes that one micro-batch's forward pass keeps for its backward pass, logits apart."""

    activations: float
    weight_copies: float  # in half precision, which autocast makes of fp32 weights
    logits: int  # number of them


def shape_of(config: Config) -> Shape:
    """The shape of a config's model; `adapted` says what its `lora` section would adapt."""
    return _shape(*_key(config))


def dry_run(config: Config, adapters: bool) -> Kept:
    """What a forward pass of one micro-batch keeps, with or without adapters."""
    model, content, lora = _key(config)
    batch = (config.batch.micro_batch_size, config.data.sequence_length)
    return _dry_run(model, content, lora if adapters else "", config.deepspeed.precision, batch)


def _key(config: Config) -> tuple[ModelConfig, str, str]:
    """All that the shape depends on, hashable: the JSON may change under the same path."""
    model = structure_of(config)
    path = model.config
    if path is None:
        assert model.pretrained is not None
        path = find_model_directory(model.pretrained) / "config.json"
    lora = config.lora.model_dump_json() if config.lora else ""
    return model, f"{path.resolve()} {path.read_text(encoding='utf8')}", lora


@cache
def _shape(model_config: ModelConfig, content: str, lora: str) -> Shape:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from relora.lora.inject import find_targets

    model = build_meta_model(model_config)
    targets = find_targets(model, LoRAConfig.model_validate_json(lora)) if lora else []
    adapted = {id(model.get_submodule(name)) for name in targets}
    blocks = blocks_of(model)
    inside = {id(m): index for index, block in enumerate(blocks) for m in block.modules()}
    linear = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D)]
    last = {inside.get(id(m)): id(m) for m in linear}
    matrices = []
    for module in linear:
        outputs, inputs = module.weight.shape[:: -1 if isinstance(module, Conv1D) else 1]
        block = inside.get(id(module))
        is_last = block is not None and last[block] == id(module)
        matrices.append(Matrix(inputs, outputs, id(module) in adapted, block is not None, is_last))
    frozen = {id(m.weight) for m in linear if id(m) in adapted}
    structure = model.config
    heads = structure.num_attention_heads
    head_width = getattr(structure, "head_dim", None) or structure.hidden_size // heads
    return Shape(
        tuple(matrices),
        tuple((p.numel(), id(p) in frozen) for p in model.parameters()),
        structure.num_hidden_layers,
        heads * head_width,
        structure.vocab_size,
        any(isinstance(m, nn.Dropout) and m.p > 0 for block in blocks for m in block.modules()),
    )


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks that transformers' gradient checkpointing runs again in the backward pass."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


@cache
def _dry_run(
    model_config: ModelConfig, content: str, lora: str, precision: str, batch: tuple[int, int]
) -> Kept:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    with FakeTensorMode():
        model = _fake_model(model_config, lora, precision)
        tally = _Tally(model, batch)
        if model_config.gradient_checkpointing:
            tally.watch_blocks(model)
        tokens = torch.zeros(batch, dtype=torch.long)
        context = torch.autocast("cpu", half, enabled=half is not None)
        with torch.autograd.graph.saved_tensors_hooks(tally.pack, lambda tensor: tensor), context:
            model(input_ids=tokens, labels=tokens)
    return tally.kept()


def _fake_model(model_config: ModelConfig, lora: str, precision: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from relora.lora.inject import adapted_layers, add_adapters

    model = AutoModelForCausalLM.from_config(load_model_config(model_config))
    model.config.use_cache = False
    if lora:
        add_adapters(model, LoRAConfig.model_validate_json(lora))
    for _, layer in adapted_layers(model):
        if precision != "fp32":
            layer.weight.data = layer.weight.data.to(torch.bfloat16)
    if precision == "deepspeed_bf16":
        for param in model.parameters():
            param.data = param.data.to(torch.bfloat16)
    return model.train()


class _Tally:
    """Counts each storage that autograd saves once, parameters not at all."""

    def __init__(self, model: nn.Module, batch: tuple[int, int]) -> None:
        self.seen: dict[int, Tensor] = {p.untyped_storage()._cdata: p for p in model.parameters()}
        self.shapes = {tuple(p.shape) for p in model.parameters()}
        self.shapes |= {shape[::-1] for shape in self.shapes}
        self.logits: int = batch[0] * batch[1] * model.config.vocab_size  # type: ignore[union-attr,operator,assignment]
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
        if self._is_weight_copy(tensor):
            self.copies += storage.nbytes()
        elif tensor.numel() == self.logits:
            pass  # see `estimate`, which knows what the loss does with them
        elif self.block is None:
            self.outside += storage.nbytes()
        else:
            self.blocks[self.block] += storage.nbytes()
        return tensor

    def kept(self) -> Kept:
        """The sums; of checkpointed blocks their inputs, and all of one at a time."""
        inside = self.inputs + max(self.blocks.values(), default=0.0)
        return Kept(self.outside + inside, self.copies, self.logits)

    def _enter(self, block: int, inputs: tuple[Any, ...]) -> None:
        self.block = block
        self.inputs += inputs[0].untyped_storage().nbytes()

    def _leave(self) -> None:
        self.block = None

    def _is_weight_copy(self, tensor: Tensor) -> bool:
        """Whether it is a parameter in another precision: nothing else entered into it."""
        if tuple(tensor.shape) not in self.shapes:
            return False
        node: torch.autograd.graph.Node | None = tensor.grad_fn
        if node is None:
            return not tensor.requires_grad
        while len(node.next_functions) == 1 and node.next_functions[0][0] is not None:
            node = node.next_functions[0][0]
        return node.name().endswith("AccumulateGrad")
