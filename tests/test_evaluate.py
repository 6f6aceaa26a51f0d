"""`evaluate` and `generate`, and runs that start from what another run has left."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ranks import Scenario, run_ranks
from relora.data.loader import eval_batches
from relora.engine.evaluation import evaluate_loss
from runs import (
    SEQUENCE,
    adam_steps,
    checkpoint,
    make_config,
    metric_lines,
    relora,
    same_bits,
    series,
    tensors,
    train,
    workshop,
)

WHOLE = {"train__eval_sequences": None}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose evaluations cover the whole validation split."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    assert train(run_dir, train__save_every=8, **WHOLE) == 0
    return run_dir


def evaluated(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[float, int]:
    """(loss, tokens) of `relora evaluate`, unrounded."""
    from relora.commands import evaluate as command

    found: list[tuple[float, int]] = []
    real = command.evaluate_loss
    with monkeypatch.context() as patch:
        patch.setattr(command, "evaluate_loss", lambda *args: found.append(real(*args)) or found[0])
        assert relora("evaluate", *arguments) == 0
    return found[0][:2]


# --- evaluate -------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [8, 16, 24])
def test_evaluate_gives_the_loss_that_training_logged(
    step: int, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, tokens = evaluated(monkeypatch, checkpoint(finished, step))
    assert loss == pytest.approx(series(finished, "eval/loss")[step], rel=1e-5)
    assert tokens == series(finished, "eval/tokens")[step]


def test_evaluate_knows_how_far_merged_weights_have_decayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a cycle, where the engine multiplies by what decay has left."""
    changes = {"lora__decay": "merged", "optimizer__weight_decay": 1.0, **WHOLE}
    assert train(tmp_path / "run", "train.stop_after=16", **changes) == 75
    loss, _ = evaluated(monkeypatch, tmp_path / "run")
    assert loss == pytest.approx(series(tmp_path / "run", "eval/loss")[16], rel=1e-5)


