"""The exported model is the trained model, and transformers needs nothing of ours to load it."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from runs import (
    VOCABULARY,
    WORDS,
    checkpoint,
    metric_lines,
    relora,
    series,
    tensors,
    train,
)

SAMPLES = (
    "def f(x):\n\treturn x + 1\n",
    "  two  spaces \t\t tabs\r\n\n\nend",
    "naïve 🙂 日本語 \u200b \x00 ≠",
    "",
    " leading",
    "trailing ",
    "</s> <s> <unk> <pad>",
)


def logits_of_the_training_model(run_dir: Path, step: int, ids: torch.Tensor) -> torch.Tensor:
    """What the engine of the run says after that step, adapters beside the weights and all."""
    from relora.data.shards import open_shards
    from relora.engine import deepspeed
    from relora.engine.distributed import read_ranks
    from relora.load import load_config
    from relora.training.start import start_run

    settings = load_config(run_dir / "config.yaml")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            patch.delenv(name, raising=False)
            patch.setenv(name, "")
            patch.delenv(name)
        ranks = read_ranks()
        deepspeed.init_distributed(ranks, 1)
        try:
            run = start_run(settings, open_shards(settings.data), ranks)
            run.metrics.close()
            assert run.step == step
            run.engine.eval()
            with torch.no_grad():
                return run.engine(input_ids=ids).logits.float()
        finally:
            deepspeed.leave()


def some_ids() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, VOCABULARY, (3, 32), generator=generator)


def assert_export_equals(run_dir: Path, step: int, to: Path, tolerance: float) -> None:
    from transformers import AutoModelForCausalLM

    assert relora("export", checkpoint(run_dir, step), "--to", to) == 0
    model = AutoModelForCausalLM.from_pretrained(to)
    assert model.dtype == torch.float32
    with torch.no_grad():
        found = model(input_ids=some_ids()).logits
    expected = logits_of_the_training_model(run_dir, step, some_ids())
    assert expected.abs().max() > 0.1
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run of a Llama, and its export."""
    directory = tmp_path_factory.mktemp("exported")
    assert train(directory / "run") == 0
    assert relora("export", directory / "run", "--to", directory / "export") == 0
    return directory / "run", directory / "export"


@pytest.mark.parametrize(
    ("model", "step"),
    # 4 is in the warm start, 6 its end, 9 and 17 in the middle of cycles, 12 a merge.
    [
        *[("llama", 4), ("llama", 6), ("llama", 9), ("llama", 12), ("llama", 17)],
        *[("gpt2", 4), ("gpt2", 17), ("gpt_neox", 4), ("gpt_neox", 17)],
    ],
)
def test_the_export_says_what_the_training_model_says(
    model: str, step: int, tmp_path: Path
) -> None:
    from runs import workshop

    config = str(workshop() / f"{model}.json")
    run_dir = tmp_path / "run"
    assert train(run_dir, f"train.stop_after={step}", model__config=config) == 75
    if step in (9, 17):  # otherwise this would show nothing
        found = tensors(checkpoint(run_dir, step))
        assert any(t.abs().max() > 1e-3 for (n, k), t in found.items() if "lora_B" in n)
    assert_export_equals(run_dir, step, tmp_path / "export", 1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"deepspeed__zero_stage": 3},
        {"lora": None, "relora": None, "warm_start": None},
        {"lora": {"rank": 5, "alpha": 3, "scaling": "rslora", "dropout": 0.2}},
    ],
    ids=["ZeRO 3", "full rank", "rslora and dropout"],
)
def test_the_export_of_other_runs_too(changes: dict[str, Any], tmp_path: Path) -> None:
    assert train(tmp_path / "run", "train.stop_after=15", **changes) == 75
    assert_export_equals(tmp_path / "run", 15, tmp_path / "export", 1e-5)


