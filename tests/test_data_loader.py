"""The order of sequences is a function of (seed, place) alone, however the batch is cut."""

import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from relora.data.loader import eval_batches, permute, sequence_indices, train_batches, widen
from relora.errors import DataError

LENGTH = 8


def numbered(sequences: int, extra: int = 3) -> np.ndarray:
    """Tokens from which every sequence can be told: sequence j is [8j, 8j + 8)."""
    return np.arange(sequences * LENGTH + extra, dtype=np.uint16)


def steps(count, tokens, *, world=1, micro_batch=2, global_batch=12, **options):
    """The first batches of all ranks, as sequence numbers: (count, micro-batches, rank, row)."""
    ranks = []
    for rank in range(world):
        batches = train_batches(
            tokens,
            sequence_length=LENGTH,
            global_batch=global_batch,
            micro_batch=micro_batch,
            rank=rank,
            world=world,
            seed=options.get("seed", 5),
            consumed=options.get("consumed", 0),
            num_workers=options.get("num_workers", 0),
        )
        ranks.append([torch.stack(step) for step in itertools.islice(batches, count)])
    found = torch.stack([torch.stack(rank) for rank in ranks], dim=2)
    assert found.dtype == torch.int64
    first = found[..., :1]
    assert torch.equal(found, first + torch.arange(LENGTH))  # rows are whole sequences
    return (first[..., 0] // LENGTH).numpy()


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**63), st.integers(0, 10**6))
def test_permute_is_a_bijection(n, seed, epoch):
    assert sorted(permute(np.arange(n), n, (seed, epoch)).tolist()) == list(range(n))


def test_permute_works_place_by_place_on_a_trillion_sequences():
    n = 10**12 + 39
    places = np.array([0, 1, 12345678901, n - 1])
    together = permute(places, n, (1, 2))
    assert [int(permute(places[i : i + 1], n, (1, 2))[0]) for i in range(4)] == together.tolist()
    assert len(set(together.tolist())) == 4
    assert ((together >= 0) & (together < n)).all()


def test_seeds_and_epochs_give_unrelated_orders():
    n = 1000
    orders = [permute(np.arange(n), n, key) for key in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]]
    for one, other in itertools.combinations([np.arange(n), *orders], 2):
        assert (one == other).sum() < 10  # 1 expected
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.15


def test_where_a_sequence_goes_is_uniform_over_seeds():
    n, seeds = 7, 7000
    counts = np.zeros((n, n))
    for seed in range(seeds):
        counts[np.arange(n), permute(np.arange(n), n, (seed, 0))] += 1
    chi_squared = ((counts - seeds / n) ** 2 / (seeds / n)).sum(axis=1)
    assert chi_squared.max() < 27  # 6 degrees of freedom: 22.5 is exceeded once in 1,000 rows


def test_the_order_is_what_it_was():
    """A change here would change every run that is resumed."""
    assert sequence_indices(0, 10, 1000, 0).tolist() == [
        *(121, 453, 786, 596, 307),
        *(254, 871, 854, 647, 645),
    ]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(0, 200), st.integers(0, 150), st.integers(0, 9))
