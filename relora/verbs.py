"""The verbs of the command line with their arguments; every help text ends in an example."""

from __future__ import annotations

import argparse
from pathlib import Path

from relora.argument_types import (
    above_0,
    few,
    positive,
    seconds,
    temperature,
    up_to_1,
    utf8_text,
    whole,
)
from relora.engine.precision import NAMES
from relora.version import __version__

Verbs = argparse._SubParsersAction  # of argparse.ArgumentParser
GPU_NAMES = ("b200", "h200", "h100", "a100", "a100-40", "l40s", "a6000", "4090", "3090", "mi300x")
OVERRIDES = "dotted overrides of the config file, such as optimizer.lr=1e-3 or relora=null"


def build_parser() -> argparse.ArgumentParser:
    """All verbs with their arguments; every help text ends in an example."""
    parser = argparse.ArgumentParser(
        prog="relora",
        description="Pretrain transformers by ReLoRA on DeepSpeed.",
        epilog="example: relora prepare configs/quickstart_relora.yaml && "
        "relora launch --devices 2 configs/quickstart_relora.yaml",
    )
    parser.add_argument("--version", action="version", version=f"relora {__version__}")
    # The deepspeed launcher puts this before the verb; the environment says the same.
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    _add_starting_verbs(verbs)
    _add_training_verbs(verbs)
    _add_arms(verbs)
    _add_reading_verbs(verbs)
    _add_export(verbs)
    _add_comparing_verbs(verbs)
    return parser


def _add_starting_verbs(verbs: Verbs) -> None:
    """Those that make a config, or explain one."""
    init = _verb(
        verbs,
        "init",
        "write a config to start from, every key explained in it",
        "relora init --from llama_130m --data 'text/*.jsonl' --to mine.yaml",
    )
    init.add_argument(
        "--to", type=Path, default=Path("relora.yaml"), metavar="FILE", help="(relora.yaml)"
    )
    init.add_argument(
        "--from",
        dest="start",
        default="quickstart",
        metavar="NAME|FILE",
        help="what to begin with: quickstart, llama_60m … llama_7b, published/llama_60m, a file",
    )
    init.add_argument(
        "--data", nargs="+", default=(), metavar="GLOB", help="files of text (Python's own source)"
    )
    init.add_argument(
        "--model",
        type=Path,
        metavar="JSON|DIR",
        help="a transformers config, or a directory; with weights in it they are gone on from",
    )
    init.add_argument(
        "--tokenizer",
        metavar="DIR|FILE|NAME",
        help="a directory of transformers, a sentencepiece .model file, or a name on the hub (one "
        "is trained on the text)",
    )
    init.add_argument("--force", action="store_true", help="replace a file")

    schema = _verb(
        verbs,
        "schema",
        "the JSON schema of config files, with which editors complete and check them",
        "relora schema > relora.schema.json",
    )
    schema.add_argument("--markdown", action="store_true", help="a table of all keys instead")


