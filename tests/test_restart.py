"""A restart's parts: exact bf16 merges, draws of A, masks, and the invariants that watch them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merge_cost import Meter
from ranks import Outcomes, Scenario, Unasked, run_ranks
from relora.engine.codec import join_bf16, split_fp32
from relora.errors import NumericsError
from relora.lora.draws import draw_a
from relora.restart.config import ResetConfig
from relora.restart.invariants import check_copies, check_function
from relora.restart.moments import beyond, find_edges, kept, random_keep
from relora.restart.restart import merge_and_restart
from test_method_reference import make_run_dir, shards
from test_method_reference import settings as config_of

# --- bf16 and a remainder ------------------------------------------------------------------------


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns of fp32 values."""
    return tensor.view(torch.int32)


def ulp_bf16(values: np.ndarray) -> np.ndarray:
    """Distance of neighbouring bf16 numbers around fp32 values, subnormal ones included."""
    exponent = np.maximum(np.frexp(np.abs(values.astype(np.float64)))[1] - 1, -126)
    return np.ldexp(1.0, exponent - 7)


def check_split(values: Tensor) -> None:
    high, low = split_fp32(values)
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(bits(join_bf16(high, low)), bits(values))
    rounded = high.double().numpy()
    finite = np.isfinite(rounded)  # the last half ulp below infinity rounds to it
    error = np.abs(rounded - values.double().numpy())[finite]
    assert (error <= ulp_bf16(values.numpy()[finite]) / 2).all()
    assert (np.abs(values.numpy()[~finite]) > 3.38e38).all()


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
@settings(max_examples=300, deadline=None)
def test_bf16_and_remainder_are_the_fp32_value(values: list[float]) -> None:
    check_split(torch.tensor(values, dtype=torch.float32))


