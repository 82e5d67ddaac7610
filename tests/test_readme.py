"""The documents keep their word: commands parse, code compiles, links lead somewhere, numbers are those of the tree."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import fewstep
from fewstep import cli
from fewstep.cli.distill import auto_settings, distill_config
from fewstep.fashion import TEACHERS, TEXT_TEACHERS, reference
from fewstep.fashion.files import manifest
from fewstep.programs.auto import CHOOSE
from tests import tiny_pipelines
from tests.test_architecture_docs import first_sentence

ROOT = Path(__file__).resolve().parent.parent
PAGES = tuple(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", *PAGES)
#: What the documents name and the tree does not have yet.
TO_COME: set[str] = set()
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
        elif words[0] == "torchrun" or words[:2] == ["accelerate", "launch"]:
            module, *rest = words[words.index("-m") + 1 :]
            if words[0] == "torchrun":  # which else takes abbreviations of its own flags for them
                assert module == "--", f"torchrun needs -m -- before the module: {words}"
                module, *rest = rest
            assert module.startswith("fewstep.trainers.") or module == "fewstep.cli"
            found.append(rest if module == "fewstep.cli" else ["distill", module.rpartition(".")[2], *rest])
    return found


class ParsedError(Exception):
    """Raised in place of running a command whose words were understood."""


@pytest.mark.parametrize("words", fewstep_commands(), ids=lambda words: " ".join(words)[:60])
def test_a_command_is_understood(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the parser that runs it; a whole configuration is made for ``distill``, which checks the values as well."""
    monkeypatch.chdir(ROOT)
    command, *rest = words
    assert command in cli.COMMANDS
    if command == "distill" and rest[0] == CHOOSE:  # whose teacher has to be there
        auto_settings(rest[1:])
        return
    if command == "distill":
        distill_config(rest[0], rest[1:])
        return
    module = importlib.import_module(f"fewstep.cli.{cli.COMMANDS[command]}")
    parse = module.parse

    def stop(parser: Any, arguments: Any, **how: bool) -> None:
        parse(parser, arguments, **how)
        raise ParsedError

    monkeypatch.setattr(module, "parse", stop)
    with pytest.raises(ParsedError):
        module.run(rest)


def test_the_documents_show_every_command() -> None:
    shown = {words[0] for words in fewstep_commands()} | {"demo"} & set(re.findall(r"make (\w+)", text("README.md")))
    assert shown == set(cli.COMMANDS)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", text("Makefile"), re.M))
    used = set(re.findall(r"`?make ([\w-]+)", "\n".join(b for name in DOCUMENTS for b in blocks(name, "bash"))))
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
    known = ("fewstep", "accelerate", "torchrun", "make", "pip", "python", ".venv/bin/python")
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


def prose(name: str) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text(name), flags=re.M | re.S)


def anchors(name: str) -> set[str]:
    """What a link may name after ``#``: the headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", prose(name), re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    """Each relative link to a file of the tree, each anchor to a heading of the document that it is in."""

    def leads_somewhere(link: str) -> bool:
        path, _, anchor = link.partition("#")
        target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        if not (target.exists() and target.is_relative_to(ROOT)):
            return False
        return not anchor or (target.suffix == ".md" and anchor in anchors(target.relative_to(ROOT).as_posix()))

    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(name)) if not link.startswith("https://")]
    assert [link for link in links if not leads_somewhere(link)] == []


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name != "CHANGELOG.md"])
def test_what_is_named_is_there(name: str) -> None:
    """Files and folders of the tree in code quotes."""
    named = set(re.findall(r"`((?:fewstep|trainers|pipelines|eval|tests|docs)/[\w./-]*)`", prose(name)))
    assert sorted(path for path in named - TO_COME if not (ROOT / path).exists()) == []


def test_the_readme_is_short_and_lists_every_page_with_its_question() -> None:
    """The question is the page's own heading."""
    assert len(text("README.md").splitlines()) <= 200
    listed = {path: question for question, path in re.findall(r"^\| (.+?) \| \[(docs/.+?)\]", text("README.md"), re.M)}
    assert listed == {name: text(name).splitlines()[0].removeprefix("# ") for name in PAGES}


