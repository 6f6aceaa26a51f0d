"""`relora train`: the run, from its config to its last checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from relora.config import Config
from relora.engine import deepspeed
from relora.engine.deterministic import determinism
from relora.engine.distributed import (
    environment_kept,
    is_lost_rank,
    read_rank,
    read_ranks,
    read_world,
)
from relora.engine.launcher import speaks_for_machine, words_of_train
from relora.engine.signals import handlers_kept
from relora.errors import LostRankError
from relora.load import check_world
from relora.record.settled import Typed, settled
from relora.record.standing import is_finished
from relora.record.trackers import check_trackers
from relora.training.guard import guarded
from relora.training.log_lines import next_commands
from relora.training.preflight import (
    check_data,
    check_model,
    check_same_shards,
    checkpoint_to_resume,
)


def train(
    config: Config, resume: str = "auto", change: bool = False, given: Sequence[str] = ()
) -> int:
    """Train, or go on with, the run that the config describes, in this process.

    As one rank of as many as the launcher's environment says; alone without one.

    Args:
        resume: `auto` for the newest sound checkpoint, or the directory of one.
        change: rate, schedule and batch may be others than the run has, from here on, on record.
        given: the config's path and overrides as they were typed, for messages.

    Returns:
        0 when the run is finished, 75 when it was stopped and can go on.

    Raises:
        UserError: a config, data, checkpoint or numbers that a user can mend; see its `code`.
    """
    # Who called from Python goes on, hears its own signals, and may start others.
    with handlers_kept(), environment_kept(), determinism(config.deterministic):
        wanted = None if resume == "auto" else checkpoint_to_resume(config.run_dir, Path(resume))
        typed = Typed([*words_of_train(), *given] if given else (), resume)
        return _train(settled(config, wanted, change, typed), wanted)


def _train(config: Config, wanted: Path | None) -> int:
    check_world(config, read_world())
    if is_finished(config, wanted):
        if read_rank() == 0:
            print(f"{config.run_dir}: is finished ({config.total_steps} steps); nothing to do")
            print("\n".join(next_commands(config.run_dir)))
        return 0
    check_trackers(config.train.log_to)
    model = check_model(config, thorough=speaks_for_machine())
    ranks, minutes = read_ranks(), config.deepspeed.timeout_minutes
    try:
        if ranks.world > 1:  # one rank's disk alone may be at fault, so all must hear of it
            deepspeed.init_distributed(ranks, minutes)
        with ranks.together():
            shards = check_data(config, model, ranks)
        if ranks.world == 1:  # whose mistakes come to light without a process group
            deepspeed.init_distributed(ranks, minutes)
        check_same_shards(shards, ranks)
        del model
        return guarded(config, shards, ranks, wanted)
    except RuntimeError as error:
        if is_lost_rank(error):
            raise LostRankError(
                f"not all {ranks.world} ranks came together within {minutes:g} minutes, or one was "
                f"lost before the run began; run the same command again ({error})"
            ) from error
        raise
    finally:
        deepspeed.leave(together=sys.exc_info()[0] is None)
