"""Blocks of a model that are compiled, each by itself; all else is as without."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from relora.errors import ConfigError
from relora.lora.layers import adapted_layers
from relora.plan.dryrun import blocks_of


def find_blocks(model: nn.Module) -> list[Any]:
    """The blocks of a model.

    Raises:
        ConfigError: they are not known.
    """
    blocks: list[Any] = blocks_of(model)
    if not blocks:
        raise ConfigError(
            f"train.compile: the blocks of {type(model).__name__} are not known, since none is a "
            "GradientCheckpointingLayer of transformers; take null"
        )
    return blocks


def compile_blocks(model: nn.Module, dtype: torch.dtype, backend: Any = "inductor") -> None:
    """Compile the training forward and backward pass of every block, in place, as it first runs.

    What is run without gradients, as evaluations and a merge's probe, is run as it is: other
    lengths of sequences would be compiled for anew.

    Args:
        dtype: in which the blocks multiply.
        backend: as for `torch.compile`.
    """
    for block in find_blocks(model):
        block.forward = _training_only(block, block.forward, backend)
    for _, layer in adapted_layers(model):
        layer.compiled = dtype


def _training_only(block: nn.Module, plain: Any, backend: Any) -> Any:
    compiled = torch.compile(plain, dynamic=False, backend=backend)

    def forward(*args: Any, **kwargs: Any) -> Any:
        run = compiled if block.training and torch.is_grad_enabled() else plain
        return run(*args, **kwargs)

    return forward
