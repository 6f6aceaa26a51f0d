"""Claim a run's directory, train in it, and leave there how it ended."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from relora.config import Config
from relora.data.shards import TokenShards
from relora.engine.deterministic import without_deterministic_kernel
from relora.engine.distributed import Ranks, is_lost_rank, memory_gib
from relora.engine.signals import StopRequest
from relora.errors import (
    PREEMPTED,
    CheckpointError,
    ConfigError,
    LostRankError,
    NumericsError,
    UserError,
)
from relora.files import NO_ROOM, is_file, making, write_atomically
from relora.load import dump_config, load_run_config
from relora.model import save_structure
from relora.record import keys, lost
from relora.record.layout import RunDirectory
from relora.record.lost import describe_loss, forget_marks
from relora.record.moved import moved_lines
from relora.record.rundir import (
    PATIENCE_S,
    clear_leftovers,
    lock,
    read_run_state,
    write_run_state,
)
from relora.training.log_lines import closing_lines
from relora.training.loop import train_run
from relora.training.phases import PHASES, Phases
from relora.training.run import Run, leave_run
from relora.training.start import start_again


def guarded(
    config: Config,
    shards: TokenShards,
    ranks: Ranks,
    wanted: Path | None = None,
    phases: Phases = PHASES,
) -> int:
    """Run with the run directory claimed, and leave in it how the run ended; its exit code.

    Args:
        wanted: the checkpoint to go on from in place of the newest.
        phases: as for `train_run`.
    """
    stop, claim, moved, step = _begin(config, ranks)
    status, reason, code = "failed", "a bug", 1
    run, together = None, False
    try:
        run = phases.start(config, shards, ranks, wanted, moved)
        while (finished := train_run(run, stop, phases)) is None:
            run = start_again(run)
        status, reason, code = ("finished", "", 0) if finished else ("preempted", "", PREEMPTED)
        if finished:
            _tell_of_end(run)
        else:
            # Another machine may have heard of it before this one.
            heard = [name for name in ranks.gather(stop.signal) if name]
            reason = f"stopped by {heard[0] if heard else 'train.stop_after'}"
            run.metrics.say(f"stopped at step {run.step}; the same command goes on from there")
        ranks.agree(run.metrics.problem)
    except BaseException as error:
        status, together = "failed", isinstance(error, NumericsError)  # which all ranks raise
        known = _as_user_error(error, config, ranks)
        reason, code = _reason(error, known, ranks)
        if known is None or known is error:
            raise
        raise known from error
    finally:
        stop.ignore_further()
        if status == "failed" and code != LostRankError.code:
            lost.mark_failed(config.run_dir, ranks, reason)
        if run is not None:
            leave_run(run, together)
        problem = None
        # Rank 0 tells of a good end. Of a bad one whoever knows first: rank 0 may be the lost one.
        if ranks.is_main if status != "failed" else lost.is_to_tell(config.run_dir, ranks):
            problem = _note_end(config, status, reason, run.step if run else step, code)
            if code == LostRankError.code and ranks.local_rank:  # the command line is silent here
                print(f"relora: {reason}", file=sys.stderr)
        if claim is not None:
            claim.close()
    ranks.agree(problem or run.metrics.problem)
    stop.restore()
    return code


def _tell_of_end(run: Run) -> None:
    values = {
        keys.TOKENS: run.progress.consumed * run.config.data.sequence_length,
        keys.ELAPSED_S: run.elapsed,
        keys.MEMORY_GIB: memory_gib(run.ranks.device),
    }
    for line in closing_lines(run.config.run_dir, run.step, values):
        run.metrics.say(line)


def _begin(config: Config, ranks: Ranks) -> tuple[StopRequest, Any, list[str], int]:
    """Listen for signals and claim the run directory; also what has moved, and the last step."""
    stop, claim = StopRequest(), None
    try:
        claim, moved = _claim(config, ranks)
        return stop, claim, moved, read_run_state(config.run_dir).step
    except BaseException:
        # Nothing has begun: whoever called goes on, and hears its own signals.
        if claim is not None:
            claim.close()
        stop.restore()
        raise


def _note_end(
    config: Config, status: str, reason: str, step: int, code: int
) -> CheckpointError | None:
    """Write how the run ended; returns what kept this rank from it."""
    try:
        write_run_state(config.run_dir, status, reason, step, code)
    except OSError as error:
        return CheckpointError(f"{config.run_dir}: cannot be written: {error}")
    return None


def _reason(error: BaseException, known: UserError | None, ranks: Ranks) -> tuple[str, int]:
    """What run_state.json says of an error, and the exit code."""
    if known is not None:
        return str(known), known.code
    where = f"rank {ranks.rank}: " if ranks.world > 1 else ""
    return f"{where}{type(error).__name__}: {error}", 1


def _as_user_error(error: BaseException, config: Config, ranks: Ranks) -> UserError | None:
    """The error in words that a user can act on; None for a bug of ours."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return CheckpointError(
            f"{config.run_dir}: cannot be written: {error}; the checkpoints in it are intact"
        )
    if is_lost_rank(error):
        detail = str(error).partition("\n")[0].partition(". This is")[0]  # torch wishes good luck
        return LostRankError(
            f"{describe_loss(config.run_dir, ranks, config.deepspeed.timeout_minutes)}; the same "
            f"command goes on from the newest checkpoint ({detail})"
        )
    return without_deterministic_kernel(error)


def _claim(config: Config, ranks: Ranks) -> tuple[Any, list[str]]:
    """Rank 0 opens the run directory; all hear of it if it cannot. Also what has moved since."""
    claim, moved = None, list[str]()
    with ranks.together():
        if ranks.is_main:
            try:
                claim, moved = _open_run_dir(config)
            except OSError as error:  # without a number: of many files at once
                kind = CheckpointError if error.errno in (*NO_ROOM, None) else ConfigError
                raise kind(f"run_dir: {config.run_dir} cannot be written: {error}") from None
    return claim, moved


def _open_run_dir(config: Config) -> tuple[Any, list[str]]:
    """Claim the run directory and write what describes the run. Rank 0 only."""
    run_dir = config.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    # The other ranks wait in a collective meanwhile, which has a timeout.
    claim = lock(run_dir, min(PATIENCE_S, 30 * config.deepspeed.timeout_minutes))
    forget_marks(run_dir)
    clear_leftovers(run_dir)
    files = RunDirectory(run_dir)
    begun = is_file(files.config)
    moved = moved_lines(load_run_config(run_dir), config) if begun else []
    if not begun:  # else its settings are those of its checkpoint, until that is found
        write_atomically(files.config, dump_config(config))
    # Read only if it is to be written: what the run started from may be gone by now.
    if not is_file(files.model_json):
        with making(files.model, replace=True) as temporary:
            save_structure(config.model, temporary)
    return claim, moved