def rows(name: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading of a document, without its two head lines."""
    section = text(name).partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    table = re.search(r"(?:^\|.*\|\n)+", section, re.M)
    assert table is not None, f"{name} has no table below {heading!r}"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines()[2:]]


def test_tested_pipelines_are_tested() -> None:
    """What is said to be part of ``make test`` is built there."""
    table = rows("docs/pipelines.md", "Tested pipelines")
    built = [
        name for name, value in vars(tiny_pipelines).items() if name.endswith("Pipeline") and inspect.isclass(value)
    ]
    assert {cells[0].strip("`") for cells in table if cells[-1] == "yes"} <= set(built)
    assert {cells[-1] for cells in table} <= {"yes", "with `--zoo`"}
    assert len(table) >= 16


def test_embedded_teachers_are_listed_with_their_size() -> None:
    files = manifest()["files"]
    table = rows("docs/teachers.md", "The three pipelines")
    assert [cells[0].strip("`") for cells in table] == list(TEACHERS)
    for name, _, guidance, size in ([cells[0].strip("`"), *cells[1:]] for cells in table):
        assert float(guidance) == TEACHERS[name].guidance_scale
        weight = sum(about["bytes"] for path, about in files.items() if path.startswith(f"{name}/"))
        assert size == f"{weight / 1e6:.1f} MB"


def test_the_rows_of_the_teacher_that_looks_are_those_of_the_manifest() -> None:
    measured = manifest()["teachers"]["fashion-inpaint"]
    shown = rows("docs/teachers.md", "The one that looks at a picture")
    assert shown == [
        [str(row["steps"]), *(f"{row[name]:.3f}" for name in ("fd", "agreement", "kept"))] for row in measured["rows"]
    ]
    page = " ".join(text("docs/teachers.md").split())
    assert f"guidance {measured['guidance_scale']}" in page
    assert f"of {measured['rows'][0]['samples']:,} items" in page
    floors = measured["kept_floors"]
    assert f"it is {floors['autoencoder']:.3f} of the pictures" in page
    assert f"and {floors['blind']:.3f} of another picture" in page


def test_the_floors_are_those_of_the_reference() -> None:
    floors = reference().floors
    said = re.search(r"have an FD of ([\d.]+) to the test images, and ([\d.]+) after", text("docs/evaluation.md"))
    assert said is not None
    assert said.groups() == (f"{floors['real']:.3f}", f"{floors['autoencoder']:.3f}")


# --- the demo's numbers -----------------------------------------------------------------------------------------


def demo_rows() -> list[tuple[str, list[str]]]:
    """The teacher that each row of the demo's table is about, and the row, its model filled in."""
    found: list[tuple[str, list[str]]] = []
    model = teacher = ""
    for cells in rows("docs/demo.md", "Teachers and students"):
        model = cells[0] or model
        teacher = model.split("`")[1] if model.startswith("teacher") else teacher
        found.append((teacher, [model, *(cell.strip("*") for cell in cells[1:])]))
    return found


def test_the_demo_has_the_teachers_rows_that_are_kept() -> None:
    """Those of eval/results, which are bound to the teachers' files."""
    shown = [(teacher, cells) for teacher, cells in demo_rows() if cells[0].startswith("teacher")]
    assert len(shown) == 8
    for teacher, (_, steps, calls, *numbers) in shown:
        kept = json.loads((ROOT / "eval" / "results" / f"teacher_{teacher}_{steps}.json").read_text(encoding="utf-8"))
        metrics = kept["metrics"]
        assert float(calls) == kept["nfe"]
        assert [numbers[0], *numbers[2:]] == [f"{metrics[name]:.3f}" for name in ("fd_test", "agreement", "recall")]


def test_the_demos_ratios_follow_from_its_distances() -> None:
    at_25 = {teacher: float(cells[3]) for teacher, cells in demo_rows() if cells[1] == "25"}
    for teacher, cells in demo_rows():
        assert float(cells[4]) == pytest.approx(float(cells[3]) / at_25[teacher], abs=0.0065)


def students() -> dict[tuple[str, int], list[str]]:
    """The demo's students at the step count that they are trained for: FD, and FD over the teacher's at 25."""
    trained = ((teacher, cells) for teacher, cells in demo_rows() if cells[0] == f"{cells[1]}-step student")
    return {(teacher, int(cells[1])): cells[3:5] for teacher, cells in trained}


def test_what_is_said_of_the_demo_elsewhere_is_what_its_table_says() -> None:
    """The first of the three seeds, the README's summary, and the LoRA students beside the full ones."""
    seeds = {cells[0]: cells[1:] for cells in rows("docs/demo.md", "Three seeds")}
    assert {title: ratios[0] for title, ratios in seeds.items()} == {
        f"`{teacher}`, {steps} step{'s' * (steps > 1)}": ratio for (teacher, steps), (_, ratio) in students().items()
    }
    said = re.search(r"`fashion-sd` has ([\d.]+) times .* `fashion-flow` ([\d.]+)\s", text("README.md"))
    assert said is not None
    assert said.groups() == (students()["fashion-sd", 4][1], students()["fashion-flow", 4][1])
    lora = " ".join(text("docs/lora.md").split())
    for teacher in TEXT_TEACHERS:
        found = re.search(rf"([\d.]+) on `{teacher}` \([^)]*\), ([\d.]+) times", lora)
        assert found is not None
        assert float(found[2]) == pytest.approx(float(found[1]) / float(students()[teacher, 4][0]), abs=0.005)


def test_probe_prints_what_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    """Line by line, but for what is left out and how small the differences came out."""
    (shown,) = [block for block in blocks("docs/pipelines.md", "text") if block.startswith("pipeline ")]
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
    purposes = {title: first_sentence(path) for title, path in rooms.items()}
    tree = text("README.md").split("## The tree\n", 1)[1].split("\n## ", 1)[0]
    assert dict(re.findall(r"^- (`[^:\n]+): (.+)$", tree, re.M)) == purposes