def test_a_run_means_its_newest_checkpoint(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss, tokens = evaluated(monkeypatch, finished)
    assert loss == pytest.approx(series(finished, "eval/loss")[24], rel=1e-5)
    output = capsys.readouterr().out
    assert f"{checkpoint(finished, 24)}: validation loss {loss:.4f} nats per token" in output
    assert f"on {tokens:,} tokens" in output


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_the_batch_size_does_not_matter(
    size: int, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a last batch that is not full."""
    loss, tokens = evaluated(monkeypatch, finished, "--batch-size", size)
    assert loss == pytest.approx(series(finished, "eval/loss")[24], rel=1e-5)
    assert tokens == series(finished, "eval/tokens")[24]


def test_it_is_the_mean_over_tokens(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: transformers' logits, one sequence at a time, in float64."""
    from relora.data.shards import open_shards
    from relora.load import load_config
    from relora.record.loaded import load_run

    shards = open_shards(load_config(finished / "config.yaml").data)
    model = load_run(finished).merged_model().eval()
    losses = []
    there = len(shards.validation) // SEQUENCE
    for number in [n * there // 5 for n in range(5)]:  # evenly over the split
        ids = shards.validation[number * SEQUENCE : (number + 1) * SEQUENCE].astype("int64")
        rows = torch.from_numpy(ids)[None]
        with torch.no_grad():
            log_p = torch.log_softmax(model(input_ids=rows).logits[0].double(), dim=-1)
        losses += (-log_p[:-1].gather(1, rows[0, 1:, None])[:, 0]).tolist()
    loss, tokens = evaluated(monkeypatch, finished, "--max-sequences", 5, "--batch-size", 2)
    assert tokens == 5 * (SEQUENCE - 1) == len(losses)
    assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)


class Fixed(torch.nn.Module):
    """Stands for a model: a batch's loss is its first token, in tenths."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        loss = input_ids[:, 0].double().mean() / 10
        return SimpleNamespace(logits=None, loss=loss)


def evaluate_rows(ranks: Any, rows: int, micro_batch: int) -> tuple[float, int, float]:
    """The whole of an evaluation of `rows` sequences of 5 tokens."""
    tokens = np.arange(rows * 5, dtype=np.uint16) ** 2 % 97
    batches = eval_batches(
        tokens, sequence_length=5, micro_batch=micro_batch, rank=ranks.rank, world=ranks.world
    )
    return tuple(evaluate_loss(Fixed(), batches, ranks))


def test_a_loss_has_a_standard_error_of_its_own_on_any_number_of_ranks() -> None:
    from relora.engine.distributed import lone_rank

    first = (np.arange(0, 35, 5) ** 2 % 97) / 10
    loss, tokens, error = evaluate_rows(lone_rank(), 7, 1)
    assert (loss, tokens) == (pytest.approx(first.mean()), 28)
    assert error == pytest.approx(first.std(ddof=1) / np.sqrt(7), rel=1e-12)
    # A last batch that is not full weighs less.
    means, weights = np.array([first[:3].mean(), first[3:6].mean(), first[6]]), np.array([3, 3, 1])
    expected = np.sqrt(1.5 * ((weights / 7 * (means - first.mean())) ** 2).sum())
    alone = evaluate_rows(lone_rank(), 7, 3)
    assert alone[2] == pytest.approx(expected, rel=1e-12)
    assert np.isnan(evaluate_rows(lone_rank(), 7, 8)[2])  # one batch
    both = run_ranks(2, [Scenario("rows", evaluate_rows, (7, 3))], timeout=500)["rows"]
    assert both[0] == both[1] == pytest.approx(alone, rel=1e-12)


def losses_by_sequence(
    ranks: Any, rows: int, micro_batch: int, chunk: int | None
) -> tuple[float, list[float]]:
    """The loss of a small Llama on `rows` sequences of 6 tokens, and that of each."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from relora.lean import make_lean

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, num_hidden_layers=1, **sizes))
    if chunk is not None:
        assert make_lean(model, chunk).loss
    tokens = np.arange(rows * 6, dtype=np.uint16) ** 2 % 97
    batches = eval_batches(
        tokens, sequence_length=6, micro_batch=micro_batch, rank=ranks.rank, world=ranks.world
    )
    each: list[float] = []
    loss = evaluate_loss(model, batches, ranks, each).loss
    return loss, each


@pytest.mark.parametrize("chunk", [None, 4])
def test_the_loss_of_each_sequence_is_that_of_the_sequence_alone(chunk: int | None) -> None:
    """In the order of the split, also where the last batch is not full; as many as rows."""
    from relora.engine.distributed import lone_rank

    loss, each = losses_by_sequence(lone_rank(), 7, 3, chunk)
    alone = losses_by_sequence(lone_rank(), 7, 1, None)
    assert len(set(each)) == len(each) == 7
    assert each == pytest.approx(alone[1], rel=1e-6)
    assert loss == pytest.approx(np.mean(each), rel=1e-6)


def test_two_ranks_have_the_losses_of_sequences_in_the_order_of_one() -> None:
    from relora.engine.distributed import lone_rank

    # Of five the second rank has two in the first round and none in the second.
    both = run_ranks(
        2,
        [Scenario(f"{chunk}", losses_by_sequence, (5, 2, chunk)) for chunk in (None, 4)],
        timeout=500,
    )
    for chunk in (None, 4):
        one = losses_by_sequence(lone_rank(), 5, 2, chunk)
        for found in both[f"{chunk}"]:
            assert found[1] == pytest.approx(one[1], rel=1e-6)


