"""The house's arrows: who may import whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parent.parent / "relora"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# The longest prefix decides. Level 0 may be imported by all: it is plain torch, or just names.
LEVELS = {
    "relora": 0,
    "relora.errors": 0,
    "relora.section": 0,
    "relora.files": 0,
    "relora.yaml_config": 0,
    "relora.lora": 0,
    "relora.model": 0,
    "relora.structure": 0,
    "relora.analysis": 0,
    "relora.restart.schedule": 0,
    "relora.restart.config": 0,
    "relora.runtime": 1,
    "relora.data": 1,
    "relora.restart": 2,
    "relora.report": 2,
    "relora.config": 2,
    "relora.checks": 2,
    "relora.training.arms": 2,
    "relora.training.log_lines": 2,
    "relora.record.loaded": 2,
    "relora.record.moved": 2,
    "relora.record.own_files": 2,
    "relora.plan.dryrun": 2,
    "relora.plan.estimate": 2,
    "relora.plan.timeline": 2,
    "relora.plan.advice": 2,
    "relora.record.standing": 2,
    "relora.training.run": 2,
    "relora.training.loop": 2,
    "relora.training.spectra": 2,
    "relora.training.guard": 2,
    "relora.commands": 3,
    "relora.cli": 4,
    "relora.__main__": 4,
}
# Only these may import the package: (package, where, what the rule protects).
DOORS = {
    "deepspeed": ("relora.engine.deepspeed",),
    "datasets": ("relora.data.corpus", "relora.data.files"),
    "torch.utils.tensorboard": ("relora.record.metrics",),
    "tensorboard": ("relora.record.metrics",),
}
HEAVY = ("torch", "transformers", "deepspeed", "datasets", "numpy", "sentencepiece", "matplotlib")


class Import(NamedTuple):
    """One import statement's target; `late` if inside a function, `typing` if for checkers only."""

    target: str
    late: bool
    typing: bool


@cache
def imports_of(module: str) -> list[Import]:
    """Everything a module imports; `from a import b` counts as a.b where that is a module."""
    return list(_walk(ast.parse(MODULES[module].read_text()), False, False))


def _walk(node: ast.AST, late: bool, typing: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, late, typing) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        base = node.module or ""
        for alias in node.names:
            whole = f"{base}.{alias.name}"
            known = whole in MODULES or base.split(".")[0] != "relora"
            yield Import(whole if known else base, late, typing)
    elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        for child in node.body:
            yield from _walk(child, late, True)
        for child in node.orelse:
            yield from _walk(child, late, typing)
    else:
        late = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from _walk(child, late, typing)


def level_of(module: str) -> int:
    """Level of a module by its longest known prefix."""
    parts = module.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next(LEVELS[prefix] for prefix in prefixes if prefix in LEVELS)


def is_in(module: str, package: str) -> bool:
    """Whether a dotted name is the package or inside it."""
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_or_stay(module: str) -> None:
    for found in imports_of(module):
        if is_in(found.target, "relora"):
            assert level_of(found.target) <= level_of(module), f"{module} imports {found.target}"


def test_every_file_at_the_top_has_a_level_of_its_own() -> None:
    top = {module for module in MODULES if module.count(".") == 1}
    assert top <= LEVELS.keys()


@pytest.mark.parametrize("package", DOORS)
def test_some_packages_are_imported_at_one_door(package: str) -> None:
    users = {m for m in MODULES for found in imports_of(m) if is_in(found.target, package)}
    assert users <= set(DOORS[package]), package


def test_every_door_is_used() -> None:
    for package in ("deepspeed", "datasets", "torch.utils.tensorboard"):
        found = [m for m in MODULES if any(is_in(i.target, package) for i in imports_of(m))]
        assert found, package


def test_commands_never_import_each_other() -> None:
    for module in MODULES:
        if is_in(module, "relora.commands"):
            for found in imports_of(module):
                own = found.target in (module, "relora.commands")
                assert own or not is_in(found.target, "relora.commands"), (module, found.target)


def test_reading_a_config_imports_nothing_heavy() -> None:
    """Neither `--help` nor a config error waits for torch."""
    reached, todo = set(), ["relora.config", "relora.cli"]
    while todo:
        module = todo.pop()
        if module in reached:
            continue
        reached.add(module)
        # Importing a.b.c runs a and a.b too.
        todo += [".".join(module.split(".")[:n]) for n in range(1, module.count(".") + 1)]
        for found in imports_of(module):
            if found.late or found.typing:
                continue
            assert not any(is_in(found.target, h) for h in HEAVY), f"{module}: {found.target}"
            if found.target in MODULES:
                todo.append(found.target)
    assert {"relora.model", "relora.restart.schedule", "relora.data.config"} <= reached


def test_lora_knows_neither_files_nor_processes() -> None:
    for module in MODULES:
        if is_in(module, "relora.lora") and module != "relora.lora.peft_format":
            for found in imports_of(module):
                assert found.target.split(".")[0] not in ("os", "pathlib", "json", "safetensors")
                assert not is_in(found.target, "torch.distributed"), module
