"""What the host reads of a step: all of it at once, right before the update is applied.

A read waits for the device. Here the device has the whole optimizer step and the next forward pass
to do behind the one read that there is, and whatever has to be known before an update is applied,
such as whether it is finite, is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import masking_utils

# Where the wrappers of ZeRO 1–3 come by the norm that they judge, and clip, an update by.
NORMS_OF = {1: "scaled_global_norm", 2: "scaled_global_norm", 3: "_get_norm_groups"}


class Reading:
    """The numbers of a step, on the device until they are read together.

    Attributes:
        means: over all ranks, of the scalars given.
        sums: over all ranks, of what each one notes.
    """

    def __init__(self, notes: Callable[[], Sequence[float]]) -> None:
        """`notes` gives as many numbers on every rank; asked when all else has been queued."""
        self._notes = notes
        self.means: list[float] = []
        self.sums: list[float] = []

    def take(self, scalars: Sequence[Tensor], norms: Sequence[Tensor]) -> list[Tensor]:
        """Fill in means and sums, and return the norms as tensors of the host's. Collective."""
        notes, world = list(self._notes()), dist.get_world_size()
        values = torch.stack([x.detach().double() for x in scalars]) / world
        if world > 1:
            # Filled in, not copied: a copy from the host would wait for the device too.
            flags = [values.new_full((1,), note) for note in notes]
            values = torch.cat([values, *flags])
            dist.all_reduce(values)
        ours = [x.to(values.device, torch.float64).view(1) for x in norms]
        read = torch.cat([values, *ours]).tolist()
        self.means = read[: len(scalars)]
        self.sums = read[len(scalars) : len(values)] if world > 1 else notes
        found = zip(read[len(values) :], norms, strict=True)
        return [torch.tensor(value, dtype=norm.dtype) for value, norm in found]


@contextmanager
def read_at_norm(
    wrapper: Any, stage: int, take: Callable[[Sequence[Tensor]], list[Tensor]]
) -> Iterator[None]:
    """Within it DeepSpeed's optimizer gets the norms that it looks at from `take`.

    It reads them several times over, to skip an update and to clip it. Infinities and NaN in the
    gradients show in the norm, so it need not look for them besides.
    """
    name = NORMS_OF[stage]
    norms_of = getattr(wrapper, name)

    def taken() -> Any:
        found = norms_of()
        several = isinstance(found, list)
        norms = take([torch.as_tensor(norm) for norm in (found if several else [found])])
        return norms if several else norms[0]

    setattr(wrapper, name, taken)
    wrapper.check_overflow = lambda *_, **__: None
    try:
        yield
    finally:
        delattr(wrapper, name)
        del wrapper.check_overflow


@contextmanager
def whole_rows() -> Iterator[None]:
    """Within it transformers' models take each row for one sequence, as ours are.

    They look whether a row holds several, and so read a number of each micro-batch.
    """
    look = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda *_, **__: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = look