def _add_training_verbs(verbs: Verbs) -> None:
    """Those that take a config."""
    plan = _verb(
        verbs,
        "plan",
        "show a run before spending on it: timeline, parameters, memory, FLOPs, hours, warnings",
        "relora plan configs/llama_60m_relora.yaml --devices 4 --tokens-per-s 400000 "
        "--png plan.png relora.cycle_steps=2500",
    )
    _config(plan)
    plan.add_argument("--devices", type=positive, default=1, metavar="N", help="ranks to plan for")
    plan.add_argument("--png", type=Path, metavar="FILE", help="draw the timeline there too")
    plan.add_argument(
        "--tokens-per-s",
        type=above_0,
        metavar="X",
        help="of the whole job, all ranks together: gives hours and GPU-hours",
    )
    plan.add_argument(
        "--gpu",
        choices=GPU_NAMES,
        metavar="KIND",
        help=f"estimate hours on this kind, and say whether it fits: {', '.join(GPU_NAMES)}",
    )
    plan.add_argument("--mfu", type=up_to_1, default=0.4, metavar="M", help="of its peak (0.4)")
    plan.add_argument("--price", type=above_0, metavar="P", help="of a GPU-hour: gives the cost")

    bench = _verb(
        verbs,
        "bench",
        "time a step of each method here, interleaved, on random tokens: one process, no data",
        "relora bench configs/llama_60m_relora.yaml batch.micro_batch_size=4 --precision fp32 bf16",
    )
    _config(bench)
    bench.add_argument(
        "--arms",
        dest="names",
        nargs="+",
        metavar="ARM",
        help="of full, full_lean, published, peft, relora, frozen_a (all)",
    )
    bench.add_argument("--precision", nargs="+", choices=NAMES, help="a table for each")
    bench.add_argument(
        "--blocks", type=few, metavar="N", help="N blocks alone: no embeddings, head and loss"
    )
    bench.add_argument("--rounds", type=few, default=9, metavar="N", help="that count (9)")
    bench.add_argument("--to", type=Path, metavar="DIR", help="write bench.json and bench.png")

    prepare = _verb(
        verbs,
        "prepare",
        "text → tokenizer → token shards; goes on where it was stopped",
        "relora prepare configs/quickstart_relora.yaml",
    )
    _config(prepare)
    prepare.add_argument("--workers", type=few, default=None, help="processes (all cores)")

    train = _verb(
        verbs,
        "train",
        "train, or go on with, a run: one process, or one rank under the launcher",
        "deepspeed --num_gpus 2 --module relora train configs/quickstart_relora.yaml; or "
        "relora train configs/quickstart_relora.yaml "
        "--resume runs/quickstart_relora/checkpoints/step_00000200",
    )
    _config(train)
    _resume(train)

    launch = _verb(
        verbs,
        "launch",
        "train on many devices: the deepspeed launcher with a free port, signals and exit code",
        "relora launch --devices 2 configs/quickstart_relora.yaml; or relora launch --devices 2 "
        "configs/quickstart_relora.yaml "
        "--resume runs/quickstart_relora/checkpoints/step_00000200",
    )
    _where(launch)
    _config(launch)
    _resume(launch)

    resume = _verb(
        verbs,
        "resume",
        "go on with a run by its own config: one process, or with --devices or --hostfile many",
        "relora resume runs/quickstart_relora --devices 2 train.steps=520",
    )
    _where(resume)
    _config(resume, "RUN", "a run directory")
    _resume(resume)


def _add_arms(verbs: Verbs) -> None:
    """What `launch/compare.sh` trains."""
    arms = _verb(
        verbs,
        "arms",
        "train full rank, LoRA, ReLoRA and other arms of a config, one after the other",
        "relora arms configs/quickstart_relora.yaml --to runs/arms --seeds 3 --devices 2",
    )
    _config(arms)
    arms.add_argument("--to", type=Path, required=True, metavar="DIR", help="where the runs go")
    arms.add_argument(
        "--arms", type=Path, metavar="FILE", help="YAML; the paper's arms if not given"
    )
    arms.add_argument("--seeds", type=few, metavar="N", help="0 … N − 1 (those of FILE, or 0)")
    arms.add_argument("--devices", type=positive, metavar="N", help="ranks here (all GPUs)")


def _add_reading_verbs(verbs: Verbs) -> None:
    """Those that take the model that a run has left."""
    evaluate = _verb(
        verbs,
        "evaluate",
        "token-weighted loss, perplexity and bits per byte of a run or a checkpoint, on any text; "
        "alone, or as one rank under the launcher",
        "relora evaluate runs/quickstart_relora; or relora evaluate runs/quickstart_relora "
        "data.source=english; or deepspeed --num_gpus 2 --module relora evaluate runs/big",
    )
    _run_or_checkpoint(evaluate)
    evaluate.add_argument(
        "--split",
        choices=("train", "validation", "all"),
        help="validation of the run's own text, and all of another, if not given",
    )
    evaluate.add_argument("--max-sequences", type=positive, default=None, metavar="N")
    evaluate.add_argument("--batch-size", type=positive, default=16, metavar="N")
    evaluate.add_argument(
        "overrides",
        nargs="*",
        metavar="data.…=…",
        help="where the shards of the run are now (data.dir=DIR), or another text "
        "(data.source=english, 'data.source.files=[book.txt]', data.source.cut=blank_lines)",
    )

    generate = _verb(
        verbs,
        "generate",
        "continue a text",
        "relora generate runs/quickstart_relora --prompt 'def main('",
    )
    _run_or_checkpoint(generate)
    generate.add_argument("--prompt", type=utf8_text, required=True, metavar="TEXT")
    generate.add_argument("--max-new-tokens", type=positive, metavar="N", help="100, if they fit")
    generate.add_argument("--temperature", type=temperature, default=0.8, help="0 is greedy")
    generate.add_argument("--top-k", type=positive, default=50, metavar="K")
    generate.add_argument("--seed", type=whole, default=0)


