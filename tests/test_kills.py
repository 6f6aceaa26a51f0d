"""kill -9 at random moments, then the same command: in the end not one bit differs.

    RELORA_KILLS=100 python -m pytest tests/test_kills.py -m slow -s

Each kill and what came of it is a line of kills.jsonl, whose place is printed at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from relora.load import load_config
from relora.training.config import TrainConfig
from runs import (
    Patience,
    Process,
    alive,
    checkpoint,
    differing,
    make_config,
    relora,
    run_state,
    trajectory,
)

SEED = 20240607
KILLS = int(os.environ.get("RELORA_KILLS", "100"))
KILLS_A_RUN = 10  # then it may finish, so that even an unlucky run has an end
GONE_S = 30  # for all processes of a launch to leave by themselves
STEPS, CYCLE = 120, 6
STAGES = (1, 2, 3, 0)
IN_BACKGROUND = "background_save" in TrainConfig.model_fields
TARGETS = ("rank 0", "rank 1", "all ranks", "the front", "launch.py", "everything")
CHANGES = {
    "train__steps": STEPS,
    "train__save_every": 4,
    "train__eval_every": 10,
    "train__keep_checkpoints": 2,
    "lora__dropout": 0.1,
    "relora__cycle_steps": CYCLE,
    "deepspeed__timeout_minutes": 1,
}


@dataclass
class Kill:
    """Who is killed and when; then what came of it.

    `moment` is "delay" (`after` seconds from the start), "save" or "merge" (`after` seconds from
    the start of the `count`-th one that this process comes to).
    """

    target: str
    moment: str
    count: int
    after: float  # seconds
    at_once: bool  # whether the command is given again before all of the old processes are gone
    # What came of it:
    stage: int = -1
    phase: str = ""
    step: int = 0
    newest: int = 0  # the newest checkpoint's step
    gone_s: float = 0.0
    code: int = 0


def random_kill(rng: random.Random, start_up_s: float) -> Kill:
    """A third at any time, a third about a save, a third about a merge."""
    moment = rng.choice(("delay", "save", "merge"))
    after = rng.uniform(0, start_up_s + 2) if moment == "delay" else rng.uniform(0, 0.02)
    return Kill(rng.choice(TARGETS), moment, rng.randint(1, 4), after, rng.random() < 0.5)


class Launch(Process):
    """`relora launch --devices 2`, watched from the files that it writes."""

    def __init__(self, config: Path, output: Path) -> None:
        super().__init__(output, "launch", "--devices", 2, config)
        self.began, self.born = time.monotonic(), time.time()
        self.run_dir = load_config(config, []).run_dir
        self.known = {self.popen.pid}  # every process seen
        self.gone_s: float | None = None  # from the kill to the end of the last of them

    @property
    def step(self) -> int | None:
        """The newest step that this process has told of; None before its first."""
        found = re.findall(r"^step +(\d+)/", self.text, re.MULTILINE)
        return int(found[-1]) if found else None

    def processes(self) -> dict[str, list[int]]:
        """Process ids by the names of TARGETS."""
        import psutil

        everything, ranks = [self.popen.pid, *self.descendants()], self.ranks()
        with contextlib.suppress(psutil.NoSuchProcess):
            launchers = [child.pid for child in psutil.Process(self.popen.pid).children()]
        self.known.update(everything)
        names = {"the front": [self.popen.pid], "everything": everything}
        if launchers:
            names["launch.py"] = launchers
        if len(ranks) == 2:
            names |= {"rank 0": ranks[:1], "rank 1": ranks[1:], "all ranks": ranks}
        return names

    def left(self) -> list[int]:
        """Those of its processes that still run, orphans included."""
        import psutil

        for pid in psutil.pids():  # one that was born as we looked
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(pid) in self.known:
                    self.known.add(pid)
        return alive(sorted(self.known))

    def see_it_go(self) -> None:
        """Note how long all of it takes to be gone; nobody helps."""
        began = time.monotonic()
        limit = max(GONE_S, began - self.began)  # a start has taken long where all takes long
        while self.left() and time.monotonic() - began < limit:
            time.sleep(0.05)
        if not self.left():
            self.gone_s = time.monotonic() - began

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Whether it came to that before the process ended."""
        patience = Patience(self.popen.pid, 240)
        while not condition():
            if self.popen.poll() is not None:
                return False
            assert not patience.over, self.text
            time.sleep(0.002)
        return True

    def wait_for_moment(self, kill: Kill) -> list[int]:
        """Who is to be killed now; nobody if the process ended before."""
        if kill.moment == "delay":
            came = self.wait_for(lambda: time.monotonic() - self.began > kill.after)
            came = came and self.wait_for(lambda: kill.target in self.processes())
            return self.processes().get(kill.target, []) if came else []
        came = self.wait_for(lambda: self.step is not None)
        pids = self.processes().get(kill.target, [])
        near = self.near_merge if kill.moment == "merge" else self.saving
        for _ in range(kill.count):
            came = came and self.wait_for(lambda: not near()) and self.wait_for(near)
        time.sleep(kill.after)
        return pids if came else []

    def saving(self) -> bool:
        """Whether a checkpoint is being written or an old one removed, by this process."""
        for path in (self.run_dir / "checkpoints").glob("*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ctime > self.born:
                    return True
        return False

    def near_merge(self) -> bool:
        """Whether the step that is under way ends in a merge, or in the birth of adapters."""
        return self.step is not None and (self.step + 1) % CYCLE == 0

    def phase(self) -> str:
        """What it is doing."""
        if self.step is None:
            return "starting"
        return "saving" if self.saving() else "merging" if self.near_merge() else "between"


def newest_of_sound(run_dir: Path) -> int:
    """The newest checkpoint's step, 0 without one; fails if one of them is not sound."""
    found = [0]
    for path in (run_dir / "checkpoints").glob("step_*"):
        if path.suffix != ".tmp":
            # The last act of ranks that are about to leave may be to remove an old one.
            assert relora("verify", path) == 0 or not path.exists(), path
            found.append(int(path.name.removeprefix("step_")))
    return max(found)


def kill_all(pids: list[int]) -> None:
    """SIGKILL to each of them that is still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class Story:
    """Runs that are killed and go on, each compared with an undisturbed one of its ZeRO stage."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.start_up_s = 0.0
        self.done: list[Kill] = []
        self.runs = 0
        self._whole: dict[int, Path] = {}

    def undisturbed(self, stage: int, **changes: Any) -> Path:
        """A finished run that nobody killed."""
        if stage not in self._whole:
            self._whole[stage] = run_dir = self.directory / f"whole{stage}"
            config = make_config(run_dir, **CHANGES | changes, deepspeed__zero_stage=stage)
            launch = Launch(config, self.directory / f"whole{stage}.txt")
            try:
                launch.wait_for(lambda: launch.step is not None)
                self.start_up_s = time.monotonic() - launch.began
                assert launch.wait() == 0, launch.text
            finally:
                kill_all(launch.left())
        return self._whole[stage]

    def run(self, stage: int, kills: Iterable[Kill], **changes: Any) -> None:
        """Start a run, carry out these kills as long as it lives, see it finish, and compare."""
        run_dir = self.directory / f"run{self.runs}"
        config = make_config(run_dir, **CHANGES | changes, deepspeed__zero_stage=stage)
        whole = self.undisturbed(stage, **changes)
        launches = [Launch(config, run_dir.with_suffix(".0.txt"))]
        watching = None  # what was killed last
        newest = 0
        try:
            for kill in kills:
                launch = launches[-1]
                pids = launch.wait_for_moment(kill)
                if watching:
                    self._finish(*watching)
                    watching = None
                if not pids:
                    break
                kill.stage, kill.step, kill.phase = stage, launch.step or 0, launch.phase()
                kill_all(pids)
                if kill.target not in ("the front", "launch.py") and launch.saving():
                    kill.phase = "saving"  # as can be seen now; orphans would save only now
                watching = (kill, launch, threading.Thread(target=launch.see_it_go))
                watching[-1].start()
                if not kill.at_once:
                    watching[-1].join()
                kill.newest = newest_of_sound(run_dir)
                assert kill.newest >= newest
                newest = kill.newest
                launches.append(Launch(config, run_dir.with_suffix(f".{len(launches)}.txt")))
            if watching:
                self._finish(*watching)
            assert launches[-1].wait() == 0, launches[-1].text
            last = load_config(config, []).total_steps
            assert run_state(run_dir) == run_state(whole)
            assert trajectory(run_dir) == trajectory(whole)
            assert differing(checkpoint(run_dir, last), checkpoint(whole, last)) == []
        finally:
            for launch in launches:
                kill_all(launch.left())
        self.runs += 1

    def _finish(self, kill: Kill, launch: Launch, watch: threading.Thread) -> None:
        """See everything gone, and write down what came of a kill."""
        watch.join()
        assert launch.gone_s is not None, f"{kill}\nafter {GONE_S} s: {launch.text}"
        kill.gone_s, kill.code = round(launch.gone_s, 2), launch.popen.wait()
        assert kill.code in (0, 6, 75, -signal.SIGKILL), f"{kill}\n{launch.text}"
        if kill.target in ("the front", "launch.py"):  # its ranks have lost no step
            kill.newest = newest_of_sound(launch.run_dir)
            assert kill.newest >= kill.step, f"{kill}\n{launch.text}"
        self.done.append(kill)
        with (self.directory / "kills.jsonl").open("a") as file:
            file.write(json.dumps(asdict(kill)) + "\n")

    def __str__(self) -> str:
        targets, phases = (
            ", ".join(f"{count} {name}" for name, count in Counter(names).most_common())
            for names in ([k.target for k in self.done], [k.phase for k in self.done])
        )
        slowest = max((kill.gone_s for kill in self.done), default=0)
        return (
            f"{len(self.done)} kills ({targets}; {phases}): {self.runs} runs, "
            f"{self.runs} bit-equal; all of a launch gone after {slowest:.1f} s at the most; "
            f"seed {SEED}, log {self.directory / 'kills.jsonl'}"
        )


@pytest.mark.slow
def test_three_kills_and_not_one_bit_differs(tmp_path: Path) -> None:
    story = Story(tmp_path)
    kills = (
        Kill("the front", "save", 1, 0.01, at_once=True),  # the new ranks meet orphans
        Kill("rank 1", "merge", 1, 0.02, at_once=False),
        Kill("launch.py", "save", 2, 0.0, at_once=True),
    )
    story.run(2, kills, train__steps=40)
    assert len(story.done) == 3
    assert story.done[1].code == 6  # a lost rank
    assert story.done[2].code == 75  # the ranks have saved


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_random_kills_and_not_one_bit_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    story, rng = Story(tmp_path), random.Random(SEED)
    try:
        while len(story.done) < KILLS:
            stage = STAGES[story.runs % len(STAGES)]
            changes = {"train__background_save": story.runs % 2 == 1} if IN_BACKGROUND else {}
            story.undisturbed(stage)  # which also says how long a start takes
            count = min(KILLS_A_RUN, KILLS - len(story.done))
            kills = [random_kill(rng, story.start_up_s) for _ in range(count)]
            story.run(stage, kills, **changes)  # which asserts what must hold after each of them
        assert len(story.done) == KILLS
    finally:
        with capsys.disabled():
            print(f"\n{story}")
