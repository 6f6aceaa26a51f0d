"""Fine-tuning: all weights, LoRA, or the head alone, through transformers' Trainer.

    pip install 'relora[finetune]'
    python configs/experiments/finetune.py --to configs/experiments/finetune.md

Two tasks on data that packages ship. Images: scikit-learn's 8×8 digits; a small ViT is pretrained
on the classes 0–4, and fine-tuned to tell 5–9 apart from few examples. Text: whether 63 bytes are
of Python (the standard library), of C++ (torch's headers) or of prose (licences of the packages
that are installed); a small RoBERTa over bytes is pretrained as a masked language model on the
training files, and fine-tuned on a thousand snippets of each; test files are others.

Learning rates are chosen for each of the three arms on a seed of its own and on validation examples
that no figure of the table comes from; the further rows take that of LoRA.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import relora

SNIPPET, FIRST, MASK, BYTES = 64, 0, 3, 4  # ids a snippet; of its beginning, a mask, byte 0
FILES, SNIPPETS = 120, 200  # of each kind of text; of a file, at most
ARMS = ("full", "LoRA", "head only")
FURTHER = ("LoRA, checkpointed", "LoRA, int8 base", "LoRA, nf4 base")
ATTENTION = ("query", "key", "value", "q_proj", "k_proj", "v_proj")
HEAD = "classifier"
TUNING_SEED = 1000


@dataclass(frozen=True)
class Budget:
    """How long everything takes."""

    pretraining: int = 800  # steps
    steps: int = 120
    batch: int = 32
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = (5e-4, 2e-3, 8e-3)
    rows: tuple[str, ...] = (*ARMS, *FURTHER)


class Examples(Dataset):
    """Inputs by name, one tensor each, and labels."""

    def __init__(self, name: str, inputs: Tensor, labels: Tensor) -> None:
        self.name, self.inputs, self.labels = name, inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {self.name: self.inputs[index], "labels": self.labels[index]}


@dataclass
class Task:
    """A pretrained body, as a maker of models with a fresh head, and its examples."""

    name: str
    build: Callable[[int], Any]  # seed → model
    train: Examples
    validation: Examples
    test: Examples


def images(budget: Budget) -> Task:
    """Digits 5–9 for a ViT that knows 0–4."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=96, intermediate_size=192,
        num_hidden_layers=4, num_attention_heads=4, num_labels=5,
    )  # fmt: skip
    known, new = labels < 5, labels >= 5
    torch.manual_seed(0)
    body = ViTForImageClassification(config)
    fit(body, Examples("pixel_values", pixels[known], labels[known]), 1e-3, 0, budget.pretraining)
    data = Examples("pixel_values", pixels[new], labels[new] - 5)
    return Task("ViT, digits 5–9", with_head(ViTForImageClassification, config, body), *cut(data))


def text(budget: Budget) -> Task:
    """Which package a snippet is from, for a RoBERTa that has filled in masks."""
    size = {"vocab_size": 256 + BYTES, "hidden_size": 96, "intermediate_size": 192}
    config = RobertaConfig(
        **size, num_hidden_layers=3, num_attention_heads=4, num_labels=len(KINDS),
        max_position_embeddings=SNIPPET + 2, pad_token_id=1, type_vocab_size=1,
    )  # fmt: skip
    (seen, seen_from), (held_out, from_) = snippets()
    torch.manual_seed(0)
    body = RobertaForMaskedLM(config)
    masked = torch.rand(seen.shape, generator=torch.Generator().manual_seed(0)) < 0.15
    masked[:, 0] = False
    labels = torch.where(masked, seen, -100)
    inputs = torch.where(masked, MASK, seen)
    fit(body, Examples("input_ids", inputs, labels), 2e-3, 0, budget.pretraining)
    kept = Examples("input_ids", *few(seen, seen_from, 1000))
    others = Examples("input_ids", *few(held_out, from_, 400))
    half = len(others) // 2
    build = with_head(RobertaForSequenceClassification, config, body)
    validation = Examples("input_ids", others.inputs[:half], others.labels[:half])
    test = Examples("input_ids", others.inputs[half:], others.labels[half:])
    return Task("RoBERTa, kinds of text", build, kept, validation, test)


def python_files() -> list[Path]:
    """Modules of the standard library."""
    found = Path(sysconfig.get_path("stdlib")).glob("*.py")
    return [path for path in found if not path.name.startswith("_")]


