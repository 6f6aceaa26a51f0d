"""What a newcomer types first: habits of other tools, configs by name, a config of their own."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from relora.cli import build_parser, main
from relora.config import Config
from relora.errors import ConfigError, DataError
from relora.hub import fetch
from relora.load import load_config
from relora.locate import shipped_directory, shipped_names
from relora.lora.config import LoRAConfig
from relora.reference import as_markdown, as_schema, keys
from relora.reflexes import translated
from relora.restart.config import ReLoRAConfig
from runs import make_config

ROOT = Path(__file__).parent.parent
VERBS = ("plan", "train", "resume", "verify")
TAKES = ("plan", "train", "resume")


def words(*typed: str) -> list[str]:
    return translated(typed, VERBS, TAKES)


# --- habits ---


@pytest.mark.parametrize(
    ("typed", "taken"),
    [
        (["train", "a.yaml", "--train.steps=5"], ["train", "a.yaml", "train.steps=5"]),
        (["train", "--config", "a.yaml", "x.y=1"], ["train", "a.yaml", "x.y=1"]),
        (["train", "x.y=1", "--config=a.yaml"], ["train", "a.yaml", "x.y=1"]),
        (
            ["train", "a.yaml", "lora={rank:", "8,", "alpha:", "16}", "seed=1"],
            ["train", "a.yaml", "lora={rank: 8, alpha: 16}", "seed=1"],
        ),
        (["train", "a", "x.y=[1,", "2]"], ["train", "a", "x.y=[1, 2]"]),
        # what is left alone
        (["--local_rank=0", "train", "a", "b=1"], ["--local_rank=0", "train", "a", "b=1"]),
        (["plan", "a", "--devices=4"], ["plan", "a", "--devices=4"]),
        (["verify", "--config", "a"], ["verify", "--config", "a"]),
        (["--help"], ["--help"]),
    ],
)
def test_what_hands_type_is_what_the_parser_takes(typed: list[str], taken: list[str]) -> None:
    assert words(*typed) == taken


def test_a_verb_that_is_none_is_told_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian", "x.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("relora: trian: no such command; did you mean train? there are ")
    assert said.count("\n") == 1


def test_a_setting_in_two_words_is_told_how_to_write_it() -> None:
    with pytest.raises(ConfigError, match=r"write a setting as train\.steps=5$"):
        words("train", "a.yaml", "--train.steps", "5")
    with pytest.raises(ConfigError, match=r"as train\.steps=VALUE$"):
        words("train", "a.yaml", "--train.steps")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--lr=1e-3", "section.key=value: optimizer.lr=1e-3 or lora.lr=1e-3 or relora.lr=1e-3"),
        ("--zero-stage=3", "a setting is written section.key=value: deepspeed.zero_stage=3"),
        ("--deviecs=3", "did you mean --devices?"),
    ],
)
def test_an_unknown_option_is_told_what_was_meant(
    typed: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["plan", "x.yaml", typed])
    assert exit.value.code == 2
    assert said in capsys.readouterr().err


def test_settings_go_by_the_names_that_peft_and_transformers_have(tmp_path: Path) -> None:
    path = make_config(tmp_path / "run")
    config = load_config(
        path,
        ["lora={r: 2, lora_alpha: 6}", "train.max_steps=1k", "optimizer.learning_rate=1e-4"],
    )
    assert config.lora is not None
    assert (config.lora.rank, config.lora.alpha) == (2, 6)
    assert config.train.steps == 1000
    assert config.optimizer.lr == 1e-4
    assert LoRAConfig(r=3) == LoRAConfig(rank=3)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"lora\.r: is lora\.rank here, which is given too"):
        load_config(path, ["lora={r: 2, rank: 4}"])
    with pytest.raises(ConfigError, match=r"train\.max_steps: is train\.steps here, which is"):
        load_config(path, ["train={max_steps: 9, steps: 10}"])
    with pytest.raises(ValueError, match="r is rank here, which is given too"):
        LoRAConfig(r=3, rank=3)  # type: ignore[call-arg]


def test_epochs_are_told_where_they_are_counted(tmp_path: Path) -> None:
    path = make_config(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"train\.epochs: a length is train\.steps or"):
        load_config(path, ["train.epochs=1"])


def test_all_mistakes_are_one_round(tmp_path: Path) -> None:
    """Keys that are none, values that cannot be, sections that contradict themselves and others."""
    path = make_config(tmp_path / "run")
    wrong = [
        "lora.foo=3",
        "lora.blocks=2",
        "train.log_every=x",
        "schedule.base=constant",
        "schedule.min_lr_ratio=0.5",
    ]
    with pytest.raises(ConfigError) as error:
        load_config(path, wrong)
    said = str(error.value)
    assert "3 problems" in said
    assert "lora.foo: unknown key" in said
    assert "lora: give the size of the adapters as either rank or blocks" in said
    assert "train.log_every: 'x': must be a whole number" in said
    # The whole of lora is in doubt, so nothing is said of what others are without it.
    assert "without lora" not in said
    with pytest.raises(ConfigError) as error:
        load_config(path, [one for one in wrong if not one.startswith("lora")])
    assert "schedule.min_lr_ratio: would do nothing with base: constant" in str(error.value)
    assert "train.log_every" in str(error.value)


def test_a_rewarm_is_a_tenth_of_the_cycle_and_at_most_the_papers() -> None:
    found = {cycle: ReLoRAConfig(cycle_steps=cycle).rewarm_steps for cycle in (5, 400, 5000)}
    assert found == {5: 0, 400: 40, 5000: 100}
    assert ReLoRAConfig(cycle_steps=400, rewarm_steps=7).rewarm_steps == 7


# --- configs by name, and what lies beside them ---


def test_shipped_configs_go_by_their_names_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in shipped_names():
        config = load_config(name)
        assert config.model.config is not None
        assert config.model.config.is_file()
    assert {"llama_130m_relora", "published/llama_60m", "quickstart_full"} <= set(shipped_names())


def test_a_file_of_that_name_is_taken_before_a_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (shipped_directory() / "quickstart_full.yaml").read_text()
    Path("llama_60m_relora").write_text(text.replace("seed: 0", "seed: 7"))
    assert load_config("llama_60m_relora").seed == 7


def test_paths_are_looked_up_beside_the_yaml_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    (there / "text").mkdir(parents=True)
    here.mkdir()
    (there / "text/a.txt").write_text("a")
    (there / "b.jsonl").write_text("{}")
    model = (shipped_directory() / "models/quickstart.json").read_text()
    (there / "model.json").write_text(model)
    (there / "mine.yaml").write_text(
        yaml.safe_dump(
            yaml.safe_load((shipped_directory() / "quickstart_full.yaml").read_text())
            | {"model": {"config": "model.json"}}
        )
    )
    monkeypatch.chdir(here)
    files = "data.source={files: [text/**/*.txt, '*.jsonl', 'none/*.txt']}"
    config = load_config("../there/mine.yaml", [files])
    assert config.model.config == Path("../there/model.json")
    assert config.data.source.files == [
        "../there/text/**/*.txt",
        "../there/*.jsonl",
        "none/*.txt",  # nowhere: told as it was written
    ]
    # What is here comes first.
    (here / "model.json").write_text(model)
    assert load_config("../there/mine.yaml").model.config == Path("model.json")


def test_a_run_directory_is_its_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "moved"
    run.mkdir()
    config = load_config(make_config(tmp_path / "run"))
    from relora.load import dump_config

    (run / "config.yaml").write_text(dump_config(config))
    assert load_config(run).run_dir == run
    assert load_config(run, ["train.steps=20"]).train.steps == 20
    assert main(["train", str(tmp_path)]) == 2
    assert "is a directory and no run" in capsys.readouterr().err
    assert main(["resume", "nowhere"]) == 2
    assert "nowhere: no such run directory" in capsys.readouterr().err


# --- the hub ---


def test_an_unreachable_hub_is_one_line_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    began = time.monotonic()
    with pytest.raises(DataError, match=r"x/y is no directory here .* does not answer"):
        fetch("x/y", ["*.json"], DataError, "data.tokenizer.path")
    with pytest.raises(ConfigError, match=r"model\.pretrained: org/name is no directory here"):
        load_config("quickstart_relora", ["model={pretrained: org/name}"])
    assert time.monotonic() - began < 10  # transformers' own client tries for nearly a minute


def test_a_path_with_a_mistake_in_it_is_not_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    monkeypatch.setattr("relora.load.fetch", None)
    config = load_config("quickstart_relora", ["model={pretrained: runs/mistyped}"])
    assert config.model.pretrained == Path("runs/mistyped")


def test_a_model_in_the_cache_of_the_hub_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = "0" * 40
    folder = tmp_path / "models--org--name"
    (folder / "snapshots" / revision).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(revision)
    (folder / "snapshots" / revision / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = load_config("quickstart_relora", ["model={pretrained: org/name}"])
    assert config.model.pretrained == folder / "snapshots" / revision


# --- every key explained ---


def test_every_key_has_a_meaning() -> None:
    found = list(keys())
    assert len(found) > 80
    for key in found:
        assert key.meaning.endswith((".", "!")), key.path
        assert "XXX" not in key.meaning
    assert len({key.path for key in found}) == len(found)


def test_the_page_of_keys_is_what_the_sections_say() -> None:
    page = (ROOT / "configs/README.md").read_text()
    assert page.endswith(as_markdown()), "relora schema --markdown has the tables for its end"


def test_the_schema_is_shipped_as_it_is_and_takes_every_config() -> None:
    assert json.loads((ROOT / "configs/schema.json").read_text()) == as_schema()
    schema = Draft202012Validator(as_schema())
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        values = yaml.safe_load(path.read_text())
        if "run_dir" not in values:
            continue  # arms, or of lm-eval
        first = path.read_text().splitlines()[0]
        assert first == "# yaml-language-server: $schema=" + os.path.relpath(
            ROOT / "configs/schema.json", path.parent
        )
        numbers = json.loads(json.dumps(values), parse_float=float)
        _floats(numbers)
        assert not list(schema.iter_errors(numbers)), path


def _floats(node: object) -> None:
    """YAML 1.1 reads 1e-3 as text, which editors (and we) take for a number."""
    if isinstance(node, dict):
        for key, value in node.items():
            if isinstance(value, str):
                try:
                    node[key] = float(value)
                except ValueError:
                    continue
            _floats(value)


def test_the_schema_refuses_what_is_wrong() -> None:
    schema = Draft202012Validator(as_schema())
    values = yaml.safe_load((ROOT / "configs/quickstart_full.yaml").read_text())
    _floats(values)
    assert not list(schema.iter_errors(values))
    for section, key, value in (
        ("train", "log_every", 0),
        ("lora", "rnk", 3),
        ("schedule", "base", "cosin"),
    ):
        bad = values | {section: (values.get(section) or {}) | {key: value}}
        assert list(schema.iter_errors(bad)), key


def test_each_key_s_help_is_in_the_schema() -> None:
    properties = as_schema()["$defs"]["ReLoRAConfig"]["properties"]
    assert properties["cycle_steps"]["description"] == "Steps between merges, C."


# --- a config of one's own ---


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("text").mkdir()
    for n in range(3):
        rows = [{"id": str(n), "body": f"some words {k} of {n}"} for k in range(5)]
        Path(f"text/{n}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def settings_of(file: str, *overrides: str) -> Config:
    assert main(["plan", file]) == 0
    return load_config(file, overrides)


def test_init_writes_what_plan_takes_and_finds_the_text(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "--from", "llama_130m", "--data", "text/*.jsonl", "--to", "a.yaml"]) == 0
    assert "3 files" in (said := capsys.readouterr().out)
    assert "text in the column 'body'" in said
    config = settings_of("a.yaml")
    assert config.data.source.files == ["text/*.jsonl"]
    assert config.data.source.text_field == "body"
    assert config.run_dir == Path("runs/a")
    same = load_config("llama_130m_relora")
    assert config.model_copy(update={"run_dir": same.run_dir, "data": same.data}) == same
    text = Path("a.yaml").read_text()
    assert max(map(len, text.splitlines())) <= 101 or "$schema" in text.splitlines()[0]
    for key in keys():
        assert f"{key.path.rpartition('.')[2]}:" in text
        assert key.meaning.split(". ")[0].split()[0] in text
    # A file that is there stays.
    assert main(["init", "--to", "a.yaml"]) == 2
    assert Path("a.yaml").read_text() == text


SMALL = [name for name in shipped_names() if not re.search("7b|1b3|350m|250m", name)]


@pytest.mark.parametrize("name", SMALL)  # the others go the same way, in seconds each
def test_init_from_any_shipped_config_is_that_config(name: str, folder: Path) -> None:
    assert main(["init", "--from", name, "--to", "b.yaml"]) == 0
    own, shipped = load_config("b.yaml"), load_config(name)
    assert own.model_copy(update={"run_dir": shipped.run_dir}) == shipped


def test_what_init_comments_out_can_be_put_in(folder: Path) -> None:
    """The keys of sections that are off are those sections' own, with their defaults."""
    assert main(["init", "--from", "quickstart_full", "--to", "c.yaml"]) == 0
    lines = Path("c.yaml").read_text().splitlines()
    at = lines.index("relora: null")
    block = [line for line in lines[at + 1 : lines.index("warm_start: null")] if "# " in line]
    keys_of = [line.strip()[2:] for line in block if not line.strip().startswith("# #")]
    names = [line.split(":")[0].strip() for line in keys_of if not line.startswith("  ")]
    assert [name for name in names if name in ReLoRAConfig.model_fields] == list(
        ReLoRAConfig.model_fields
    )


