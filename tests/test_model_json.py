"""What a model's JSON and directory may hold: work, or one message that names the file."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from relora.errors import ConfigError
from relora.model import ModelConfig, build_meta_model, build_model
from relora.structure import check_pretrained, context_of, read_structure
from runs import MODELS, make_config, relora
from test_hostile_input import mutate

MPT = {"model_type": "mpt", "vocab_size": 320, "d_model": 32, "n_layers": 2, "n_heads": 4}
MIXTRAL = {**MODELS["llama"], "model_type": "mixtral", "num_local_experts": 4}
FALCON = {"model_type": "falcon", "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2,
          "num_attention_heads": 4}  # fmt: skip
BASES = (*MODELS.values(), {**MPT, "max_seq_len": 64}, MIXTRAL, FALCON)


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """The one message of a refused command."""
    message = capsys.readouterr().err
    assert message.startswith("relora: "), message
    assert "Traceback" not in message
    return message


# --- contexts by other names ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "context"),
    [
        ({"model_type": "llama", "max_position_embeddings": 16}, 16),
        ({"model_type": "gpt2", "n_positions": 16}, 16),
        ({"model_type": "mpt", "max_seq_len": 16}, 16),
        ({"model_type": "mpt", "max_position_embeddings": 16}, 16),
        ({"model_type": "codegen", "n_positions": 16, "n_ctx": 99}, 16),
        ({"model_type": "whisper", "max_target_positions": 16}, 16),
        ({"model_type": "bloom", "seq_length": 16}, 16),
        ({"model_type": "gemma3", "text_config": {"max_position_embeddings": 16}}, 16),
        ({"model_type": "mamba"}, None),
        ({"model_type": "bloom"}, None),
        ({"model_type": "xlnet"}, None),
        # What the type has where the file says nothing.
        ({"model_type": "mpt"}, 2048),
        ({"model_type": "ctrl"}, 256),
    ],
)
def test_a_context_is_found_by_any_name(
    values: dict[str, Any], context: int | None, tmp_path: Path
) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(values))
    assert context_of(read_structure(path)) == context
    if len(values) > 1:
        assert context_of(values) == context


def test_a_sequence_beyond_the_context_is_refused_whatever_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, model = make_config(tmp_path / "run"), tmp_path / "model.json"
    model.write_text(json.dumps({**MPT, "max_seq_len": 16}))
    for verb in ("plan", "train"):
        assert relora(verb, config, f"model.config={model}") == 2
        assert "32 is longer than the model's context of 16" in told(capsys)
    model.write_text(json.dumps(MPT))  # 2,048, which only transformers knows
    assert relora("plan", config, f"model.config={model}", "data.sequence_length=4096") == 2
    assert "longer than the model's context of 2048" in told(capsys)


# --- JSON that is no model ------------------------------------------------------------------------

LLAMA = MODELS["llama"]
HOSTILE: dict[str, Any] = {
    "a string for a number": {**LLAMA, "hidden_size": "32"},
    "negative": {**LLAMA, "hidden_size": -32},
    "zero heads": {**LLAMA, "num_attention_heads": 0},
    "zero width": {**LLAMA, "hidden_size": 0},
    "a list for a number": {**LLAMA, "num_hidden_layers": [2]},
    "null": {**LLAMA, "vocab_size": None},
    "layers without end": {**LLAMA, "num_hidden_layers": 10**9},
    "experts without end": {**MIXTRAL, "num_local_experts": 10**9},
    "labels without end": {**LLAMA, "num_labels": 10**9},
    "heads without end": {**LLAMA, "num_attention_heads": 10**9},
    "beyond 64 bits": {**LLAMA, "hidden_size": 10**30},
    "wider than can be counted": {**LLAMA, "hidden_size": 2**40, "intermediate_size": 2**40},
    "heads that do not divide": {**LLAMA, "num_attention_heads": 5},
    "an activation of nobody": {**LLAMA, "hidden_act": "nobody"},
    "a type of nobody": {**LLAMA, "model_type": "nobody"},
    "no type": {k: v for k, v in LLAMA.items() if k != "model_type"},
    "a type that is no text": {**LLAMA, "model_type": "vit"},
    "a type that is no name": {**LLAMA, "model_type": ["llama"]},
    "no object": ["llama"],
    "a kernel from elsewhere": {**LLAMA, "_attn_implementation": "someone/kernel"},
    "a rope of another shape": {**LLAMA, "rope_parameters": "x"},
}
TEXTS = {
    "4,301 digits": '{"model_type": "llama", "vocab_size": ' + "7" * 4301 + "}",
    "nested": '{"model_type": "llama", "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "cut": '{"model_type": "llama", "vocab',
    "empty": "",
}


@pytest.mark.parametrize("name", [*HOSTILE, *TEXTS])
def test_a_json_that_is_no_model_is_one_line_that_names_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, model = make_config(tmp_path / "run"), tmp_path / "hostile.json"
    model.write_text(TEXTS[name] if name in TEXTS else json.dumps(HOSTILE[name]))
    started = time.process_time()
    assert relora("plan", config, f"model.config={model}") == 2
    message = told(capsys)
    assert "hostile.json" in message
    assert message.count("\n") == 1
    assert len(message) < 800
    assert time.process_time() - started < 120  # building what it asks for would take hours


def test_code_that_a_model_names_is_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    values = {**LLAMA, "auto_map": names, "trust_remote_code": True}
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "config.json").write_text(json.dumps(values))
    build_meta_model(ModelConfig(config=tmp_path / "config.json"))
    (tmp_path / "config.json").write_text(json.dumps({**values, "model_type": "mine"}))
    with pytest.raises(ConfigError, match="transformers does not know this model: 'mine'"):
        build_meta_model(ModelConfig(pretrained=tmp_path))
    assert not (tmp_path / "ran").exists()


def _mutants(count: int, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, path = make_config(tmp_path / "run"), tmp_path / "mutant.json"
    rng, codes = random.Random(seed), []
    for _ in range(count):
        values = mutate(rng, rng.choice(BASES))
        path.write_text(json.dumps(values))
        codes.append(relora("plan", config, f"model.config={path}"))
        message = capsys.readouterr().err
        assert codes[-1] in (0, 2), values
        if codes[-1]:
            assert message.startswith("relora: "), values
            assert message.count("\nrelora: ") == 0, values
            assert "mutant.json" in message or "data." in message or "lora." in message, message
    assert codes.count(0) > count / 20
    assert codes.count(2) > count / 4


def test_a_mutated_model_is_planned_or_refused_in_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _mutants(12, 1, tmp_path, capsys)


@pytest.mark.slow
def test_many_mutated_models_are_planned_or_refused_in_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _mutants(2000, 2, tmp_path, capsys)


# --- directories of weights -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory as transformers writes it."""
    directory = tmp_path_factory.mktemp("sound")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA)).save_pretrained(directory)
    return directory


