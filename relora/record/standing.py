"""What `relora train` makes of a run directory, by its files; `relora plan` says it before."""

from __future__ import annotations

from typing import Any

from relora.config import Config
from relora.errors import CheckpointError, UserError
from relora.files import exists, is_dir, is_file
from relora.load import MAY_CHANGE, PATHS, differences, load_run_config
from relora.model import ModelConfig, load_model_config
from relora.structure import changed_keys

SHOWN = 3  # differences


def standing(config: Config) -> str | None:
    """In one line what `train` would do with what is in `run_dir`; None for a run yet to begin."""
    run_dir = config.run_dir
    if exists(run_dir) and not is_dir(run_dir):
        return "train refuses it: it is no directory"
    if not is_file(run_dir / "config.yaml"):
        return None
    try:
        return _standing(config)
    except UserError as error:
        return f"train refuses it: {str(error).splitlines()[0]}"


def _standing(config: Config) -> str:
    from relora.record.checkpoint import complete_checkpoints
    from relora.record.manifest import step_of
    from relora.record.rundir import read_run_state

    changes = changes_of_run(config)
    if changes:
        return f"train refuses it: it holds another run: {_cut(changes)}"
    changes = changes_of_model(config)
    if changes:
        return f"train refuses it: it holds a run of another model: {_cut(changes)}"
    state = read_run_state(config.run_dir)
    total = config.total_steps
    if state.get("step", 0) > total:
        return f"train refuses it: it holds a run that is at step {state['step']:,} already"
    if is_complete(config, state):
        return "is finished: train has nothing to do"
    checkpoints = complete_checkpoints(config.run_dir)
    if not checkpoints:
        return "has begun: train starts again, for there is no checkpoint yet"
    return f"has begun: train goes on from step {step_of(checkpoints[-1]):,}"


def is_complete(config: Config, state: dict[str, Any]) -> bool:
    """Whether a run is finished, and its last checkpoint is there; else it is to be made again.

    Args:
        state: run_state.json.

    Raises:
        CheckpointError: the run has saved, and no checkpoint is left.
    """
    if state.get("status") not in ("finished", "preempted") or not state.get("step"):
        return False
    from relora.record.checkpoint import newest_state

    newest, complaints = newest_state(config.run_dir)
    if newest is None and not complaints:
        raise CheckpointError(
            f"{config.run_dir}: run_state.json says {state['status']} at step {state['step']}, and "
            "there is no checkpoint; put them back, or start anew in another run_dir"
        )
    last = newest.state["step"] if newest else None
    return state["status"] == "finished" and state["step"] == config.total_steps == last


def changes_of_run(config: Config) -> list[str]:
    """How a config differs from that of the run in its directory in what no run changes on its way.

    Paths are compared by what they hold.
    """
    from relora.record.moved import other_contents  # and torch with it

    before = load_run_config(config.run_dir)
    changes = [
        f"{path}: was {old!r}, is now {new!r}"
        for path, old, new in differences(before, config)
        if not path.startswith(MAY_CHANGE) and (path not in PATHS or None in (old, new))
    ]
    return changes or list(other_contents(before, config))


def changes_of_model(config: Config) -> list[str]:
    """How the model that the config names differs from the one that its run has begun with."""
    begun = is_file(config.run_dir / "model" / "config.json")
    if not begun or (config.model.pretrained and not exists(config.model.pretrained)):
        return []
    old = load_model_config(ModelConfig(pretrained=config.run_dir))
    return changed_keys(old, load_model_config(config.model))


def _cut(changes: list[str]) -> str:
    more = f", and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
    return ", ".join(changes[:SHOWN]) + more
