"""The settings that a run goes on with: those it has, or others if it may have them."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from relora.config import Config
from relora.errors import ConfigError
from relora.files import exists, is_dir, is_file
from relora.load import MAY_CHANGE, differences, load_run_config
from relora.locate import PATHS
from relora.record.changes import (
    ASKED,
    REASONS,
    Change,
    before_changes,
    check_fit,
    read_changes,
    with_settings,
)
from relora.record.checkpoint import Standing, newest_state
from relora.record.layout import RunDirectory, step_of
from relora.record.moved import other_contents
from relora.record.rundir import check_plain

# What other weights could not be loaded into, or could make nothing of.
_OF_WEIGHTS = ("model.config", "model.pretrained", "data.source", "data.tokenizer")


class AnotherRun(ConfigError):
    """The run directory holds another run than the config describes.

    Args:
        holds: what it holds.
        changes: how that differs, in words.
        message: what it comes to, for a reader of `train`.
        ways: what to do, behind the changes.
    """

    def __init__(
        self, holds: str, changes: Sequence[str], message: str, ways: Sequence[str] = ()
    ) -> None:
        super().__init__("\n".join(["\n  ".join([message, *changes]), *ways]))
        self.holds, self.changes = holds, changes


class UnaskedChange(AnotherRun):
    """It holds the same run with settings that it may change on its way, if that is asked for."""


class Typed:
    """How `train` was started, for messages that say what to type.

    Args:
        words: the command with its config and overrides; none for a call from Python.
        resume: what `--resume` said.
    """

    def __init__(self, words: Sequence[str] = (), resume: str = "auto") -> None:
        self.words, self.resume = words, resume

    def to_change(self) -> str:
        """The same with `--change`."""
        if not self.words:
            return "relora.train(config, change=True)"
        back = () if self.resume == "auto" else ("--resume", self.resume)
        return shlex.join([*self.words, *back, "--change"])

    def to_begin_from(self, weights: Path, config: Config) -> str:
        """Another run from these weights."""
        others = (Path(f"{config.run_dir}_{n}") for n in itertools.count(2))
        other = next(place for place in others if not exists(place))
        overrides = [f"model.pretrained={weights}", f"run_dir={other}"]
        if config.model.config is not None:
            overrides = ["model.config=null", *overrides]
        if not self.words:
            return f"the config with {' '.join(overrides)}"
        return shlex.join([*self.words, *overrides])


def settled(
    config: Config, wanted: Path | None = None, change: bool = False, typed: Typed | None = None
) -> Config:
    """The config that `train` goes on with: the given one, if the run may have it.

    Settings that the run has changed since stay changed where the config still has the old ones.

    Args:
        wanted: a checkpoint of the run to go back to.
        change: settings that may change if it is asked for may change now.
        typed: for what a message says to do.

    Raises:
        AnotherRun: the run directory holds another run, or one whose settings were to change.
        ConfigError: a change does not fit what the run has done.
    """
    saved = RunDirectory(config.run_dir).config
    if exists(config.run_dir) and not is_dir(config.run_dir):
        raise ConfigError(f"run_dir: {config.run_dir} is not a directory; choose another")
    check_plain(saved)
    if not is_file(saved):
        return config
    before, done = load_run_config(config.run_dir), read_changes(config.run_dir)
    if wanted is not None:
        later = [one for one in done if one.step > step_of(wanted)]
        before, done = before_changes(before, later), done[: len(done) - len(later)]
    if not change:
        config = _with_changes(config, before, done)
    found, typed = _unlike(before, config), typed or Typed()
    newest, _ = newest_state(wanted or config.run_dir)
    other = {path: both for path, both in found.items() if path not in ASKED}
    if other or (moved := list(other_contents(before, config))):
        lines = [f"{_told(path, both)}{_reason(path)}" for path, both in other.items()]
        lines = lines or moved
        lines += [f"{_told(path, found[path])}: may change" for path in found if path in ASKED]
        possible = newest is not None and not any(p.startswith(_OF_WEIGHTS) for p in other)
        raise AnotherRun(
            "another run",
            lines,
            f"run_dir: {config.run_dir} holds a run with another config; choose another run_dir, "
            "or undo what a run cannot change on its way:",
            _to_begin_anew(config, wanted, typed) if possible else (),
        )
    if found and not change:
        _refuse_unasked(config, found, wanted, newest, typed)
    _check_change(before, config, done, newest)
    return config


def _unlike(before: Config, config: Config) -> dict[str, tuple[Any, Any]]:
    """Old and new value of what no run changes by itself; paths are compared by what they hold."""
    return {
        path: (old, new)
        for path, old, new in differences(before, config)
        if not path.startswith(MAY_CHANGE) and (path not in PATHS or None in (old, new))
    }


def _told(path: str, both: tuple[Any, Any]) -> str:
    was, now = ("null" if value is None else repr(value) for value in both)
    return f"{path}: was {was}, is now {now}"


def _reason(path: str) -> str:
    reason = next((why for begin, why in REASONS.items() if path.startswith(begin)), None)
    return f": {reason}" if reason else ""


def _with_changes(config: Config, before: Config, done: Sequence[Change]) -> Config:
    """The config with what its run has changed, where it still has what was there before.

    A length that was changed together with other settings is one of them.
    """
    replaced = [
        (path, was) for one in done if one.was_asked for path, (was, _) in one.settings.items()
    ]
    kept = {
        path: now for path, now, given in differences(before, config) if (path, given) in replaced
    }
    return with_settings(config, kept) if kept else config


def _refuse_unasked(
    config: Config,
    found: dict[str, tuple[Any, Any]],
    wanted: Path | None,
    newest: Standing | None,
    typed: Typed,
) -> None:
    step = newest.state.step if newest else 0
    ways = [f"To have them change from step {step} on, on record:\n  {typed.to_change()}"]
    if newest is not None:
        ways += _to_begin_anew(config, wanted, typed)
    raise UnaskedChange(
        "this run with other settings",
        [_told(path, both) for path, both in found.items()],
        f"run_dir: {config.run_dir} holds this run with other settings; undo them, choose another "
        "run_dir, or see below:",
        ways,
    )


def _to_begin_anew(config: Config, wanted: Path | None, typed: Typed) -> list[str]:
    return [
        "To begin another run from its weights, with adapters merged into them, where steps, "
        "schedule, the optimizer's state and the order of the data start over:\n"
        f"  {typed.to_begin_from(wanted or config.run_dir, config)}"
    ]


def _check_change(
    before: Config, config: Config, done: Sequence[Change], newest: Standing | None
) -> None:
    """Whether what changes fits what the run has done.

    Raises:
        ConfigError: it does not.
    """
    if newest is None:
        return
    check_fit(before, config, newest.state.step)
    batch = "batch.global_batch_size"
    other = before.batch.global_batch_size != config.batch.global_batch_size
    if config.train.tokens and (other or any(batch in one.settings for one in done)):
        left = config.train.tokens - newest.state.consumed * config.data.sequence_length
        steps = newest.state.step + max(0, math.ceil(left / config.tokens_per_step))
        raise ConfigError(
            f"train.tokens: {config.train.tokens} would be counted as if every step had the new "
            f"{batch}; for so many tokens in all give train.tokens=null train.steps={steps}"
        )