def test_a_run_keeps_the_losses_of_its_end_and_no_others(finished: Path, tmp_path: Path) -> None:
    """Also one that was stopped right before, and one that is finished and started again."""
    (kept,) = [line for line in metric_lines(finished) if "eval/sequence_losses" in line]
    assert kept["step"] == 24
    each = kept["eval/sequence_losses"]
    assert np.mean(each) == pytest.approx(series(finished, "eval/loss")[24], rel=1e-5)
    assert len(each) * (SEQUENCE - 1) == series(finished, "eval/tokens")[24]
    assert train(tmp_path / "run", "train.stop_after=23", **WHOLE) == 75
    assert not [line for line in metric_lines(tmp_path / "run") if "eval/sequence_losses" in line]
    for _ in range(2):
        assert train(tmp_path / "run", **WHOLE) == 0
        (line,) = [x for x in metric_lines(tmp_path / "run") if "eval/sequence_losses" in x]
        assert line["eval/sequence_losses"] == each


def test_evaluate_says_how_sure_its_loss_is(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert relora("evaluate", finished, "--batch-size", 2) == 0
    assert re.search(
        r"nats per token \(standard error 0\.\d{4}\), perplex", capsys.readouterr().out
    )
    assert relora("evaluate", finished, "--max-sequences", 1) == 0
    assert "nats per token, perplexity" in capsys.readouterr().out
    errors = series(finished, "eval/standard_error")
    assert list(errors) == list(series(finished, "eval/loss"))
    assert all(0 < error < 1 for error in errors.values())


def test_the_training_split_has_another_loss(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--split", "train", "--max-sequences", 200)
    loss, tokens = evaluated(monkeypatch, finished, *arguments)
    assert tokens == 200 * (SEQUENCE - 1)
    assert loss == pytest.approx(series(finished, "eval/loss")[24], rel=0.2)
    assert loss != series(finished, "eval/loss")[24]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(("--batch-size", 0), "--batch-size"), (("--max-sequences", 0), "--max-sequences")],
)
def test_numbers_that_make_no_sense_are_refused(
    arguments: tuple[object, ...],
    word: str,
    finished: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert relora("evaluate", finished, *arguments) == 2
    error = capsys.readouterr().err
    assert word in error
    assert "at least 1" in error


@pytest.mark.parametrize("verb", ["evaluate", "generate"])
def test_no_run_is_one_message(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--prompt", "x") if verb == "generate" else ()
    config = make_config(tmp_path / "run")
    for subject in (tmp_path, tmp_path / "none", config):
        assert relora(verb, subject, *more) == 4
        error = capsys.readouterr().err
        assert str(subject) in error
        assert "is no checkpoint and no run directory with one" in error


# --- generate -------------------------------------------------------------------------------------


def generated(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert relora("generate", *arguments) == 0
    return capsys.readouterr().out


PROMPT = "def\tself  🙂 naïve\n  return"


def test_the_prompt_is_kept_and_goes_on(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = generated(capsys, finished, "--prompt", PROMPT, "--max-new-tokens", 20)
    assert text.startswith(PROMPT)
    assert len(text.rstrip("\n")) > len(PROMPT)


def test_it_writes_as_much_as_the_context_takes_if_nothing_is_asked(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hundred tokens would be beyond this model's 64."""
    assert generated(capsys, finished, "--prompt", PROMPT, "--temperature", 0).startswith(PROMPT)


def test_a_seed_gives_one_text_and_another_seed_another(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (finished, "--prompt", "def", "--max-new-tokens", 30)
    texts = [generated(capsys, *arguments, "--seed", seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_temperature_0_is_greedy(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from relora.data.tokenizer import load_tokenizer
    from relora.record.loaded import load_run

    tokenizer = load_tokenizer(finished / "tokenizer")
    model = load_run(finished).merged_model().eval()
    ids = tokenizer.encode("def", add_special_tokens=False)
    for _ in range(12):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    arguments = (finished, "--prompt", "def", "--max-new-tokens", 12, "--temperature", 0)
    for seed in (0, 1):
        assert generated(capsys, *arguments, "--seed", seed) == f"{expected}\n"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--prompt", ""), "--prompt: is empty"),
        (("--prompt", "def " * 60), "beyond the model's context of 64"),
        (("--prompt", "def", "--max-new-tokens", 100), "beyond the model's context of 64"),
        (("--prompt", "def", "--max-new-tokens", 0), "--max-new-tokens"),
        (("--prompt", "def", "--temperature", -1), "--temperature"),
        (("--prompt", "def", "--top-k", 0), "--top-k"),
    ],
)
def test_what_cannot_be_generated_is_refused(
    arguments: tuple[object, ...],
    word: str,
    finished: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert relora("generate", finished, *arguments) == 2
    assert word in capsys.readouterr().err


# --- another run's weights as the start -----------------------------------------------------------


def first_losses(run_dir: Path, pretrained: Path, **changes: Any) -> tuple[float, float]:
    """(evaluation, training loss) after the first update of a run, whose learning rate is 0."""
    changes = {
        "model": {"pretrained": str(pretrained)},
        "train__eval_every": 1,
        "warm_start": None,
        **WHOLE,
        **changes,
    }
    assert train(run_dir, "train.stop_after=1", **changes) == 75
    assert series(run_dir, "train/lr") == {1: 0}
    return series(run_dir, "eval/loss")[1], series(run_dir, "train/loss")[1]


STARTS, METHODS = ("run", "checkpoint", "export"), ("ReLoRA", "full rank", "warm start")


@pytest.mark.parametrize(
    ("start", "method"),
    [  # each with one of the others by default
        pytest.param(start, method, marks=[pytest.mark.slow] * (number != place))
        for place, method in enumerate(METHODS)
        for number, start in enumerate(STARTS)
    ],
)
def test_a_run_starts_where_another_ended(
    start: str, method: str, finished: Path, tmp_path: Path
) -> None:
    step = 16 if start == "checkpoint" else 24
    where = {"run": finished, "checkpoint": checkpoint(finished, 16), "export": tmp_path / "e"}
    if start == "export":
        assert relora("export", finished, "--to", tmp_path / "e") == 0
    changes: dict[str, Any] = {
        "ReLoRA": {},
        "full rank": {"lora": None, "relora": None},
        "warm start": {"warm_start": {"steps": 6}},
    }[method]
    evaluation, _ = first_losses(tmp_path / "run", where[start], **changes)
    assert evaluation == pytest.approx(series(finished, "eval/loss")[step], rel=1e-5)


def test_a_run_from_another_s_checkpoint_resumes_bit_for_bit(
    finished: Path, tmp_path: Path
) -> None:
    changes = {"model": {"pretrained": str(checkpoint(finished, 16))}, "seed": 5}
    assert train(tmp_path / "whole", **changes) == 0
    assert train(tmp_path / "cut", "train.stop_after=13", **changes) == 75
    assert train(tmp_path / "cut", **changes) == 0
    for key in ("train/loss", "eval/loss"):
        assert series(tmp_path / "whole", key) == series(tmp_path / "cut", key)


def test_a_run_goes_on_when_what_it_started_from_is_gone(finished: Path, tmp_path: Path) -> None:
    """Its checkpoints hold everything; the weights it began with matter no more."""
    import shutil

    assert relora("export", finished, "--to", tmp_path / "e") == 0
    copy = shutil.copytree(finished, tmp_path / "copy")
    for name, pretrained in (("a", tmp_path / "e"), ("b", copy)):
        changes = {"model": {"pretrained": str(pretrained)}}
        assert train(tmp_path / name, "train.stop_after=13", **changes) == 75
        shutil.rmtree(pretrained)
        assert train(tmp_path / name, **changes) == 0


@pytest.mark.parametrize("content", ["nothing", "an empty run", "a torn export"])
def test_a_start_that_is_none_is_refused(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrained = tmp_path / "pretrained"
    if content == "an empty run":
        assert train(pretrained, "train.stop_after=1") == 75
        import shutil

        shutil.rmtree(pretrained / "checkpoints")
    elif content == "a torn export":
        assert train(tmp_path / "run", "train.stop_after=1") == 75
        assert relora("export", tmp_path / "run", "--to", pretrained) == 0
        (pretrained / "model.safetensors").write_bytes(b"torn")
    capsys.readouterr()
    code = train(tmp_path / "new", model={"pretrained": str(pretrained)})
    error = capsys.readouterr().err
    assert code == (4 if content == "an empty run" else 2), error
    assert str(pretrained) in error
    assert "Traceback" not in error


# --- the end of the warm start --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "model"),
    [
        (0, "llama"),
        (1, "gpt2"),
        (2, "gpt_neox"),
        (3, "llama"),
        pytest.param(1, "llama", marks=pytest.mark.slow),
        pytest.param(2, "llama", marks=pytest.mark.slow),
    ],
)
def test_adapters_are_born_without_a_jump(stage: int, model: str, tmp_path: Path) -> None:
    """The same run with and without adapters: nothing differs up to the first update with them."""
    changes = {
        "optimizer__lr_embeddings": "adapters",  # or the first update moves what is none
        "deepspeed__zero_stage": stage,
        "train__eval_every": 1,
        "model__config": str(workshop() / f"{model}.json"),
    }
    assert train(tmp_path / "born", "train.stop_after=7", **changes) == 75
    assert train(tmp_path / "before", "train.stop_after=5", **changes) == 75
    full = {**changes, "lora": None, "relora": None, "warm_start": None}
    assert train(tmp_path / "full", "train.stop_after=6", **full) == 75
    born, full_rank = (series(tmp_path / n, "eval/loss") for n in ("born", "full"))
    assert {k: born[k] for k in range(1, 6)} == {k: full_rank[k] for k in range(1, 6)}
    assert born[6] == pytest.approx(full_rank[6], rel=1e-6)
    # The next update has learning rate 0: it fills moments and moves nothing.
    assert series(tmp_path / "born", "train/lr")[7] == 0
    assert born[7] == pytest.approx(full_rank[6], rel=1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_stays_trainable_keeps_its_moments(stage: int, tmp_path: Path) -> None:
    """Bit for bit, and Adam's count with them; adapters begin with none."""
    changes = {"deepspeed__zero_stage": stage}
    assert train(tmp_path / "born", "train.stop_after=6", **changes) == 75
    full = {**changes, "lora": None, "relora": None, "warm_start": None}
    assert train(tmp_path / "full", "train.stop_after=6", **full) == 75
    born, full_rank = (checkpoint(tmp_path / n, 6) for n in ("born", "full"))
    mine, theirs = tensors(born), tensors(full_rank)
    kept = {name for name, kind in mine if kind == "exp_avg" and ".lora_" not in name}
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} < kept
    for name in {n for n, _ in theirs}:
        assert same_bits(mine[name, "value"], theirs[name, "value"])
        assert (name in kept) == ((name, "exp_avg") in mine)
        for kind in ("exp_avg", "exp_avg_sq") if name in kept else ():
            assert same_bits(mine[name, kind], theirs[name, kind])
            assert mine[name, kind].abs().max() > 0
    assert {adam_steps(born)[name] for name in kept} == {6}
    adapters = {name for name, _ in mine if ".lora_" in name}
    assert len(adapters) == 28
    for name in adapters:
        assert not mine[name, "exp_avg"].any()
        assert not mine[name, "exp_avg_sq"].any()
        assert mine[name, "value"].any() == name.endswith("lora_A")
        assert adam_steps(born)[name] == 0


def test_the_birth_is_announced(tmp_path: Path) -> None:
    assert train(tmp_path / "run", "train.stop_after=7") == 75
    log = (tmp_path / "run" / "log.txt").read_text()
    assert re.search(r"BIRTH at step 6: 14 adapters, 24\.7K of 42\.4K parameters train", log)
