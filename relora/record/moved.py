"""Runs, models and data that lie elsewhere by now: found again, and compared by what they hold."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from relora.config import Config
from relora.data.config import DataConfig
from relora.data.shards import open_shards, shard_directory
from relora.errors import UserError
from relora.files import exists, is_file
from relora.load import differences, load_run_config
from relora.locate import PATHS
from relora.record.checkpoint import is_checkpoint, named_checkpoints, newest_state
from relora.record.layout import MANIFEST, RunDirectory
from relora.record.loaded import is_run_or_checkpoint
from relora.record.rundir import read_stretches


def moved_path(path: Path, config: Config, run_dir: Path) -> Path:
    """Where a path of a run's config is: as written, or where it lies from the run directory now.

    So a run and what lies beside it can be moved together, and be named from any folder.

    Args:
        run_dir: where the run directory is; `config.run_dir` is what it was called.
    """
    return next((p for p in (path, *_beside_run(path, config, run_dir)) if exists(p)), path)


def _beside_run(path: Path, config: Config, run_dir: Path) -> list[Path]:
    if path.is_absolute() != config.run_dir.is_absolute():
        return []
    relative = os.path.relpath(path, config.run_dir)
    return [Path(os.path.normpath(run_dir.absolute() / relative))]


def data_candidates(config: Config, run_dir: Path) -> list[DataConfig]:
    """The `data` sections under which a run's shards may be found by now, the likeliest first."""
    settings = [config]
    hints: list[Any] = []
    # Whoever shows what is in these files says what is wrong with them.
    with suppress(UserError):
        settings.append(load_run_config(run_dir))
    with suppress(UserError):
        hints = [stretch.get("shards") for stretch in reversed(read_stretches(run_dir))]
    found: list[DataConfig] = []
    for one in settings:
        places = [one.data.dir, *_beside_run(one.data.dir, one, run_dir)]
        places += [Path(hint).parent for hint in hints if isinstance(hint, str)]
        found += [one.data.model_copy(update={"dir": place}) for place in places]
    return found


def prepared_data(config: Config) -> DataConfig:
    """The `data` section under which the shards of a run that is to be trained are there.

    As configured if that can be; else where the run had them, under the same settings.
    """
    if not exists(RunDirectory(config.run_dir).config):
        return config.data
    wanted = shard_directory(config.data).name
    for data in (config.data, *data_candidates(config, config.run_dir)):
        directory = shard_directory(data)
        if directory.name == wanted and is_file(directory / "index.json"):
            return data
    return config.data


def moved_paths(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """Those differences of two configs that may be no more than another place."""
    return [
        (path, before, after)
        for path, before, after in differences(old, new)
        if path in PATHS and before is not None and after is not None
    ]


def moved_lines(old: Config, new: Config) -> list[str]:
    """What a run says of paths that are written otherwise than when it began."""
    return [
        f"{path}: was {before}, is now {after}: moved, what it holds is the same"
        for path, before, after in moved_paths(old, new)
    ]


def other_contents(old: Config, new: Config) -> Iterator[str]:
    """Each path of a run's config that holds something else now, in words.

    The model's structure is not looked at here: `record.standing` compares it.
    """
    paths = moved_paths(old, new)
    texts = [one for one in paths if one[0].startswith("data.")]
    standing, _ = newest_state(new.run_dir)
    if texts and standing is not None:  # else it begins anew, with what is there
        data = prepared_data(new)
        there = is_file(shard_directory(data) / "index.json")
        if not there or open_shards(data).fingerprint != standing.state.data:
            why = (
                "other text" if there else "not prepared (relora prepare CONFIG), so it is unknown"
            )
            yield from (f"{path}: was {was!r}, is now {now!r}: {why}" for path, was, now in texts)
    for path, was, now in paths:
        if path == "model.pretrained":
            before = moved_path(Path(was), old, new.run_dir)
            if exists(before) and not _same_weights(before, Path(now)):
                yield f"{path}: was {was!r}, is now {now!r}: other weights"


def _same_weights(one: Path, other: Path) -> bool:
    """Whether two places hold the same weights, byte for byte."""
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    a, b = _weight_files(one), _weight_files(other)
    return a.keys() == b.keys() and all(filecmp.cmp(a[n], b[n], shallow=False) for n in a)


def _weight_files(place: Path) -> dict[str, Path]:
    """The files that tell the weights in a place apart from others, by name."""
    if is_run_or_checkpoint(place):
        checkpoint = [place] if is_checkpoint(place) else named_checkpoints(place)[-1:]
        found = [each / MANIFEST for each in checkpoint]  # it has all hashes
        return {path.name: path for path in found if is_file(path)}
    return {path.name: path for path in place.glob("*.safetensors")}