def _add_export(verbs: Verbs) -> None:
    export = _verb(
        verbs,
        "export",
        "write a merged model that transformers loads, or adapters that PEFT loads",
        "relora export runs/quickstart_relora --to runs/quickstart_relora/export; or relora export "
        "runs/quickstart_relora --to runs/delta --format delta --tolerance 0.1",
    )
    _run_or_checkpoint(export)
    export.add_argument("--to", type=Path, required=True, metavar="DIR")
    export.add_argument(
        "--format",
        choices=("hf", "peft", "delta"),
        default="hf",
        help="one merged model; the run's adapters beside their base; what the run has changed, "
        "as adapters by truncated SVD beside what it began with",
    )
    export.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    export.add_argument("--rank", type=positive, metavar="R", help="of every matrix of delta")
    export.add_argument(
        "--tolerance",
        type=above_0,
        metavar="E",
        help="in place of a rank: the largest relative Frobenius error of a matrix of delta",
    )
    export.add_argument(
        "--max-shard-size", default="50GB", metavar="SIZE", help="of a file of weights: 5GB"
    )
    export.add_argument(
        "--license",
        metavar="ID",
        help="for the model card: apache-2.0, say; otherwise that of the base model's card, if any",
    )
    export.add_argument("--force", action="store_true", help="replace an earlier export")


def _add_comparing_verbs(verbs: Verbs) -> None:
    compare = _verb(
        verbs,
        "compare",
        "one report on finished or running runs: perplexity at equal tokens, time and memory",
        "relora compare runs/quickstart_relora runs/quickstart_full --to runs/quickstart_report; "
        "or relora compare full=runs/a relora=runs/b --to report --watch",
    )
    compare.add_argument(
        "runs",
        nargs="+",
        metavar="[NAME=]RUN",
        help="a run directory; runs that differ by their seed alone, or bear one name, are one arm",
    )
    compare.add_argument("--to", type=Path, required=True, metavar="DIR")
    compare.add_argument(
        "--watch",
        type=seconds,
        nargs="?",
        const=30.0,
        metavar="SECONDS",
        help="renew the report (every 30 s) until all runs have finished or failed",
    )
    compare.add_argument(
        "--baseline", metavar="NAME", help="the arm that others are compared with (full rank)"
    )

    verify = _verb(
        verbs,
        "verify",
        "check a checkpoint's files against its manifest",
        "relora verify runs/quickstart_relora/checkpoints/step_00000300",
    )
    verify.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")


def _verb(verbs: Verbs, name: str, help: str, example: str) -> argparse.ArgumentParser:
    return verbs.add_parser(name, help=help, description=help, epilog=f"example: {example}")


def _config(
    parser: argparse.ArgumentParser,
    metavar: str = "CONFIG",
    help: str = "a YAML file, a run directory, or a name that comes with relora: llama_60m_relora",
) -> None:
    parser.add_argument("config", type=Path, metavar=metavar, help=help)
    parser.add_argument("overrides", nargs="*", default=[], metavar="a.b=c", help=OVERRIDES)


def _where(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--devices", type=positive, metavar="N", help="ranks here (all GPUs)")
    where.add_argument("--hostfile", type=Path, metavar="F", help="lines of `host slots=N`")


def _resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|CHECKPOINT",
        help="go on from the newest sound checkpoint (auto), or from this one of the run, after "
        "which later checkpoints and figures go",
    )
    parser.add_argument(
        "--change",
        action="store_true",
        help="a run that has begun goes on with this config's rates, schedule and batch, on record",
    )


def _run_or_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="RUN|CHECKPOINT")
