"""A rank that dies, stops or hangs: the others end in time, with its number, in every case."""

from __future__ import annotations

import functools
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ranks import rank_context
from runs import Patience, make_config, run_state, workshop

AT = 3  # the step at which it happens
TIMEOUT_S = 6.0
ANSWER_S = 2.0


class Case(NamedTuple):
    """What becomes of which rank among how many."""

    how: str
    victim: int
    world: int

    @property
    def name(self) -> str:
        return f"{self.how.replace(' ', '_')}_{self.victim}_of_{self.world}"


class Ended(NamedTuple):
    """Exit codes of the survivors, seconds from the fault to the last of them, what they left."""

    codes: dict[int, int | None]
    seconds: float
    output: str
    state: dict[str, Any]


def rank_main(config: str, case: Case, rank: int, port: int, output: str) -> None:
    """`relora train` as one rank, which may be the victim."""
    from relora.cli import main
    from relora.commands import train
    from relora.engine import deepspeed
    from relora.record import lost
    from relora.training.guard import guarded
    from relora.training.phases import Phases, update

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(case.world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    lost.ANSWER_S = ANSWER_S
    real_build = deepspeed.build_optimizer
    steps = iter(range(1, 10**6))

    def happens() -> None:
        if rank == case.victim:
            Path(output).with_suffix(".at").write_text(str(time.time()))
            befall(case.how)

    def disturbed(*arguments: Any) -> Any:
        if case.how != "hang early" and next(steps) == AT:
            happens()
        return update(*arguments)

    def build_optimizer(*arguments: Any) -> Any:
        if case.how == "hang early":
            happens()
        return real_build(*arguments)

    deepspeed.build_optimizer = build_optimizer
    train.guarded = functools.partial(guarded, phases=Phases(update=disturbed))
    code = main(["train", config])
    sys.stdout.flush()
    os._exit(code)


def befall(how: str) -> None:
    """What may become of a rank."""
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how.startswith("hang"):
        time.sleep(1000)
    else:
        raise KeyError("a bug")


def run_cases(directory: Path, cases: list[Case]) -> dict[Case, Ended]:
    """All of them at the same time: mostly they wait."""
    from relora.engine.distributed import free_port

    workshop()
    context = rank_context()
    started: dict[Case, list[Any]] = {}
    for case in cases:
        config = make_config(
            directory / case.name,
            batch__global_batch_size=12,
            batch__micro_batch_size=1,
            deepspeed__timeout_minutes=TIMEOUT_S / 60,
            deepspeed__zero_stage=2,
            train__steps=200,
        )
        port, output = free_port(), directory / f"{case.name}.txt"
        started[case] = [
            context.Process(target=rank_main, args=(str(config), case, rank, port, str(output)))
            for rank in range(case.world)
        ]
        for process in started[case]:
            process.start()
    try:
        wait_for_survivors(started, seconds := {case: {} for case in cases})
        return {case: ended(directory, case, started[case], seconds[case]) for case in cases}
    finally:
        for process in (process for ranks in started.values() for process in ranks):
            process.kill()  # one that is stopped or sleeps would be waited for at the very end


def wait_for_survivors(
    started: dict[Case, list[Any]], ended_at: dict[Case, dict[int, float]], patience_s: float = 90
) -> None:
    """Note when each rank but the victim ends."""
    patience = Patience(os.getpid(), patience_s)
    waiting = [(c, r) for c, ranks in started.items() for r in range(len(ranks)) if r != c.victim]
    while waiting and not patience.over:
        for case, rank in list(waiting):
            if not started[case][rank].is_alive():
                ended_at[case][rank] = time.time()
                waiting.remove((case, rank))
        time.sleep(0.02)


def ended(directory: Path, case: Case, ranks: list[Any], ended_at: dict[int, float]) -> Ended:
    """What a case left, once what still stands or sleeps of it is killed."""
    for rank, process in enumerate(ranks):
        if case.how != "bug" or rank not in ended_at:
            process.join(5 if case.how == "bug" else 0)
            process.kill()
        process.join()
    output = directory / f"{case.name}.txt"
    state = directory / case.name / "run_state.json"
    file = output.with_suffix(".at")
    at = float(file.read_text()) if file.exists() else float("nan")  # it never came to that
    return Ended(
        {rank: process.exitcode for rank, process in enumerate(ranks) if rank in ended_at},
        max(ended_at.values(), default=float("inf")) - at,
        output.read_text(),
        run_state(state.parent) if state.is_file() else {},
    )


# Rank 0 has the process group's store, and writes metrics and checkpoints; 1 has neither. With
# four, not every rank talks to the one that is killed.
QUICK = [Case("stop", 0, 3), Case("kill", 2, 4), Case("bug", 1, 2), Case("hang early", 0, 2)]
MORE = [
    Case("stop", 0, 2),
    Case("stop", 1, 2),
    Case("stop", 1, 3),
    Case("kill", 0, 2),
    Case("kill", 0, 3),
    Case("kill", 1, 2),
    Case("bug", 0, 2),
    Case("bug", 2, 3),
    Case("hang", 0, 2),
    Case("hang", 1, 2),
    Case("hang early", 1, 3),
]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Ended]:
    """The cases of every day."""
    return run_cases(tmp_path_factory.mktemp("quick"), QUICK)


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Ended]:
    """The other cases, some at a time."""
    directory = tmp_path_factory.mktemp("more")
    parts = (MORE[::3], MORE[1::3], MORE[2::3])
    return {case: end for part in parts for case, end in run_cases(directory, part).items()}


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_the_others_end_in_time_and_name_the_rank(case: Case, quick: dict[Case, Ended]) -> None:
    assert_named(case, quick[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE, ids=lambda case: case.name)
def test_whichever_rank_and_however_many(case: Case, more: dict[Case, Ended]) -> None:
    assert_named(case, more[case])


def assert_named(case: Case, end: Ended) -> None:
    others = [rank for rank in range(case.world) if rank != case.victim]
    assert not math.isnan(end.seconds), f"the fault never came:\n{end.output}"
    assert end.codes == dict.fromkeys(others, 6), end.output
    silent = case.how in ("stop", "hang", "hang early")
    assert end.seconds < ANSWER_S + 10 + (
        TIMEOUT_S if silent else 0
    )  # the 10 are for slow machines
    messages = {line for line in end.output.splitlines() if line.startswith("relora: ")}
    # Rank 0 speaks, or who writes the state; a traceback speaks for itself.
    assert messages or (case.how, case.victim) == ("bug", 0), end.output
    step = 0 if case.how == "hang early" else AT - 1
    if case.how == "bug":
        # A bug is code 1, on the rank that has it and in the run's state.
        said = f"relora: rank {case.victim} failed (KeyError: 'a bug'); the same command goes on"
        reason, code = f"rank {case.victim}: KeyError: 'a bug'", 1
        assert end.state == {"status": "failed", "reason": reason, "step": step, "code": code}
    else:
        named = f"rank {case.victim} of {case.world} is gone, or silent for 0.1 minutes; the same"
        said = f"relora: {named}"
        assert end.state["reason"].startswith(named)
        assert {**end.state, "reason": ""} == {
            "status": "failed",
            "reason": "",
            "step": step,
            "code": 6,
        }
        assert "Traceback" not in end.output
    assert all(message.startswith(said) for message in messages), messages


def test_a_rank_that_wakes_too_late_does_not_write_over_what_the_others_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from relora.engine.distributed import Ranks
    from relora.record import lost
    from relora.record.rundir import write_run_state

    monkeypatch.setattr(lost, "break_connections", lambda: None)
    monkeypatch.setattr(lost, "ANSWER_S", 0.1)
    ranks = [Ranks(rank, 3, rank, 3, None) for rank in range(3)]  # type: ignore[arg-type]
    said = [lost.describe_loss(tmp_path, ranks[rank], 2) for rank in (1, 2, 0)]
    assert said[0].startswith("ranks 0 and 2 of 3 are gone")
    assert said[1].startswith("rank 0 of 3 is gone")
    assert said[2].endswith("rank 0 was silent for more than 2 minutes")
    assert [lost.is_to_tell(tmp_path, ranks[rank]) for rank in (1, 2, 0)] == [1, 0, 0]
    write_run_state(tmp_path, "running", "", 3, 0)  # by a rank 0 that did not know yet
    assert lost.is_to_tell(tmp_path, ranks[0])
    write_run_state(tmp_path, "failed", said[0], 3, 6)
    assert not lost.is_to_tell(tmp_path, ranks[0])
    lost.forget_marks(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run_state.json"]