def test_a_bf16_run_exports_the_exact_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right after a merge B is 0, so the export holds W + s·B·A + s·B·A in fp32, not in bf16."""
    import relora.restart.restart as under_test

    sums: dict[str, torch.Tensor] = {}
    real_merge = under_test.merge_

    def merge(adapter: Any, a: torch.Tensor, b: torch.Tensor, size: int) -> torch.Tensor:
        name, scale = adapter.weight.name, adapter.layer.scale
        if name not in sums:
            place = adapter.weight
            sums[name] = place.value(0, place.numel).view(place.shape).clone()
        sums[name] += (b @ a) * scale
        return real_merge(adapter, a, b, size)

    monkeypatch.setattr(under_test, "merge_", merge)
    run_dir = tmp_path / "run"
    assert train(run_dir, "train.stop_after=18", deepspeed__precision="bf16") == 75
    assert len(sums) == 14
    assert relora("export", run_dir, "--to", tmp_path / "export") == 0
    found = load_file(tmp_path / "export" / "model.safetensors")
    for name, expected in sums.items():
        # Merged in slices, whose products may round otherwise than that of the whole.
        torch.testing.assert_close(found[name], expected, rtol=2.0**-22, atol=1e-8)
        assert not torch.equal(found[name], expected.bfloat16().float()), name


def test_decay_of_the_merged_weights_is_exported_in_the_middle_of_a_cycle(tmp_path: Path) -> None:
    """Frozen weights stay as they are in the checkpoint; what decay has left is a factor."""
    run_dir = tmp_path / "run"
    assert train(run_dir, "train.stop_after=16", lora__decay="merged") == 75
    rates = series(run_dir, "train/lr")
    shrink = math.prod(1 - 0.1 * rates[step] for step in range(13, 17))  # a merge was after 12
    assert shrink < 0.999
    assert relora("export", run_dir, "--to", tmp_path / "export") == 0
    exported = load_file(tmp_path / "export" / "model.safetensors")
    held = tensors(checkpoint(run_dir, 16))
    adapted = [
        n.removesuffix(".lora_A") for n, kind in held if (n[-7:], kind) == (".lora_A", "value")
    ]
    assert len(adapted) == 14
    for name in adapted:
        found = exported[f"{name}.weight"]
        a, b = (held[f"{name}.{x}", "value"] for x in ("lora_A", "lora_B"))
        weight = held[f"{name}.weight", "value"].view(found.shape)
        update = 2 * b.view(-1, 4) @ a.view(4, -1)
        torch.testing.assert_close(found, shrink * weight + update, rtol=1e-5, atol=1e-6)
        assert (found - weight - update).norm() > 1e-4 * weight.norm()
    assert_export_equals(run_dir, 16, tmp_path / "again", 1e-5)


def test_weights_are_safetensors_and_nothing_is_a_pickle(exported: tuple[Path, Path]) -> None:
    names = {path.name for path in exported[1].iterdir()}
    needed = {"model.safetensors", "config.json", "generation_config.json", "README.md"}
    assert needed | {"tokenizer.json", "tokenizer_config.json"} <= names
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))}


def test_the_tokenizer_round_trips_and_gives_the_shards_ids(exported: tuple[Path, Path]) -> None:
    import numpy as np
    from transformers import AutoTokenizer

    from relora.data.shards import open_shards
    from relora.load import load_config

    tokenizer = AutoTokenizer.from_pretrained(exported[1])
    for text in SAMPLES:
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert tokenizer.decode(ids) == text
    shards = open_shards(load_config(exported[0] / "config.yaml").data)
    ids = np.concatenate([shards.validation, shards.train])
    documents = np.split(ids, np.flatnonzero(ids == shards.eos_id) + 1)[:-1]
    assert len(documents) == 50
    for document in documents:
        text = tokenizer.decode(document[:-1])
        assert tokenizer.encode(text, add_special_tokens=False) == document[:-1].tolist()
        assert any(word in text for word in WORDS)
    assert tokenizer.eos_token_id == shards.eos_id


def test_transformers_generates_with_it(exported: tuple[Path, Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    model = AutoModelForCausalLM.from_pretrained(exported[1])
    tokenizer = AutoTokenizer.from_pretrained(exported[1])
    assert model.config.use_cache
    assert model.config.eos_token_id == model.generation_config.eos_token_id
    assert model.config.eos_token_id == tokenizer.eos_token_id
    writer = pipeline("text-generation", model=str(exported[1]))
    text = writer("def self", max_new_tokens=10, do_sample=False)[0]["generated_text"]
    assert text.startswith("def self")
    assert len(text) > len("def self")


def test_a_merged_model_trains_in_transformers(exported: tuple[Path, Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exported[1])
    ids = some_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_the_model_card_states_the_run_s_figures(exported: tuple[Path, Path]) -> None:
    run_dir, to = exported
    card = (to / "README.md").read_text()
    loss = series(run_dir, "eval/loss")[24]
    for figure in (f"{loss:.4f}", "24 of 24", "ReLoRA", "rank 4, alpha 8", "38.4K", "6.14K"):
        assert figure in card, figure
    assert "| merges | 2 |" in card
    assert "| base model | none: trained from scratch |" in card
    assert "| dtype | float32 |" in card
    parameters = sum(t.numel() for t in load_file(to / "model.safetensors").values())
    assert f"| tokens per parameter | {24 * 256 / parameters:.3g} |" in card
    assert "license" not in front_matter(card)  # nobody has said one
    assert str(Path.cwd()) not in card


def test_a_run_that_has_diverged_is_exported_too(
    exported: tuple[Path, Path], tmp_path: Path
) -> None:
    run = shutil.copytree(exported[0], tmp_path / "run")
    lines = metric_lines(run)
    lost = dict.fromkeys(("eval/loss", "eval/perplexity"))
    text = "".join(
        json.dumps({**line, **lost} if "eval/loss" in line else line) + "\n" for line in lines
    )
    (run / "metrics.jsonl").write_text(text)
    assert relora("export", run, "--to", tmp_path / "export") == 0
    card = (tmp_path / "export" / "README.md").read_text()
    assert "| validation perplexity | not finite |" in card


def front_matter(card: str) -> dict[str, str]:
    """What the Hub reads of a card."""
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


def test_the_model_loads_and_writes_as_its_card_says(
    exported: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "b"
    assert relora("export", exported[0], "--to", to, "--dtype", "bfloat16") == 0
    (code,) = re.findall(r"```python\n(.*?)```", (to / "README.md").read_text(), re.DOTALL)
    capsys.readouterr()
    found: dict[str, Any] = {}
    with contextlib.chdir(to):
        exec(code, found)
    assert found["model"].dtype == torch.bfloat16
    assert capsys.readouterr().out.startswith("The")


BASE_CARD = """---
language: en
license: other
license_name: 'house-rules'
license_link: https://example.org/rules
tags: [a]
---
# A base
license: mit
"""


@pytest.mark.parametrize("asked", [None, "apache-2.0"])
def test_a_model_is_under_the_licence_of_its_base_unless_another_is_asked_for(
    asked: str | None, exported: tuple[Path, Path], tmp_path: Path
) -> None:
    """The base's name is known where huggingface_hub has put it."""
    base = tmp_path / "models--some-lab--tiny-1" / "snapshots" / "0123"
    shutil.copytree(exported[1], base)
    (base / "README.md").write_text(BASE_CARD)
    changes = {"model": {"pretrained": str(base)}, "train__steps": 5, "warm_start": None}
    changes["relora"] = None
    assert train(tmp_path / "run", **changes) == 0
    more = ["--license", asked] if asked else []
    assert relora("export", tmp_path / "run", "--to", tmp_path / "export", *more) == 0
    card = (tmp_path / "export" / "README.md").read_text()
    front = front_matter(card)
    assert front["base_model"] == "some-lab/tiny-1"
    assert front["license"] == (asked or "other")
    assert front.get("license_name") == (None if asked else "house-rules")
    assert front.get("license_link") == (None if asked else "https://example.org/rules")
    assert "| base model | some-lab/tiny-1 |" in card
    assert f"| licence | {asked or 'other'} |" in card


