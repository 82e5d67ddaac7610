"""The house: which room may import which, what a method consists of, and what no file may contain."""

from __future__ import annotations

import ast
import graphlib
import importlib
import re
import sys
from collections import Counter
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import yaml

from fewstep.config.checks import names_of

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("fewstep", "trainers", "pipelines", "eval")
#: Rooms by floor, from the ground up: a module imports from its own room and from lower floors, nothing else.
FLOORS = (
    ("errors", "reading", "sending", "version"),
    ("conditioning", "kernels"),
    ("diffusion", "fashion"),
    ("losses", "config", "recording"),
    ("networks", "teachers", "data"),
    ("critic", "training", "export"),
    ("programs",),
    ("eval",),
    ("cli", "__init__"),
    ("trainers",),
)
#: They stand apart: files that are copied beside a student, and the test suite's own options.
APART = ("pipelines", "pytest_plugin")
#: The one place that finds a method by its name, and those that find a file of pipelines/: no list of them is needed.
METHOD_LOOKUP = {"fewstep.programs.methods"}
PIPELINE_LOOKUP = {
    "fewstep.export.phased",
    "fewstep.export.flow_map",
    "fewstep.export.own_code",
    "fewstep.export.several",
    "fewstep.data.partition",
    "fewstep.export.speed_up",
    "fewstep.export.steering",
    "fewstep.export.walk.scheduler",
    "fewstep.networks.second_time",
    "fewstep.networks.speed_up",
}
#: Losses and kernels know tensors, not networks; a file of pipelines/ works when copied beside a checkpoint.
NARROW = {
    "losses": (
        "torch",
        "fewstep.diffusion.prediction",
        "fewstep.diffusion.schedule",
        "fewstep.kernels",
        "fewstep.losses",
    ),
    "kernels": ("torch", "triton", "fewstep.errors", "fewstep.sending", "fewstep.kernels"),
    "pipelines": ("torch", "diffusers"),
}
#: What people start may print; the library logs.
PROGRAMS = (
    "fewstep.cli",
    "fewstep.eval.bench.gpu",
    "fewstep.eval.benchmark.renew",
    "fewstep.eval.fashion",
    "fewstep.eval.forms",
    "fewstep.eval.memory",
    "fewstep.eval.methods",
    "fewstep.eval.plugged",
    "fewstep.eval.steering",
    "fewstep.fashion.items",
)
LONGEST_FILE = 350
#: So many files in one folder, its ``__init__.py`` apart, are too many to find one's way: it asks for rooms within.
MOST_FILES = 40
#: One file for each method, found by its name.
LISTS = ("trainers",)


def module_name(path: Path) -> str:
    """``fewstep.losses.score`` of fewstep/losses/score.py, ``fewstep.trainers.dmd2`` of trainers/dmd2.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "fewstep" else ("fewstep", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name."""
    return {module_name(path): path for room in FOLDERS for path in sorted((ROOT / room).rglob("*.py"))}


