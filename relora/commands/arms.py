"""`relora arms`: train every arm of a comparison, one after the other; goes on where it stopped."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from relora.config import Config
from relora.engine.devices import choose_devices
from relora.engine.signals import LAUNCHER_GONE, caught, following
from relora.errors import PREEMPTED, CheckpointError, ConfigError, NumericsError, UserError
from relora.files import write_atomically, write_json
from relora.load import MAY_CHANGE, check_world, differences, load_config, load_run_config
from relora.record import keys
from relora.record.layout import ARMS_FILE
from relora.record.metrics import read_metrics
from relora.record.rundir import RunState, read_run_state
from relora.training.arms import (
    Arm,
    ArmsConfig,
    TuneConfig,
    check_seeds,
    rate_of,
    read_arms,
    scale_rate,
    standard_arms,
    with_embeddings,
)
from relora.training.tuning import search

DIVERGED = NumericsError.code  # a result, not a reason to stop


def arms(
    config: Config,
    given: Sequence[str],
    to: Path,
    arms: Path | None,
    seeds: int | None,
    devices: int | None,
) -> int:
    """Train all runs, tune rates first if so asked, and write `runs.txt` and `arms.json` into `to`.

    Args:
        given: the config's path and its overrides, which every run is started with.

    Returns:
        0 once every run is finished or has diverged, else the code of the run that stopped.

    Raises:
        ConfigError: an arm, or a run of it, is wrong; before anything is trained.
    """
    ranks = len(choose_devices(devices))
    plan = read_arms(arms) if arms else ArmsConfig()
    if seeds is not None:
        plan = plan.model_copy(update={"seeds": list(range(seeds))})
    check_seeds(plan)
    if plan.arms is None:
        chosen = standard_arms(config, to)
    else:
        chosen = [Arm(name, tuple(changes)) for name, changes in plan.arms.items()]
    work = _Work(config, given, to, ranks)
    for arm in chosen:  # all of them are sound, before the first is trained
        work.load(arm, to / "none", 0)
    to.mkdir(parents=True, exist_ok=True)
    try:
        with caught(work.stop):
            report = _train_all(chosen, plan, work)
    except _Stopped as stopped:
        return stopped.code
    runs = [(name, run) for name, arm in report.items() for run in arm["runs"]]
    write_atomically(to / "runs.txt", "".join(f"{name}={run}\n" for name, run in runs))
    write_json(to / ARMS_FILE, report)
    print(f"all {len(runs)} runs are done: {to / 'runs.txt'}")
    return 0


def _train_all(chosen: Sequence[Arm], plan: ArmsConfig, work: _Work) -> dict[str, Any]:
    """Train every run; what arms.json says of each arm."""
    grids = (plan.tune.factors, plan.tune.lr_embeddings or ()) if plan.tune else ()
    work.left = len(chosen) * (len(plan.seeds) + sum(map(len, grids)))  # grids may grow
    tuned = _tune(chosen, plan.tune, work) if plan.tune else {}
    report = {}
    for arm in chosen:
        arm, tried, said = tuned.get(arm.name, _Tuned(arm, None, []))
        directories = [work.to / arm.slug / f"seed_{seed}" for seed in plan.seeds]
        for seed, directory in zip(plan.seeds, directories, strict=True):
            work.train(arm, directory, seed)
        report[arm.name] = {
            "overrides": list(arm.overrides),
            "runs": list(map(str, directories)),
            "tried": tried,
            "tuning": said,
        }
    return report


class _Tuned(NamedTuple):
    """An arm at its best rates."""

    arm: Arm
    tried: dict[str, float | None] | None  # loss by matrices' or adapters' rate
    said: list[str]  # what was tried, and what was taken


class _Stopped(Exception):
    """A run ended otherwise than by finishing or diverging."""

    def __init__(self, code: int) -> None:
        self.code = code


class _Work:
    """Trains runs by `relora launch`, passes over what is done, and says how long it will take."""

    def __init__(self, config: Config, given: Sequence[str], to: Path, devices: int) -> None:
        self.config, self.given, self.to = config, list(given), to
        self.devices = devices
        self.left = 0
        self.asked: list[int] = []
        self.process: subprocess.Popen[bytes] | None = None
        self.seconds: list[float] = []

    def load(self, arm: Arm, directory: Path, seed: int) -> Config:
        """The config of a run.

        Raises:
            ConfigError: it is not sound, or does not fit the devices; names the arm.
        """
        try:
            path, *overrides = self.given
            config = load_config(Path(path), [*overrides, *arm.run(directory, seed)])
            check_world(config, self.devices)
        except UserError as error:
            raise type(error)(f"arm {arm.name!r}: {error}") from None
        return config

    def train(self, arm: Arm, directory: Path, seed: int) -> float:
        """Train a run unless it is done; its final validation loss, inf if it diverged.

        Raises:
            _Stopped: it ended in another way.
        """
        config = self.load(arm, directory, seed)
        self.left = max(0, self.left - 1)
        state = read_run_state(directory)
        if _is_done(state):
            _check_same(directory, config)
        else:
            if self.asked:
                raise _Stopped(PREEMPTED)
            eta = sum(self.seconds) / len(self.seconds) * (self.left + 1) if self.seconds else None
            then = "" if eta is None else f", about {eta / 60:.0f} min for all that are left"
            print(f"── {arm.name}, seed {seed}{then}", flush=True)
            began = time.monotonic()
            code = self._launch(arm, directory, seed)
            self.seconds.append(time.monotonic() - began)
            state = read_run_state(directory)
            if not _is_done(state):
                if code < 0:  # the launch itself was ended: before it listened, or by kill -9
                    code = PREEMPTED if self.asked else 128 - code
                raise _Stopped(code or PREEMPTED)
        if state.code == DIVERGED:
            print(f"{arm.name}, seed {seed}: diverged: {state.reason}")
            return math.inf
        return final_loss(directory)

    def _launch(self, arm: Arm, directory: Path, seed: int) -> int:
        command = [sys.executable, "-m", "relora", "launch", "--devices", str(self.devices)]
        command += [*self.given, *arm.run(directory, seed)]
        # In a session of its own: what a terminal sends reaches it through us, and once only.
        self.process = subprocess.Popen(
            command, start_new_session=True, preexec_fn=following(LAUNCHER_GONE)
        )
        if self.asked:  # while it was started
            self.process.send_signal(self.asked[-1])
        return self.process.wait()

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on to the run that is under way; no other run is begun."""
        self.asked.append(number)
        if self.process is not None:
            self.process.send_signal(number)


