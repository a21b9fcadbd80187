"""The rooms: imports only point down, nothing light imports torch."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "bitfront": {"workers", "sensitivity", "cost_models", "engines", "evaluation", "quantization",
                 "search", "store"},
    "workers": {"sensitivity", "cost_models", "engines", "evaluation", "quantization", "store"},
    "sensitivity": {"evaluation", "quantization"},
    "cost_models": {"engines", "quantization"},
    "engines": {"evaluation", "quantization"},
    "evaluation": {"quantization"},
    "quantization": set(),
    "search": set(),
    "store": set(),
}  # fmt: skip


def imported_rooms(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("room", list(MAY_IMPORT))
def test_imports_only_point_down(room):
    for file in (ROOT / room).rglob("*.py"):
        rooms = imported_rooms(file) & set(MAY_IMPORT) - {room}
        assert rooms <= MAY_IMPORT[room], f"{file} imports {rooms - MAY_IMPORT[room]}"


@pytest.mark.parametrize("room", ["search", "store"])
def test_search_and_store_know_no_torch(room):
    for file in (ROOT / room).rglob("*.py"):
        assert not imported_rooms(file) & {"torch", "transformers", "ray"}, file


def test_modules_stay_readable():
    long = {
        str(file.relative_to(ROOT)): lines
        for room in MAY_IMPORT
        for file in (ROOT / room).rglob("*.py")
        if (lines := len(file.read_text().splitlines())) > 400
    }
    assert not long
