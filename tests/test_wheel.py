"""The package as others get it: a wheel, installed elsewhere, used from another directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from runs import make_config

ROOT = Path(__file__).parent.parent


def run(*command: object, cwd: Path, site: Path | None = None) -> str:
    """What a command printed; without the tree on its path, and with `site` on it."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if site is not None:
        environment["PYTHONPATH"] = str(site)
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since a build leaves folders in the tree."""
    tree = tmp_path_factory.mktemp("wheel") / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("relora", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "-q")
    run(sys.executable, "-m", "pip", "wheel", *options, "-w", tree / "made", tree, cwd=tree)
    (found,) = (tree / "made").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel installs, and nothing else."""
    target = tmp_path_factory.mktemp("installed") / "site"
    options = ("--no-deps", "--no-index", "-q", "--target", target)
    run(sys.executable, "-m", "pip", "install", *options, wheel, cwd=target.parent)
    return target


def test_every_file_of_the_package_is_in_the_wheel_and_nothing_else(wheel: Path) -> None:
    files = (path for path in (ROOT / "relora").rglob("*") if path.is_file())
    ours = {str(p.relative_to(ROOT)) for p in files if "__pycache__" not in p.parts}
    # The configs are data of the package; what was measured with them stays in the repository.
    configs = (path for path in (ROOT / "configs").rglob("*") if path.is_file())
    kept = (path.relative_to(ROOT) for path in configs if "experiments" not in path.parts)
    ours |= {f"relora/{path}" for path in kept if "__pycache__" not in path.parts}
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert "relora/py.typed" in ours
    assert {name for name in packed if ".dist-info/" not in name} == ours
    assert any(name.endswith("licenses/LICENSE") for name in packed)


def test_the_installed_package_is_the_library_and_the_command(site: Path, tmp_path: Path) -> None:
    code = "import relora; print(relora.__file__); [getattr(relora, n) for n in relora.__all__]"
    where = run(sys.executable, "-c", code, cwd=tmp_path, site=site).splitlines()[0]
    assert Path(where).is_relative_to(site)
    assert "usage: relora" in run(site / "bin" / "relora", "--help", cwd=tmp_path, site=site)


def test_a_run_is_planned_from_any_folder(site: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path / "run")
    for what in (config, "llama_60m_relora"):
        page = run(sys.executable, "-m", "relora", "plan", what, cwd=tmp_path, site=site)
        assert "ReLoRA" in page
    assert f"from {site}" in page
