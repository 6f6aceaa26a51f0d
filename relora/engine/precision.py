"""What `deepspeed.precision` means: one record a value, which everybody asks.

With `bf16` and `fp16` trainable parameters are fp32, the frozen base is bf16, and torch's autocast
multiplies inside the model's forward; to DeepSpeed it is an fp32 run. That is the one arrangement
that behaves the same on ZeRO 0–3. `deepspeed_bf16` is DeepSpeed's own engine, where all weights are
bf16 with fp32 masters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    import torch

Name = Literal["fp32", "bf16", "fp16", "deepspeed_bf16"]
NAMES: tuple[Name, ...] = get_args(Name)
REMAINDER = "int16"  # beside a bf16 weight: see `codec`
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, REMAINDER: 2}


class Precision(NamedTuple):
    """Number formats, by torch's names."""

    base: str  # of weights that adapters freeze
    trained: str  # of parameters that train, as the forward pass reads them
    autocast: str | None = None  # of products inside the forward pass; None = that of the weights
    scales_loss: bool = False
    # Most that a merge may change the probe's logits, of the largest. In half precision the merge
    # is exact in weight + remainder, but the forward pass reads the weight rounded anew: that moved
    # logits by 0.7 % at width 64, and by 2.6 % at width 18, the narrowest model seen.
    tolerance: float = 5e-2

    @property
    def base_bytes(self) -> int:
        """Of an entry of a frozen weight."""
        return BYTES[self.base]

    @property
    def trained_bytes(self) -> int:
        """Of an entry that trains; its gradient has as many."""
        return BYTES[self.trained]

    @property
    def product_bytes(self) -> int:
        """Of an entry of what a layer puts out."""
        return BYTES[self.autocast or self.trained]

    @property
    def remainder_bytes(self) -> int:
        """Of what completes an entry of a frozen weight to fp32; 0 where that is fp32 already."""
        return BYTES[REMAINDER] if self.base_bytes < 4 else 0

    def residual(self, half: bool) -> torch.dtype | None:
        """Of what blocks add to, if that is to be in half precision."""
        return dtype_of(self.autocast) if half and self.autocast else None

    @property
    def is_deepspeeds(self) -> bool:
        """Whether DeepSpeed's own engine casts, and keeps fp32 masters."""
        return self.trained_bytes < 4


_PRECISIONS: dict[Name, Precision] = {
    "fp32": Precision("float32", "float32", tolerance=1e-5),
    "bf16": Precision("bfloat16", "float32", "bfloat16"),
    "fp16": Precision("bfloat16", "float32", "float16", scales_loss=True),
    "deepspeed_bf16": Precision("bfloat16", "bfloat16"),
}


def precision_of(name: Name) -> Precision:
    """The record of a value of `deepspeed.precision`."""
    return _PRECISIONS[name]


def dtype_of(name: str) -> torch.dtype:
    """torch's own object for one of its names."""
    import torch  # configs are checked without

    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


@dataclass
class LossScale:
    """The dynamic loss scale of fp16: halved when gradients overflow, doubled after long calm.

    Powers of two, so that scaling itself rounds nothing (arXiv 1710.03740, section 3.2).
    """

    value: float = 2.0**16
    calm: int = 0  # updates applied since it last changed

    DOUBLE_AFTER = 1000

    def update(self, applied: bool) -> None:
        """Follow one update; `applied` is False if its gradients were not finite."""
        self.calm = self.calm + 1 if applied else 0
        if not applied:
            self.value = max(1.0, self.value / 2)
        elif self.calm == self.DOUBLE_AFTER:
            self.value, self.calm = min(2.0**24, self.value * 2), 0
