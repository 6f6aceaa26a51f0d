"""Exports as adapters: the run's own beside their base, and all that it has changed by SVD."""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, pipeline

import relora
from relora.model import build_model
from relora.structure import ModelConfig
from runs import relora as run_relora
from runs import train, workshop
from test_export import some_ids


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run within its third cycle."""
    run_dir = tmp_path_factory.mktemp("adapters") / "run"
    assert train(run_dir, "train.stop_after=20") == 75
    return run_dir


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=some_ids()).logits


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_peft_loads_the_runs_adapters_on_the_runs_base(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, to = tmp_path / "run", tmp_path / "peft"
    config = str(workshop() / f"{model}.json")
    assert train(run_dir, "train.stop_after=20", model__config=config) == 75
    assert run_relora("export", run_dir, "--to", to, "--format", "peft") == 0
    loaded = AutoPeftModelForCausalLM.from_pretrained(str(to))
    expected = logits(relora.load_run(run_dir).merged_model())
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=0)
    # It is the adapter that does it, and it is small.
    base = AutoModelForCausalLM.from_pretrained(to / "base")
    assert (logits(base) - expected).abs().max() > 1e-3
    relora.load_adapter(base, to)
    torch.testing.assert_close(logits(base), expected, atol=1e-5, rtol=0)
    sizes = re.search(r"adapters ([\d,]+) bytes, base ([\d,]+): ", capsys.readouterr().out)
    assert sizes
    adapter, whole = (int(size.replace(",", "")) for size in sizes.groups())
    assert adapter == (to / "adapter_model.safetensors").stat().st_size < whole


def test_a_delta_is_the_truncated_svd_of_what_the_run_has_changed(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "delta"
    assert run_relora("export", stopped, "--to", to, "--format", "delta", "--rank", "4") == 0
    run = relora.load_run(stopped)
    start = build_model(run.config.model, run.config.seed).state_dict()
    end = run.merged_model().state_dict()
    tensors = load_file(to / "adapter_model.safetensors")
    names = [n for n in end if f"base_model.model.{n[:-7]}.lora_A.weight" in tensors]
    assert len(names) == 14
    missed = least = whole = 0.0
    for name in names:
        a, b = (
            tensors[f"base_model.model.{name[:-7]}.lora_{x}.weight"].double().numpy() for x in "AB"
        )
        delta = (end[name].double() - start[name].double()).numpy()
        tail = np.linalg.svd(delta, compute_uv=False)[4:]
        assert np.linalg.norm(delta - b @ a) == pytest.approx(np.linalg.norm(tail), rel=1e-4)
        missed += np.linalg.norm(delta - b @ a) ** 2
        least += np.linalg.norm(tail) ** 2
        whole += np.linalg.norm(delta) ** 2
    said = re.search(r"error (\S+), the best possible (\S+)", capsys.readouterr().out)
    assert said
    assert [float(x) for x in said.groups()] == pytest.approx(
        [(missed / whole) ** 0.5, (least / whole) ** 0.5], rel=1e-3
    )


def test_a_delta_of_full_rank_is_the_model_and_a_tolerance_is_kept(
    stopped: Path, tmp_path: Path
) -> None:
    expected = logits(relora.load_run(stopped).merged_model())
    far = []
    for tolerance in (1e-5, 0.5):
        to = tmp_path / str(tolerance)
        command = ("export", stopped, "--to", to, "--format", "delta", "--tolerance", tolerance)
        assert run_relora(*command) == 0
        loaded = AutoPeftModelForCausalLM.from_pretrained(str(to))
        far.append((logits(loaded) - expected).abs().max().item())
    assert far[0] < 1e-4 < far[1]


def test_of_a_full_rank_run_all_linear_layers_are_a_delta(tmp_path: Path) -> None:
    full = {"lora": None, "relora": None, "warm_start": None}
    assert train(tmp_path / "run", "train.stop_after=8", **full) == 75
    to = tmp_path / "delta"
    command = ("export", tmp_path / "run", "--to", to, "--format", "delta", "--rank", "64")
    assert run_relora(*command) == 0
    loaded = AutoPeftModelForCausalLM.from_pretrained(str(to))
    expected = logits(relora.load_run(tmp_path / "run").merged_model())
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("begun_from", ["directory", "run", "config that is gone"])
def test_a_delta_is_counted_from_what_the_run_began_with(
    begun_from: str, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And where that has other weights by now, it is refused and not taken for it."""
    first, run_dir, to = tmp_path / "first", tmp_path / "run", tmp_path / "delta"
    if begun_from == "config that is gone":
        first = shutil.copyfile(workshop() / "llama.json", tmp_path / "model.json")
        changes: dict[str, Any] = {"model__config": str(first)}
    else:
        if begun_from == "directory":
            assert run_relora("export", stopped, "--to", first) == 0
        else:
            shutil.copytree(stopped, first)
        changes = {"model": {"pretrained": str(first)}}
    assert train(run_dir, "train.stop_after=8", **changes) == 75
    if begun_from == "config that is gone":
        first.unlink()
    command = ("export", run_dir, "--to", to, "--format", "delta", "--tolerance", "1e-5")
    assert run_relora(*command) == 0
    base = AutoModelForCausalLM.from_pretrained(to / "base").state_dict()
    expected = relora.load_run(stopped).merged_model().state_dict()
    if begun_from == "config that is gone":
        expected = build_model(ModelConfig(config=workshop() / "llama.json"), 1).state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(base[name], expected[name], atol=1e-6, rtol=0)
    if begun_from == "directory":
        weights = load_file(first / "model.safetensors")
        save_file(
            {k: v * 1.5 for k, v in weights.items()}, first / "model.safetensors", {"format": "pt"}
        )
    elif begun_from == "run":
        assert train(first, "train.stop_after=22") == 75
    if begun_from != "config that is gone":
        assert run_relora(*command, "--force") == 2
        assert "gives other weights now than" in capsys.readouterr().err


