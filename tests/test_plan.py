"""`relora plan` says what the run will do: every figure on its page is checked against the run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from relora.cli import main
from relora.data.prepare import prepare_shards
from relora.load import build_config, load_config
from relora.lora.config import LoRAConfig
from relora.lora.inject import add_adapters, parameter_groups
from relora.model import ModelConfig, build_meta_model, count_parameters
from relora.plan.advice import reach_of_updates
from relora.plan.estimate import (
    flops_per_token,
    full_rank_twin,
    memory_by_part,
    peak_memory,
    training_flops,
)
from relora.plan.gpus import GPUS
from relora.plan.shape import count_by_group, shape_of
from relora.plan.timeline import phases
from relora.training.config import parse_count
from relora.training.log_lines import phases_line
from relora.verbs import GPU_NAMES
from relora.words import format_bytes, format_count
from runs import make_config

ROOT = Path(__file__).parent.parent
LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 2,
        "n_positions": 64}  # fmt: skip
NEOX = {**LLAMA, "model_type": "gpt_neox"}
VALUES = {
    "run_dir": "run",
    "model": {"config": "model.json"},
    "data": {
        "source": {"files": ["text/*.txt"]},
        "tokenizer": {"train": "bpe", "vocab_size": 512},
        "sequence_length": 32,
    },
    "batch": {"global_batch_size": 8, "micro_batch_size": 2},
    "train": {"steps": 100, "eval_every": 10},
    "optimizer": {"lr": 0.001},
    "schedule": {"warmup_steps": 5, "min_lr_ratio": 0.1},
    "lora": {"rank": 4, "alpha": 8},
    "relora": {"cycle_steps": 30, "rewarm_steps": 5, "lr": 0.002},
    "warm_start": {"steps": 20},
    "deepspeed": {"precision": "fp32"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for all: a model file is run through once for each path that it has."""
    return tmp_path_factory.mktemp("plan")


