"""Token shards in, batches out; the whole state is the number of sequences consumed.

Sequence j of a split is `tokens[j*L : (j+1)*L]`. Every epoch visits the sequences in a fresh
order, given by a keyed permutation that is computed, not stored: row `i` of the run is a function
of (seed, i) alone. So batches do not depend on world size, micro-batch or loader processes, and
resuming at any place costs nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from relora.errors import DataError

_ROUNDS = 8
_MASK64 = (1 << 64) - 1


def _mix(value: Any) -> Any:
    """The finaliser of SplitMix64 (Steele et al. 2014): every input bit moves every output bit.

    For uint64 arrays, which wrap around.
    """
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _round_keys(key: tuple[int, int]) -> np.ndarray:
    """One uint64 a round from (seed, epoch)."""
    counter = np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for part in key:
        counter = _mix(counter ^ _mix(np.full(_ROUNDS, part & _MASK64, dtype=np.uint64)))
    return counter


def permute(position: np.ndarray, n: int, key: tuple[int, int]) -> np.ndarray:
    """Where a keyed permutation of 0..n-1 sends each position, in O(1) memory.

    A Feistel network permutes the smallest power of two that holds n; an image outside 0..n-1 is
    sent through again until it falls inside (cycle walking: Black and Rogaway 2002), which takes
    fewer than two turns on average. `position` and the result are int64 arrays of one shape.
    """
    assert n > 0, n
    bits = (n - 1).bit_length()
    low_bits = np.uint64((bits + 1) // 2)
    low_mask = np.uint64((1 << int(low_bits)) - 1)
    high_mask = np.uint64((1 << (bits // 2)) - 1)
    keys = _round_keys(key)

    def once(x: np.ndarray) -> np.ndarray:
        high, low = x >> low_bits, x & low_mask
        for turn in range(0, _ROUNDS, 2):
            high = high ^ (_mix(low ^ keys[turn]) & high_mask)
            low = low ^ (_mix(high ^ keys[turn + 1]) & low_mask)
        return (high << low_bits) | low

    image = np.asarray(position, dtype=np.uint64)
    assert image.size == 0 or int(image.max()) < n, (image, n)
    image = once(image)
    while (outside := image >= n).any():
        image[outside] = once(image[outside])
    return image.astype(np.int64)


def sequence_indices(start: int, count: int, n: int, seed: int) -> np.ndarray:
    """Which sequences stand at places start..start+count-1 of the run; an int64 array (count,).

    Place p lies in epoch p // n; one call may span several epochs.
    """
    places = np.arange(start, start + count, dtype=np.int64)
    epochs, within = np.divmod(places, n)
    found = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        found[here] = permute(within[here], n, (seed, int(epoch)))
    return found


def count_sequences(tokens: np.ndarray, sequence_length: int) -> int:
    """How many whole sequences a split holds; a DataError if there is none."""
    count = len(tokens) // sequence_length
    if count == 0:
        raise DataError(
            f"{getattr(tokens, 'filename', None) or 'the split'}: {len(tokens)} tokens make no "
            f"sequence of data.sequence_length {sequence_length}; use more text, a shorter "
            "sequence or, for the validation split, a larger data.validation_fraction"
        )
    return count


class _Steps(Dataset):
    """Item i: this rank's rows of optimizer step i, a tensor (micro-batches, micro, L) as stored:
    see `widen`."""

    def __init__(
        self,
        tokens: np.ndarray,
        length: int,
        rows: tuple[int, int, int, int],
        seed: int,
        start: int,
    ) -> None:
        self.tokens, self.length, self.seed, self.start = tokens, length, seed, start
        self.global_batch, self.micro, self.rank, self.world = rows
        self.count = count_sequences(tokens, length)

    def __getitem__(self, step: int) -> torch.Tensor:
        first = self.start + step * self.global_batch
        indices = sequence_indices(first, self.global_batch, self.count, self.seed)
        mine = indices.reshape(-1, self.world, self.micro)[:, self.rank]
        return _stored_rows(self.tokens, self.length, mine)

    def __getstate__(self) -> dict[str, Any]:
        """A memory map would travel to a loader process as a copy of the file: send its name."""
        state = dict(self.__dict__)
        if isinstance(self.tokens, np.memmap):
            state["tokens"] = (self.tokens.filename, self.tokens.dtype)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.tokens, tuple):
            filename, dtype = self.tokens
            self.tokens = np.memmap(Path(filename), dtype=dtype, mode="r")


def _stored_rows(tokens: np.ndarray, length: int, indices: np.ndarray) -> torch.Tensor:
    """Sequences by number: a tensor (*indices.shape, length) of the tokens' bits, as integers with
    a sign, which every device knows."""
    sequences = tokens[: len(tokens) // length * length].reshape(-1, length)
    rows = np.asarray(sequences[indices])
    return torch.from_numpy(rows.view(rows.dtype.str.replace("u", "i")))


def widen(stored: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """Tokens from their bits as they are stored: an int64 tensor, widened on the device."""
    stored = stored.to(device, non_blocking=True)
    return stored.long() & ((1 << 8 * min(stored.itemsize, 7)) - 1)


def _ahead(item: Callable[[int], torch.Tensor]) -> Iterator[torch.Tensor]:
    """item(0), item(1), …; each is made, in a thread, while what asked for the one before works."""
    with ThreadPoolExecutor(1, "batches") as pool:
        following = pool.submit(item, 0)
        for number in itertools.count(1):
            current, following = following.result(), pool.submit(item, number)
            yield current


def train_batches(
    tokens: np.ndarray,
    *,
    sequence_length: int,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world: int,
    seed: int,
    consumed: int = 0,
    num_workers: int = 0,
    device: torch.device | None = None,
) -> Iterator[list[torch.Tensor]]:
    """Endlessly, this rank's micro-batches of the next optimizer step.

    Each is an int64 tensor (micro_batch, sequence_length) on the device. Micro-batch m of rank r
    holds rows [(m*world + r)*micro_batch, +micro_batch) of the global batch, so their union over
    ranks is the same for every way to cut it. `consumed` is the number of sequences the run has
    seen. With `num_workers` processes that read ahead the batches are the same; without, the next
    step's are read while the last's are worked on. A copy to a GPU waits for nothing.
    """
    assert global_batch % (micro_batch * world) == 0, (global_batch, micro_batch, world)
    rows = (global_batch, micro_batch, rank, world)
    steps = _Steps(tokens, sequence_length, rows, seed, consumed)
    pinned = device is not None and device.type == "cuda"

    def item(step: int) -> torch.Tensor:
        stored = steps[step]
        return stored.pin_memory() if pinned else stored

    batches: Any = _ahead(item)
    if num_workers > 0:
        batches = DataLoader(
            steps,
            sampler=itertools.count(),
            batch_size=None,  # an item is a batch already
            num_workers=num_workers,
            pin_memory=pinned,
        )
    return (list(widen(batch, device).unbind()) for batch in batches)


def eval_batches(
    tokens: np.ndarray,
    *,
    sequence_length: int,
    micro_batch: int,
    rank: int,
    world: int,
    max_sequences: int | None = None,
) -> Iterator[tuple[torch.Tensor, int]]:
    """At most `max_sequences` sequences, evenly spaced over the split, each on one rank once.

    Evenly, because neighbours are parts of one document: the first few would be a biased sample.

    Yields (batch, real): an int64 tensor (micro_batch, sequence_length) whose first `real` rows
    count (0 is possible); the others repeat sequence 0. Every rank yields the same number of
    batches, because a forward pass on ZeRO 3 is a collective.
    """
    there = count_sequences(tokens, sequence_length)
    count = there if max_sequences is None else min(there, max_sequences)
    stride = world * micro_batch
    for start in range(0, count, stride):
        first = start + rank * micro_batch
        indices = np.arange(first, first + micro_batch)
        real = int((indices < count).sum())
        chosen = np.where(indices < count, indices, 0) * there // count
        yield widen(_stored_rows(tokens, sequence_length, chosen)), real
