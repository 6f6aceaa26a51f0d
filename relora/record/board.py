"""What TensorBoard shows of a run.

Event files lie in the run directory itself, so `tensorboard --logdir runs` calls each run by its
directory's name. Its axis is the step. A second one, `NAME/tokens`, has the main figures over
tokens, as tags of their own: a chart with both axes in it could not be read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent
from typing import Any

from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR, Summary, SummaryMetadata
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from relora.record import keys
from relora.record.layout import RunDirectory

OVER_TOKENS = (keys.TRAIN_LOSS, keys.EVAL_LOSS, keys.PERPLEXITY, keys.LR, keys.GRAD_NORM)


def _chart(*tags: str) -> list[Any]:
    """One chart of these tags; TensorBoard takes them as patterns."""
    return ["Multiline", [f"{tag}$" for tag in tags]]


def _over_tokens(*figures: str) -> list[Any]:
    return _chart(*(keys.OVER_TOKENS_PREFIX + key for key in figures))


# The dashboard "Custom Scalars".
LAYOUT = {
    "Over steps": {
        "loss": _chart(keys.TRAIN_LOSS, keys.EVAL_LOSS),
        "learning rate": _chart(keys.LR),
        "norm of the gradient": _chart(keys.GRAD_NORM),
        "norms of updates by those of weights": _chart(keys.UPDATE_RATIO, keys.TOTAL_RATIO),
        "memory (GiB)": _chart(keys.MEMORY_GIB),
    },
    "Over tokens": {
        "loss": _over_tokens(keys.TRAIN_LOSS, keys.EVAL_LOSS),
        "perplexity": _over_tokens(keys.PERPLEXITY),
        "learning rate": _over_tokens(keys.LR),
        "norm of the gradient": _over_tokens(keys.GRAD_NORM),
    },
}


@dataclass
class _Level:
    """The newest value of a scalar: where it was written, and as far as it is known to hold."""

    value: float
    written: int
    holds: int


class Board:
    """Writes one run's figures for TensorBoard.

    A scalar that stays as it is gets a point where it begins and one where it ends, so a figure
    that never changes costs two.

    Args:
        run_dir: the run directory, which exists.
        resumed_at: step the run goes on from; what an earlier process wrote of later ones goes.
        resumed_tokens: as many as the run had been trained on by then.
    """

    def __init__(self, run_dir: Path, resumed_at: int, resumed_tokens: int) -> None:
        files = RunDirectory(run_dir)
        self._steps = SummaryWriter(str(files.path), purge_step=resumed_at + 1)
        self._tokens = SummaryWriter(str(files.over_tokens), purge_step=resumed_tokens + 1)
        self._levels: dict[tuple[SummaryWriter, str], _Level] = {}
        self._newest: tuple[int, set[str]] = (-1, set())  # what there is of the newest step
        self._steps.add_custom_scalars(LAYOUT)

    def add(self, step: int, values: Mapping[str, float | int | str | Sequence[float]]) -> None:
        """The figures of a line; text as text, and of lists nothing."""
        if step != self._newest[0]:
            self._newest = (step, set())
        known, tokens = self._newest[1], values.get(keys.TOKENS)
        for key, value in values.items():
            if key in known:  # an evaluation says again where it stands
                continue
            known.add(key)
            if isinstance(value, str):
                self._steps.add_text(key, value, step)
            elif isinstance(value, int | float) and not isinstance(value, bool):
                self._scalar(self._steps, key, value, step)
                if key in OVER_TOKENS and isinstance(tokens, int):
                    self._scalar(self._tokens, keys.OVER_TOKENS_PREFIX + key, value, tokens)

    def add_text(self, step: int, key: str, text: str) -> None:
        """A text as it is."""
        # Indented by four it is code to Markdown, which keeps its lines and signs.
        self._steps.add_text(key, indent(text, "    ", lambda _: True), step)

    def add_figure(self, step: int, key: str, figure: Any) -> None:
        """A matplotlib figure."""
        self._steps.add_figure(key, figure, step)

    def conclude(self, settings: Mapping[str, Any], results: Mapping[str, float]) -> None:
        """The run's settings and final figures, for the HParams tab."""
        plain = {k: v if isinstance(v, bool | int | float) else str(v) for k, v in settings.items()}
        # SummaryWriter.add_hparams would make a run of its own beside this one.
        for summary in hparams(plain, dict(results)):
            self._steps._get_file_writer().add_summary(summary)

    def close(self) -> None:
        """Write the ends of what has not changed, and close the files."""
        for (writer, tag), level in self._levels.items():
            _end(writer, tag, level)
        self._steps.close()
        self._tokens.close()

    def _scalar(self, writer: SummaryWriter, tag: str, value: float, place: int) -> None:
        level = self._levels.get((writer, tag))
        if level is not None and value == level.value:
            level.holds = place
            return
        if level is not None:
            _end(writer, tag, level)
        figure = tag.removeprefix(keys.OVER_TOKENS_PREFIX)
        # A tag is described where it begins; `SummaryWriter.add_scalar` has no room for it.
        _write(writer, tag, value, place, "" if level else keys.MEANINGS.get(figure, ""))
        self._levels[writer, tag] = _Level(value, place, place)


def _end(writer: SummaryWriter, tag: str, level: _Level) -> None:
    """The last point of a level, without which a line would lead from its first to the next."""
    if level.holds > level.written:
        _write(writer, tag, level.value, level.holds)


def _write(
    writer: SummaryWriter, tag: str, value: float, place: int, description: str = ""
) -> None:
    about = None
    if description:
        about = SummaryMetadata(
            summary_description=description,
            plugin_data=SummaryMetadata.PluginData(plugin_name="scalars"),
            data_class=DATA_CLASS_SCALAR,  # else TensorBoard's fast reader drops the description
        )
    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value, metadata=about)])
    writer._get_file_writer().add_summary(summary, place)
