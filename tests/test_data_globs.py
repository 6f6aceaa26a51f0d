"""Which files a pattern names: one rule, and one line where it names none."""

import os
import random
import tempfile
from pathlib import Path

import pytest

from relora.data.config import SourceConfig
from relora.data.corpus import iter_documents, source_files
from relora.errors import DataError


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(os.fsencode(name))


def link(name: str, target: str) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).symlink_to(target)


def named(*patterns: str) -> list[str]:
    parts = source_files(SourceConfig(files=list(patterns)))
    return [str(path) for part in parts.values() for _, path in part]


def test_links_are_followed_and_a_real_file_has_one_name(tree):
    make("real/b.txt", "real/deep/c.txt", "tree/sub/a.txt", "elsewhere.txt")
    link("tree/linked", "../real")
    link("tree/sub/file.txt", "../../elsewhere.txt")
    assert named("tree/**/*.txt") == [
        "tree/linked/b.txt",
        "tree/linked/deep/c.txt",
        "tree/sub/a.txt",
        "tree/sub/file.txt",
    ]
    # Its own name, where that matches too; also over several patterns.
    every = ["elsewhere.txt", "real/b.txt", "real/deep/c.txt", "tree/sub/a.txt"]
    assert named("**/*.txt") == every
    assert named("tree/*/*.txt", "**/*.txt") == [
        "tree/linked/b.txt",
        "tree/sub/a.txt",
        "tree/sub/file.txt",
        "real/deep/c.txt",
    ]
    assert named(f"{tree}/**/*.txt") == [f"{tree}/{name}" for name in every]


def test_circles_of_links_end(tree):
    make("a/1.txt", "b/2.txt")
    for number in range(4):  # each way round is one of 4**depth
        link(f"a/to_b{number}", "../b")
        link(f"b/to_a{number}", "../a")
    link("a/self", ".")
    link("a/up", "..")
    assert named("a/**/*.txt") == ["a/1.txt", "a/to_b0/2.txt"]
    assert named("**/*.txt") == ["a/1.txt", "b/2.txt"]
    assert named("*/**/**/*.txt", "a/*/*/*.txt")[:2] == ["a/1.txt", "b/2.txt"]


def test_hidden_names_are_matched_where_the_pattern_names_them(tree):
    make("a.txt", ".a.txt", ".git/b.txt", "sub/.cache/c.txt", "sub/.c.txt", "sub/c.txt")
    assert named("**/*.txt") == ["a.txt", "sub/c.txt"]
    assert named("*") == ["a.txt"]
    assert named(".*") == [".a.txt"]
    assert named("**/.*.txt") == [".a.txt", "sub/.c.txt"]
    assert named(".git/*.txt", "**/.cache/*") == [".git/b.txt", "sub/.cache/c.txt"]


def test_a_name_that_exists_is_itself(tree):
    make("dir [2024]/docs.txt", "dir 2/docs.txt", "[a].txt", "a.txt", "~/x.txt", "what?.txt")
    make("x/dir [2024]/deep/docs.txt")
    assert named("dir [2024]/docs.txt") == ["dir [2024]/docs.txt"]
    assert named("dir [2024]/*.txt") == ["dir [2024]/docs.txt"]
    assert named("**/dir [2024]/**/*.txt") == [
        "dir [2024]/docs.txt",
        "x/dir [2024]/deep/docs.txt",
    ]
    assert named("dir [[]2024]/*.txt") == ["dir [2024]/docs.txt"]
    assert named("dir [1-3]/*.txt") == ["dir 2/docs.txt"]
    assert named("[a].txt", "what?.txt", "~/x.txt") == ["[a].txt", "what?.txt", "~/x.txt"]


def test_the_home_directory_is_found(tree, monkeypatch):
    make("home/corpus/a.txt")
    monkeypatch.setenv("HOME", f"{tree}/home")
    assert named("~/corpus/*.txt") == [f"{tree}/home/corpus/a.txt"]