def test_a_licence_is_an_identifier(
    exported: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "export"
    assert relora("export", exported[0], "--to", to, "--license", "mine: all\nof it") == 2
    assert "--license: 'mine: all\\nof it': must be an identifier" in capsys.readouterr().err
    assert not to.exists()


def test_the_card_of_an_earlier_checkpoint_has_its_own_figures(tmp_path: Path) -> None:
    assert train(tmp_path / "run", train__save_every=8) == 0
    assert relora("export", checkpoint(tmp_path / "run", 8), "--to", tmp_path / "export") == 0
    card = (tmp_path / "export" / "README.md").read_text()
    assert "8 of 24" in card
    assert f"{series(tmp_path / 'run', 'eval/loss')[8]:.4f}" in card
    assert "| merges | 0 |" in card


def test_bfloat16_is_a_rounding_of_float32(exported: tuple[Path, Path], tmp_path: Path) -> None:
    assert relora("export", exported[0], "--to", tmp_path / "b", "--dtype", "bfloat16") == 0
    exact = load_file(exported[1] / "model.safetensors")
    rounded = load_file(tmp_path / "b" / "model.safetensors")
    assert exact.keys() == rounded.keys()
    assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in exact)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_existing_directory_is_kept_without_force(
    exported: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = shutil.copytree(exported[1], tmp_path / "export")
    (to / "config.json").write_text("mine")
    assert relora("export", exported[0], "--to", to) == 2
    assert "--force" in capsys.readouterr().err
    assert (to / "config.json").read_text() == "mine"
    assert relora("export", exported[0], "--to", to, "--force") == 0
    assert json.loads((to / "config.json").read_text())["model_type"] == "llama"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize("where", ["the run", "its parent", "its model", "a file", "other files"])
def test_force_replaces_exports_and_nothing_else(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "runs" / "run"
    run_dir.parent.mkdir()
    assert train(run_dir, "train.stop_after=2") == 75
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    to = {
        "the run": run_dir,
        "its parent": run_dir.parent,
        "its model": run_dir / "model",
        "a file": mine / "thesis.tex",
        "other files": mine,
    }[where]
    assert relora("export", run_dir, "--to", to, "--force") == 2
    assert str(to) in capsys.readouterr().err
    assert relora("verify", run_dir) == 0
    assert (run_dir / "model" / "config.json").is_file()
    assert (mine / "thesis.tex").read_text() == "years of work"


def test_an_export_can_be_made_elsewhere(
    exported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another directory, the run moved, the model's file gone; parents of --to are made."""
    moved = shutil.copytree(exported[0], tmp_path / "moved")
    values = yaml.safe_load((moved / "config.yaml").read_text())
    values["model"]["config"] = "no/such/file.json"
    (moved / "config.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    assert relora("export", "moved", "--to", "some/where/export") == 0
    weights = [d / "model.safetensors" for d in (exported[1], tmp_path / "some/where/export")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_without_a_checkpoint_there_is_nothing_to_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for subject in (tmp_path, tmp_path / "none"):
        assert relora("export", subject, "--to", tmp_path / "export") == 4
        assert "is no checkpoint and no run directory with one" in capsys.readouterr().err
    assert not (tmp_path / "export").exists()


def test_every_figure_of_the_card_comes_from_the_run(exported: tuple[Path, Path]) -> None:
    evaluation = [line for line in metric_lines(exported[0]) if "eval/loss" in line][-1]
    assert f"{evaluation['eval/perplexity']:.2f}" in (exported[1] / "README.md").read_text()
