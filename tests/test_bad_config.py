"""Every bad config ends in exit 2 and one message: path, value, and what to do about it.

And it ends there before a process group exists or any text is read, which for a mistake in the
file itself means before torch is imported.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from relora.cli import build_parser, main

MODEL = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
GOOD = {
    "model": {"config": "model.json"},
    "data": {
        "source": {"files": ["text/*.txt"]},
        "tokenizer": {"train": "bpe", "vocab_size": 512},
        "sequence_length": 32,
    },
    "batch": {"global_batch_size": 8, "micro_batch_size": 4},
    "train": {"steps": 100},
    "optimizer": {"lr": 0.001},
    "schedule": {"warmup_steps": 5},
    "lora": {"rank": 4},
    "relora": {"cycle_steps": 20, "rewarm_steps": 5},
    "warm_start": {"steps": 20},
    "deepspeed": {"precision": "fp32"},
}

# What is wrong: the overrides that make it so, and the message, without the file it is about.
IN_THE_FILE = {
    "unknown key": (
        ["relora.cycle_step=20"],
        "relora.cycle_step: unknown key; did you mean cycle_steps? allowed here: cycle_steps, "
        "rewarm_steps, lr, reset, keep_adapters, precision, remainder, tolerance",
    ),
    "milestones of nothing": (
        ["train.keep_every=cycle", "relora=null"],
        "train.keep_every: cycle would do nothing without relora; give a number of steps",
    ),
    "milestones that are no interval": (
        ["train.keep_every=true"],
        "train.keep_every: true: must be a number of steps from 1 up, or cycle, or null",
    ),
    "a check that finds nothing": (
        ["relora.tolerance=1e9"],
        "relora.tolerance: '1e9': must be less than 1",
    ),
    "unknown section": (
        ["optimiser.lr=1e-3"],
        "optimiser: unknown key; did you mean optimizer? allowed here: run_dir, seed, "
        "deterministic, model, data, batch, train, optimizer, schedule, lora, relora, warm_start, "
        "deepspeed, spectra",
    ),
    "one rate given twice": (
        ["lora.lr=1e-3", "relora.lr=2e-3"],
        "lora.lr: 0.001 would do nothing beside relora.lr 0.002: they are the same rate; remove "
        "one",
    ),
    "spectra from elsewhere than the birth": (
        ["spectra.start=3"],
        "spectra.start: 3 would do nothing with lora: updates are counted from the birth of the "
        "adapters; remove it",
    ),
    "wrong type": (["lora.rank=many"], "lora.rank: 'many': must be a whole number"),
    "fraction of a step": (["train.steps=1.5"], "train.steps: 1.5: must be a whole number"),
    "null where a value is due": (
        ["train.log_every=null"],
        "train.log_every: null: must be a whole number",
    ),
    "true as a number": (["optimizer.lr=true"], "optimizer.lr: true: must be a number"),
    "not finite": (["optimizer.lr=.nan"], "optimizer.lr: nan: must be a finite number"),
    "out of range": (["optimizer.lr=-1"], "optimizer.lr: -1: must be greater than 0"),
    "not one of the choices": (
        ["relora.reset.mode=all"],
        "relora.reset.mode: 'all': must be 'zero', 'random', 'magnitude' or 'none'",
    ),
    "word for a section": (
        ["relora=true"],
        "relora: true: must be a section with the keys cycle_steps, rewarm_steps, lr, reset, "
        "keep_adapters, precision, remainder, tolerance",
    ),
    "word for a list": (
        ["lora.targets=q_proj"],
        "lora.targets: 'q_proj': must be a list, such as [a, b]",
    ),
    "empty list": (["lora.targets=[]"], "lora.targets: []: must have at least 1 of them"),
    "one beta": (["optimizer.betas=[0.9]"], "optimizer.betas: has no value number 2"),
    "three betas": (
        ["optimizer.betas=[0.9, 0.95, 0.99]"],
        "optimizer.betas: [0.9, 0.95, 0.99]: must have at most 2 of them",
    ),
    "a beta of one": (
        ["optimizer.betas=[0.9, 1.0]"],
        "optimizer.betas: [0.9, 1.0]: both betas lie in [0, 1)",
    ),
    "missing section": (
        ["batch=null"],
        "batch: null: must be a section with the keys global_batch_size, micro_batch_size",
    ),
    "two lengths": (
        ["train.tokens=1B"],
        "train: give the run's length as either steps or tokens",
    ),
    "no number of tokens": (
        ["train={tokens: a lot}"],
        "train.tokens: 'a lot': a whole number, or one with K, M, B or T, such as 1.2B",
    ),
    "model from two places": (
        ["model.pretrained=x"],
        "model: give either config (a JSON file) or pretrained (a directory)",
    ),
    "no such model config": (
        ["model.config=none.json"],
        "model.config: none.json: no such file (looked from {cwd})",
    ),
    "two sources": (
        ["data.source.dataset=allenai/c4"],
        "data.source: name exactly one of builtin, files, dataset, saved; given: files, dataset",
    ),
    "tokenizer of unknown size": (
        ["data.tokenizer={train: bpe}"],
        "data.tokenizer: train needs vocab_size, for example 32100",
    ),
    "cycle longer than the run": (
        ["relora.cycle_steps=80"],
        "relora.cycle_steps: 80 leaves no merge in a run of 100 steps with 20 of warm start; take "
        "at most 79, or relora: null for plain LoRA",
    ),
    "rewarm as long as the cycle": (
        ["relora.rewarm_steps=20"],
        "relora.rewarm_steps: 20 must be below cycle_steps 20, or the learning rate never arrives",
    ),
    "warm start longer than the run": (
        ["warm_start.steps=100"],
        "warm_start.steps: 100 must be below the run's 100 steps",
    ),
    "warm-up longer than the run": (
        ["schedule.warmup_steps=100"],
        "schedule.warmup_steps: 100 must be below the run's 100 steps",
    ),
    "warm-up beyond the first restart": (
        ["schedule.warmup_steps=21"],
        "schedule.warmup_steps: 21 must not outlast the first restart at step 20, or that restart "
        "would not restart the learning rate",
    ),
    "cycles without adapters": (
        ["lora=null", "warm_start=null"],
        "relora: would do nothing without lora; set lora, or relora: null",
    ),
    "warm start without adapters": (
        ["lora=null", "relora=null"],
        "warm_start: would do nothing without lora; set lora, or warm_start: null",
    ),
    "share of a reset that has none": (
        ["relora.reset={mode: zero, ratio: 0.5}"],
        "relora.reset: ratio would do nothing with mode: zero; set it to null",
    ),
    "momentum of Adam": (
        ["optimizer.momentum=0.9"],
        "optimizer.momentum: is that of muon and would do nothing; remove it",
    ),
    "second masks of one moment": (
        ["optimizer.matrices=muon", "relora.reset={masks: independent}"],
        "relora.reset.masks: independent would do nothing with optimizer.matrices: muon, which "
        "keeps one moment; remove it",
    ),
    "rounding of fp32": (
        ["relora.precision=rounded"],
        "relora.precision: rounded would do nothing with deepspeed.precision: fp32",
    ),
    "floor of a constant": (
        ["schedule={base: constant, min_lr_ratio: 0.2}"],
        "schedule.min_lr_ratio: would do nothing with base: constant; remove it",
    ),
    "an effective weight under dropout": (
        ["lora={rank: 4, dropout: 0.1, graph: effective}"],
        "lora.graph: effective knows no dropout, which acts on the adapter's input alone; take "
        "graph: low_rank, or dropout: 0",
    ),
    "what to keep of a graph that keeps nothing": (
        ["lora={rank: 4, graph: low_rank, keep_effective: false}"],
        "lora.keep_effective: would do nothing with the low-rank graph; remove it",
    ),
    "whole weights under ZeRO 3": (
        ["lora={rank: 4, keep_effective: true}", "deepspeed.zero_stage=3"],
        "lora.keep_effective: true would hold whole on each rank what ZeRO 3 partitions; take "
        "false, or zero_stage 2",
    ),
    "compiled blocks that ZeRO 3 gathers": (
        ["train.compile=blocks", "deepspeed.zero_stage=3"],
        "train.compile: blocks: ZeRO 3 gathers weights within the blocks, by hooks that no "
        "compiler sees through; take null, or zero_stage 0, 1 or 2",
    ),
    "compiled blocks that keep nothing": (
        ["train.compile=blocks", "lora={rank: 4, keep_effective: false}"],
        "lora.keep_effective: false would do nothing with train.compile: blocks, which keep W + "
        "s·B·A for each step; remove it",
    ),
    "another thing to compile": (
        ["train.compile=model"],
        "train.compile: 'model': must be 'blocks'",
    ),
    "reduction beside DeepSpeed's own": (
        ["deepspeed={reduce_dtype: bf16, precision: deepspeed_bf16}"],
        "deepspeed.reduce_dtype: bf16: with precision deepspeed_bf16 DeepSpeed makes gradients and "
        "reduces them in bf16; take null, or precision: bf16",
    ),
    "reduction in two words": (
        ["deepspeed={reduce_dtype: bf16, extra: {communication_data_type: fp32}}"],
        "deepspeed.extra.communication_data_type: is decided by deepspeed.reduce_dtype; remove one",
    ),
    "reduction in fp16": (
        ["deepspeed.reduce_dtype=fp16"],
        "deepspeed.reduce_dtype: 'fp16': must be 'fp32' or 'bf16'",
    ),
    "whole codes under ZeRO 3": (
        ["lora={rank: 4, base: nf4}", "deepspeed.zero_stage=3"],
        "lora.base: nf4 quantises whole weights, where ZeRO 3 partitions them; take null, or "
        "zero_stage 0, 1 or 2",
    ),
    "codes and compiled blocks": (
        ["lora={rank: 4, base: int8}", "train.compile=blocks"],
        "lora.base: int8 with train.compile: blocks, which keep W + s·B·A in half precision for "
        "each step; take one of them",
    ),
    "merges that round a quantised base": (
        ["lora={rank: 4, base: fp8}", "relora.precision=rounded"],
        "relora.precision: rounded would do nothing with lora.base: fp8, whose exact values lie "
        "in host memory; remove it",
    ),
    "a remainder that exact values need not": (
        ["lora={rank: 4, base: fp8}", "relora.remainder=device", "deepspeed.precision=bf16"],
        "relora.remainder: device would do nothing with lora.base: fp8, whose exact values lie in "
        "host memory; remove it",
    ),
    "a base of another kind": (
        ["lora={rank: 4, base: int4}"],
        "lora.base: 'int4': must be 'int8', 'fp8' or 'nf4'",
    ),
    "half a residual stream of fp32": (
        ["model.half_residual=true", "deepspeed.precision=fp32"],
        "model.half_residual: would do nothing without model.lean and precision: bf16",
    ),
    "half a residual stream of fp16": (
        ["model.half_residual=true", "deepspeed.precision=fp16"],
        "model.half_residual: fp16 overflows where blocks add up; take precision: bf16, or "
        "half_residual: false",
    ),
    "chunks of no token": (
        ["model.loss_chunk=0"],
        "model.loss_chunk: 0: must be greater than or equal to 1",
    ),
    "sequence longer than the context": (
        ["data.sequence_length=128"],
        "data.sequence_length: 128 is longer than the model's context of 64 (model.json); take at "
        "most 64",
    ),
    "tokenizer larger than the model's vocabulary": (
        ["data.tokenizer.vocab_size=1024"],
        "data.tokenizer.vocab_size: 1024 does not fit the model's vocabulary of 512 (model.json); "
        "make them equal",
    ),
    "offload of what is not partitioned": (
        ["deepspeed.zero_stage=0", "deepspeed.offload_optimizer=true"],
        "deepspeed: zero_stage 0, precision fp32, offload_optimizer true: ZeRO 0 has no "
        "partitioned optimizer to offload; take zero_stage 1, 2 or 3, or offload_optimizer: false",
    ),
    "DeepSpeed's own bf16 where it takes a step unasked": (
        ["deepspeed.zero_stage=0", "deepspeed.precision=deepspeed_bf16"],
        "deepspeed: zero_stage 0, precision deepspeed_bf16, offload_optimizer false: DeepSpeed's "
        "wrapper of ZeRO 0 takes an optimizer step with zero gradients when built; take "
        "precision: bf16, or zero_stage 1, 2 or 3",
    ),
    "DeepSpeed's own fp16": (
        ["deepspeed.extra={fp16: {enabled: true}}"],
        "deepspeed.extra.fp16: DeepSpeed's fp16 engine never scales the loss under ZeRO 0, and 16 "
        "bits more do not complete its fp16 weights to fp32, so merges would lose updates; take "
        "deepspeed.precision: fp16",
    ),
    "another accumulator of DeepSpeed's": (
        ["deepspeed.extra={data_types: {grad_accum_dtype: fp32}}"],
        "deepspeed.extra.data_types: DeepSpeed wraps Adam in another class for it, whose state "
        "merges do not reach; remove it",
    ),
    "DeepSpeed's checkpoints": (
        ["deepspeed.extra={checkpoint: {load_universal: true}}"],
        "deepspeed.extra.checkpoint: checkpoints are relora's own: those of DeepSpeed lose frozen "
        "weights when the ranks change; remove it",
    ),
    "a place for what is not there": (
        ["relora.remainder=device"],
        "relora.remainder: device would do nothing with deepspeed.precision: fp32",
    ),
    "a place for what is dropped": (
        ["relora.remainder=device", "relora.precision=rounded", "deepspeed.precision=bf16"],
        "relora.remainder: device would do nothing with precision: rounded",
    ),
    "decay of nothing": (
        ["lora.decay=merged", "optimizer.weight_decay=0"],
        "lora.decay: merged would do nothing with optimizer.weight_decay: 0",
    ),
    "one thing set in two places": (
        ["deepspeed.extra={gradient_clipping: 1.0}"],
        "deepspeed.extra.gradient_clipping: is decided by optimizer.grad_clip; set it there",
    ),
    "DeepSpeed option that breaks merges": (
        ["deepspeed.extra={zero_optimization: {round_robin_gradients: true}}"],
        "deepspeed.extra.zero_optimization.round_robin_gradients: DeepSpeed maps fp32 masters to "
        "the wrong parameters with it; remove it",
    ),
}

# What only the model, the world or the shards show; the message stands without the file's name.
BEYOND_THE_FILE = {
    "override without a value": (
        ["lora.rank"],
        "override 'lora.rank': write it as section.key=value",
    ),
    "override that is no YAML": (
        ["lora.rank=["],
        "override 'lora.rank=[': the value is not valid YAML: expected the node content, but found "
        "'<stream end>'",
    ),
    "override that is no date": (
        ["seed=2026-02-30"],
        "override 'seed=2026-02-30': the value is not valid YAML: day is out of range for month",
    ),
    "override through a value": (
        ["lora.rank.deep=3"],
        "override 'lora.rank.deep=3': lora.rank is 4, which has no keys; override lora.rank as a "
        "whole",
    ),
    "batch not divisible": (
        ["batch.micro_batch_size=3"],
        "batch.global_batch_size: 8 is not a multiple of micro_batch_size 3 × 1 rank = 3; take 6 "
        "or 9, or another micro_batch_size",
    ),
    "micro-batch larger than the batch": (
        ["batch.micro_batch_size=16"],
        "batch.global_batch_size: 8 is not a multiple of micro_batch_size 16 × 1 rank = 16; take "
        "16, or another micro_batch_size",
    ),
    "rank beyond a dimension": (
        ["lora.rank=33"],
        "lora.rank: 33 is beyond the smaller dimension of model.layers.0.self_attn.q_proj "
        "(32, 32); take at most 32",
    ),
    "targets that match nothing": (
        ["lora.targets=[q_proj, query]"],
        "lora.targets: 'query' matches no linear layer of this model; it has: down_proj, "
        "gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
    ),
    "no model in the directory": (
        ["model={pretrained: nowhere}"],
        "model.pretrained: nowhere: holds no config.json; give a transformers model directory, a "
        "run directory or one of its checkpoints",
    ),
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A good config of a tiny model, in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("model.json").write_text(json.dumps(MODEL))
    path = Path("bad.yaml")
    path.write_text(yaml.safe_dump({"run_dir": "run", **copy.deepcopy(GOOD)}))
    return path


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a process group, or reading any text, fail the test."""
    import relora.data.corpus
    import relora.engine.deepspeed

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("work was begun before the config was checked")

    monkeypatch.setattr(relora.engine.deepspeed, "init_distributed", forbidden)
    monkeypatch.setattr(relora.data.corpus, "iter_documents", forbidden)


