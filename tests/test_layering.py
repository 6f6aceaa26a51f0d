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
# Imports go down. What shares a floor does not know each other, but for `NEIGHBOURS`; a package's
# own files do. The longest prefix decides.
FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "relora.errors",
        "relora.section",
        "relora.cores",
        "relora.quiet",
        "relora.words",
        "relora.version",
    ),
    ("relora.files",),
    ("relora.hub",),
    ("relora.record.layout",),
    (
        "relora.lora",
        "relora.loss",
        "relora.structure",
        "relora.locate",
        "relora.analysis",
        "relora.restart.config",
        "relora.training.config",
    ),
    ("relora.rotary", "relora.restart.schedule"),
    ("relora.model", "relora.lean", "relora.engine", "relora.data", "relora.yaml_config"),
    ("relora.restart",),
    ("relora.config",),
    ("relora.checks", "relora.reference"),
    ("relora.load",),
    ("relora.record",),
    ("relora.plan",),
    ("relora.training",),
    ("relora.report", "relora.integrations"),
    ("relora.commands",),
    ("relora.reflexes", "relora.argument_types"),
    ("relora.verbs",),
    ("relora.cli", "relora"),
    ("relora.__main__",),
)
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}
NEIGHBOURS: set[tuple[str, str]] = set()
# Only these may import the package: (package, where, what the rule protects).
DOORS = {
    "deepspeed": ("relora.engine.deepspeed",),
    "datasets": ("relora.data.corpus",),
    "torch.utils.tensorboard": ("relora.record.board",),
    "tensorboard": ("relora.record.board",),
    # Optional, so imported by their names: none of them by a statement.
    "wandb": (),
    "mlflow": (),
    "trackio": (),
}
# Names imported inside functions: as few as start-up time allows. This only goes down.
LATE = 25
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


def room_of(module: str) -> str:
    """The package or module of `FLOORS` that a module belongs to."""
    parts = module.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next(prefix for prefix in prefixes if prefix in FLOOR_OF)


def is_in(module: str, package: str) -> bool:
    """Whether a dotted name is the package or inside it."""
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    own = room_of(module)
    for found in imports_of(module):
        if is_in(found.target, "relora"):
            other = room_of(found.target)
            lower = FLOOR_OF[other] < FLOOR_OF[own]
            assert other == own or lower or (own, other) in NEIGHBOURS, f"{module} → {found.target}"


def test_no_files_import_each_other_in_a_circle() -> None:
    """Nor late, inside functions; what only a checker of types reads does not count."""
    ahead = {
        module: {i.target for i in imports_of(module) if i.target in MODULES and not i.typing}
        for module in MODULES
    }
    while True:  # take away what imports nothing that is left
        leaves = {m for m in ahead if not ahead[m] & ahead.keys() - {m}}
        if not leaves:
            break
        ahead = {m: targets for m, targets in ahead.items() if m not in leaves}
    assert not ahead


def test_every_room_and_every_neighbour_is_there() -> None:
    assert all(name in MODULES for name in FLOOR_OF)
    assert {m for m in MODULES if m.count(".") == 1} <= FLOOR_OF.keys()
    for own, other in NEIGHBOURS:
        users = [m for m in MODULES if room_of(m) == own]
        assert any(
            room_of(i.target) == other
            for m in users
            for i in imports_of(m)
            if is_in(i.target, "relora")
        )


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
    reached = _runs_with("relora.config") | _runs_with("relora.cli")
    for module in reached:
        for found in imports_of(module):
            if not (found.late or found.typing):
                assert not any(is_in(found.target, h) for h in HEAVY), f"{module}: {found.target}"
    assert {"relora.structure", "relora.restart.schedule", "relora.data.config"} <= reached


def test_no_two_modules_define_one_public_name() -> None:
    """Who reads a call knows what is called. A method's name is its class's own matter."""
    owners: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            for name in _names_of(node):
                if not name.startswith("_"):
                    owners.setdefault(name, []).append(module)
    assert {name: found for name, found in owners.items() if len(found) > 1} == {}


def _names_of(node: ast.stmt) -> set[str]:
    """What a statement at the top of a module defines; `import` only names what others define."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return {n.id for each in targets for n in ast.walk(each) if isinstance(n, ast.Name)}
    return set()


def test_few_imports_are_inside_functions_and_only_of_what_takes_its_time() -> None:
    late = {(m, i.target) for m in MODULES for i in imports_of(m) if i.late and not i.typing}
    assert len(late) <= LATE, late
    slow = (*HEAVY, "pyarrow", "huggingface_hub", "pydantic")
    for module, target in late:
        reached = {target, *(i.target for m in _runs_with(target) for i in imports_of(m))}
        assert any(is_in(name, each) for name in reached for each in slow), f"{module}: {target}"


def _runs_with(target: str) -> set[str]:
    """Modules of the package that run when this is imported."""
    reached: set[str] = set()
    todo = [target]
    while todo:
        module = todo.pop()
        if module in MODULES and module not in reached:
            reached.add(module)
            # Importing a.b.c runs a and a.b too.
            todo += [".".join(module.split(".")[:n]) for n in range(1, module.count(".") + 1)]
            todo += [i.target for i in imports_of(module) if not (i.late or i.typing)]
    return reached


def test_lora_knows_neither_files_nor_processes() -> None:
    for module in MODULES:
        if is_in(module, "relora.lora") and module != "relora.lora.peft_format":
            for found in imports_of(module):
                assert found.target.split(".")[0] not in ("os", "pathlib", "json", "safetensors")
                assert not is_in(found.target, "torch.distributed"), module


def test_only_lora_knows_how_an_adapted_weight_lies_and_what_its_parameters_are_called() -> None:
    """Of the rest, docstrings may say A and B by name; code asks the layer's kind."""
    for module, path in MODULES.items():
        if is_in(module, "relora.lora"):
            continue
        tree = ast.parse(path.read_text())
        prose = {
            id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)
        }  # docstrings
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) else getattr(node, "attr", "")
            if isinstance(text, str) and id(node) not in prose:
                assert "lora_" not in text, f"{module}: {text}"
            assert getattr(node, "id", "") != "Conv1D", module
            assert getattr(node, "attr", "") != "transposed", module
