"""What Muon holds on a rank's device for a moment, while it moves its matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from relora.config import Config
from relora.engine.muon import work_entries, worked_together
from relora.engine.options import zero_sizes
from relora.plan.shape import shape_of

Shapes = Sequence[tuple[int, ...]]


def muon_step_bytes(config: Config, world: int, adapters: bool) -> float:
    """Bytes beside weights, masters, moments and waiting gradients at its peak; 0 with AdamW.

    That is the work on some matrices of one shape, and what they are to be moved by; with the
    matrices themselves where ranks gather what ZeRO has cut; and under ZeRO a copy of all their
    gradients. What is offloaded is worked on in host memory, unless it is gathered.
    """
    moved = shape_of(config).moved_by_muon(config, adapters)
    if not moved:
        return 0.0
    section, stage = config.deepspeed, config.deepspeed.zero_stage
    copied = sum(map(math.prod, moved)) / world if stage else 0.0
    if stage == 3:
        copied = min(copied, zero_sizes(section, 0).stepped)
    peaks = [0]
    for whole, cut in _by_holders(moved, world, stage):
        if not section.offload_optimizer:
            peaks += [size + work for size, work in _blocks(whole)]
        peaks += [2 * size + work for size, work in _blocks(cut)]
    return 4.0 * (max(peaks) + (0.0 if section.offload_optimizer else copied))


def _blocks(shapes: Shapes) -> Iterator[tuple[int, int]]:
    """(entries, those of the work) of matrices that are worked on together."""
    for block in worked_together(shapes):
        batch = (len(block), *shapes[block[0]])
        yield math.prod(batch), work_entries(batch)


def _by_holders(moved: Shapes, world: int, stage: int) -> Iterator[tuple[Shapes, Shapes]]:
    """For each rank the matrices it holds whole, and those it gathers."""
    if stage == 0 or world == 1:
        yield moved, ()
        return
    if stage == 3:
        yield (), moved
        return
    # Each rank has a stretch of all of them.
    part, end = sum(map(math.prod, moved)) / world, 0
    whole: list[list[tuple[int, ...]]] = [[] for _ in range(world)]
    cut: list[list[tuple[int, ...]]] = [[] for _ in range(world)]
    for shape in moved:
        start, end = end, end + math.prod(shape)
        first, last = int(start // part), min(world - 1, int((end - 1) // part))
        for rank in range(first, last + 1):
            (whole if first == last else cut)[rank].append(shape)
    yield from zip(whole, cut, strict=True)
