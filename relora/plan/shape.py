"""What a model is made of: its matrices, and its parameters by what they are."""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Any, NamedTuple

from torch import nn

from relora.config import Config
from relora.lora.choose import embeddings_and_heads, find_shared, find_targets
from relora.lora.config import LoRAConfig
from relora.lora.kinds import kind_of, linear_kind_of
from relora.lora.layers import parameter_roles
from relora.lora.names import bias_of
from relora.model import ModelConfig, build_meta_model, find_model_directory
from relora.record.layout import MODEL_JSON


class Matrix(NamedTuple):
    """The weight of a linear or an adapted layer, by what multiplies with it."""

    inputs: int
    outputs: int
    adapted: bool  # has A and B beside it once adapters are born
    shares_a: bool = False  # with another, which multiplies their input with it
    rank: int | None = None  # of A and B; None where they are blocks, or where there are none
    experts: int = 1  # so many such matrices, in one tensor

    def entries(self, lora: LoRAConfig) -> list[tuple[int, bool]]:
        """(entries, trainable) of its A and B."""
        a, b = map(math.prod, self.shapes(lora))
        return [(a, lora.rank is not None and lora.train == "both"), (b, True)]

    def shapes(self, lora: LoRAConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of its A and B."""
        own = lora if self.rank is None else lora.model_copy(update={"rank": self.rank})
        a, b = own.shapes(self.outputs, self.inputs)
        return (a, b) if self.experts == 1 else ((self.experts, *a), (self.experts, *b))

    @property
    def numel(self) -> int:
        """Entries of the weight."""
        return self.experts * self.outputs * self.inputs

    def least_flops(self, lora: LoRAConfig) -> float:
        """FLOPs a token of what A and B take beside the products with W, at least."""
        if self.rank is None:
            return 2.0 * self.entries(lora)[1][0]
        factor = (4 if lora.train == "both" else 2) * self.rank
        return float(factor * (self.outputs + self.inputs * (not self.shares_a)))

    def merge_flops(self, lora: LoRAConfig) -> float:
        """FLOPs of W += s·B·A."""
        if self.rank is None:
            return float(self.entries(lora)[1][0])
        return float((2 * self.rank + 1) * self.numel)


class Shape(NamedTuple):
    """What a model is made of."""

    matrices: tuple[Matrix, ...]  # of linear layers, the output head among them
    others: tuple[Matrix, ...]  # adapted ones of embeddings, convolutions and experts
    parameters: tuple[tuple[int, bool], ...]  # (entries, whether adapters freeze it)
    moved: tuple[tuple[int, ...] | None, ...]  # the shape of each that Muon would move

    def adapted(self) -> list[Matrix]:
        """The matrices with adapters."""
        return [matrix for matrix in self.matrices if matrix.adapted] + [*self.others]

    def sizes(self, lora: LoRAConfig | None) -> list[tuple[int, bool]]:
        """(entries, trainable) of every parameter; without a config of adapters, in full rank.

        Those of the model come first, then each layer's A and B.
        """
        if lora is None:
            return [(size, True) for size, _ in self.parameters]
        sizes = [(size, not frozen) for size, frozen in self.parameters]
        for matrix in self.adapted():
            sizes += matrix.entries(lora)
        return sizes

    def of_one_moment(self, config: Config, adapters: bool) -> int:
        """Entries of which the optimizer keeps one moment and not two."""
        return sum(map(math.prod, self.moved_by_muon(config, adapters)))

    def moved_by_muon(self, config: Config, adapters: bool) -> list[tuple[int, ...]]:
        """Shapes of what takes its steps; none where all is AdamW's."""
        if config.optimizer.matrices == "adamw":
            return []
        lora = config.lora if adapters else None
        pairs = zip(self.moved, self.parameters, strict=True)
        shapes = [shape for shape, (_, freezes) in pairs if shape and not (lora and freezes)]
        if lora:
            for matrix in self.adapted():
                trains = [trains for _, trains in matrix.entries(lora)]
                both = matrix.shapes(lora)
                shapes += itertools.compress(both, trains)
        return shapes


def shape_of(config: Config) -> Shape:
    """The shape of a config's model; `adapted` says what its `lora` section would adapt."""
    return _shape(*model_key(config))


def model_key(config: Config) -> tuple[ModelConfig, str, str]:
    """All that the shape depends on, hashable: the JSON may change under the same path."""
    model = config.model
    path = model.config
    if path is None:
        assert model.pretrained is not None
        path = find_model_directory(model.pretrained) / MODEL_JSON
    lora = config.lora.model_dump_json() if config.lora else ""
    return model, f"{path.resolve()} {path.read_text(encoding='utf8')}", lora


@cache
def _shape(model_config: ModelConfig, content: str, lora: str) -> Shape:
    model = build_meta_model(model_config)
    config = LoRAConfig.model_validate_json(lora) if lora else None
    targets = find_targets(model, config) if config else []
    adapted = {id(model.get_submodule(name)): name for name in targets}
    shared = find_shared(model, targets, config) if config else {}
    shares = {id(model.get_submodule(name)) for name, first in shared.items() if name != first}
    linear = linear_modules(model)

    def matrix_of(module: Any) -> Matrix:
        kind, name = kind_of(module), adapted.get(id(module))
        assert kind is not None
        *experts, outputs, inputs = kind.matrix(module.weight).shape
        rank = config.for_layer(name).rank if config and name else None
        shared, count = id(module) in shares, math.prod(experts)
        return Matrix(inputs, outputs, name is not None, shared, rank, count)

    chosen = [model.get_submodule(name) for name in targets]
    others = [module for module in chosen if linear_kind_of(module) is None]
    frozen = {id(module.weight) for module in chosen}
    if config and config.bias == "none":
        frozen |= {id(bias) for bias in map(bias_of, chosen) if bias is not None}
    tables = embeddings_and_heads(model)
    return Shape(
        tuple(map(matrix_of, linear)),
        tuple(map(matrix_of, others)),
        tuple((p.numel(), id(p) in frozen) for p in model.parameters()),
        tuple(
            tuple(p.shape) if p.dim() > 1 and id(p) not in tables else None
            for p in model.parameters()
        ),
    )


def linear_modules(model: nn.Module) -> list[Any]:
    """The linear layers, in the order of `Shape.matrices`."""
    linear: Any = (m for m in model.modules() if linear_kind_of(m) is not None)
    return [m for m in linear if m.weight.dim() == 2]


def count_by_group(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(trainable, frozen) numbers of parameters by what they are, shared ones counted once."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    names = ("projections", "experts", "adapters", "embeddings", "head", "norms, biases")
    groups, roles = dict.fromkeys(names, (0, 0)), parameter_roles(model)
    for name, parameter in model.named_parameters():
        if roles[name] in ("A", "B"):
            group = "adapters"
        elif id(parameter) in embeddings:
            group = "embeddings"
        elif head is not None and parameter is getattr(head, "weight", None):
            group = "head"
        elif parameter.dim() == 3 and "expert" in name:
            group = "experts"
        else:
            group = "norms, biases" if parameter.dim() == 1 else "projections"
        trainable, frozen = groups[group]
        if parameter.requires_grad:
            trainable += parameter.numel()
        else:
            frozen += parameter.numel()
        groups[group] = trainable, frozen
    return {group: counts for group, counts in groups.items() if any(counts)}