def message_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `relora ARGUMENTS` says, checked to exit with 2 and to print nothing else."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize("what", IN_THE_FILE)
def test_a_mistake_in_the_file_is_named_with_its_value_and_its_remedy(
    what: str, config: Path, no_work: None, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, expected = IN_THE_FILE[what]
    message = message_of(capsys, "train", str(config), *overrides)
    assert message == f"relora: bad.yaml: {expected.format(cwd=Path.cwd())}\n"
    assert not Path("run").exists()


@pytest.mark.parametrize("what", BEYOND_THE_FILE)
def test_a_mistake_that_only_model_or_world_show_is_named_alike(
    what: str, config: Path, no_work: None, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, expected = BEYOND_THE_FILE[what]
    assert message_of(capsys, "train", str(config), *overrides) == f"relora: {expected}\n"
    assert message_of(capsys, "plan", str(config), *overrides) == f"relora: {expected}\n"
    assert not Path("run").exists()


def test_missing_shards_are_a_config_error_that_names_the_command(
    config: Path, no_work: None, capsys: pytest.CaptureFixture[str]
) -> None:
    message = message_of(capsys, "train", str(config))
    assert message.startswith("relora: data: there are no token shards at data/")
    assert message.endswith("; run: relora prepare CONFIG\n")
    assert not Path("run").exists()


def test_a_batch_that_the_ranks_do_not_divide_is_refused_by_every_rank(
    config: Path,
    no_work: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = (
        "relora: batch.global_batch_size: 8 is not a multiple of micro_batch_size 4 × 3 ranks = "
        "12; take 12, or another micro_batch_size\n"
    )
    assert message_of(capsys, "plan", "--devices", "3", str(config)) == expected
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert message_of(capsys, "train", str(config)) == expected


def test_all_mistakes_are_shown_at_once(
    config: Path, no_work: None, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["lora.rnk=8", "optimizer.lr=fast", "batch.micro_batch_size=0"]
    lines = message_of(capsys, "train", str(config), *overrides).splitlines()
    assert lines[0] == "relora: bad.yaml: 3 problems"
    assert sorted(line.strip().partition(": ")[0] for line in lines[1:]) == [
        "batch.micro_batch_size",
        "lora.rnk",
        "optimizer.lr",
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "bad.yaml: a config file is a mapping of sections, such as `model:`"),
        (b"- a\n- b\n", "bad.yaml: a config file is a mapping of sections, such as `model:`"),
        (b"seed: 1\nseed: 2\n", "bad.yaml: not valid YAML: line 2: seed is given twice"),
        (b"? [a, b]\n: 1\n", "bad.yaml: not valid YAML: line 1: a key must be a name"),
        (b"\xff\xfe", "bad.yaml: cannot be read: not UTF-8 (byte 0xff at 0)"),
        (b"model: [\n", "bad.yaml: not valid YAML: while parsing"),
        (b"model: !!python/name:os.system\n", "bad.yaml: not valid YAML: could not determine a"),
        (
            b"model: !!python/object/apply:os.system [touch executed]\n",
            "bad.yaml: not valid YAML: could not determine a constructor",
        ),
        (
            b"a: &a [x, x]\n"
            + b"".join(b"%c: &%c [*%c, *%c]\n" % (n + 1, n + 1, n, n) for n in range(97, 122)),
            "bad.yaml: not valid YAML: line 2: *a: aliases are not read; write the value out",
        ),
        (b"seed: !!int ''\n", "bad.yaml: not valid YAML: string index out of range"),
        (b"seed: " + b"9" * 5000, "bad.yaml: not valid YAML: Exceeds the limit"),
        (b"seed: 2026-13-45\n", "bad.yaml: not valid YAML: month must be in 1..12"),
        (b"seed: " + b"[" * 50_000, "bad.yaml: not valid YAML: maximum recursion depth"),
        (b"#" * 1_000_001, "bad.yaml: 1000001 bytes is no config file"),
    ],
)
def test_a_file_that_is_no_config_is_refused(
    content: bytes, expected: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_bytes(content)
    assert message_of(capsys, "train", str(config)).startswith(f"relora: {expected}")
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "bad.yaml: model.config: model.json: not valid JSON"),
        ("[]", 'bad.yaml: model.config: model.json: needs a "model_type", such as "llama"'),
        ("{}", 'bad.yaml: model.config: model.json: needs a "model_type", such as "llama"'),
        ('{"model_type": "lama"}', "model.json: transformers does not know this model"),
    ],
)
def test_a_bad_model_config_is_refused(
    content: str, expected: str, config: Path, no_work: None, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("model.json").write_text(content)
    assert message_of(capsys, "train", str(config)).startswith(f"relora: {expected}")


def test_no_config_file_is_said_with_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    message = message_of(capsys, "train", "configs/none.yaml")
    assert message == (f"relora: configs/none.yaml: no such config file (looked from {tmp_path})\n")


def _verbs() -> list[str]:
    actions = build_parser()._subparsers._group_actions  # type: ignore[union-attr]
    return list(actions[0].choices)  # type: ignore[arg-type]


@pytest.mark.parametrize("verb", _verbs())
def test_help_shows_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([verb, "--help"])
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"relora {verb}" in text.partition("example: ")[2]


def test_unknown_arguments_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        [],
        ["plan"],
        ["plan", "x.yaml", "--devices", "two"],
        ["plan", "x.yaml", "--device-count=2"],
        ["verify", "x", "a=1"],
    ):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 2
        assert "usage: relora" in capsys.readouterr().err


def test_help_and_config_errors_answer_without_torch(config: Path) -> None:
    code = (
        "import sys\n"
        "from relora.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "except SystemExit:\n"
        "    pass\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'datasets', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    for arguments in (
        ["--help"],
        ["train", "--help"],
        ["train", str(config), "lora.rank=0"],
        ["plan", str(config), "lora.rank=0"],
        ["launch", str(config), "lora=1"],
        ["prepare", str(config), "lora=1"],
        ["arms", str(config), "--to", "arms", "lora=1"],
        ["plan", str(config), "--devices", "3"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (arguments, done.stderr)