def _tune(chosen: Sequence[Arm], tune: TuneConfig, work: _Work) -> dict[str, _Tuned]:
    """Each arm with the best of its rates, and what was tried.

    What is found for full rank is the rate of the other arms' warm starts.
    """
    given = work.config.optimizer
    embeddings = given.lr_embeddings or given.lr if tune.lr_embeddings else None
    start = embeddings if isinstance(embeddings, float) else None  # 'adapters' is no rate
    found: dict[str, _Tuned] = {}
    warm: tuple[str, ...] = ()
    configs = {arm.name: work.load(arm, work.to / "none", tune.seed) for arm in chosen}
    for arm in sorted(chosen, key=lambda arm: configs[arm.name].lora is not None):
        config = configs[arm.name]
        if config.lora is not None:
            arm = Arm(arm.name, (*warm, *arm.overrides))
        key, rate = rate_of(config)

        def loss_at(factor: float, arm: Arm = arm, config: Config = config) -> float:
            return _try(scale_rate(arm, config, factor), start, tune, work)

        searched = search(tune.factors, loss_at, tune.extend)
        if searched.diverged:
            rates = ", ".join(f"{rate * factor:.4g}" for factor in searched.losses)
            raise NumericsError(
                f"arm {arm.name!r}: diverged at every {key} that was tried ({rates}); add smaller "
                "tune.factors: what is done is not trained again"
            )
        best = scale_rate(arm, config, searched.best)
        if config.lora is None and not warm and config.model == work.config.model:
            warm = (f"optimizer.lr={rate * searched.best:.6g}",)
        tried = {
            f"{rate * f:.6g}": x if math.isfinite(x) else None for f, x in searched.losses.items()
        }
        found[arm.name] = _Tuned(best, tried, [searched.sentence(arm.name, key, rate)])
        print(found[arm.name].said[0], flush=True)
    if start is not None:
        _tune_embeddings(found, start, tune, work)
    return found


