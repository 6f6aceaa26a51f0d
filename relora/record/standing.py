"""What `relora train` makes of a run directory, by its files; `relora plan` says it before."""

from __future__ import annotations

from pathlib import Path

from relora.config import Config
from relora.errors import CheckpointError, ConfigError, UserError
from relora.files import exists, is_file
from relora.load import differences
from relora.model import ModelConfig, load_model_config
from relora.record.checkpoint import complete_checkpoints, newest_state
from relora.record.layout import RunDirectory, step_of
from relora.record.rundir import RunState, read_run_state
from relora.record.settled import AnotherRun, UnaskedChange, settled
from relora.structure import changed_keys

SHOWN = 3  # differences


def standing(config: Config) -> str | None:
    """In one line what `train` would do with what is in `run_dir`; None for a run yet to begin."""
    kept = ""
    try:
        given, config = config, settled(config)
        stays = [f"{path} {now}" for path, _, now in differences(given, config)]
        kept = f", with {', '.join(stays)} by its change" if stays else ""
        if is_finished(config):
            return "is finished: train has nothing to do"
    except AnotherRun as error:
        more = len(error.changes) - SHOWN
        changes = ", ".join(error.changes[:SHOWN]) + (f", and {more} more" if more > 0 else "")
        if isinstance(error, UnaskedChange):
            return f"train asks for --change: {changes}"
        return f"train refuses it: it holds {error.holds}: {changes}"
    except UserError as error:
        return f"train refuses it: {str(error).splitlines()[0]}"
    if not is_file(RunDirectory(config.run_dir).config):
        return None
    checkpoints = complete_checkpoints(config.run_dir)
    if not checkpoints:
        return "has begun: train starts again, for there is no checkpoint yet"
    return f"has begun: train goes on from step {step_of(checkpoints[-1]):,}{kept}"


def is_finished(config: Config, wanted: Path | None = None) -> bool:
    """Whether the run directory holds this very run, finished, and no going back is wanted.

    Args:
        config: `settled`.
        wanted: a checkpoint of the run to go back to.

    Raises:
        ConfigError: the model is another one, or the run is past the wanted length already.
        CheckpointError: its checkpoints are gone.
    """
    if not is_file(RunDirectory(config.run_dir).config):
        return False
    _check_same_model(config)
    state = read_run_state(config.run_dir)
    step = state.step if wanted is None else step_of(wanted)
    if step > config.total_steps:
        raise ConfigError(
            f"train.steps: {config.total_steps}, but the run in {config.run_dir} is at step "
            f"{step} already"
        )
    return wanted is None and _is_complete(config, state)


def _is_complete(config: Config, state: RunState) -> bool:
    """Whether a run is finished, and its last checkpoint is there; else it is to be made again.

    Args:
        state: run_state.json.

    Raises:
        CheckpointError: the run has saved, and no checkpoint is left.
    """
    if state.status not in ("finished", "preempted") or not state.step:
        return False
    newest, complaints = newest_state(config.run_dir)
    if newest is None and not complaints:
        raise CheckpointError(
            f"{config.run_dir}: run_state.json says {state.status} at step {state.step}, and "
            "there is no checkpoint; put them back, or start anew in another run_dir"
        )
    last = newest.state.step if newest else None
    return state.status == "finished" and state.step == config.total_steps == last


def _check_same_model(config: Config) -> None:
    """Whether the model that the config names is still the one that its run began with.

    Raises:
        AnotherRun: its file has changed since; nothing in the shapes need tell.
    """
    begun = is_file(RunDirectory(config.run_dir).model_json)
    if not begun or (config.model.pretrained and not exists(config.model.pretrained)):
        return
    old = load_model_config(ModelConfig(pretrained=config.run_dir))
    if changes := changed_keys(old, load_model_config(config.model)):
        where = config.model.config or config.model.pretrained
        raise AnotherRun(
            "a run of another model",
            changes,
            f"model: {where} has changed since the run in {config.run_dir} began; choose another "
            "run_dir, or undo:",
        )