def test_bf16_and_remainder_are_the_fp32_value_for_random_and_awkward_bits() -> None:
    random = np.random.default_rng(0).integers(0, 2**32, 2_000_000, dtype=np.uint32)
    high = np.arange(2**16, dtype=np.uint32) << np.uint32(16)
    ties = np.concatenate([high + np.uint32(low) for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    values = np.concatenate([random, ties]).view(np.float32)
    check_split(torch.from_numpy(values[np.isfinite(values)]))


@pytest.mark.parametrize("merges", [20, 50])
@pytest.mark.parametrize("size", [1e-4, 1e-3])
def test_merging_into_bf16_and_remainder_is_merging_into_fp32(merges: int, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(200, 100, generator=generator).bfloat16()
    accumulator, rounded, truth = start.float(), start.clone(), start.double()
    high, low = split_fp32(start.float())
    assert not low.any()
    for _ in range(merges):
        delta = torch.randn(200, 100, generator=generator) * size
        accumulator += delta
        truth += delta.double()
        high, low = split_fp32(join_bf16(high, low) + delta)
        rounded += delta.bfloat16()
    assert torch.equal(bits(join_bf16(high, low)), bits(accumulator))
    wanted = truth - start.double()
    kept = ((rounded.double() - start.double()) * wanted).sum() / (wanted * wanted).sum()
    error = (accumulator.double() - truth).norm() / wanted.norm()
    lost = (rounded.double() - truth).norm() / wanted.norm()
    print(f"{merges} merges of {size}: fp32's error {error:.1e}; bf16 keeps {kept:.0%}, {lost:.2f}")
    assert error < 1e-3
    assert kept < 0.1 if size == 1e-4 else lost > 0.5


# --- A -------------------------------------------------------------------------------------------


def test_a_depends_on_seed_merge_and_name_alone() -> None:
    shape = torch.Size((8, 40))
    first = draw_a(shape, 1, 2, "layer.lora_A")
    torch.manual_seed(99)
    torch.rand(5)
    assert torch.equal(draw_a(shape, 1, 2, "layer.lora_A"), first)
    state = torch.get_rng_state()
    others = [(2, 2, "layer.lora_A"), (1, 3, "layer.lora_A"), (1, 2, "other.lora_A"),
              (12, 2, "layer.lora_A"), (1, 22, "layer.lora_A")]  # fmt: skip
    draws = [first, *(draw_a(shape, *key) for key in others)]
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    for i, one in enumerate(draws):
        for other in draws[:i]:
            assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 0.2


def test_a_is_kaiming_uniform_root_five() -> None:
    a = draw_a(torch.Size((64, 400)), 0, 0, "x")
    bound = math.sqrt(6 / ((1 + 5) * 400))  # gain √(2/(1+5)), times √(3/fan_in)
    assert a.shape == (64, 400)
    assert a.dtype == torch.float32
    assert 0.999 * bound < a.abs().max() <= bound
    assert abs(a.mean()) < 3 * bound / math.sqrt(3 * a.numel())
    assert a.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    theirs = torch.nn.Linear(400, 64).weight.detach()  # initialised by the same rule
    assert theirs.abs().max() == pytest.approx(bound, rel=0.01)


# --- masks ---------------------------------------------------------------------------------------


def masks(moments: list[Tensor], key: tuple[int, int, str] = (0, 1, "x"), **config: Any) -> Any:
    """The masks of both moments of one tensor that one rank holds, with the config's words."""
    settings, numel = ResetConfig(**config), moments[0].numel()
    if settings.mode == "random":
        masks = random_keep(settings, numel, *key)
    else:
        used = moments if settings.masks == "independent" else moments[:1]
        masks = keep_largest([m.flatten() for m in used], [kept(settings, numel)] * len(used))
    return [masks[0], masks[-1]]


def keep_largest(parts: list[Tensor], counts: list[int], *sums: Any) -> list[Tensor]:
    """Masks over this rank's parts."""
    edges = find_edges(parts, counts, *sums)
    return [beyond(part, edge) for part, edge in zip(parts, edges, strict=True)]


@given(
    st.integers(1, 400),
    st.floats(0.001, 1),
    st.sampled_from(["random", "magnitude"]),
    st.sampled_from(["shared", "independent"]),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_exactly_the_rounded_share_goes(
    n: int, share: float, mode: str, kind: str, ties: bool
) -> None:
    generator = torch.Generator().manual_seed(n)
    moments = [torch.randn(n, generator=generator) for _ in range(2)]
    if ties:
        moments = [moment.round() for moment in moments]
    for keep in masks(moments, mode=mode, ratio=share, masks=kind):
        assert keep.shape == (n,)
        assert int((~keep).sum()) == round(share * n)


def test_magnitude_zeroes_the_smallest_first_moments() -> None:
    m, v = torch.randn(30, 20), torch.rand(30, 20)
    keep, again = masks([m, v], mode="magnitude", ratio=0.7)
    assert m.flatten().abs()[keep].min() >= m.flatten().abs()[~keep].max()
    assert torch.equal(keep, again), "one mask for both"
    first, second = masks([m, v], mode="magnitude", ratio=0.7, masks="independent")
    assert torch.equal(first, keep)
    assert v.flatten()[second].min() >= v.flatten()[~second].max()
    assert not torch.equal(first, second)


@given(
    st.integers(1, 300), st.integers(1, 5), st.integers(0, 2**31), st.sampled_from([1.0, 3.0, 1e30])
)
@settings(max_examples=200, deadline=None)
def test_ranks_choose_by_counts_what_a_sort_of_the_whole_tensor_chooses(
    n: int, world: int, seed: int, coarse: float
) -> None:
    """Each rank sees its own part alone; `coarse` makes ties, up to all entries alike."""
    generator = torch.Generator().manual_seed(seed)
    wholes = [torch.randn(m, generator=generator) for m in (n, 2 * n + 1)]
    wholes = [(w * 4 / coarse).round() * coarse if coarse > 1 else w for w in wholes]
    counts = [int(torch.randint(0, w.numel() + 1, (), generator=generator)) for w in wholes]
    cuts = [
        sorted(torch.randint(0, w.numel() + 1, (world - 1,), generator=generator).tolist())
        for w in wholes
    ]
    parts = [
        [
            w[a:b]
            for w, c in zip(wholes, cuts, strict=True)
            for a, b in [([0, *c, None][r], [*c, None][r])]
        ]
        for r in range(world)
    ]
    found = run_as_ranks(parts, counts)
    for index, (whole, count) in enumerate(zip(wholes, counts, strict=True)):
        expected = torch.zeros(whole.numel(), dtype=torch.bool)
        expected[whole.abs().argsort(descending=True, stable=True)[:count]] = True
        assert torch.equal(torch.cat([masks[index] for masks in found]), expected)


def run_as_ranks(parts: list[list[Tensor]], counts: list[int]) -> list[list[Tensor]]:
    """keep_largest on ranks played by threads, whose sums wait for each other."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    world = len(parts)
    barrier, box = Barrier(world), [torch.empty(0)] * world

    def exchange(rank: int, values: Tensor) -> Tensor:
        box[rank] = values
        barrier.wait(120)
        rows = torch.stack(box)
        barrier.wait(120)
        return rows

    def one(rank: int) -> list[Tensor]:
        return keep_largest(
            parts[rank],
            counts,
            lambda values: exchange(rank, values).sum(0),
            lambda values: exchange(rank, values)[:rank].sum(0),
        )

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(one, range(world)))


def test_a_tensor_beyond_what_quantile_takes_loses_its_share_to_one_entry() -> None:
    generator = torch.Generator().manual_seed(0)
    moments = torch.randn(17_000_000, generator=generator)
    (keep,) = keep_largest([moments], [1_700_000])
    assert int(keep.sum()) == 1_700_000
    assert moments[keep].abs().min() >= moments[~keep].abs().max()


def test_random_is_keyed_by_seed_merge_and_name() -> None:
    m = [torch.zeros(1000)]
    one = masks(m, mode="random", ratio=0.5)
    assert torch.equal(one[0], one[1])
    assert torch.equal(one[0], masks(m, mode="random", ratio=0.5)[0])
    for key in [(1, 1, "x"), (0, 2, "x"), (0, 1, "y")]:
        other = masks(m, key, mode="random", ratio=0.5)[0]
        assert 350 < int((other == one[0]).sum()) < 650
    first, second = masks(m, mode="random", ratio=0.5, masks="independent")
    assert 350 < int((first == second).sum()) < 650


def test_zero_takes_all_and_none_nothing() -> None:
    assert kept(ResetConfig(mode="zero"), 10) == 0
    assert kept(ResetConfig(mode="none"), 10) == 10


def test_two_masks_make_the_next_update_explode_and_one_does_not() -> None:
    torch.manual_seed(0)
    largest = {}
    for kind in ("shared", "independent"):
        param = torch.nn.Parameter(torch.zeros(2000))
        adam = torch.optim.AdamW([param], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0)
        for _ in range(50):
            param.grad = torch.randn(2000)
            adam.step()
        state = adam.state[param]
        moments = [state["exp_avg"], state["exp_avg_sq"]]
        for moment, keep in zip(moments, masks(moments, mode="random", masks=kind), strict=True):
            moment.mul_(keep)
        before = param.detach().clone()
        param.grad = torch.zeros(2000)  # the restart step itself: only the memory moves it
        adam.step()
        largest[kind] = float((param.detach() - before).abs().max()) / 1e-3
    print(f"largest update in learning rates: {largest}")
    assert largest["shared"] < 3
    assert largest["independent"] > 1e4


# --- on engines ----------------------------------------------------------------------------------

RESETS = {
    "magnitude": {"mode": "magnitude", "ratio": 0.75},
    "random": {"mode": "random", "ratio": 0.5},
    "zero": {"mode": "zero"},
    "none": {"mode": "none"},
}


BF16 = {"deepspeed.precision": "bf16", "relora.tolerance": 0.1}
ELSEWHERE = [(0, 3), (2, 3), (3, 2)]  # stages: saved under, read under


def changes_of(stage: int, more: dict[str, Any]) -> dict[str, Any]:
    return {
        "deepspeed.zero_stage": stage,
        "batch.micro_batch_size": 1,
        "warm_start": None,
        "train.steps": 7,
        "train.stop_after": 3,
        **more,
    }


def start(
    ranks: Any, model: Path, run_dir: Path, stage: int, more: dict[str, Any] | None = None
) -> Any:
    """A run right after some updates with adapters, between merges."""
    from relora.training.loop import train_run
    from relora.training.start import start_run

    config = config_of(str(model), str(run_dir), changes_of(stage, more or {}))
    make_run_dir(config, ranks)
    run = start_run(config, shards(), ranks)  # type: ignore[arg-type]
    train_run(run, Unasked())  # type: ignore[arg-type]
    run.metrics.close()
    return run


def state_of(run: Any) -> dict[tuple[str, str], np.ndarray]:
    """Values and moments by (name, kind), whole."""
    kinds = ("value", "exp_avg", "exp_avg_sq")
    return {
        (place.name, kind): run.state.gather([place], kind)[0].numpy()
        for place in run.state
        for kind in kinds[: 1 if place.flat is None else 3]
    }


def restart_every_way(ranks: Any, model: Path, root: Path, stage: int) -> dict[str, Any]:
    """State before and after restarts with each kind of reset, and what they reported."""
    run = start(ranks, model, root / f"restart_{stage}", stage)
    found = {}
    for merge, (name, reset) in enumerate(RESETS.items(), 1):
        before = state_of(run)
        with Meter() as meter:
            report = merge_and_restart(run.state, merge, seed=5, reset=ResetConfig(**reset))
        check_copies(run.state, merge)
        found[name] = (before, state_of(run), report, merge, meter.received)
    return found


# Two rules of somebody's own: A follows directions that were measured, and moments go along.


def tamper(ranks: Any, model: Path, root: Path, stage: int) -> dict[str, str]:
    """What the invariants say when something has been tampered with, by what it was."""
    run = start(ranks, model, root / f"tamper_{stage}", stage)
    places, said = run.state, {}
    check_copies(places, 1)

    def complaint() -> str:
        with pytest.raises(NumericsError) as error:
            check_copies(places, 1)
        return str(error.value)

    name = "model.layers.1.mlp.up_proj.lora_A"
    place = places[name]
    if stage < 3 and ranks.world > 1:
        for tampered in (name, "model.layers.0.self_attn.q_proj.weight"):
            live = places[tampered].live
            kept = live.clone()
            if ranks.rank == 1:
                live[4] += 1e-7
            said[f"replica of {tampered}"] = complaint()
            live.copy_(kept)
    holders = ranks.gather(bool(place.master is not None and place.count))
    if place.master is not None and place.count and ranks.rank == holders.index(True):
        place.master.data[0] += 1e-7
    said[f"master of {name}"] = complaint()
    logits = torch.randn(1, 4, 8)
    assert check_function(logits, logits + 1e-7, 1e-5, 1) < 1e-5
    with pytest.raises(NumericsError, match="merge 7 changed the model's function"):
        check_function(logits, logits + (0.01 if ranks.rank == 0 else 0), 1e-5, 7)
    with pytest.raises(NumericsError):
        check_function(logits, logits * math.nan, 1e-5, 7)
    return said


def merged_exactly(ranks: Any, model: Path, root: Path, stage: int) -> dict[str, Any]:
    """Three merges of the same A and B in bf16, and what the ranks hold and save of it."""
    from relora.record.metrics import Metrics
    from relora.training.run import save

    run = start(ranks, model, root / f"bf16_{stage}", stage, BF16)
    generator, grown = torch.Generator().manual_seed(0), []
    for merge in (1, 2, 3):
        for view in run.state:
            if "lora_" in view.name:
                view.write_(torch.randn(view.shape, generator=generator) * 1e-2)
        grown.append(state_of(run))
        report = merge_and_restart(run.state, merge, seed=5)
        assert report.rounding_loss < 1e-3, "only fp32's own"
        check_copies(run.state, merge)
    run.saves.newest = -1  # another state than was saved of this step
    metrics = Metrics(run.config.run_dir, ranks.is_main, resumed_at=run.step)
    save(dataclasses.replace(run, metrics=metrics), background=False)
    remainders = [view.remainder for view in run.state if view.remainder is not None]
    live = {view.name: view.live.float().numpy() for view in run.state if view.flat is None}
    return {
        "grown": grown,
        "end": state_of(run),
        "live": live,
        "remainder": sum(remainder.numel() for remainder in remainders),
        "update": report.update_ratio,
    }


def read_elsewhere(ranks: Any, model: Path, root: Path, stage: int, saved: int) -> dict[str, Any]:
    """The exact weights of a checkpoint that was saved under another stage or by other ranks."""
    from relora.training.start import start_run

    run_dir = root / f"bf16_{saved}"
    config = config_of(str(model), str(run_dir), changes_of(stage, BF16))
    run = start_run(config, shards(), ranks)  # type: ignore[arg-type]
    check_copies(run.state, 0)
    return state_of(run)


@pytest.fixture(scope="module")
def two(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Everything here that needs 2 ranks."""
    root = tmp_path_factory.mktemp("two")
    wanted = [
        Scenario(f"restart {s}", restart_every_way, (tiny_llama, root, s)) for s in (0, 1, 2, 3)
    ]
    wanted += [Scenario(f"tamper {s}", tamper, (tiny_llama, root, s)) for s in (1, 2, 3)]
    wanted += [Scenario(f"bf16 {s}", merged_exactly, (tiny_llama, root, s)) for s in (0, 1, 2, 3)]
    wanted += [
        Scenario(f"{saved} → {stage}", read_elsewhere, (tiny_llama, root, stage, saved))
        for saved, stage in ELSEWHERE
    ]
    found = run_ranks(2, wanted, 300)
    alone = [Scenario("2 → alone", read_elsewhere, (tiny_llama, root, 1, 2))]
    found.results |= run_ranks(1, alone, 120).results
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("mode", RESETS)
def test_a_restart_zeroes_its_share_and_touches_no_other_moment(
    mode: str, stage: int, two: Outcomes
) -> None:
    before, after, report, merge, _ = two[f"restart {stage}"][0][mode]
    share = {"magnitude": 0.75, "random": 0.5, "zero": 1.0, "none": 0.0}[mode]
    zeroed = total = 0
    for (name, kind), old in before.items():
        new = after[name, kind]
        if "lora_" not in name:
            if kind != "value" or not name.endswith("proj.weight"):
                np.testing.assert_array_equal(new, old, name)
            continue
        if kind == "value":
            shape = torch.Size(new.shape)
            right = draw_a(shape, 5, merge, name).numpy() if "lora_A" in name else np.zeros(shape)
            np.testing.assert_array_equal(new, right, name)
            continue
        gone = (new == 0) & (old != 0)
        changed = new != old
        np.testing.assert_array_equal(gone, changed, "what is not zeroed keeps its bits")
        count = round(share * new.size)
        lost = new.size - int((new != 0).sum())
        assert lost == max(count, new.size - int((old != 0).sum())) or mode == "random", name
        total, zeroed = total + new.size, zeroed + count
        if kind == "exp_avg":
            other = after[name, "exp_avg_sq"]
            old_other = before[name, "exp_avg_sq"]
            both = (old != 0) & (old_other != 0)
            np.testing.assert_array_equal((new == 0)[both], (other == 0)[both], "one mask")
            if mode == "magnitude" and (old != 0).all():
                kept = np.abs(old)[new != 0]
                assert kept.min() >= np.abs(old)[new == 0].max()
    assert report.zeroed_share == pytest.approx(zeroed / total, abs=1e-12)
    assert report.layers == 14


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_merge_sends_a_and_b_under_zero_3_and_counts_else(stage: int, two: Outcomes) -> None:
    before, *_, received = two[f"restart {stage}"][0]["zero"]
    factors = [o.size for (name, kind), o in before.items() if "lora_" in name and kind == "value"]
    counts = 64  # bytes: two sums of squares, one number of zeroed entries
    padding = 4 * len(factors) if stage == 3 else 0
    sent = 4 * sum(factors) if stage == 3 else 0
    assert sent <= received <= sent + padding + counts


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_each_rank_merges_its_part_of_a_bf16_weight_and_holds_the_remainder_of_that_alone(
    stage: int, two: Outcomes
) -> None:
    first, second = two[f"bf16 {stage}"]
    frozen = [name for name, kind in first["end"] if kind == "value" and name in first["live"]]
    assert len(frozen) == 14
    entries = sum(first["end"][name, "value"].size for name in frozen)
    assert first["remainder"] + second["remainder"] == entries, "once over all ranks"
    assert abs(first["remainder"] - second["remainder"]) <= len(frozen)
    assert first["update"] == second["update"]
    for name in frozen:
        sums = [state[name, "value"] for state in (*first["grown"], first["end"])]
        layer = name.removesuffix("weight")
        for merge, (before, after) in enumerate(itertools.pairwise(sums)):
            a, b = (first["grown"][merge][layer + f, "value"] for f in ("lora_A", "lora_B"))
            expected = before.astype(np.float64) + 1.5 * b.astype(np.float64) @ a
            ulp = np.spacing(np.abs(expected).astype(np.float32))
            assert (np.abs(after - expected) <= 0.5 * ulp + 1e-6 * np.abs(b) @ np.abs(a)).all()
        assert np.array_equal(sums[-1], second["end"][name, "value"])
        if stage < 3:  # what the forward pass reads: the same whole weight on both ranks
            rounded = split_fp32(torch.from_numpy(sums[-1]))[0].float().flatten().numpy()
            assert np.array_equal(rounded, first["live"][name])
            assert np.array_equal(rounded, second["live"][name])


@pytest.mark.parametrize("to", [*(f"{a} → {b}" for a, b in ELSEWHERE), "2 → alone"])
def test_the_exact_weights_go_on_under_another_stage_and_on_other_ranks(
    to: str, two: Outcomes
) -> None:
    saved = two[f"bf16 {to[0]}"][0]["end"]
    for found in two[to]:
        assert found.keys() == saved.keys()
        for key, tensor in saved.items():
            np.testing.assert_array_equal(found[key], tensor, err_msg=str(key))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_tampering_is_noticed_on_every_rank_by_name(stage: int, two: Outcomes) -> None:
    results = two[f"tamper {stage}"]
    assert results[0] == results[1]
    assert len(results[0]) == (3 if stage < 3 else 1)
    for what, message in results[0].items():
        kind, _, name = what.partition(" of ")
        assert name in message
        assert ("ranks hold different values" if kind == "replica" else "fp32 copy") in message
