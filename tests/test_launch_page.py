"""launch/README.md: each command marked as tested or not, and such that it could run."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from relora.cli import build_parser
from relora.load import load_config

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "launch" / "README.md").read_text(encoding="utf8")
MARK = re.compile(r"\*(?:Tested|Not tested)[:.][^*]*\*\n\n\Z")
BLOCKS = [
    (PAGE[: found.start()], found[1])
    for found in re.finditer(r"```bash\n(.*?)```", PAGE, re.DOTALL)
]
HERE = re.compile(r"(?<![\w/.])((?:launch|configs)/[\w./-]*\.(?:sh|sbatch|yaml|example))")


def commands() -> list[list[str]]:
    """The words of each line of the blocks, without comments."""
    found = []
    for _, text in BLOCKS:
        lines = re.sub(r"(?s)<<'END'.*?\nEND\n", "\n", text).replace("\\\n", " ").splitlines()
        found += [words for line in lines if (words := shlex.split(line, comments=True))]
    return found


def test_every_block_says_whether_it_was_tested_and_by_what() -> None:
    assert len(BLOCKS) >= 5
    for before, text in BLOCKS:
        mark = MARK.search(before)
        assert mark, text
        assert "Not tested" in mark[0] or re.search(r"`test_\w+\.py`", mark[0])
    for name in re.findall(r"\btest_\w+\.py\b", PAGE):
        assert (ROOT / "tests" / name).is_file(), name


def test_the_shell_parses_every_block() -> None:
    for _, text in BLOCKS:
        done = subprocess.run(
            ["bash", "-n"], input=text, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_scripts_and_configs_of_every_command_are_there() -> None:
    named = {name for words in commands() for word in words for name in HERE.findall(word)}
    assert len(named) > 6
    made = {"launch/hostfile"}
    assert not [name for name in named - made if not (ROOT / name).is_file()]


def test_the_command_line_takes_what_follows_relora(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    taken = 0
    for words in commands():
        at = [n for n, word in enumerate(words) if word in ("relora", ".venv/bin/relora")]
        if at:
            arguments = vars(build_parser().parse_args(words[at[0] + 1 :]))
            load_config(arguments["config"], arguments["overrides"])
            taken += 1
    assert taken >= 2


def test_configs_and_overrides_that_scripts_are_given_are_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    taken = 0
    for words in commands():
        at = [n for n, word in enumerate(words) if re.match(r"launch/\w+\.(sh|sbatch)$", word)]
        if not at:
            continue
        script = (ROOT / words[at[0]]).read_text()
        default = re.findall(r"^CONFIG=\$\{CONFIG:-(.*)\}$", script, re.MULTILINE)
        rest = words[at[0] + 1 :]
        given = [word.removeprefix("CONFIG=") for word in words if word.startswith("CONFIG=")]
        given += default
        config = given[0] if given else rest.pop(0) if rest else None
        if config is not None:
            load_config(Path(config), rest)
            taken += 1
    assert taken >= 6


def test_the_table_has_every_script_with_its_variables() -> None:
    rows = dict(re.findall(r"^\| `([\w.]+)` \| .* \| (.*?) \|$", PAGE, re.MULTILINE))
    scripts = [*(ROOT / "launch").glob("*.sh"), ROOT / "launch" / "slurm.sbatch"]
    assert rows.keys() == {script.name for script in scripts}
    compared = 0
    for script in scripts:
        comment = re.search(r"\bEnvironment:((?:.*\n#)*.*)\n", script.read_text())
        if comment:
            said = re.findall(r"\b[A-Z]{2,}\b", re.sub(r"\([^)]*\)", "", comment[1]))
            own = set(said) - {"PYTHON", "VENV"}
            assert own == set(re.findall(r"[A-Z]{2,}", rows[script.name])), script.name
            compared += 1
    assert compared >= 4


def test_the_hostfile_on_the_page_is_the_one_that_is_shipped() -> None:
    example = (ROOT / "launch" / "hostfile.example").read_text().splitlines()
    lines = [line for line in example if not line.startswith("#")]
    assert "```\n" + "\n".join(lines) + "\n```" in PAGE
