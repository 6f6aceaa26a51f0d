"""What code of others does: whether a layer is a plain linear one, and what a module reads of its
layers."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel


def computes_linear(layer: Any, stored: Callable[[Tensor, torch.Size], Tensor]) -> bool:
    """Whether a layer's own forward pass, with small weights in place of its own, is x Wᵀ + b.

    Args:
        stored: a matrix (out, in) as it lies in a weight of such a layer.
    """
    # Real numbers also while a model without any is counted; fixed ones, since the generator
    # belongs to the initial weights.
    with _disable_current_modes(), torch.device("cpu"), torch.no_grad():
        x, weight, bias = (torch.linspace(-1, 2, n) for n in (12, 15, 5))
        x, weight = x.view(2, 2, 3).sin(), weight.view(5, 3).cos()
        expected = F.linear(x, weight, bias if layer.bias is not None else None)
        held = {"weight": stored(weight, torch.Size((5, 3)))}
        if layer.bias is not None:
            held["bias"] = bias
        try:
            found = torch.func.functional_call(layer, held, (x,))
        except Exception:  # whatever it may want in addition, it is no plain linear layer
            return False
        alike = isinstance(found, Tensor) and found.shape == expected.shape
        return alike and torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


@functools.cache
def read_directly(owner: Any) -> frozenset[str]:
    """Names of the layers whose weight a module's own code computes with.

    There an adapter would be passed by: `F.linear(x, self.out_proj.weight)` in
    nn.MultiheadAttention, `self.dt_proj.weight @ x` in Mamba.
    """
    found: set[str] = set()
    for kind in owner.__mro__:
        if kind in (nn.Module, PreTrainedModel) or not issubclass(kind, nn.Module):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
        except (OSError, TypeError, SyntaxError):  # made at run time
            continue
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef) and function.name not in _SETTING_UP:
                found |= _weights_computed_with(function)
    return frozenset(found)


_SETTING_UP = ("__init__", "_init_weights", "init_weights", "reset_parameters", "extra_repr")


def _weights_computed_with(function: ast.FunctionDef) -> set[str]:
    """x of every `self.x.weight` that is more than looked at for its dtype, device or shape."""
    parents = {child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
    found = set()
    for node in ast.walk(function):
        if not isinstance(node, ast.Attribute) or node.attr != "weight":
            continue
        layer, parent = node.value, parents.get(node)
        if not isinstance(layer, ast.Attribute) or not isinstance(layer.value, ast.Name):
            continue
        asked = isinstance(parent, ast.Attribute) and parent.attr in ("dtype", "device", "shape")
        tested = isinstance(parent, ast.Call) and ast.unparse(parent.func) in (
            "isinstance",
            "hasattr",
        )
        if layer.value.id == "self" and not asked and not tested:
            found.add(layer.attr)
    return found