@cache
def parse(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(name: str) -> set[str]:
    """What a module imports, absolute and as deep as it says: in functions and for type checking, too."""
    path = modules()[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(filter(None, (up, node.module)))
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                found.add(inner if inner in modules() else source)
    return found


def within(name: str, packages: tuple[str, ...]) -> bool:
    """Whether a module is one of the packages or inside one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def room_of(name: str) -> str:
    """``losses`` of ``fewstep.losses.score``; the front door ``fewstep`` itself is ``__init__``."""
    return [*name.split("."), "__init__"][1]


def floor_of(name: str) -> int:
    """The floor of a module's room."""
    return next(floor for floor, rooms in enumerate(FLOORS) if room_of(name) in rooms)


def housed() -> list[str]:
    """The modules that stand on a floor."""
    return [name for name in modules() if room_of(name) not in APART]


def test_every_module_has_a_room() -> None:
    """A new folder, or a file beside the rooms, needs a floor in the table."""
    homeless = [name for name in housed() if not any(room_of(name) in rooms for rooms in FLOORS)]
    assert homeless == []


def test_imports_go_downwards() -> None:
    """Also those inside a function or for type checking."""
    upwards = {
        (name, other): f"floor {floor_of(name)} imports floor {floor_of(other)}"
        for name in housed()
        for other in imports(name)
        if within(other, ("fewstep",)) and room_of(other) != room_of(name)
        if room_of(other) in APART or floor_of(other) >= floor_of(name)
    }
    assert upwards == {}


@pytest.mark.parametrize("room", [room for rooms in FLOORS for room in rooms])
def test_no_room_has_a_circle(room: str) -> None:
    """Files of one room in an order in which each imports only those before it."""
    inside = {name for name in modules() if room_of(name) == room}
    graph = {name: imports(name) & inside - {name} for name in inside}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def part_of(name: str) -> str:
    """``fewstep.recording.watch`` of ``fewstep.recording.watch.hooks``; a file beside them is its own."""
    return ".".join(name.split(".")[:3])


@pytest.mark.parametrize("room", [room for rooms in FLOORS for room in rooms])
def test_rooms_within_a_room_have_no_circle(room: str) -> None:
    """Rooms within, and the files beside them, in an order in which each imports only those before it."""
    inside = {name for name in modules() if room_of(name) == room}
    graph: dict[str, set[str]] = {part_of(name): set() for name in inside}
    for name in inside:
        graph[part_of(name)] |= {part_of(other) for other in imports(name) & inside} - {part_of(name)}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_no_folder_is_flat() -> None:
    """A room with more files than one sees at a glance is divided into rooms within."""
    files = Counter(path.parent.relative_to(ROOT).as_posix() for path in modules().values() if path.stem != "__init__")
    assert {folder: count for folder, count in files.items() if count > MOST_FILES and folder not in LISTS} == {}


def test_methods_and_pipelines_are_named_in_few_places() -> None:
    """By a string for importlib, as ``fewstep distill METHOD`` needs."""
    rooms = re.compile(r"fewstep\.(trainers|pipelines)(\.[\w.]*)?")
    found = [
        (name, node.value)
        for name in housed()
        if room_of(name) not in ("eval", "cli", "__init__", "trainers")
        for node in ast.walk(parse(modules()[name]))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and rooms.fullmatch(node.value)
        if not (name in METHOD_LOOKUP and node.value.startswith("fewstep.trainers"))
        if not (name in PIPELINE_LOOKUP and node.value.startswith("fewstep.pipelines"))
    ]
    assert found == []


@pytest.mark.parametrize("room", NARROW)
def test_what_a_narrow_room_may_import(room: str) -> None:
    found = [
        (name, other)
        for name in modules()
        if room_of(name) == room
        for other in imports(name)
        if not within(other, NARROW[room]) and other.partition(".")[0] not in sys.stdlib_module_names
    ]
    assert found == []


# --- a method ---------------------------------------------------------------------------------------------------


def methods() -> list[str]:
    """The files of trainers/."""
    return sorted(path.stem for path in (ROOT / "trainers").glob("*.py") if not path.stem.startswith("_"))


def configs() -> list[Path]:
    """The shipped recipes."""
    return sorted((ROOT / "trainers" / "configs").iterdir())


def listed_methods() -> list[str]:
    """The first column of the table of methods: links to files of trainers/."""
    page = (ROOT / "docs" / "methods.md").read_text("utf-8")
    rows = re.findall(r"^\| \[`(\w+)`\]\(\.\./trainers/(\w+)\.py\) \|", page, re.M)
    assert all(shown == file for shown, file in rows)
    return [shown for shown, _ in rows]


def test_the_page_of_methods_has_one_row_for_each_method() -> None:
    assert sorted(listed_methods()) == methods()


@pytest.mark.parametrize("method", methods())
def test_a_method_has_a_test_and_a_recipe(method: str) -> None:
    assert (ROOT / "tests" / "trainers" / f"test_{method}.py").is_file()
    assert any(method_of(path) == method for path in configs())


def method_of(recipe: Path) -> str | None:
    """The method that ``METHOD.yaml`` or ``METHOD_anything.yaml`` is for; the longest name that fits."""
    fitting = [name for name in methods() if recipe.stem == name or recipe.stem.startswith(f"{name}_")]
    return max(fitting, key=len, default=None)


@pytest.mark.parametrize("recipe", configs(), ids=lambda path: path.stem)
def test_a_recipe_says_what_the_method_understands(recipe: Path) -> None:
    method = method_of(recipe)
    assert method is not None, "its name begins with no method's name"
    assert recipe.suffix == ".yaml"
    text = recipe.read_text(encoding="utf-8")
    header = text[: text.index("\nsteps:")]
    for word in (f"--config trainers/configs/{recipe.name}", "Source:", "Expected:"):
        assert word in header, f"its header lacks {word}"
    settings = yaml.safe_load(text)
    config_class = importlib.import_module("fewstep.programs.methods").method_class(method).Config
    known = {field.name: field for field in fields(config_class)}
    assert sorted(settings.keys() - known.keys()) == []
    # What a machine's owner chooses does not belong into a recipe.
    assert settings.keys().isdisjoint(names_of(config_class, "source", "machine") | {"seed"})
    for name, value in settings.items():
        expected = type(known[name].default)
        if expected in (bool, int, float, str):
            # YAML reads 1e-3 as a word and no as a switch; both would get past the checks of the command line.
            assert type(value) is expected, f"{name}: {value!r} is no {expected.__name__}"
    launch = header.split("#\n")[1]
    config_class(teacher="teacher", out="out", data="data" if "--data" in launch else None, **settings)


# --- every file -------------------------------------------------------------------------------------------------


def test_a_file_is_read_in_one_sitting() -> None:
    """Tests and what they share as well."""
    files = [*modules().values(), *(ROOT / "tests").rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def test_only_the_command_line_prints() -> None:
    """The library logs; programs talk."""
    printing = [name for name, path in modules().items() for node in ast.walk(parse(path)) if calls(node) == "print"]
    assert [name for name in printing if not within(name, PROGRAMS)] == []


def test_no_pickle_is_executed() -> None:
    unsafe = [
        name
        for name, path in modules().items()
        for node in ast.walk(parse(path))
        if calls(node) == "torch.load"
        and not any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in node.keywords)
    ]
    assert unsafe == []
    assert [name for name in modules() if within_any(imports(name), ("pickle", "dill", "joblib"))] == []


def within_any(names: set[str], packages: tuple[str, ...]) -> bool:
    """Whether any of the names is in one of the packages."""
    return any(within(name, packages) for name in names)


def calls(node: ast.AST) -> str | None:
    """The name of the function that a node calls, as written."""
    return ast.unparse(node.func) if isinstance(node, ast.Call) else None


def test_no_file_knows_somebodys_machine() -> None:
    """Home folders and the like, in code, documents and package data alike."""
    private = re.compile(r"(?<![\w.:/])(?:/(?:home|root|Users|work|scratch|mnt)/\w|[A-Z]:\\\\?Users)")
    folders = [ROOT / name for name in (*FOLDERS, "docs", "tests", ".github", ".ci")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]  # a worktree's is a file
    found = []
    for path in files:
        if path.suffix == ".pyc" or path == Path(__file__).resolve():
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        found += [(str(path.relative_to(ROOT)), match[0]) for match in private.finditer(text)]
    assert found == []
