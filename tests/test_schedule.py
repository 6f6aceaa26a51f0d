"""The clock: its learning rate against an independent float64 reference, its merges by counting."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import lr_factor
from relora.restart.schedule import Clock

TOTALS, WARMUPS, CYCLES = (40, 97, 300), (0, 1, 10, 37), (7, 20, 50)
REWARMS, LOWS, BIRTHS = (0, 1, 5), (0.0, 0.1, 0.5, 1.0), (None, 0, 1, 13, 36)
GRID = list(product(TOTALS, WARMUPS, CYCLES, REWARMS, LOWS, BIRTHS))


def published_cosine_restarts(
    step: int, first_warmup: int, restart_warmup: int, restart_every: int, total: int, low: float
) -> float:
    """`cosine_restarts` of the published ReLoRA code with adjust_step = 0, restated."""
    if step < first_warmup:
        return step / max(1, first_warmup)

    def cosine(at: int) -> float:
        progress = (at - first_warmup) / max(1, total - first_warmup)
        return low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * progress))

    restart_step, restart_number = step % restart_every, step // restart_every
    if restart_step < restart_warmup and step >= restart_every:
        end_of_warmup = cosine(restart_number * restart_every + restart_warmup)
        return restart_step / max(1, restart_warmup) * end_of_warmup
    return cosine(step)


@st.composite
def clocks(draw: st.DrawFn) -> Clock:
    """Clocks that a config may describe."""
    total = draw(st.integers(2, 400))
    birth = draw(st.one_of(st.just(0), st.integers(0, total - 1)))
    cycle = draw(st.integers(1, 120))
    first = birth or cycle
    return Clock(
        total=total,
        warmup=draw(st.integers(0, min(first, total - 1))),
        base=draw(st.sampled_from(["cosine", "linear", "constant"])),
        min_ratio=draw(st.floats(0, 1)),
        birth=birth,
        cycle=cycle,
        rewarm=draw(st.integers(0, cycle - 1)),
    )


def test_lr_factor_equals_the_reference_on_every_step_of_2160_settings() -> None:
    assert len(GRID) == 2160
    worst = 0.0
    for total, warmup, cycle, rewarm, low, birth in GRID:
        clock = Clock(total, warmup, "cosine", low, birth, cycle, rewarm)
        for step in range(total):
            expected = lr_factor(step, total, warmup, cycle, rewarm, low, birth)
            worst = max(worst, abs(clock.lr_factor(step) - expected))
    assert worst < 1e-14, worst


def test_lr_factor_without_restarts_equals_the_reference() -> None:
    for total, warmup, _, rewarm, low, birth in GRID[::7]:
        clock = Clock(total, warmup, "cosine", low, birth, None, rewarm)
        ours = [clock.lr_factor(step) for step in range(total)]
        theirs = [lr_factor(t, total, warmup, None, rewarm, low, birth) for t in range(total)]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("low", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("warmup", [0, 5, 10])
@pytest.mark.parametrize(("cycle", "rewarm"), [(10, 0), (10, 3), (25, 10), (60, 59)])
def test_from_scratch_it_is_the_published_cosine_restarts(
    low: float, warmup: int, cycle: int, rewarm: int
) -> None:
    for total in (61, 120, 201):
        clock = Clock(total, warmup, "cosine", low, 0, cycle, rewarm)
        for step in range(total):
            theirs = published_cosine_restarts(step, warmup, rewarm, cycle, total, low)
            assert clock.lr_factor(step) == pytest.approx(theirs, rel=0, abs=1e-15), (step, total)


@given(clocks())
@settings(max_examples=300, deadline=None)
def test_a_merge_follows_update_k_iff_k_is_a_boundary_after_birth_and_before_the_end(
    clock: Clock,
) -> None:
    assert clock.birth is not None
    assert clock.cycle is not None
    boundaries = {clock.birth + n * clock.cycle for n in range(1, clock.total + 1)}
    expected = [k for k in range(clock.total + 2) if k in boundaries and k < clock.total]
    assert [k for k in range(clock.total + 2) if clock.is_merge(k)] == expected
    assert list(clock.merge_steps()) == expected
    for step in range(clock.total + 2):
        assert clock.merges_before(step) == sum(k <= step for k in expected)


@given(clocks())
@settings(max_examples=300, deadline=None)
def test_every_merge_and_a_birth_restart_the_learning_rate(clock: Clock) -> None:
    restarts = [*clock.merge_steps(), *([clock.birth] if clock.birth else [])]
    for step in restarts:
        if clock.rewarm:
            assert clock.lr_factor(step) == 0.0
        climb = [clock.lr_factor(step + i) for i in range(clock.rewarm)]
        top = clock.base_factor(step + clock.rewarm)
        line = [i / clock.rewarm * top for i in range(clock.rewarm)]
        assert climb == pytest.approx(line, rel=1e-12, abs=1e-15)
    inside = {step + i for step in restarts for i in range(clock.rewarm)}
    for step in range(clock.warmup, clock.total):
        if step not in inside:
            assert clock.lr_factor(step) == clock.base_factor(step)


@given(clocks())
@settings(max_examples=300, deadline=None)
def test_the_learning_rate_stays_between_zero_and_its_peak(clock: Clock) -> None:
    factors = [clock.lr_factor(step) for step in range(clock.total)]
    assert all(0 <= factor <= 1 for factor in factors)


@given(clocks(), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_the_clock_has_no_state(clock: Clock, random: object) -> None:
    steps = list(range(clock.total))
    in_order = [(clock.lr_factor(k), clock.is_merge(k), clock.is_birth(k)) for k in steps]
    random.shuffle(steps)  # type: ignore[attr-defined]
    for k in steps:
        fresh = Clock(*clock)
        assert (fresh.lr_factor(k), fresh.is_merge(k), fresh.is_birth(k)) == in_order[k]


def test_linear_and_constant_bases() -> None:
    linear = Clock(110, 10, "linear", 0.2, 0, 30, 4)
    constant = linear._replace(base="constant")
    assert [linear.lr_factor(t) for t in (5, 10, 59, 60, 109)] == pytest.approx(
        [0.5, 1.0, 0.2 + 0.8 * 0.51, 0.0, 0.2 + 0.8 * 0.01]
    )
    assert [constant.lr_factor(t) for t in (5, 10, 29, 60, 109)] == [0.5, 1.0, 1.0, 0.0, 1.0]
    assert linear.lr_factor(32) == pytest.approx(0.5 * (0.2 + 0.8 * 0.76))  # half way up to t = 34


def test_adapters_exist_from_birth_on_and_birth_is_an_event_only_after_a_warm_start() -> None:
    warm, scratch, full = Clock(10, birth=4, cycle=3), Clock(10, cycle=3), Clock(10, birth=None)
    assert [warm.has_adapters(k) for k in (0, 3, 4, 10)] == [False, False, True, True]
    assert [k for k in range(11) if warm.is_birth(k)] == [4]
    assert scratch.has_adapters(0)
    assert not any(scratch.is_birth(k) for k in range(11))
    assert not any(full.has_adapters(k) or full.is_merge(k) for k in range(11))


@given(clocks(), st.data())
@settings(max_examples=500, deadline=None)
def test_the_turns_hold_the_highest_and_the_lowest_rate_of_any_stretch(
    clock: Clock, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, clock.total - 1))
    stop = data.draw(st.integers(start + 1, clock.total))
    every = [clock.lr_factor(step) for step in range(start, stop)]
    turns = [clock.lr_factor(step) for step in clock.turns(start, stop)]
    assert len(turns) < 30
    assert max(turns) == pytest.approx(max(every), rel=1e-12)
    assert min(turns) == pytest.approx(min(every), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("total", [10**12, 2**63 - 1])
def test_merges_of_a_run_of_any_length_are_counted_and_not_listed(total: int) -> None:
    clock = Clock(total=total, birth=7, cycle=3, rewarm=1)
    merges = clock.merge_steps()
    assert len(merges) == clock.merges_before(total) == (total - 1 - 7) // 3
    assert merges[:2] == range(10, 16, 3)
    assert clock.is_merge(merges[-1])
    assert total - 3 <= merges[-1] < total
    assert len(clock.turns(0, total)) < 30
