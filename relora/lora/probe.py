"""Whether a layer of any class is a plain linear one, by what it computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


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
