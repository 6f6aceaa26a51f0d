"""What the pages say: links lead somewhere, commands parse, YAML loads, figures are measured."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import shlex
import statistics
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from relora.load import build_config, load_config
from relora.plan.estimate import full_rank_twin, peak_memory, training_flops
from relora.verbs import build_parser
from relora.words import format_bytes
from relora.yaml_config import read_yaml
from runs import relora
from screen import rows

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf8")
    for folder in (".", ".github", "configs", "configs/experiments", "launch", "relora", "tests")
    for path in [*(ROOT / folder).glob("*.md"), *(ROOT / folder).glob("integrations/*.md")]
}
README = PAGES["README.md"]


def blocks(kind: str) -> Iterator[tuple[str, str]]:
    """(page, text) of every fenced block of a language."""
    for page, text in PAGES.items():
        for found in re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            yield page, found


def commands(page: str, text: str) -> Iterator[str]:
    """The lines of a shell block, without comments, continued ones joined."""
    for line in text.replace("\\\n", " ").splitlines():
        typed = re.sub(r"(^|\s)#.*", "", line).strip()
        if typed:
            yield typed


COMMANDS = [
    pytest.param(page, typed, id=f"{page}: {typed[:60]}")
    for page, text in blocks("bash")
    if page != "launch/README.md"  # read by test_launch_page
    for typed in commands(page, text)
]


def anchors(text: str) -> set[str]:
    """Those of the headings of a page, as hosts of Markdown make them."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.strip().replace(" ", "-") for title in plain}


def test_the_readme_is_short_and_every_page_is_reached_from_it() -> None:
    assert len(README.encode()) <= 8192
    reached = {"README.md"}
    waiting = ["README.md"]
    while waiting:
        page = waiting.pop()
        for target in re.findall(r"\]\(([^)#]+\.md)", PAGES.get(page, "")):
            path = (ROOT / page).parent / target
            if path.exists() and (name := str(path.resolve().relative_to(ROOT))) not in reached:
                reached.add(name)
                waiting.append(name)
    assert set(PAGES) <= reached


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = urllib.parse.unquote(target).partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf8")), target


@pytest.mark.parametrize(("page", "typed"), COMMANDS)
def test_every_command_on_a_page_is_one(page: str, typed: str) -> None:
    words = shlex.split(typed)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words[0] == "deepspeed":  # --num_gpus N --module relora …
        words = words[words.index("relora") :]
    if words[:3] == ["python", "-m", "relora"]:
        words = words[2:]
    if words[0] == "relora":
        spelled = [word for word in words[1:] if word != "…"]
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                known, rest = build_parser().parse_known_args(spelled)
            except SystemExit:
                pytest.fail(said.getvalue())
        assert all("=" in word for word in rest), rest
        config = getattr(known, "config", None)
        if config is not None and config.parts[0] == "configs":
            assert (ROOT / config).is_file()
    elif words[0] in ("bash", "sbatch", "python"):
        file = next(word for word in words[1:] if not word.startswith("-"))
        assert (ROOT / file).is_file()


@pytest.mark.parametrize(("page", "text"), list(blocks("yaml")))
def test_every_yaml_block_loads(page: str, text: str) -> None:
    """A part of a config in the place of that part of a shipped one."""
    block = yaml.safe_load(text)
    if not {"model", "data", "train", "optimizer", "lora", "relora"} & block.keys():
        return  # arms, or of another tool
    values = read_yaml(ROOT / "configs/quickstart_full.yaml") | block
    build_config(values, page, read_model=False)


# --- figures ---


def test_the_table_of_methods_is_that_of_the_screen() -> None:
    names = {
        "full opt=muon": "full rank, Muon",
        "block k=2 C=400 opt=muon": "**two blocks of each matrix, Muon, restarts**",
        "block k=4 C=400 opt=muon": "**four blocks**",
        "full": "full rank, AdamW",
        "lora r=16 C=800 w=20 m=magnitude": "ReLoRA as published, rank 1/8",
    }
    results = rows(ROOT / "configs/experiments/screen.jsonl")
    for arm, name in names.items():
        cells = {}
        for row in results:
            if (row.arm, row.width, row.steps) == (arm, 128, 10_240):
                assert len(row.losses) == 3
                spread = statistics.stdev(row.losses)
                cells[row.source] = f"{row.mean:.3f} ± {spread:.3f}"
                state = f"{row.state:.1f}".removesuffix(".0")
        line = re.findall(rf"^\| {re.escape(name)}.*$", README, re.MULTILINE)[0]
        assert line.split(" | ")[1:] == [f"{state} B", cells["english"], f"{cells['python']} |"]


@pytest.mark.parametrize(
    "size",
    ["130m", *(pytest.param(name, marks=pytest.mark.slow) for name in ("350m", "1b3", "7b"))],
)
def test_the_table_of_sizes_is_the_planner_s(size: str) -> None:
    full, blocks, paper = (
        load_config(name.format(size))
        for name in ("llama_{}_full", "llama_{}_relora", "published/llama_{}")
    )

    def share(run: object) -> str:
        twin = full_rank_twin(run)  # type: ignore[arg-type]
        flops = training_flops(run, run.total_steps)  # type: ignore[arg-type, attr-defined]
        return f"{flops / training_flops(twin, twin.total_steps):.2f}"

    title = {"1b3": "1.3B"}.get(size, size.upper())
    born = ", ".join(format_bytes(peak_memory(paper, 8, adapters)) for adapters in (False, True))
    row = (
        f"| {title} | {format_bytes(peak_memory(full, 8))} "
        f"| {format_bytes(peak_memory(blocks, 8))}, {share(blocks)} | {born}, {share(paper)} |"
    )
    assert row in README


# --- what is typed first ---


def own_commands() -> list[list[str]]:
    """The six commands from one's own text to an exported model, as the README has them."""
    (text,) = re.findall(r"^## Your own\n\n```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    found = [shlex.split(typed) for typed in commands("README.md", text)]
    assert len(found) == 6
    assert all(words[0] == "relora" for words in found)
    return [words[1:] for words in found]


def test_six_commands_lead_from_text_to_an_exported_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As typed, but from a smaller config: the verbatim run takes minutes (test_wheel, slow)."""
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path)
    small = read_yaml(ROOT / "configs/quickstart_relora.yaml")
    small["data"]["sequence_length"] = 32
    small["data"]["tokenizer"]["vocab_size"] = 320
    small["model"] = {"config": "small.json"}
    small["train"] |= {"steps": 9, "save_every": 5, "eval_every": 4, "eval_sequences": 4}
    small["relora"]["cycle_steps"] = 3
    small["schedule"]["warmup_steps"] = 1
    small["deepspeed"]["zero_stage"] = 1
    Path("small.yaml").write_text(yaml.safe_dump(small))
    model = json.loads((ROOT / "configs/models/quickstart.json").read_text())
    shape = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    Path("small.json").write_text(json.dumps(model | shape))
    first, *others = own_commands()
    assert relora(*first, "--from", "small.yaml") == 0
    for words in others:
        assert relora(*words) == 0
    model = AutoModelForCausalLM.from_pretrained("model")
    assert model.config.vocab_size == 320
    report = json.loads(Path("report/report.json").read_text())
    assert len(report["arms"]) == 2


def write_text(folder: Path) -> None:
    """A few files of JSON lines, whose text is in a column of another name."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(400)]
    (folder / "text").mkdir()
    for n in range(4):
        rows = ({"id": n, "body": " ".join(draw.choices(words, k=60))} for _ in range(30))
        (folder / f"text/{n}.jsonl").write_text("\n".join(map(json.dumps, rows)))
