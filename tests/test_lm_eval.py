"""Exports in EleutherAI's lm-evaluation-harness, by the task files of configs/lm_eval."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from runs import relora, train

TASKS = Path(__file__).parent.parent / "configs" / "lm_eval"
WORDS = ("def return self value", "for x in range ( z )", "naïve 🙂 if not None :", "print [ 0 ]")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is missing"),
]


def log_likelihood(model: Any, before: list[int], ids: list[int]) -> float:
    """Sum of log p of ids behind `before`, in float64 from the model's logits."""
    rows = torch.tensor([[*before, *ids]])
    with torch.no_grad():
        log_p = torch.log_softmax(model(input_ids=rows).logits[0].double(), dim=-1)
    return float(log_p[len(before) - 1 : -1].gather(1, torch.tensor(ids)[:, None]).sum())


def test_the_harness_finds_the_likelihoods_of_an_export_that_are_ours(tmp_path: Path) -> None:
    """By the command that users type; bits per byte and accuracies follow from them."""
    from relora.data.tokenizer import load_tokenizer
    from relora.record.loaded import load_run

    assert train(tmp_path / "run", "train.stop_after=14") == 75  # in mid-cycle
    assert relora("export", tmp_path / "run", "--to", tmp_path / "export") == 0
    texts = [" ".join(WORDS[: number % 4 + 1])[: 40 + number].rstrip() for number in range(9)]
    rows = [
        {"context": text, "choices": [" return", " self \tfor", "🙂", " zz"], "answer": n % 4}
        for n, text in enumerate(texts)
    ]
    for name, lines in (("held_out", [{"text": text} for text in texts]), ("continuations", rows)):
        content = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(content)
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args"]
    command += ["pretrained=export,dtype=float32", "--tasks", "held_out_text,continuations"]
    command += ["--include_path", str(TASKS), "--batch_size", "4", "--device", "cpu"]
    command += ["--output_path", "out", "--log_samples"]
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | offline, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]

    run = load_run(tmp_path / "run")
    model, tokenizer = run.merged_model().eval(), load_tokenizer(run.tokenizer_dir)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    (path,) = (tmp_path / "out").rglob("samples_held_out_text_*.jsonl")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(found) == len(texts)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    total = 0.0
    for sample in found:
        ids = encode(sample["doc"]["text"])
        assert len(ids) < 64  # one window
        ours = log_likelihood(model, [start], ids)
        (theirs,) = sample["filtered_resps"]
        assert float(theirs) == pytest.approx(ours, rel=1e-4)
        total += ours
    (path,) = (tmp_path / "out").rglob("samples_continuations_*.jsonl")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    right = 0
    for sample in found:
        doc = sample["doc"]
        whole = [encode(doc["context"] + choice) for choice in doc["choices"]]
        before = encode(doc["context"])
        ours = [log_likelihood(model, before, each[len(before) :]) for each in whole]
        theirs = [float(value) for value, _ in sample["filtered_resps"]]
        assert theirs == pytest.approx(ours, rel=1e-4)
        right += max(range(4), key=ours.__getitem__) == doc["answer"]

    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
    bits = -total / math.log(2) / sum(len(text.encode()) for text in texts)
    assert results["held_out_text"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    assert results["continuations"]["acc,none"] == pytest.approx(right / len(texts))
    print(f"bits per byte: {results['held_out_text']['bits_per_byte,none']:.6f}, ours {bits:.6f}")