def header_files() -> list[Path]:
    """Headers that torch is compiled against."""
    return list((Path(torch.__file__).parent / "include/ATen").glob("*.h"))


def licence_files() -> list[Path]:
    """Of each installed package once."""
    found = {}
    for package in importlib.metadata.distributions():
        for file in package.files or ():
            if file.name.startswith("LICENSE"):
                found.setdefault(Path(str(file.locate())).read_bytes(), Path(str(file.locate())))
    return list(found.values())


KINDS = (python_files, header_files, licence_files)


def snippets() -> list[tuple[Tensor, Tensor]]:
    """(ids, labels) of the files that are trained on, and of every third file, which is not."""
    found: list[tuple[list[np.ndarray], list[int]]] = [([], []), ([], [])]
    for label, files in enumerate(KINDS):
        for number, path in enumerate(sorted(files())[:FILES]):
            whole = np.frombuffer(path.read_bytes(), np.uint8)
            length = SNIPPET - 1
            rows = whole[: len(whole) // length * length].reshape(-1, length)[:SNIPPETS]
            ids, labels = found[number % 3 == 2]
            ids.append(
                np.pad(rows.astype(np.int64) + BYTES, ((0, 0), (1, 0)), constant_values=FIRST)
            )
            labels += [label] * len(rows)
    return [(torch.from_numpy(np.concatenate(ids)), torch.tensor(labels)) for ids, labels in found]


def few(inputs: Tensor, labels: Tensor, each: int) -> tuple[Tensor, Tensor]:
    """`each` examples of every class, in random order."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    chosen = torch.cat([order[labels[order] == label][:each] for label in labels.unique()])
    chosen = chosen[torch.randperm(len(chosen), generator=generator)]
    return inputs[chosen], labels[chosen]


def cut(data: Examples, each: int = 16) -> tuple[Examples, Examples, Examples]:
    """A few examples of each class to train on; of the rest one half chooses rates."""
    inputs, labels = few(data.inputs, data.labels, 10**6)
    first = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        first[(labels == label).nonzero()[:each, 0]] = True
    rest = (~first).nonzero()[:, 0]
    parts = (first.nonzero()[:, 0], *rest.chunk(2))
    train, validation, test = (Examples(data.name, inputs[p], labels[p]) for p in parts)
    return train, validation, test


def with_head(kind: Any, config: Any, body: nn.Module) -> Callable[[int], Any]:
    """A maker of models that have a body's weights and a head that is drawn anew."""
    weights = {k: v.clone() for k, v in body.state_dict().items() if ".encoder." in k
               or ".embeddings." in k or ".layernorm." in k or ".layers." in k}  # fmt: skip
    assert weights

    def build(seed: int) -> Any:
        torch.manual_seed(seed)
        model = kind(config)
        absent, unknown = model.load_state_dict(weights, strict=False)
        assert not unknown, unknown
        assert all(HEAD in name for name in absent), absent
        return model

    return build


def fit(
    model: Any, data: Examples, rate: float, seed: int, steps: int, batch: int = 32,
    checkpointed: bool = False,
) -> Trainer:  # fmt: skip
    """Train by transformers' Trainer what of a model is not frozen."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, learning_rate=rate, per_device_train_batch_size=batch,
            seed=seed, use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no",
            disable_tqdm=True, warmup_steps=max(1, steps // 10),
            gradient_checkpointing=checkpointed,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointed else None,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer


def train_only(model: nn.Module, head: str = HEAD) -> None:
    """Freeze all but the parameters of the head."""
    for name, param in model.named_parameters():
        param.requires_grad_(name.split(".")[0] == head)


def equip_arm(model: nn.Module, row: str) -> None:
    """Freeze and adapt a model as a row of the table says, in place."""
    if row == "full":
        return
    train_only(model)
    if row.startswith("LoRA"):
        names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        targets = [name for name in ATTENTION if name in names]
        relora.add_adapters(model, relora.LoRAConfig(rank=8, alpha=16, targets=targets))
    for kind in ("int8", "nf4"):
        if kind in row:
            relora.quantise_base(model, kind)


@torch.no_grad()
def accuracy(model: Any, data: Examples) -> float:
    """Share of examples whose class has the largest logit."""
    model.eval()
    right = model(**{data.name: data.inputs}).logits.argmax(-1) == data.labels
    return right.double().mean().item()


def state_bytes(model: nn.Module, trainer: Trainer) -> tuple[int, int]:
    """Bytes of (weights or their codes, gradients and moments; exact weights of codes, which lie
    in host memory)."""
    host = sum(
        layer.weight.numel() * layer.weight.element_size()
        for _, layer in relora.adapted_layers(model)
        if layer.quantised is not None
    )
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    optimizer: Any = trainer.optimizer
    states = getattr(optimizer, "optimizer", optimizer).state.values()
    moments = sum(
        v.numel() * v.element_size() for s in states for v in s.values() if isinstance(v, Tensor)
    )
    return held - host + gradients + moments, host


def saved_bytes(model: Any, data: Examples, batch: int) -> int:
    """Bytes that a forward pass keeps for the backward pass, beside the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**{data.name: data.inputs[:batch], "labels": data.labels[:batch]})
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def one_run(task: Task, row: str, rate: float, seed: int, budget: Budget) -> dict[str, Any]:
    """Fine-tune, and measure all columns."""
    model = task.build(seed)
    total = sum(p.numel() for p in model.parameters())
    equip_arm(model, row)
    began = time.perf_counter()
    checkpointed = "checkpointed" in row
    trainer = fit(model, task.train, rate, seed, budget.steps, budget.batch, checkpointed)
    seconds = time.perf_counter() - began
    state, host = state_bytes(model, trainer)
    return {
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "total": total,
        "validation": accuracy(model, task.validation),
        "test": accuracy(model, task.test),
        "state": state,
        "host": host,
        "saved": saved_bytes(model, task.train, budget.batch),
        "ms": seconds / budget.steps * 1000,
    }