def _shards(directory: Path, name: Any) -> None:
    """Weights that an index says are in `name`."""
    path = directory / "model.safetensors"
    outside = directory.parent / "outside.safetensors"
    shutil.copy(path, outside)
    shutil.copy(path, directory / "weights.bin")
    path.unlink()
    index = {"weight_map": {"lm_head.weight": name}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _fifo(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    os.mkfifo(directory / "model.safetensors")


def _pickle(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.save({}, directory / "pytorch_model.bin")


def _cut(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


DAMAGE = {
    "an index that names a pickle": (lambda d: _shards(d, "weights.bin"), "not a .safetensors"),
    "an index that leaves": (lambda d: _shards(d, "../outside.safetensors"), "not a .safetensors"),
    "an absolute index": (
        lambda d: _shards(d, str(d.parent / "outside.safetensors")),
        "not a .safetensors",
    ),
    "an index of numbers": (lambda d: _shards(d, 3), "not a .safetensors"),
    "an index of nothing": (lambda d: _shards(d, "gone.safetensors"), "which is not there"),
    "a FIFO": (_fifo, "holds no weights"),
    "a pickle alone": (_pickle, "a pickle (pytorch_model.bin) is not opened"),
    "cut weights": (_cut, "is damaged"),
    "no safetensors": (lambda d: (d / "model.safetensors").write_text("x" * 99), "is damaged"),
    "no JSON": (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_model_directory_is_refused_before_any_work(
    name: str, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(sound, directory)
    damage, expected = DAMAGE[name]
    damage(directory)
    config = make_config(tmp_path / "run")
    for verb in ("plan", "train"):
        overrides = ("model.config=null", f"model.pretrained={directory}")
        assert relora(verb, config, *overrides) == 2
        message = told(capsys)
        assert expected in message
        assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()
    if expected != "not valid JSON":
        with pytest.raises(ConfigError):
            build_model(ModelConfig(pretrained=directory), 0)


def test_sound_weights_in_one_file_or_in_many_are_loaded(sound: Path, tmp_path: Path) -> None:
    check_pretrained(sound)
    one = build_model(ModelConfig(pretrained=sound), 0)
    one.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    check_pretrained(tmp_path / "many")
    many = build_model(ModelConfig(pretrained=tmp_path / "many"), 0)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, many.state_dict()[name])