@pytest.fixture
def config(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config of a tiny Llama, in the working directory, with nothing else in it."""
    shutil.rmtree(place)
    place.mkdir()
    monkeypatch.chdir(place)
    Path("model.json").write_text(json.dumps(LLAMA))
    Path("config.yaml").write_text(yaml.safe_dump(VALUES))
    return Path("config.yaml")


def page_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `relora plan ARGUMENTS` prints."""
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def test_the_timeline_is_that_of_the_clock(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = page_of(capsys, str(config))
    rows = re.findall(r"^  (.+?) +([\d,]+) – ([\d,]+) +(\S+) +(\S+)   (.+)$", page, re.MULTILINE)
    # 20 steps of warm start, merges after 50 and 80; 8 × 32 tokens a step.
    assert [(name, start, stop, tokens, then) for name, start, stop, tokens, _, then in rows] == [
        ("warm start", "0", "20", "5.12K", "adapters are born"),
        ("cycle 1", "20", "50", "12.8K", "merge 1"),
        ("cycle 2", "50", "80", "20.5K", "merge 2"),
        ("cycle 3", "80", "100", "25.6K", "end"),
    ]
    run = load_config(config)
    for _, start, stop, _, peak, _ in rows:
        rates = [run.learning_rate(step) for step in range(int(start), int(stop))]
        assert float(peak) == pytest.approx(max(rates), rel=0.01)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_phases_tile_the_run_and_end_where_something_happens(data: st.DataObject) -> None:
    values = {**VALUES, "model": {"pretrained": "x"}, "schedule": {}}
    total = data.draw(st.integers(3, 2000), "total")
    birth = data.draw(st.integers(0, total - 2), "birth")
    values["train"] = {"steps": total}
    values["warm_start"] = {"steps": birth} if birth else None
    values["relora"] = data.draw(
        st.none()
        | st.builds(
            lambda c: {"cycle_steps": c, "rewarm_steps": 0}, st.integers(1, total - birth - 1)
        ),
        "relora",
    )
    config = build_config(values, "test")
    cut = phases(config)
    assert [phase.start for phase in cut] == [0, *(phase.stop for phase in cut[:-1])]
    assert cut[-1].stop == total
    clock = config.clock
    events = [step for step in range(1, total) if clock.is_merge(step) or clock.is_birth(step)]
    assert [phase.stop for phase in cut[:-1]] == events


@pytest.mark.parametrize(
    ("overrides", "method", "rows"),
    [
        (["lora=null", "relora=null", "warm_start=null"], "full rank", ["full rank"]),
        (["relora=null"], "LoRA: 20 steps of full rank, then", ["warm start", "LoRA"]),
        (["relora=null", "warm_start=null"], "LoRA: rank 4, s = 2", ["LoRA"]),
        (["warm_start=null"], "ReLoRA: rank 4, s = 2 (standard)", ["cycle 1", "cycle 2"]),
    ],
)
def test_each_method_is_named_with_its_phases(
    overrides: list[str],
    method: str,
    rows: list[str],
    config: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = page_of(capsys, str(config), *overrides)
    assert f"method       {method}" in page
    assert re.findall(r"^  (\S.*?) +0 –", page, re.MULTILINE) == rows[:1]
    for row in rows:
        assert f"\n  {row} " in page


@pytest.mark.parametrize("shape", [LLAMA, GPT2, NEOX], ids=lambda shape: shape["model_type"])
def test_groups_hold_every_parameter_once(shape: dict[str, object], config: Path) -> None:
    Path("model.json").write_text(json.dumps(shape))
    model = build_meta_model(ModelConfig(config=Path("model.json")))
    before = count_by_group(model)
    assert sum(trainable for trainable, _ in before.values()) == count_parameters(model)[1]
    assert "adapters" not in before
    names = add_adapters(model, LoRAConfig(rank=4))
    after = count_by_group(model)
    trainable, total = count_parameters(model)
    assert sum(counts[0] for counts in after.values()) == trainable
    assert sum(map(sum, after.values())) == total
    # Every projection is frozen, nothing else is, and A and B have r·(in + out) numbers each.
    assert after["projections"] == (0, before["projections"][0])
    layers = [model.get_submodule(name) for name in names]
    assert after["adapters"] == (sum(4 * sum(layer.weight.shape) for layer in layers), 0)  # type: ignore[union-attr,arg-type]
    for group in ("embeddings", "norms, biases"):
        assert after[group] == before[group]


def test_embeddings_of_a_class_of_their_own_are_embeddings(config: Path) -> None:
    """OPT's learned positions are a subclass, and its head is its embeddings."""
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 1}
    shape = {"model_type": "opt", "vocab_size": 64, "num_attention_heads": 2, **sizes}
    Path("model.json").write_text(json.dumps({**shape, "max_position_embeddings": 30}))
    groups = count_by_group(build_meta_model(ModelConfig(config=Path("model.json"))))
    assert groups["embeddings"] == ((64 + 30 + 2) * 16, 0)  # two positions are for padding
    assert groups["projections"] == (4 * 16 * 16 + 2 * 16 * 32, 0)


def test_the_rank_that_updates_can_sum_to_is_that_of_the_largest_layers(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Keys and values of 16 rows beside queries of 32; three cycles of rank 8."""
    shape = {**LLAMA, "num_key_value_heads": 1, "num_attention_heads": 2}
    Path("model.json").write_text(json.dumps(shape))
    assert "sum to rank 24 of 32 at most" in page_of(capsys, str(config), "lora.rank=8")


def test_the_disk_that_spectra_take_is_that_of_the_measured_weights(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = format_bytes(4 * 2 * (4 * 32 * 32 + 3 * 32 * 64))
    full = ("lora=null", "relora=null", "warm_start=null")
    for overrides in ((), full):
        page = page_of(capsys, str(config), *overrides)
        assert f"spectra      {size} for the weights they start from" in page
    assert "weights they start" not in page_of(capsys, str(config), "spectra=null")


def test_groups_of_a_llama_are_as_counted_by_hand(config: Path) -> None:
    groups = count_by_group(build_meta_model(ModelConfig(config=Path("model.json"))))
    assert groups == {
        "projections": (2 * (4 * 32 * 32 + 3 * 32 * 64), 0),
        "embeddings": (512 * 32, 0),
        "head": (512 * 32, 0),
        "norms, biases": (5 * 32, 0),
    }


def test_tied_embeddings_are_counted_once(config: Path) -> None:
    Path("model.json").write_text(json.dumps(GPT2))
    groups = count_by_group(build_meta_model(ModelConfig(config=Path("model.json"))))
    assert groups["embeddings"] == (512 * 32 + 64 * 32, 0)
    assert "head" not in groups


def test_batch_and_tokens_add_up(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = page_of(capsys, str(config), "--devices", "2")
    assert "8 sequences of 32 = 2 ranks × micro-batch 2 × accumulation 2" in page
    assert "tokens       25.6K = 100 steps × 256," in page
    parameters = count_parameters(build_meta_model(ModelConfig(config=Path("model.json"))))[1]
    assert f"{25_600 / parameters:.3g} per parameter" in page
    assert "corpus       not prepared yet" in page
    # Commands to copy hold the overrides.
    page = page_of(capsys, str(config), "--devices", "4", "train.steps=90")
    assert "next         relora prepare config.yaml train.steps=90\n" in page
    assert "relora launch --devices 4 config.yaml train.steps=90\n" in page


def test_the_size_of_checkpoints_is_that_of_the_paper_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1.3B: 12 × 251.1M + 4 × 1207.9M bytes; 12 and 14 for each of 1339.5M in full rank."""
    monkeypatch.chdir(ROOT)
    page = page_of(capsys, "configs/published/llama_1b3.yaml")
    assert "checkpoint   7.85GB (16.1GB in the warm start), 3 are kept\n" in page
    assert "full rank in bf16 as DeepSpeed saves it: 18.8GB\n" in page
    page = page_of(capsys, "configs/llama_1b3_full.yaml")
    assert "checkpoint   16.1GB, 3 are kept\n" in page


def test_prepared_shards_give_epochs(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [f"data.source={{files: ['{ROOT}/relora/**/*.py']}}", "data.validation_fraction=0.2"]
    directory = prepare_shards(load_config(config, data).data, workers=1, quiet=True)
    capsys.readouterr()
    tokens = json.loads((directory / "index.json").read_text())["splits"]["train"]["tokens"]
    steps = 3 * tokens // 256
    page = page_of(capsys, str(config), *data, f"train.steps={steps}")
    epochs = steps * 256 / tokens
    assert f"{format_count(tokens)} training tokens: {epochs:.3g} epochs" in page
    assert f"! the corpus is read {epochs:.2g} times" in page


def test_the_curve_shows_every_restart(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = page_of(capsys, str(config))
    axis = re.search(r"^ +0 └(.+)$", page, re.MULTILINE)
    assert axis is not None
    # 100 steps in 80 columns: column n begins at step round(1.25 n).
    columns = {step: max(n for n in range(80) if round(1.25 * n) <= step) for step in (20, 50, 80)}
    assert {step: axis[1][column] for step, column in columns.items()} == {
        20: "△", 50: "▲", 80: "▲",
    }  # fmt: skip
    assert axis[1].count("▲") == 2
    # Rows of the drawing: the learning rate is 0 at each restart and reaches the top somewhere.
    rows = re.findall(r"│(.*)$", page, re.MULTILINE)
    assert len(rows) == 8
    assert "█" in rows[0] or "▇" in rows[0]
    for column in columns.values():
        assert rows[-1].ljust(80)[column] == " "


def test_many_cycles_are_cut_out_of_the_middle(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = page_of(capsys, str(config), "relora.cycle_steps=2", "relora.rewarm_steps=0")
    shown = re.findall(r"^  cycle (\d+)", page, re.MULTILINE)
    (hidden,) = re.findall(r"^  … (\d+) more cycles …", page, re.MULTILINE)
    assert len(shown) + int(hidden) == 40
    assert shown[0] == "1"
    assert shown[-1] == "40"
    assert max(map(len, page.splitlines())) <= 100


def test_a_run_of_any_length_is_planned_in_seconds(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """10¹² steps with 2.5·10¹¹ cycles: they are counted, the first and the last are shown."""
    overrides = ["train.steps=1000000000000", "relora.cycle_steps=4", "relora.rewarm_steps=1"]
    started = time.process_time()
    page = page_of(capsys, str(config), *overrides, "--png", "picture.png")
    assert time.process_time() - started < 120  # counting cycle by cycle would take hours
    assert "  … 249,999,999,984 more cycles …" in page
    assert "999,999,999,996 – 1,000,000,000,000" in page
    assert "256T = 1,000,000,000,000 steps × 256" in page
    assert Path("picture.png").stat().st_size > 10_000
    # A cycle's highest rate follows the base curve; one column holds three billion cycles.
    assert re.search(r"cycle 249999999995 .* 2\.00e-04   end", page)
    [line] = (line for line in phases_line(load_config(config, overrides).clock).split(" · ")
              if "merges" in line)  # fmt: skip
    assert line == (
        "cycles of 4: merges after 24, 28, 32, 36, 40, 44, 48, 52, … (249999999994 in all)"
    )


WARNINGS = {
    "lora.rank=20": "lora.rank 20: A and B hold as many numbers as the weight itself in 8 of 14",
    "warm_start=null": "no warm_start: from random weights, low rank from the first step",
    "relora.rewarm_steps=20": "relora.rewarm_steps 20: 67% of every cycle is warm-up",
    "train.steps=81": "the last cycle has only 1 of 30 steps",
    "relora.reset.mode=none": "relora.reset.mode none: old moments steer the new A and B",
    "relora.rewarm_steps=0": "relora.rewarm_steps 0: full learning rate on moments just reset",
    "relora.reset.masks=independent": "relora.reset.masks independent: updates of first moment",
    "relora.lr=null": "relora.lr null: 1.0e-03 as in full rank; the paper doubles it",
    "schedule.warmup_steps=0": "schedule.warmup_steps 0: full learning rate on random weights",
    "lora.rank=24": "lora.rank 24: 3 cycles add up to rank 72, and no adapted weight goes beyond",
    "train.eval_every=null": "train.eval_every null: one validation loss at the end, no curve",
}


@pytest.mark.parametrize("override", WARNINGS)
def test_a_doubtful_setting_is_warned_of(
    override: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def warned(*arguments: str) -> bool:
        return f"! {WARNINGS[override]}" in page_of(capsys, str(config), *arguments)

    assert warned(override)
    assert not warned()


def test_adapters_have_a_rate_of_their_own_in_either_section(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = page_of(capsys, str(config), "relora.lr=null", "lora.lr=2e-3")
    assert "the paper doubles it" not in page


def test_tokens_per_parameter_are_warned_of_below_half_the_optimum(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parameters = count_parameters(build_meta_model(ModelConfig(config=Path("model.json"))))[1]
    few, enough = 10 * parameters // 256, 10 * parameters // 256 + 1
    assert "are compute-optimal" in page_of(capsys, str(config), f"train.steps={few}")
    assert "are compute-optimal" not in page_of(capsys, str(config), f"train.steps={enough}")


def test_rounded_merges_are_warned_of(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["deepspeed.precision=bf16", "relora.precision=rounded"]
    assert "! relora.precision rounded: bf16 weights drop" in page_of(
        capsys, str(config), *overrides
    )


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (1000, "1K"), (1_234_567, "1.23M"), (12e9, "12B")]
)
def test_counts_are_shortened_to_units_a_config_takes(count: float, text: str) -> None:
    assert format_count(int(count)) == text
    assert parse_count(text) == pytest.approx(count, rel=0.01)


def test_7b_is_planned_in_seconds_and_without_its_memory() -> None:
    # In a process of its own, which says what it has used. (Its ru_maxrss would be that of this
    # one, from before the exec.)
    code = (
        "import pathlib, re, sys, time\n"
        "from relora.cli import main\n"
        "assert main(['plan', 'configs/llama_7b_relora.yaml', '--devices', '16']) == 0\n"
        "status = pathlib.Path('/proc/self/status').read_text()\n"
        "print(time.process_time(), re.search(r'VmHWM:\\s+(\\d+)', status)[1], file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    processor_s, peak_kib = map(float, done.stderr.split()[-2:])
    assert processor_s < 120  # about 11 on a core of its own; a real model would take many minutes
    assert peak_kib < 3e6  # 7B parameters alone would be 28 GB
    # The config says itself what comes out, as the smaller ones do (test_configs).
    text = (ROOT / "configs/llama_7b_relora.yaml").read_text()
    held = re.search(r"^# Each of 16 GPUs holds (\S+) at its peak ", text, re.MULTILINE)
    assert held
    assert all(size in done.stdout for size in held.groups()), held[0]
    assert "no warnings" in done.stdout


def test_the_plan_shows_which_engines_work(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = page_of(capsys, str(config), "deepspeed.zero_stage=3", "deepspeed.precision=fp16")
    rows = {
        line.split()[0]: [cell.strip() for cell in re.split(r"\s{2,}", line.strip())[1:]]
        for line in page.splitlines()
        if line.split()[:1] in (["fp32"], ["bf16"], ["fp16"], ["deepspeed_bf16"])
    }
    assert {name: len(cells) for name, cells in rows.items()} == dict.fromkeys(rows, 4)
    assert rows["fp32"] == rows["bf16"] == ["yes", *["yes, offload"] * 3]
    assert rows["fp16"][3] == "[yes, offload]"
    assert rows["deepspeed_bf16"][0] == "no"
    assert "take precision: bf16, or zero_stage 1, 2 or 3" in " ".join(page.split())


def test_the_plan_says_what_a_merge_sends(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing but counts is sent" in page_of(capsys, str(config))
    half = page_of(capsys, str(config), "deepspeed.precision=bf16", "--devices", "2")
    # 2 bytes of the half of each adapted weight that the other rank merges.
    entries = sum(m.inputs * m.outputs for m in shape_of(load_config(config)).adapted())
    assert f"each rank merges its part of W and receives {format_bytes(entries)} of others" in half
    assert re.search(r"\S+e-\d+ of the FLOPs of the steps before it, \S+e-\d+ of the bytes", half)
    page = page_of(capsys, str(config), "deepspeed.zero_stage=3")
    assert re.search(r"A and B are gathered, \S+B in \d+ collectives", page)
    assert "merges       none" in page_of(capsys, str(config), "relora=null")


def test_memory_stands_beside_that_of_full_rank(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["deepspeed.precision=bf16", "deepspeed.zero_stage=1"]
    page = page_of(capsys, str(config), "--devices", "2", *overrides)
    table = page[page.index("memory per rank") :].split("\n\n")[0]
    cells = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()[1:]]
    rows = {name: both[:2] for name, *both in cells}
    run = load_config(config, overrides)
    twin = full_rank_twin(run)
    for part, both in {
        **{p: [memory_by_part(r, 2, r is run)[p] for r in (run, twin)]
           for p in ("weights", "gradients", "masters", "moments", "activations", "logits",
                     "buffers")},
        "in host memory": [memory_by_part(run, 2, True)["host"], 0],
        "peak": [peak_memory(run, 2, True), peak_memory(twin, 2, False)],
    }.items():  # fmt: skip
        assert rows[part] == [format_bytes(size) for size in both], part
    assert "remainder" not in rows  # it lies in host memory
    assert "the warm start is full rank and needs its memory" in table
    alone = page_of(capsys, str(config), "lora=null", "relora=null", "warm_start=null")
    assert re.search(r"^memory per rank +full rank$", alone, re.MULTILINE)
    assert "with adapters" not in alone


def verdict_of(page: str) -> str:
    """The plan's first sentences, on one line."""
    found = re.search(r"^plan .*\nverdict {6}(.*(?:\n {13}.*)*)", page)
    assert found, page
    return " ".join(found[1].split())


def test_the_page_opens_with_what_the_run_costs_beside_full_rank(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = verdict_of(page_of(capsys, str(config), "lora=null", "relora=null", "warm_start=null"))
    run = load_config(config)
    twin = full_rank_twin(run)
    parts = memory_by_part(twin, 1, False)
    del parts["host"]
    name = max(parts, key=lambda part: parts[part])
    size = format_count(sum(p.numel() for p in build_meta_model(run.model).parameters()))
    assert full == (
        f"{size} in full rank: at its peak a rank holds {format_bytes(peak_memory(twin, 1))}, "
        f"most of it {name} ({format_bytes(parts[name])})"
    )
    said = verdict_of(page_of(capsys, str(config)))
    less = 1 - flops_per_token(run, True).total / flops_per_token(run, False).total
    below = peak_memory(twin, 1) - peak_memory(run, 1, True)
    assert f"{size} at rank 4: a step with adapters multiplies {less:.1%} less than in" in said
    assert f"at its peak a rank holds {format_bytes(peak_memory(run, 1, True))}, " in said
    assert f"{format_bytes(abs(below))} {'less' if below >= 0 else 'more'}, most of it" in said
    assert less > 0.05
    assert said.endswith("Where products take most of a step, that saves time")


@pytest.mark.parametrize("rank", [9, 12, 24])
def test_the_rank_that_would_save_time_does_by_the_planner_s_own_count(
    rank: int, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def less(*overrides: str) -> float:
        run = load_config(config, overrides)
        return 1 - flops_per_token(run, True).total / flops_per_token(run, False).total

    said = verdict_of(page_of(capsys, str(config), f"lora.rank={rank}"))
    here = less(f"lora.rank={rank}")
    assert here < 0.05
    assert f"multiplies {abs(here):.1%} {'less' if here >= 0 else 'more'} than in" in said
    found = re.search(r"which takes 5%: from rank (\d+) down(.*)", said)
    assert found
    assert less(f"lora.rank={int(found[1])}") >= 0.05
    assert less(f"lora.rank={int(found[1]) + 1}") < 0.05
    alone = less(f"lora.rank={rank}", "lora.train=b")
    assert found[2] == (f", or with lora.train: b ({alone:.1%} less)" if alone >= 0.05 else "")


def test_hours_follow_from_the_throughput_of_the_whole_job(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 25,600 tokens at 10 a second.
    page = page_of(capsys, str(config), "--devices", "4", "--tokens-per-s", "10")
    assert "time         0.711 hours, 2.84 GPU-hours on 4 at 10 tokens/s together" in page
    run = load_config(config)
    ratio = training_flops(run, 100) / training_flops(full_rank_twin(run), 100)
    assert f"in the whole run, {ratio:.3g} of full rank's over the same tokens" in page
    assert f"full rank at the same FLOPs per second: {25_600 / 36_000 / ratio:.3g} hours" in page
    assert "give --gpu h100 for an estimate, or --tokens-per-s" in page_of(capsys, str(config))
    for wrong in ("0", "-1", "inf", "nan", "x"):
        with pytest.raises(SystemExit, match="2"):
            main(["plan", str(config), f"--tokens-per-s={wrong}"])


def test_traffic_is_shown_for_several_ranks(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "traffic" not in page_of(capsys, str(config))
    assert re.search(
        r"traffic      \S+B received per rank and step in full rank, \S+B with adapters",
        page_of(capsys, str(config), "--devices", "2"),
    )


@pytest.mark.parametrize("overrides", [[], ["lora=null", "relora=null", "warm_start=null"]])
def test_the_timeline_is_drawn_as_a_picture(
    overrides: list[str], config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = page_of(capsys, str(config), "--png", "plan.png", *overrides)
    assert "picture      plan.png\n" in page
    assert Path("plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("where", ["nowhere/plan.png", "."])
def test_a_picture_without_a_place_is_refused_before_any_work(
    where: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(config), "--png", where]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert f"--png {where}" in said.err


def test_ranks_without_work_are_warned_of(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> str:
        return " ".join(page_of(capsys, str(config), *arguments).split())

    assert "with micro-batch 2 any more would stay unused" in said("--devices", "4")
    assert "stay unused" not in said("--devices", "2")
    assert "one rank has nothing to share: with ZeRO 0 it is" in said()
    assert "nothing to share" not in said("deepspeed.zero_stage=0")
    assert "nothing to share" not in said("--devices", "2")


def test_the_config_is_planned_whatever_its_run_directory_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its run is told apart: to go on, finished, of another model, with another config."""
    path = make_config(tmp_path / "run", train__save_every=6, train__steps=14)

    def stands(*overrides: str) -> str:
        page = page_of(capsys, str(path), *overrides)
        found = re.search(r"^run_dir {6}(.*(?:\n {13}.*)*)", page, re.MULTILINE)
        return " ".join(found[1].split()) if found else ""

    assert stands() == ""
    assert main(["train", str(path), "train.stop_after=6"]) == 75
    capsys.readouterr()
    assert stands() == "has begun: train goes on from step 6"
    assert main(["train", str(path)]) == 0
    capsys.readouterr()
    assert stands() == "is finished: train has nothing to do"
    assert stands("train.steps=20") == "has begun: train goes on from step 14"
    assert "is at step 14 already" in stands("train.steps=13")
    assert stands("optimizer.lr=0.5") == (
        "train asks for --change: optimizer.lr: was 0.01, is now 0.5"
    )
    assert stands("seed=2").startswith(
        "train refuses it: it holds another run: seed: was 1, is now 2: the order of the data"
    )
    # The same file with another model in it: that one is planned.
    model = tmp_path / "other.json"
    values = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert "width 32" in page_of(capsys, str(path))
    model.write_text(json.dumps({**values, "hidden_size": 64}))
    page = page_of(capsys, str(path), f"model.config={model}")
    assert "2 layers of width 64" in page
    assert "train refuses it: it holds a run of another model: hidden_size: was 32," in page
    config = yaml.safe_load(path.read_text())
    Path(config["model"]["config"]).rename(tmp_path / "kept.json")
    try:
        Path(config["model"]["config"]).write_text(model.read_text())
        page = page_of(capsys, str(path))
    finally:
        (tmp_path / "kept.json").replace(config["model"]["config"])
    assert "2 layers of width 64" in page
    assert "it holds a run of another model: hidden_size: was 32, is now 64" in page
    # What cannot be read as a run is said too, and planned all the same.
    (tmp_path / "run" / "config.yaml").write_text("{")
    assert "train refuses it: " in stands()


@pytest.mark.parametrize(
    ("overrides", "lean"),
    [
        ([], "9 norms, 4 SwiGLU MLPs, 4 rotary embeddings, the loss in chunks"),
        (["model.loss_chunk=null"], "9 norms, 4 SwiGLU MLPs, 4 rotary embeddings, the loss whole"),
        (["model.lean=false"], "blocks are transformers' own, and keep more, the loss in chunks"),
    ],
    ids=str,
)
def test_the_page_says_what_keeps_less(
    overrides: list[str], lean: str, capsys: pytest.CaptureFixture[str]
) -> None:
    page = page_of(capsys, str(ROOT / "configs/quickstart_relora.yaml"), *overrides)
    assert f"\nlean         {lean}\n" in page


@pytest.mark.parametrize(
    "name",
    ["60m", *(pytest.param(n, marks=pytest.mark.slow) for n in ("130m", "250m", "350m", "1b3"))],
)
def test_the_pages_peaks_are_the_planners(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config_path = Path(f"configs/published/llama_{name}.yaml")
    plain = ["model.lean=false", "model.loss_chunk=null"]
    lean = load_config(config_path, [])
    blocks = load_config(Path(f"configs/llama_{name}_relora.yaml"))
    cells = [
        peak_memory(full_rank_twin(load_config(config_path, plain)), 8),
        peak_memory(load_config(config_path, [*plain, "lora.graph=low_rank"]), 8, True),
        peak_memory(full_rank_twin(lean), 8),
        peak_memory(lean, 8, True),
        peak_memory(blocks, 8, True),
    ]
    assert max(cells[3:]) < min(cells[:3])
    numbers = [f"{size / 2**30:.1f} GiB" for size in cells]
    steps = [
        flops_per_token(one, True).total / flops_per_token(full_rank_twin(one), False).total
        for one in (lean, blocks)
    ]
    title = {"1b3": "1.3B"}.get(name, name.upper())
    row = f"| {title} | {' | '.join(numbers)} | {steps[0]:.2f} | {steps[1]:.2f} |"
    print(row)
    assert row in (ROOT / "configs/experiments/cost.md").read_text()


def test_the_readmes_quickstart_holds_and_saves_what_the_planner_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    readme = (ROOT / "README.md").read_text()

    def parts(name: str) -> tuple[str, str]:
        config = load_config(Path(f"configs/quickstart_{name}.yaml"))
        found = memory_by_part(config, 2, config.lora is not None)
        state = sum(found[part] for part in ("weights", "gradients", "masters", "moments"))
        held, saved = format_bytes(state), format_bytes(found["activations"])
        return held.replace("MB", " MB"), saved.replace("MB", " MB")

    for name, row in {"full": "full rank, AdamW", "relora": "two blocks, Muon"}.items():
        cells = re.findall(rf"^\| {row}.*$", readme, re.MULTILINE)[-1]
        assert tuple(cells.split(" | ")[6:8]) == parts(name)


@pytest.mark.parametrize(
    ("name", "precision", "hours"),
    [("h100", "bf16", True), ("4090", "deepspeed_bf16", True), ("a100", "fp32", False)],
)
def test_hours_on_a_gpu_are_estimated_from_its_peak(
    name: str, precision: str, hours: bool, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--devices", "2", "--gpu", name, "--mfu", "0.3", "--price", "2"]
    setting = f"deepspeed.precision={precision}"
    page = page_of(capsys, str(config), *options, setting)
    run = load_config(config, [setting])
    flops, gpu = training_flops(run, run.total_steps), GPUS[name]
    together = 2 * flops / (2 * gpu.flops * 0.3) / 3600
    assert (f"{together:,.3g} GPU-hours on 2 {gpu.name}: an estimate," in page) == hours
    assert (f"for 30% of {gpu.flops / 1e12:,.0f} TFLOPS" in page) == hours
    assert (f"cost         {together * 2:,.4g} at 2 a GPU-hour" in page) == hours
    assert (f"no estimate for deepspeed.precision: {precision}" in page) != hours
    assert f"of {format_bytes(gpu.memory)} on each {gpu.name}: fits" in page


LARGE_BATCH = [f"batch.{name}_batch_size=16384" for name in ("micro", "global")]
LARGE_BATCH += ["model.loss_chunk=null"]


def test_what_does_not_fit_is_told_with_ways_out(capsys: pytest.CaptureFixture[str]) -> None:
    page = page_of(capsys, "quickstart_full", "--gpu", "3090", *LARGE_BATCH)
    assert "on each RTX 3090: does not fit with a tenth to spare;" in page
    assert "model.gradient_checkpointing" in page


def test_each_kind_of_gpu_can_be_named() -> None:
    assert list(GPUS) == list(GPU_NAMES)


def test_what_is_not_there_is_told_before_anything_is_prepared(
    config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    own = ["data.source={files: [none/*.txt]}", "data.tokenizer={path: ./no_tokenizer}"]
    page = " ".join(page_of(capsys, str(config), *own, f"data.dir={tmp_path}").split())
    assert "absent data.source.files: 'none/*.txt'" in page or "absent none/*.txt" in page
    assert "absent data.tokenizer.path: ./no_tokenizer is not here" in page
    saved = ["data.source={saved: none}", f"data.dir={tmp_path}"]
    assert "data.source.saved: no such directory none" in page_of(capsys, str(config), *saved)


@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_rate_that_moves_w_far_from_full_ranks_is_doubted(
    model: dict[str, object], config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 4 of 32 inputs (also where a weight lies transposed), s = 1: an update reaches √(4/96)
    of the ratio of rates."""
    Path("model.json").write_text(json.dumps(model))
    said = "! adapters' rate"
    for ratio, is_said in ((1, True), (4, False), (30, True)):
        overrides = [f"relora.lr={1e-3 * ratio}", "lora.rank=4", "lora.alpha=4"]
        page = page_of(capsys, str(config), "optimizer.lr=1e-3", *overrides)
        assert (said in page) == is_said, ratio
    assert " ".join(page.split()).count(f"moves W by {30 * (4 / 96) ** 0.5:.3g} of") == 2


def test_the_reach_of_an_update_is_that_of_adams_first_one(config: Path) -> None:
    """After a restart B is zero: W moves by s·B·A, where full rank's entries move by the rate."""
    run = load_config(config, ["lora.rank=16", "lora.alpha=8"])
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 512, bias=False))
    add_adapters(model, run.lora)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=2e-3)
    model(torch.randn(64, 256)).square().sum().backward()
    optimizer.step()
    layer = model[0]
    moved = (layer.effective(torch.float32) - layer.weight).square().mean().sqrt() / 1e-3
    told = re.search(r"moves W by ([\d.e-]+) of", reach_of_updates(run, {"0": (512, 256)}))
    assert told is not None
    assert float(told[1]) == pytest.approx(moved.item(), rel=0.05)