def table(task: Task, budget: Budget) -> str:
    """The Markdown table of a task."""
    rates = {}
    for arm in ARMS:
        scores = {
            rate: one_run(task, arm, rate, TUNING_SEED, budget)["validation"]
            for rate in budget.rates
        }
        rates[arm] = max(scores, key=scores.__getitem__)
    lines = [
        f"### {task.name}",
        "",
        f"{len(task.train)} examples to train on, {len(task.test)} to test.",
        "",
        "| | rate | parameters trained | share | accuracy | training state | in host memory | "
        "kept for backward | a step |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in budget.rows:
        rate = rates[row.partition(",")[0]]
        runs = [one_run(task, row, rate, seed, budget) for seed in budget.seeds]
        first, scores = runs[0], [100 * run["test"] for run in runs]
        spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        lines.append(
            f"| {row} | {rate:g} | {first['trained']:,} | {first['trained'] / first['total']:.1%} "
            f"| {statistics.mean(scores):.1f} %{spread} | {first['state']:,} B "
            f"| {first['host']:,} B | {first['saved']:,} B "
            f"| {statistics.median(run['ms'] for run in runs):.0f} ms |"
        )
    return "\n".join(lines)


def report(budget: Budget, command: str) -> str:
    """The whole page."""
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(describe, capture_output=True, text=True, check=False)
    today = datetime.datetime.now(datetime.UTC).date()
    explained = (__doc__ or "").partition("finetune.md\n\n")[2]
    head = (
        f"# Fine-tuning\n\n`{command}`, commit {done.stdout.strip() or 'unknown'}, {today}, "
        f"{torch.get_num_threads()} CPU thread(s), fp32.\n\n{explained}"
        f"\nPretraining: {budget.pretraining} steps; fine-tuning: {budget.steps} steps of "
        f"{budget.batch} examples, AdamW. LoRA: rank 8, alpha 16, on queries, keys and values; the "
        f"head trains in every arm. Accuracy: mean ± sample standard deviation of "
        f"{len(budget.seeds)} seeds. Training state: weights (or codes and scales), gradients and "
        "moments, exactly. A step: median over seeds, with the start of Trainer in it. "
        f"Rates tried: {', '.join(f'{rate:g}' for rate in budget.rates)}."
    )
    return "\n\n".join([head, *(table(make(budget), budget) for make in (images, text))]) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pretraining", type=int, default=Budget.pretraining, metavar="STEPS")
    parser.add_argument("--steps", type=int, default=Budget.steps, help="of each fine-tuning")
    parser.add_argument("--to", type=Path, required=True, metavar="FILE", help="the page")
    arguments = vars(parser.parse_args())
    page = arguments.pop("to")
    page.write_text(report(Budget(**arguments), " ".join(["python", *sys.argv])), encoding="utf8")