def test_init_with_a_model_and_a_tokenizer_of_one_s_own(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{n}": n for n in range(98)} | {"<s>": 98, "</s>": 99}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>"
    ).save_pretrained("tok")
    assert main(["init", "--tokenizer", "tok", "--data", "text/*.jsonl", "--to", "d.yaml"]) == 0
    config = settings_of("d.yaml")
    assert config.model.config == Path("d_model.json")
    structure = json.loads(Path("d_model.json").read_text())
    assert (structure["vocab_size"], structure["eos_token_id"]) == (128, 99)
    assert config.data.tokenizer.path == "tok"
    # A model that is too small for it is told, and nothing is written.
    Path("small.json").write_text(
        json.dumps(structure | {"vocab_size": 64, "bos_token_id": None, "eos_token_id": None})
    )
    capsys.readouterr()
    assert main(["init", "--tokenizer", "tok", "--model", "small.json", "--to", "e.yaml"]) == 2
    assert "has 100 tokens, and --model a vocabulary of 64" in capsys.readouterr().err
    assert not Path("e.yaml").exists()
    # Alone it decides the vocabulary of the tokenizer that is to be trained, and the length.
    structure |= {"vocab_size": 1000, "max_position_embeddings": 64}
    Path("mine.json").write_text(json.dumps(structure))
    assert main(["init", "--model", "mine.json", "--to", "f.yaml"]) == 0
    config = settings_of("f.yaml")
    assert config.data.tokenizer.vocab_size == 1000
    assert config.data.sequence_length == 64


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("one\n\ntwo\n\nthree", {"blank_lines": True}),
        ("one line only " * 50, {"characters": 20_000}),
    ],
)
def test_one_text_file_is_cut_into_documents(
    text: str, cut: dict[str, object], folder: Path
) -> None:
    Path("book.txt").write_text(text)
    assert main(["init", "--data", "book.txt", "--to", "g.yaml"]) == 0
    found = load_config("g.yaml").data.source.cut
    assert found is not None
    assert found.model_dump(exclude_defaults=True) == cut


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--data", "none/*.txt"], 3, "none/*.txt"),
        (["--from", "llama_9m"], 2, "--from llama_9m: no such config; give a file, or one of"),
        (["--to", "x.json"], 2, "--to x.json: must be a .yaml file in a folder that exists"),
        (["--model", "none.json"], 2, "--model: none.json: no such"),
        (["--tokenizer", "./none"], 3, "--tokenizer ./none: must be a transformers tokenizer"),
    ],
)
def test_what_init_cannot_use_is_told_and_nothing_is_written(
    arguments: list[str], code: int, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.rglob("*"))
    assert main(["init", *arguments]) == code
    assert said in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


def test_the_text_s_column_is_found_in_every_kind_of_table(folder: Path) -> None:
    import gzip

    from pyarrow import Table, parquet

    from relora.data.columns import text_column

    rows = [{"name": "a", "words": "some longer text", "n": 3}]
    Path("l.json").write_text(json.dumps(rows))
    Path("c.csv").write_text("name,words\na,some longer text\n")
    parquet.write_table(Table.from_pylist(rows), "p.parquet")
    with gzip.open("z.jsonl.gz", "wt") as file:
        file.write(json.dumps(rows[0]))
    for name in ("l.json", "c.csv", "p.parquet", "z.jsonl.gz"):
        assert text_column(Path(name)) == "words", name
    Path("u.jsonl").write_text(json.dumps({"title": "longer than it", "content": "short"}))
    assert text_column(Path("u.jsonl")) == "content"
    Path("t.txt").write_text("text")
    assert text_column(Path("t.txt")) is None
    Path("n.jsonl").write_text(json.dumps({"n": 1}))
    with pytest.raises(DataError, match="no column holds text in its first row; there are: n"):
        text_column(Path("n.jsonl"))


def test_every_verb_completes_in_a_shell() -> None:
    import shtab

    script = shtab.complete(build_parser(), "bash")
    for verb in ("init", "plan", "train", "resume"):
        assert verb in script
