"""The verbs of the command line: arguments → a checked config → one module of `relora.commands`.

A command is imported once its config is known to be sound, so that help and config errors answer
at once. Its module imports what it likes.
"""

from __future__ import annotations

import argparse
import gc
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from relora.cores import limit_spinning
from relora.engine.launcher import speaks_for_machine
from relora.engine.precision import NAMES
from relora.engine.signals import follow_launcher, undisturbed
from relora.errors import ConfigError
from relora.files import as_user_error, mend_standard_streams
from relora.quiet import quiet_libraries
from relora.version import __version__

Verbs = argparse._SubParsersAction  # of argparse.ArgumentParser
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

    _add_training_verbs(verbs)
    _add_arms(verbs)
    _add_reading_verbs(verbs)
    _add_export(verbs)
    _add_comparing_verbs(verbs)
    return parser


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
    plan.add_argument("--devices", type=_positive, default=1, metavar="N", help="ranks to plan for")
    plan.add_argument("--png", type=Path, metavar="FILE", help="draw the timeline there too")
    plan.add_argument(
        "--tokens-per-s",
        type=_above_0,
        metavar="X",
        help="of the whole job, all ranks together: gives hours and GPU-hours",
    )

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
        "--blocks", type=_few, metavar="N", help="N blocks alone: no embeddings, head and loss"
    )
    bench.add_argument("--rounds", type=_few, default=9, metavar="N", help="that count (9)")
    bench.add_argument("--to", type=Path, metavar="DIR", help="write bench.json and bench.png")

    prepare = _verb(
        verbs,
        "prepare",
        "text → tokenizer → token shards; goes on where it was stopped",
        "relora prepare configs/quickstart_relora.yaml",
    )
    _config(prepare)
    prepare.add_argument("--workers", type=_few, default=None, help="processes (all cores)")

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
    where = launch.add_mutually_exclusive_group()
    where.add_argument("--devices", type=_positive, metavar="N", help="ranks here (all GPUs)")
    where.add_argument("--hostfile", type=Path, metavar="F", help="lines of `host slots=N`")
    _config(launch)
    _resume(launch)


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
    arms.add_argument("--seeds", type=_few, metavar="N", help="0 … N − 1 (those of FILE, or 0)")
    arms.add_argument("--devices", type=_positive, metavar="N", help="ranks here (all GPUs)")


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
    evaluate.add_argument("--max-sequences", type=_positive, default=None, metavar="N")
    evaluate.add_argument("--batch-size", type=_positive, default=16, metavar="N")
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
    generate.add_argument("--prompt", type=_text, required=True, metavar="TEXT")
    generate.add_argument("--max-new-tokens", type=_positive, default=100, metavar="N")
    generate.add_argument("--temperature", type=_temperature, default=0.8, help="0 is greedy")
    generate.add_argument("--top-k", type=_positive, default=50, metavar="K")
    generate.add_argument("--seed", type=_whole, default=0)


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
    export.add_argument("--rank", type=_positive, metavar="R", help="of every matrix of delta")
    export.add_argument(
        "--tolerance",
        type=_above_0,
        metavar="E",
        help="in place of a rank: the largest relative Frobenius error of a matrix of delta",
    )
    export.add_argument(
        "--max-shard-size", default="50GB", metavar="SIZE", help="of a file of weights: 5GB"
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
        type=_seconds,
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


def _import_quickly(name: str) -> Any:
    """A module whose imports make half a million objects, which stay: nothing of them is garbage,
    and looking for it takes a fifth of the time."""
    if name in sys.modules:
        return sys.modules[name]
    collecting = gc.isenabled()
    gc.disable()
    try:
        return import_module(name)
    finally:
        gc.freeze()
        if collecting:
            gc.enable()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code (0 done, 1 our bug, 2–6 and 75 as in the README)."""
    mend_standard_streams()
    limit_spinning()
    quiet_libraries()
    if sys.platform == "win32":  # signals, file locks and DeepSpeed's launcher are another matter
        print("relora: needs Linux; on Windows that is WSL 2", file=sys.stderr)
        return ConfigError.code
    parser = build_parser()
    known, rest = parser.parse_known_args(argv)
    arguments = vars(known)
    # argparse takes overrides before an option or after it, and not both.
    if rest and not ("overrides" in arguments and all("=" in r and r[0] != "-" for r in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments["overrides"] += rest
    verb = arguments.pop("verb")
    arguments.pop("local_rank")
    try:
        if "config" in arguments:
            arguments = _with_config(verb, arguments)
        command = getattr(_import_quickly(f"relora.commands.{verb}"), verb)
        code = command(**arguments) or 0
        sys.stdout.flush()  # here, where a full disk behind it is still one message
        return code
    except KeyboardInterrupt:  # the verbs that can be stopped in a better way catch it themselves
        print(f"relora: {verb} was stopped by Ctrl-C", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        told = as_user_error(error)
        if told is None:
            raise
        if speaks_for_machine():  # one message a machine, not one a rank
            with undisturbed():  # by the launcher, which stops a rank when another fails
                print(f"relora: {told}", file=sys.stderr)
        return told.code


def _with_config(verb: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A verb's arguments with the config it names read and checked, as far as that needs no torch.

    Verbs that name the config to others get it as it was `given` too: its path and overrides.

    Raises:
        ConfigError: the config is wrong in itself or does not fit the other arguments.
    """
    if verb == "train":
        follow_launcher()  # before anything that takes its time
    from relora.load import check_world, load_config  # pydantic, which `--help` can do without

    path, overrides = arguments["config"], arguments["overrides"]
    checked = {name: value for name, value in arguments.items() if name != "overrides"}
    checked["config"] = config = load_config(path, overrides)
    if verb in ("plan", "bench", "train", "launch", "arms"):
        checked["given"] = [str(path), *overrides]
    if verb == "plan":
        check_world(config, arguments["devices"])
    path = arguments.get("png")
    if path is not None and (not path.parent.is_dir() or path.is_dir()):
        raise ConfigError(f"--png {path}: {path.parent} is no directory, or {path.name} is one")
    return checked


def _whole(text: str, least: int = -(2**63), most: int = 2**63 - 1) -> int:
    """argparse type: a whole number, of 64 bits if nothing else is said."""
    value = int(text)
    if not least <= value <= most:
        bounds = f"at least {least:,}" if value < least else f"at most {most:,}"
        raise argparse.ArgumentTypeError(f"must be {bounds}")
    return value


def _positive(text: str) -> int:
    """argparse type: a whole number from 1 up."""
    return _whole(text, 1)


def _few(text: str) -> int:
    """argparse type: a number of things that are all listed, or started, at once."""
    return _whole(text, 1, 1024)


def _text(text: str) -> str:
    """argparse type: characters, and no bytes that are none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("is not UTF-8") from None
    return text


def _verb(verbs: Verbs, name: str, help: str, example: str) -> argparse.ArgumentParser:
    return verbs.add_parser(name, help=help, description=help, epilog=f"example: {example}")


def _temperature(text: str) -> float:
    value = float(text)
    if value != 0 and not 0.001 <= value <= 1e6:  # beyond, logits are no numbers any more
        raise argparse.ArgumentTypeError(f"{text}: must be 0 (greedy), or 0.001 … 1,000,000")
    return value


def _above_0(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be a number above 0")
    return value


def _seconds(text: str) -> float:
    """argparse type: a time to wait."""
    value = float(text)
    if not 0.1 <= value <= 86_400:
        raise argparse.ArgumentTypeError(f"{text}: must be 0.1 … 86,400 seconds")
    return value


def _config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help=OVERRIDES)


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
