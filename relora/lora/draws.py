"""Random numbers that a key decides alone, and how A starts."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def seeded_generator(seed: int, merge: int, name: str) -> torch.Generator:
    """A CPU generator keyed by (seed, merge number, parameter name).

    The key decides every draw alone, so it is the same on every rank, device, world size and
    after a resume, and no generator state needs saving.
    """
    digest = hashlib.blake2b(f"{seed}/{merge}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw_a(
    shape: torch.Size, seed: int, merge: int, name: str, fan_in: int | None = None
) -> Tensor:
    """A new A (…, r, in) in fp32 on the CPU: Kaiming uniform with a = √5, as in loralib and PEFT.

    That is A ~ U(−1/√in, 1/√in). Of blocks, whose A (k,) has the band of columns of each band of
    rows: the next ones, round and round, from places that the layers draw at birth; after k merges
    every entry of W has had its turn.

    Args:
        merge: number of the merge it follows; 0 is the birth.
        name: full parameter name, such as `model.layers.0.mlp.up_proj.lora_A`.
        fan_in: in place of `in`, see `AdaptedLayer.fan_in`.
    """
    if len(shape) == 1:
        first = torch.randint(shape[0], (), generator=seeded_generator(seed, 0, name))
        return (torch.arange(shape[0]) + first + merge).remainder(shape[0]).float()
    bound = math.sqrt(6 / ((1 + 5) * (fan_in or shape[-1])))
    return torch.empty(shape).uniform_(-bound, bound, generator=seeded_generator(seed, merge, name))