def _tune_embeddings(found: dict[str, _Tuned], start: float, tune: TuneConfig, work: _Work) -> None:
    """Search lr_embeddings for all arms that have none of their own; in place."""
    assert tune.lr_embeddings is not None
    names = [
        name
        for name, tuned in found.items()
        if work.load(with_embeddings(tuned.arm, start), work.to / "none", 0).optimizer.lr_embeddings
        == float(f"{start:.6g}")
    ]
    together = [names] if tune.share_embeddings and names else [[name] for name in names]
    for members in together:

        def loss_at(factor: float, members: list[str] = members) -> float:
            losses = [_try(found[m].arm, start * factor, tune, work) for m in members]
            return statistics.fmean(losses)

        searched = search(tune.lr_embeddings, loss_at, tune.extend)
        whose, of = members[0], ""
        if tune.share_embeddings:
            whose, of = "all arms", f" by the mean loss of {', '.join(members)}"
        if searched.diverged:
            raise NumericsError(
                f"{whose}: no optimizer.lr_embeddings that was tried is one at which none diverged "
                f"({searched.sentence(whose, 'optimizer.lr_embeddings', start)}); add smaller "
                "tune.lr_embeddings: what is done is not trained again"
            )
        said = searched.sentence(whose, "optimizer.lr_embeddings", start, of)
        print(said, flush=True)
        for name in members:
            arm, tried, before = found[name]
            found[name] = _Tuned(
                with_embeddings(arm, start * searched.best), tried, [*before, said]
            )


def _try(arm: Arm, embeddings: float | None, tune: TuneConfig, work: _Work) -> float:
    """The loss of a run of the search, whose directory says its rates."""
    if embeddings is not None:
        arm = with_embeddings(arm, embeddings)
    config = work.load(arm, work.to / "none", tune.seed)
    key, rate = rate_of(config)
    name = f"{key}_{rate:.6g}"
    if embeddings is not None:
        name += f"_lr_embeddings_{config.optimizer.lr_embeddings}"
    return work.train(arm, work.to / "tuning" / arm.slug / name, tune.seed)


def final_loss(directory: Path) -> float:
    """The last validation loss of a finished run.

    Raises:
        CheckpointError: there is none.
    """
    losses = [line[keys.EVAL_LOSS] for line in read_metrics(directory) if keys.EVAL_LOSS in line]
    if not losses:
        raise CheckpointError(f"{directory}: is finished and has no evaluation; delete it")
    return math.inf if losses[-1] is None else losses[-1]


def _check_same(directory: Path, config: Config) -> None:
    """Whether a run that is done is the one that is wanted.

    Raises:
        ConfigError: it had other settings.
    """
    measured = ("train.steps", "train.tokens", "train.eval_sequences", "lora.base")
    changed = [
        f"{path}: {old} there, {new} here"
        for path, old, new in differences(load_run_config(directory), config)
        if not path.startswith(MAY_CHANGE) or path in measured
    ]
    if changed:
        raise ConfigError(
            f"{directory}: is done with other settings ({'; '.join(changed)}); delete it, or take "
            "another --to"
        )


def _is_done(state: RunState) -> bool:
    failed = state.status == "failed" and state.code == DIVERGED
    return failed or state.status == "finished"
