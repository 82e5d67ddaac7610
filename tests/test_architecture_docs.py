"""docs/architecture.md shows the rooms, their floors, and the rooms within them, as the tree has them."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_architecture import FLOORS, FOLDERS, ROOT, module_name, modules, parse, part_of


def first_sentence(path: Path) -> str:
    """What a module says of itself."""
    docstring = ast.get_docstring(parse(path)) or ""
    return re.split(r"\.(?:\s|$)", " ".join(docstring.split()), maxsplit=1)[0] + "."


def floors_table() -> str:
    """``FLOORS`` for people, from the top down, each room with its purpose."""
    rows = ["| floor | room | what it is for |", "| ---: | --- | --- |"]
    for floor, rooms in reversed(list(enumerate(FLOORS, 1))):
        for room in rooms:
            folder = Path(room) if room in FOLDERS else Path("fewstep", room)
            file = folder.with_suffix(".py")
            shown, path = (file.as_posix(), file) if (ROOT / file).is_file() else (f"{folder}/", folder / "__init__.py")
            purpose = first_sentence(ROOT / path) if (ROOT / path).is_file() else "To come."
            rows.append(f"| {floor} | `{shown}` | {purpose} |")
    return "\n".join(rows)


def within_table() -> str:
    """The rooms within rooms for people, each with its purpose."""
    packages = [path for path in modules().values() if path.stem == "__init__"]
    folders = {
        path.parent.relative_to(ROOT).as_posix(): path
        for path in packages
        if part_of(module_name(path)).count(".") == 2
    }
    rows = [f"| `{folder}/` | {first_sentence(path)} |" for folder, path in sorted(folders.items())]
    return "\n".join(["| room within | what it is for |", "| --- | --- |", *rows])


@pytest.mark.parametrize(("what", "table"), [("floors", floors_table), ("rooms within", within_table)])
def test_the_documents_show_the_floors(what: str, table: Callable[[], str]) -> None:
    """docs/architecture.md has the tables; the right one is in the failure's message."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    shown = re.search(f"<!-- {what}: made .*-->\n(.*)\n<!-- {what}: to here -->", page, re.DOTALL)
    if shown is None or shown[1].strip() != table():
        pytest.fail(f"docs/architecture.md, between its two marks of {what}:\n\n{table()}\n", pytrace=False)
