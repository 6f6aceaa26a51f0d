"""What the host reads of device values, counted where all values lie in the host's memory."""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# Operators whose result, or its shape, the host has to know.
READING = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.item.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten._unique2.default,
}
# What reads without an operator if the tensor lies on the host already.
METHODS = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}


class HostReads:
    """Within it each read of a tensor that would lie on the device is noted, with its place.

    A tensor is the host's own if it was made of Python's numbers with no device named, or of such
    tensors alone; all others would be the device's.
    """

    def __init__(self) -> None:
        self.places: list[str] = []
        self._own: dict[int, Tensor] = {}  # kept, so that no other gets their place
        self._modes = (_Functions(self), _Operators(self))

    def __enter__(self) -> HostReads:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def owns(self, tensor: Tensor) -> bool:
        return id(tensor) in self._own

    def note(self, tensor: Tensor) -> None:
        if not self.owns(tensor):
            frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename]
            names = (f"{f.filename.rpartition('/')[2]}:{f.name}:{f.lineno}" for f in frames[-5:-2])
            self.places.append(" > ".join(names))

    def give_up(self, tensors: Any) -> None:
        for tensor in tree_leaves(tensors):
            self._own.pop(id(tensor), None)

    def take(self, tensors: Any) -> None:
        self._own |= {id(x): x for x in tree_leaves(tensors) if isinstance(x, Tensor)}


class _Functions(TorchFunctionMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in METHODS:
            self.reads.note(args[0])
        result = function(*args, **(kwargs or {}))
        if function is torch.tensor and "device" not in (kwargs or {}):
            self.reads.take(result)
        return result


class _Operators(TorchDispatchMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if operator in READING:
            self.reads.note(given[0])
        result = operator(*args, **kwargs)
        if given and all(self.reads.owns(x) for x in given):
            self.reads.take(result)
        elif given:
            self.reads.give_up(result)  # what was added to in place
        return result
