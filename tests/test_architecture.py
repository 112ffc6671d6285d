"""Folders are the architecture: imports run one way, down the floors; files stay small."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ouro_jax"
FLOORS = {
    "errors": 0,
    "settings": 0,
    "config": 0.5,
    "model": 1,
    "objectives": 2,
    "data": 3,
    "parallel": 3,
    "interop": 4,
    "training": 5,
    "inference": 5,
    "reporting": 6,
    "planning": 6,
    "experiments": 6,
    "cli": 7,
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(module: str) -> str | None:
    """`ouro_jax.data.rows` → `data`; None for what is not ours."""
    parts = module.split(".")
    return parts[1] if parts[0] == "ouro_jax" and len(parts) > 1 else None


def imports_of(source: str) -> list[str]:
    """Modules that a source text imports anywhere, inside functions and type checks too."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += [node.module or ""]
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def is_allowed(importer: str, imported: str) -> bool:
    """A room may import itself and lower floors; rooms on one floor do not know each other."""
    return importer == imported or FLOORS[imported] < FLOORS[importer]


def test_the_rule_itself():
    assert is_allowed("training", "data") and is_allowed("cli", "reporting")
    assert not is_allowed("data", "training")
    assert not is_allowed("inference", "training") and not is_allowed("training", "inference")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_run_down_the_floors(file):
    room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        return  # the package's face names things of every floor
    for module in imports_of(file.read_text()):
        imported = room_of(module)
        if imported is not None:
            assert is_allowed(room, imported), f"{file.name} imports {module}"


def test_every_folder_has_a_floor():
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert rooms == set(FLOORS) - {"errors", "settings", "config"}


def test_flax_stays_inside_the_model_and_the_mesh():
    users = {
        file.relative_to(PACKAGE).as_posix()
        for file in FILES
        if any(module.startswith("flax.linen") for module in imports_of(file.read_text()))
    }
    outside = {user for user in users if not user.startswith("model/")}
    # Logical axis names are flax's: the mesh gives them meaning, two more rooms use them.
    assert outside == {
        "objectives/cross_entropy.py",
        "parallel/mesh.py",
        "training/state.py",
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_stay_small_and_public_things_are_documented(file):
    source = file.read_text()
    assert source.count("\n") <= 500
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{file.name}: {node.name} has no docstring"