def test_any_window_of_the_run_equals_that_part_of_the_whole(n, start, count, seed):
    whole = sequence_indices(0, 350, n, seed)
    assert sequence_indices(start, count, n, seed).tolist() == whole[start : start + count].tolist()
    for epoch in range(350 // n):
        assert sorted(whole[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_a_step_holds_the_same_rows_for_every_world_size_and_micro_batch(world, micro_batch):
    tokens = numbered(50)
    cut = steps(9, tokens, world=world, micro_batch=micro_batch, global_batch=24)
    assert cut.shape == (9, 24 // world // micro_batch, world, micro_batch)
    assert cut.ravel().tolist() == sequence_indices(0, 9 * 24, 50, 5).tolist()


def test_loader_processes_give_the_same_batches(tmp_path):
    path = tmp_path / "train.bin"
    numbered(50).tofile(path)
    tokens = np.memmap(path, dtype=np.uint16, mode="r")
    for consumed in (0, 36):
        expected = steps(6, tokens, consumed=consumed)
        assert (steps(6, tokens, consumed=consumed, num_workers=2) == expected).all()


def test_a_memory_map_reaches_a_loader_process_by_name_not_by_content(tmp_path):
    import pickle

    from relora.data.loader import _Steps

    path = tmp_path / "train.bin"
    np.zeros(10**6, np.uint16).tofile(path)
    tokens = np.memmap(path, dtype=np.uint16, mode="r")
    sent = pickle.dumps(_Steps(tokens, LENGTH, (4, 2, 0, 1), 0, 0))
    assert len(sent) < 2000
    assert torch.equal(widen(pickle.loads(sent)[3]), torch.zeros(2, 2, LENGTH, dtype=torch.int64))


def test_one_step_is_read_ahead_while_the_last_is_worked_on_and_no_more(monkeypatch):
    from relora.data.loader import _Steps

    read, real, asked = {}, _Steps.__getitem__, [threading.Event() for _ in range(9)]

    def reading(self, step):
        read[step] = threading.current_thread().name
        asked[step].set()
        return real(self, step)

    monkeypatch.setattr(_Steps, "__getitem__", reading)
    options = {"sequence_length": LENGTH, "micro_batch": 1, "rank": 0, "world": 1}
    batches = train_batches(numbered(50), global_batch=2, seed=0, **options)
    for step in range(4):
        next(batches)
        assert asked[step + 1].wait(60)  # nobody has asked for it
        assert list(read) == list(range(step + 2))
    assert threading.current_thread().name not in read.values()
    del batches
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]


def test_what_fails_in_reading_ahead_fails_where_it_is_asked_for(monkeypatch):
    from relora.data.loader import _Steps

    real = _Steps.__getitem__
    monkeypatch.setattr(_Steps, "__getitem__", lambda self, step: real(self, [0, 1][step]))
    options = {"sequence_length": LENGTH, "micro_batch": 1, "rank": 0, "world": 1}
    batches = train_batches(numbered(50), global_batch=2, seed=0, **options)
    assert len(next(batches)) == len(next(batches)) == 2
    with pytest.raises(IndexError):
        next(batches)


class Copies(TorchDispatchMode):
    """(dtype, device) of what is copied, to another of these."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.made.append((args[0].dtype, args[0].device.type, result.dtype, result.device.type))
        return result


@pytest.mark.parametrize(("dtype", "stored"), [(np.uint16, torch.int16), (np.uint32, torch.int32)])
def test_tokens_travel_as_they_are_stored_and_are_widened_on_the_device(dtype, stored):
    options = {"sequence_length": LENGTH, "micro_batch": 1, "rank": 0, "world": 1}
    tokens, meta = numbered(50).astype(dtype), torch.device("meta")
    batches = train_batches(tokens, global_batch=2, seed=0, device=meta, **options)
    with Copies() as copies:
        batch = next(batches)
    assert copies.made == [
        (stored, "cpu", stored, "meta"),
        (stored, "meta", torch.int64, "meta"),
    ]
    assert [(x.dtype, x.device.type, x.shape) for x in batch] == [
        (torch.int64, "meta", (1, LENGTH))
    ] * 2


def test_going_on_at_any_step_equals_never_having_stopped():
    tokens = numbered(17)  # smaller than two global batches: epochs end inside batches
    whole = steps(20, tokens)
    for done in (1, 2, 7, 19):
        assert (steps(20 - done, tokens, consumed=done * 12) == whole[done:]).all()


def test_an_epoch_sees_every_sequence_once_and_the_next_in_another_order():
    order = steps(10, numbered(24)).reshape(-1)
    epochs = [order[at : at + 24].tolist() for at in range(0, 120, 24)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_ids_at_the_top_of_their_type_are_not_wrapped(dtype):
    top = np.iinfo(dtype).max
    tokens = np.full(LENGTH, top, dtype=dtype)
    batch = next(
        train_batches(
            tokens, sequence_length=LENGTH, global_batch=1, micro_batch=1, rank=0, world=1, seed=0
        )
    )
    assert batch[0].tolist() == [[int(top)] * LENGTH]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(1, 4),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(1, 40)),
)
def test_evaluation_sees_each_of_the_first_sequences_exactly_once(n, micro, world, most):
    seen, lengths = [], set()
    for rank in range(world):
        batches = list(
            eval_batches(
                numbered(n),
                sequence_length=LENGTH,
                micro_batch=micro,
                rank=rank,
                world=world,
                max_sequences=most,
            )
        )
        lengths.add(len(batches))
        for batch, real in batches:
            assert batch.shape == (micro, LENGTH)
            seen += (batch[:real, 0] // LENGTH).tolist()
            assert (batch[real:, 0] == 0).all()
    count = min(n, most or n)
    assert sorted(seen) == [number * n // count for number in range(count)]
    assert len(set(seen)) == count
    assert len(lengths) == 1  # a rank with fewer forward passes would hang the others


def test_too_few_tokens_for_one_sequence_are_refused_with_the_numbers(tmp_path):
    path = tmp_path / "validation.bin"
    numbered(0, extra=5).tofile(path)
    tokens = np.memmap(path, dtype=np.uint16, mode="r")
    message = r"validation.bin: 5 tokens make no sequence of data.sequence_length 8"
    options = {"sequence_length": 8, "micro_batch": 1, "rank": 0, "world": 1}
    with pytest.raises(DataError, match=message):
        next(train_batches(tokens, global_batch=1, seed=0, **options))
    with pytest.raises(DataError, match=message):
        next(eval_batches(tokens, **options))
