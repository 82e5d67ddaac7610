"""The documents keep their word: commands parse, code compiles, links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import fewstep
from fewstep import cli
from fewstep.cli.distill import distill_config
from fewstep.fashion import TEACHERS
from tests import tiny_pipelines

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
RECIPES = sorted((ROOT / "trainers" / "configs").glob("*.yaml"))


def text(name: str) -> str:
    """A document's text."""
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text(name), re.M | re.S)


def shell_lines(script: str) -> list[list[str]]:
    """The words of each command; lines that end in a backslash go on."""
    lines = script.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def launch_lines(recipe: Path) -> str:
    """The commands in a recipe's header: the comment's indented lines."""
    lines = re.findall(r"^#   +(.*)$", recipe.read_text(encoding="utf-8"), re.M)
    return "\n".join(lines)


def commands() -> list[tuple[str, list[str]]]:
    """Every command of the documents and of the recipes' headers, with the place it stands in."""
    found = [(name, words) for name in DOCUMENTS for block in blocks(name, "bash") for words in shell_lines(block)]
    return found + [(recipe.name, words) for recipe in RECIPES for words in shell_lines(launch_lines(recipe))]


def fewstep_commands() -> list[list[str]]:
    """The words after ``fewstep``, for both ways of saying it."""
    found = []
    for _, words in commands():
        if words[0] == "fewstep":
            found.append(words[1:])
        elif words[:2] == ["accelerate", "launch"]:
            module = words[words.index("-m") + 1]
            assert module.startswith("fewstep.trainers.")
            found.append(["distill", module.rpartition(".")[2], *words[words.index("-m") + 2 :]])
    return found


class ParsedError(Exception):
    """Raised in place of running a command whose words were understood."""


@pytest.mark.parametrize("words", fewstep_commands(), ids=lambda words: " ".join(words)[:60])
def test_a_command_is_understood(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the parser that runs it; a whole configuration is made for ``distill``, which checks the values as well."""
    monkeypatch.chdir(ROOT)
    command, *rest = words
    assert command in cli.COMMANDS
    if command == "distill":
        distill_config(rest[0], rest[1:])
        return
    module = importlib.import_module(f"fewstep.cli.{cli.COMMANDS[command]}")
    parse = module.parse

    def stop(parser: Any, arguments: Any) -> None:
        parse(parser, arguments)
        raise ParsedError

    monkeypatch.setattr(module, "parse", stop)
    with pytest.raises(ParsedError):
        module.run(rest)


def test_the_documents_show_every_command() -> None:
    shown = {words[0] for words in fewstep_commands()} | {"demo"} & set(re.findall(r"make (\w+)", text("README.md")))
    assert shown == set(cli.COMMANDS)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^(\w+):", text("Makefile"), re.M))
    used = set(re.findall(r"`?make (\w+)", "\n".join(b for name in DOCUMENTS for b in blocks(name, "bash"))))
    assert {"demo", "test"} <= used <= targets


def test_a_fresh_machine_needs_python_and_make_only() -> None:
    """Both targets make the environment themselves, with the interpreter's own venv and pip."""
    makefile = text("Makefile")
    for target in ("demo", "test"):
        assert re.search(rf"^{target}: \$\(VENV\)/\.{target}$", makefile, re.M)
    assert "$(PYTHON) -m venv $(VENV)" in makefile
    assert "-m pip install" in makefile
    assert text(".ci/run").rstrip().endswith("make test")
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_other_commands_are_known() -> None:
    known = ("fewstep", "accelerate", "make", "pip", "python", ".venv/bin/python")
    assert [words for _, words in commands() if words[0] not in known] == []
    modules = {words[words.index("-m") + 1] for _, words in commands() if words[0].endswith("python")}
    # pre-commit comes with the dev extra, which the tests do without.
    assert [name for name in modules - {"pre_commit"} if importlib.util.find_spec(name) is None] == []


@pytest.mark.parametrize("code", [block for name in DOCUMENTS for block in blocks(name, "python")])
def test_python_code_uses_the_public_interface(code: str) -> None:
    names = {
        node.attr
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fewstep"
    }
    assert names <= set(fewstep.__all__)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", text(name))
    local = [link for link in links if not link.startswith(("https://", "#"))]
    assert [link for link in local if not (ROOT / link).exists()] == []
    headings = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text(name), re.M)}
    assert [link for link in links if link.startswith("#") and link[1:] not in headings] == []


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading of the README, without its two head lines."""
    section = text("README.md").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", section, re.M)][
        2:
    ]


def test_tested_pipelines_are_tested() -> None:
    """What is said to be part of ``make test`` is built there."""
    table = rows("Tested pipelines")
    built = [
        name for name, value in vars(tiny_pipelines).items() if name.endswith("Pipeline") and inspect.isclass(value)
    ]
    assert {cells[0].strip("`") for cells in table if cells[-1] == "yes"} <= set(built)
    assert {cells[-1] for cells in table} <= {"yes", "with `--zoo`"}
    assert len(table) >= 16


def test_embedded_teachers_are_listed() -> None:
    assert [cells[0].strip("`") for cells in rows("Embedded teachers")] == list(TEACHERS)


def test_probe_prints_what_the_readme_shows(capfd: pytest.CaptureFixture[str]) -> None:
    """Line by line, but for what is left out and how small the differences came out."""
    (shown,) = [block for block in blocks("README.md", "text") if block.startswith("pipeline ")]
    assert cli.main(["probe", "fashion-sd"]) == 0
    printed = [measured(line) for line in capfd.readouterr().out.splitlines()]
    assert [line for line in shown.splitlines() if line != "..." and measured(line) not in printed] == []


def measured(line: str) -> str:
    """A line with its measured difference masked."""
    return re.sub(r"\d\.\de[-+]\d\d \(", "(", line)


def test_the_changelog_knows_the_version() -> None:
    assert fewstep.__version__ in text("CHANGELOG.md")


def test_the_tree_lists_every_room_with_its_purpose() -> None:
    """The first sentence of each room's docstring, word for word."""
    rooms = {f"`fewstep/{path.parent.name}/`": path for path in (ROOT / "fewstep").glob("*/__init__.py")}
    beside = {path.parent.name: path for path in ROOT.glob("*/__init__.py") if path.parent.name != "fewstep"}
    rooms |= {f"`{name}/` (imported as `fewstep.{name}`)": path for name, path in beside.items()}
    docstrings = {title: ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "" for title, path in rooms.items()}
    purposes = {title: re.split(r"\.(?:\s|$)", words, maxsplit=1)[0] + "." for title, words in docstrings.items()}
    tree = text("README.md").split("## The tree\n", 1)[1].split("\n## ", 1)[0]
    assert dict(re.findall(r"^- (`[^:\n]+): (.+)$", tree, re.M)) == purposes