def test_adapters_that_were_moved_load_as_their_card_says(stopped: Path, tmp_path: Path) -> None:
    to, moved = tmp_path / "peft", tmp_path / "moved"
    assert run_relora("export", stopped, "--to", to, "--format", "peft") == 0
    to.rename(moved)
    (code,) = re.findall(r"```python\n(.*?)```", (moved / "README.md").read_text(), re.DOTALL)
    found: dict[str, Any] = {}
    with contextlib.chdir(moved):
        exec(code, found)
    expected = logits(relora.load_run(stopped).merged_model())
    torch.testing.assert_close(logits(found["model"]), expected, atol=1e-5, rtol=0)


def test_weights_in_many_files_load_and_a_pipeline_takes_them(
    stopped: Path, tmp_path: Path
) -> None:
    to = tmp_path / "export"
    assert run_relora("export", stopped, "--to", to, "--max-shard-size", "20KB") == 0
    assert len(list(to.glob("model-*.safetensors"))) > 2
    expected = logits(relora.load_run(stopped).merged_model())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(to)), expected)
    writes: Any = pipeline("text-generation", model=str(to))
    (found,) = writes("the", max_new_tokens=4, do_sample=False)
    assert found["generated_text"].startswith("the")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rank", "3"), "are of --format delta"),
        (("--format", "delta"), "say either --rank R or --tolerance E"),
        (("--format", "delta", "--rank", "3", "--tolerance", "0.1"), "say either"),
        (("--max-shard-size", "5"), "must be a whole number with its unit"),
    ],
)
def test_what_does_not_go_together_is_said_before_anything_is_read(
    arguments: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_relora("export", tmp_path / "no run", "--to", tmp_path / "e", *arguments) == 2
    assert said in capsys.readouterr().err


def test_a_run_without_a_and_b_has_no_adapters_to_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = {"lora": {"blocks": 2}, "relora__reset": {"mode": "zero"}, "warm_start": None}
    assert train(tmp_path / "run", "train.stop_after=8", **blocks) == 75
    command = ("export", tmp_path / "run", "--to", tmp_path / "e", "--format")
    assert run_relora(*command, "peft") == 2
    assert "has blocks and no A and B; take hf, or delta" in capsys.readouterr().err
    assert run_relora(*command, "delta", "--rank", "2") == 0