ODD = {
    "**.txt": r"\*\* stands for any folders .* write '\*\*/\*.txt'",
    "/**.txt": "stands for any folders",
    "a**b": "stands for any folders",
    "sub/***": "stands for any folders",
    "[": "matches no file",
    "[!]": "matches no file",
    "[z-a]*.none": "matches no file",
    "~nobody-of-that-name/*.txt": "matches no file",
    "x" * 5000: "matches no file",
    "x" * 300 + "/**/*.txt": "matches no file",
    "/".join(["x" * 200] * 30) + "/*": "matches no file",
    "a.txt/*.txt": "matches no file",
    "su*": "matches only folders",
    "sub": "is a directory; name its files",
    ".": "is a directory",
    "*.md": r"b.md: is a link to nothing \(nowhere\)",
    "*.csv": r"c.csv: .*links",
}


@pytest.mark.parametrize("pattern", ODD, ids=range(len(ODD)))
def test_an_odd_pattern_is_one_line(tree, pattern):
    make("a.txt", "sub/b.txt")
    link("b.md", "nowhere")
    link("c.csv", "c.csv")
    with pytest.raises(DataError, match=ODD[pattern]) as caught:
        named(pattern)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_any_pattern_gives_files_or_one_line(tree):
    make("a.txt", "[x]/b.txt", "sub/.h/c.txt", "sub/é\udc80.txt")
    link("sub/up", "..")
    rng = random.Random(0)
    signs = [
        "*",
        "**",
        "?",
        "[",
        "]",
        "!",
        "/",
        "..",
        ".",
        "~",
        "a",
        "sub",
        "é",
        "x",
        "\n",
        "-",
    ]
    for _ in range(2000):
        pattern = "".join(rng.choices(signs, k=rng.randrange(1, 7)))
        if pattern.startswith(("/", "~")) or ".." in pattern:
            pattern = "a" + pattern.replace("..", "")  # not over this whole machine
        try:
            assert named(pattern)
        except DataError as error:
            assert str(error)  # noqa: PT017


def test_a_folder_that_cannot_be_looked_into_is_an_error_not_less_text(tree, monkeypatch):
    make("a/1.txt", "locked/2.txt")
    scandir = os.scandir

    def locked(folder):
        if str(folder).endswith("locked"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(DataError, match="locked: cannot be looked into: Permission denied"):
        named("**/*.txt")


def test_a_file_that_vanishes_between_listing_and_reading_is_named(tree):
    make("a.txt", "b.txt", "c.txt")
    documents = iter_documents(SourceConfig(files=["*.txt"]))
    assert next(documents).text == "a.txt"
    Path("b.txt").unlink()
    with pytest.raises(DataError, match=r"b\.txt: cannot be read: No such file"):
        list(documents)


def test_linked_packages_and_data_sets_count_as_what_they_link_to(tree, monkeypatch):
    import sys

    from relora.data.reuse import describe_source

    make("packages/site-packages/a.py", "project/mine/b.py", "set/data/x.arrow")
    link("packages/site-packages/mine", "../../project/mine")
    link("linked/data", "../set/data")
    monkeypatch.setattr(
        sys, "path", [f"{tree}/packages/site-packages", f"{tree}/none/site-packages"]
    )
    every = iter_documents(SourceConfig(builtin="python_packages"))
    library = iter_documents(SourceConfig(builtin="python"))
    assert [d.origin for d in every][len(list(library)) :] == ["a.py", "mine/b.py"]
    before = describe_source(SourceConfig(saved=Path("linked")))
    make("set/data/y.arrow")
    assert before["files"] == 1
    assert describe_source(SourceConfig(saved=Path("linked")))["files"] == 2


def said_by(patterns: list[str], user: int | None) -> list[str]:
    """What is said about each pattern in a process of another user."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if user is not None:
                os.setuid(user)
            for pattern in patterns:
                try:
                    said = str(named(pattern))
                except DataError as error:
                    said = str(error)
                os.write(write, f"{said}\n".encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as file:
        return file.read().splitlines()


def test_a_file_or_folder_without_the_right_to_read_is_named():
    """As another user where this is root, whom no mode stops."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own is closed to others
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "a.txt").write_text("a")
        (folder / "a.txt").chmod(0)
        (folder / "closed").mkdir()
        (folder / "closed").chmod(0)
        patterns = [f"{folder}/a.txt", f"{folder}/*.txt", f"{folder}/**/*.md"]
        said = said_by(patterns, 65534 if os.geteuid() == 0 else None)
        (folder / "closed").chmod(0o755)
        assert said == [
            f"{folder}/a.txt: cannot be read: Permission denied",
            f"{folder}/a.txt: cannot be read: Permission denied",
            f"{folder}/closed: cannot be looked into: Permission denied",
        ]
