"""How long things take to begin, and text to become tokens, beside what nobody can do without.

    PYTHONPATH=tests python configs/experiments/startup.py

Medians of interleaved rounds, each in a process of its own: imports and `--help` beside an empty
Python; `relora train` of a tiny model, its first step and a checkpoint, beside importing what it
must; what `relora prepare` does, with one worker and a tokenizer that there is, beside plain
sentencepiece on the same files with the same model. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from relora.data.config import DataConfig
from relora.data.corpus import source_files
from relora.data.prepare import prepare_shards
from runs import make_config

FEW = 50  # files, by which the cost of beginning is told from that of going on
LIBRARIES = "import deepspeed; from transformers import LlamaForCausalLM"  # and torch by them
TRAIN = "import sys; from relora.cli import main; sys.exit(main(sys.argv[1:]) - 75)"
PREPARE = """
import sys
from relora.data.config import DataConfig
from relora.data.prepare import prepare_shards
if __name__ == "__main__":
    model, where = sys.argv[1:]
    values = {
        "source": {"files": sys.stdin.read().splitlines()},
        "sequence_length": 256,
        "validation_fraction": 0.2,
        "dir": where,
        "tokenizer": {"path": model},
    }
    prepare_shards(DataConfig.model_validate(values), workers=1, quiet=True)
"""
SENTENCEPIECE = """
import sys
import numpy as np, sentencepiece
encode = sentencepiece.SentencePieceProcessor(model_file=sys.argv[1]).encode
with open(sys.argv[2], "wb") as out:
    for name in sys.stdin.read().splitlines():
        text = open(name, encoding="utf8").read()
        np.array(encode(text), np.uint16).tofile(out)
"""


def seconds(command: list[str], given: str = "") -> float:
    """Wall time of a process."""
    began = time.perf_counter()
    subprocess.run(command, input=given, text=True, capture_output=True, check=True)
    return time.perf_counter() - began


def python(code: str, *arguments: str) -> list[str]:
    """A command that runs code."""
    return [sys.executable, "-c", code, *arguments]


def _is_utf8(path: Path) -> bool:
    try:
        path.read_text(encoding="utf8")
    except UnicodeDecodeError:  # the standard library has some, to test what reads them
        return False
    return True


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    took: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        first = DataConfig.model_validate(
            {
                "source": "python",
                "sequence_length": 256,
                "dir": root / "first",
                "tokenizer": {"train": "bpe", "vocab_size": 4096},
            }
        )
        model = str(prepare_shards(first, quiet=True) / "tokenizer" / "tokenizer.model")
        found = source_files(first.source) or {}
        paths = [path for each in found.values() for _, path in each]
        files = [str(path) for path in paths if _is_utf8(path)]
        script, tiny = root / "prepare.py", make_config(root / "run")
        script.write_text(PREPARE)
        for number in range(rounds):
            run = ["train", str(tiny), f"run_dir={root / f'run{number}'}", "train.stop_after=1"]
            commands = {
                "nothing": python("pass"),
                "import relora": python("import relora"),
                "relora --help": [sys.executable, "-m", "relora", "--help"],
                "imports": python(LIBRARIES),
                "relora train": python(TRAIN, *run),
            }
            for what, command in commands.items():
                took[what].append(seconds(command))
            for few, chosen in (("few", files[:FEW]), ("all", files)):
                to, given = str(root / f"{few}{number}"), "\n".join(chosen)
                plain = python(SENTENCEPIECE, model, f"{to}.bin")
                took[f"{few} by sentencepiece"].append(seconds(plain, given))
                took[f"{few} by prepare"].append(
                    seconds([sys.executable, str(script), model, to], given)
                )
    for tool in ("sentencepiece", "prepare"):
        pairs = zip(took[f"all by {tool}"], took[f"few by {tool}"], strict=True)
        took[tool] = [whole - part for whole, part in pairs]
    print("| what | seconds | times | what |\n|---|---|---|---|")
    for what, other in (
        ("import relora", "nothing"),
        ("relora --help", "nothing"),
        ("relora train", "imports"),
        ("few by prepare", "few by sentencepiece"),
        ("all by prepare", "all by sentencepiece"),
        ("prepare", "sentencepiece"),
    ):
        ratio = statistics.median(a / b for a, b in zip(took[what], took[other], strict=True))
        print(f"| {what} | {statistics.median(took[what]):.2f} | {ratio:.2f} | {other} |")
    rate = (len(files) - FEW) / statistics.median(took["prepare"])
    print(f"prepare: {rate:,.0f} documents per second and core, once it is at work")


if __name__ == "__main__":
    main()
