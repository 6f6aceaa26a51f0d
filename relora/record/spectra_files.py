"""Files of spectra: W_start of each layer, and what was measured after a step.

A measurement is a safetensors file with keys `layer|what`, put together of the parts that the ranks
have written. Its metadata holds the step, the number of the merge that followed (empty if none
did), and a row of figures for each layer.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from relora.files import TEMPORARY, replacing
from relora.record.layout import RunDirectory

# What a measurement leaves, whole or not.
_FILE = re.compile(rf"step_([0-9]{{8,}})\.(safetensors|rank_[0-9]{{4,}})({TEMPORARY}|\.tmp)?")


@dataclass(frozen=True)
class Measurement:
    """One file: what was measured after a step."""

    file: Any  # open: a run that goes back removes what it measured after that
    step: int
    merge: int | None  # None = the end of the run, or between merges
    layers: dict[str, dict[str, Any]]

    def tensor(self, layer: str, kind: str) -> Any:
        """A tensor of the file, as numpy; None if it has none of that name."""
        name = f"{layer}|{kind}"
        return self.file.get_tensor(name) if name in self.file.keys() else None  # noqa: SIM118

    def median(self, figure: str) -> float | None:
        """Over the layers that have it."""
        values = [layer.get(figure) for layer in self.layers.values()]
        known = [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]
        return statistics.median(known) if known else None


def read_measurements(run_dir: Path) -> tuple[list[Measurement], list[str]]:
    """A run's measurements by step, and a complaint about each file that cannot be read."""
    found, complaints = [], []
    for path in measurements(run_dir):
        try:
            if not path.is_file():  # a FIFO would be waited for
                raise OSError("no plain file")
            file = safe_open(path, framework="numpy").__enter__()
            metadata = file.metadata() or {}
            layers = {layer["name"]: layer for layer in json.loads(metadata["layers"])}
            merge = int(metadata["merge"]) if metadata.get("merge") else None
            found.append(Measurement(file, int(metadata["step"]), merge, layers))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            complaints.append(f"{path}: is left out, since it cannot be read: {error!r}")
    return sorted(found, key=lambda measurement: measurement.step), complaints


def measurements(run_dir: Path) -> list[Path]:
    """The files of a run's measurements, in the order of steps."""
    found = _left(run_dir)
    return [path for _, path in sorted((int(m[1]), p) for p, m in found if _is_whole(m))]


def drop_measurements(run_dir: Path, step: int) -> None:
    """Remove those of later steps, unfinished ones too; they come again. Rank 0 only."""
    for path, match in _left(run_dir):
        if int(match[1]) > step:
            path.unlink()


def write_start(run_dir: Path, layer: str, weight: Tensor, step: int) -> None:
    """Keep a layer's weight of a step, to count its updates from."""
    path = RunDirectory(run_dir).spectra_start(layer)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, {"weight": weight}, {"step": str(step)})


@contextmanager
def open_start(run_dir: Path, layer: str, wanted: int | None) -> Iterator[Any]:
    """The file of a layer's W_start, if it is that of the step which is wanted.

    Raises:
        ValueError: it is of another.
    """
    path = RunDirectory(run_dir).spectra_start(layer)
    with safe_open(path, framework="pt") as file:
        step = (file.metadata() or {}).get("step")
        if step != str(wanted):  # spectra.start has been changed since
            raise ValueError(f"{path.name} is of step {step}, spectra.start says {wanted}")
        yield file


def directions_of_cycle(run_dir: Path, merge: int) -> dict[str, Tensor]:
    """Left directions of the cycle that ended in a merge, by layer; empty if there was none."""
    for path in reversed(measurements(run_dir)) if merge else ():
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("merge") == str(merge):
                ending = "|cycle_left"
                names = [key for key in file.keys() if key.endswith(ending)]  # noqa: SIM118
                found = {key.removesuffix(ending): file.get_tensor(key) for key in names}
                return {
                    n: x for n, x in found.items() if file.get_tensor(f"{n}|cycle_values").any()
                }
    return {}


def read_tensors(run_dir: Path, step: int) -> dict[str, Tensor]:
    """All tensors of a measurement, by `layer|what`."""
    return load_file(RunDirectory(run_dir).measurement(step))


def write_part(part: Path, tensors: dict[str, Tensor]) -> None:
    """What one rank has measured."""
    _write(part, tensors)


def join_parts(
    run_dir: Path, step: int, world: int, merge: int | None, layers: list[dict[str, Any]]
) -> None:
    """Make one file of those that the ranks have written. Rank 0 only."""
    files = RunDirectory(run_dir)
    # Not those of ranks that there were before a kill.
    parts = [files.part_of_measurement(step, rank) for rank in range(world)]
    tensors = {name: tensor for part in parts for name, tensor in load_file(part).items()}
    metadata = {"step": str(step), "merge": str(merge or ""), "layers": json.dumps(layers)}
    _write(files.measurement(step), tensors, metadata)
    for part in parts:
        part.unlink()


def _left(run_dir: Path) -> list[tuple[Path, re.Match[str]]]:
    """Files that measurements have left, whole or not."""
    found = ((p, _FILE.fullmatch(p.name)) for p in RunDirectory(run_dir).spectra.glob("step_*"))
    return [(path, match) for path, match in found if match]


def _is_whole(match: re.Match[str]) -> bool:
    return match[2] == "safetensors" and not match[3]


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a file whole or not at all."""
    plain = {name: t.float().cpu().contiguous() for name, t in tensors.items()}
    with replacing(path, durable=False) as temporary:
        save_file(plain, temporary, metadata=metadata)
