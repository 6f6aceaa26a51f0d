"""`relora bench`: what a step of each method takes on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from relora.config import Config
from relora.engine.distributed import lone_rank
from relora.engine.precision import precision_of
from relora.errors import ConfigError
from relora.files import replacing, write_json
from relora.load import load_config
from relora.record.rundir import describe_environment
from relora.report.bench_figure import draw_bench
from relora.report.style import LIGHT, to_png
from relora.training.bench import Timing, measure_steps
from relora.training.bench_arms import DESCRIPTIONS, blocks_alone, variants
from relora.words import format_bytes, format_count, format_table

EXPLAINED = (
    "/ ARM: its time over that arm's, the median of the rounds. reached: its FLOPs over",
    "full_lean's, divided by / full_lean: below 1 less was saved in time than in products. peak:",
    "weights and Adam's state among it. A step is one micro-batch; W + s·B·A is formed in each.",
)


def bench(
    config: Config,
    given: Sequence[str],
    names: Sequence[str] | None = None,
    rounds: int = 9,
    to: Path | None = None,
    precision: Sequence[str] | None = None,
    blocks: int | None = None,
) -> int:
    """Print a table of the arms' steps for each precision.

    Args:
        given: the config's path and its overrides.
        names: of arms; None for all there are.
        to: a directory for `bench.json` and `bench.png`.
        precision: None for the config's.
        blocks: measure so many of the model's blocks alone.

    Raises:
        ConfigError: there is no such arm, or the config does not go with a precision.
    """
    wanted = precision or [config.deepspeed.precision]
    configs = {
        name: load_config(Path(given[0]), [*given[1:], f"deepspeed.precision={name}"])
        for name in dict.fromkeys(wanted)
    }
    for name, each in configs.items():
        if precision_of(each.deepspeed.precision).is_deepspeeds:
            raise ConfigError(f"{name} is DeepSpeed's engine, and none runs here; take another "
                              "--precision")  # fmt: skip
    chosen = _checked(config, names)
    if to is not None:
        to.mkdir(parents=True, exist_ok=True)
    print(_title(config, rounds, blocks))
    if "peft" not in chosen and names is None and config.lora and config.lora.rank:
        print("peft is not installed, so its layer is left out: pip install peft")
    tables: dict[str, list[Timing]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, each in configs.items():
            cut = blocks_alone(each, blocks, Path(directory)) if blocks else each
            arms = {arm: variant for arm, variant in variants(cut).items() if arm in chosen}
            tables[name] = list(measure_steps(arms, rounds, blocks is not None).values())
            print("", *_lines(name, tables[name], config), sep="\n")
    print("", *EXPLAINED, sep="\n")
    if to is not None:
        _write(to, tables, list(given), rounds, blocks)
        print(f"\nwritten: {to / 'bench.json'}, {to / 'bench.png'}")
    return 0


def _checked(config: Config, names: Sequence[str] | None) -> list[str]:
    known = list(variants(config))
    for name in names or ():
        if name == "peft" and name not in known and config.lora and config.lora.rank:
            raise ConfigError("--arms: peft: is not installed; pip install peft")
        if name not in known:
            raise ConfigError(f"--arms: {name}: this config has {', '.join(known)}")
    return [name for name in known if names is None or name in names]


def _title(config: Config, rounds: int, blocks: int | None) -> str:
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    batch = f"{config.batch.micro_batch_size} × {config.data.sequence_length} tokens"
    what = f"{blocks} blocks alone, " if blocks else ""
    return f"{device}, torch {torch.__version__}; {what}{batch} a step, {rounds} rounds"


def _lines(precision: str, timings: Sequence[Timing], config: Config) -> list[str]:
    """A table of the arms, and what merges take."""
    others = list(timings[0].ratios)
    reached = "full_lean" in others
    gpu = any(one.mfu is not None for one in timings)
    heads = [precision, "ms/step", "±", *(f"/ {other}" for other in others), "FLOPs/token"]
    heads += ["reached"] * reached + ["MFU"] * gpu
    rows = [[*heads, "tokens/s", "saved/token", "peak", "kernels/block", "/step"]]
    for one in timings:
        kernels = "–" if one.block_launches is None else f"{one.block_launches}"
        rows.append(
            [one.arm, f"{one.ms:.1f}", f"{one.spread_ms:.1f}"]
            + [f"{one.ratios[other]:.3f}" for other in others]
            + [format_count(one.flops)]
            + ([] if one.reached is None else [f"{one.reached:.3f}"])
            + ([f"{one.mfu:.1%}" if one.mfu else "–"] if gpu else [])
            + [f"{one.tokens_per_s:,.0f}", f"{one.saved_bytes:,.0f} B"]
            + [format_bytes(one.peak_bytes), kernels, f"{one.launches:,}"]
        )
    lines = format_table(rows, "<" + ">" * (len(rows[0]) - 1))
    for one in timings:
        if one.merge_ms is not None and config.relora is not None:
            lines.append(
                f"a merge of {one.arm} takes {one.merge_ms:,.1f} ms: {one.merge_share:.4%} of a "
                f"cycle of {config.relora.cycle_steps:,} such steps"
            )
    return lines


def _write(
    to: Path,
    tables: dict[str, list[Timing]],
    given: list[str],
    rounds: int,
    blocks: int | None,
) -> None:
    """All figures as JSON, and a picture."""
    values = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": describe_environment(lone_rank()),
        "config": given,
        "rounds": rounds,
        "blocks": blocks,
        "arms": DESCRIPTIONS,
        "steps": {name: [one._asdict() for one in each] for name, each in tables.items()},
    }
    write_json(to / "bench.json", values)
    with replacing(to / "bench.png", durable=False) as temporary:
        temporary.write_bytes(to_png(partial(draw_bench, tables, LIGHT), LIGHT))
