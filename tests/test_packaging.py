"""The distribution: the wheel, built by way of the sdist, holds the tree's files under ``fewstep`` and nothing else."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Where a folder of the tree is installed. All other top-level folders stay out of the wheel.
INSTALLED = {
    "fewstep": "fewstep",
    "trainers": "fewstep/trainers",
    "pipelines": "fewstep/pipelines",
    "eval": "fewstep/eval",
}
# What `make methods` has measured belongs to the checkout.
MEASURED = "eval/results"
# Distributions that are imported under another name.
IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml", "clean-fid": "cleanfid", "protobuf": "google"}


def tree() -> list[PurePosixPath]:
    """The files of the checkout that git does not ignore; without git, the files of the rooms and beside them."""
    git = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if git.returncode == 0:
        names = git.stdout.splitlines()
    else:
        paths = [*ROOT.iterdir(), *(path for room in (*INSTALLED, "docs") for path in (ROOT / room).rglob("*"))]
        names = [path.relative_to(ROOT).as_posix() for path in paths if "__pycache__" not in path.parts]
    return [PurePosixPath(name) for name in names if (ROOT / name).is_file()]


def sources() -> list[Path]:
    """Every Python file that is installed."""
    return [ROOT / name for name in tree() if name.parts[0] in INSTALLED and name.suffix == ".py"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a clean copy of the tree, offline. Tests and caches of this checkout are not in its way."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    for name in tree():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    build = subprocess.run(command, cwd=out, capture_output=True, text=True)
    assert build.returncode == 0, build.stdout[-2000:] + build.stderr[-2000:]
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as installing it lays it out."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(code: str, site: Path, cwd: Path) -> str:
    """What a fresh interpreter prints that finds the unpacked wheel, but not this checkout's editable install."""
    isolate = (
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]\n"
        f"sys.path.insert(1, {str(site)!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", isolate + code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_the_wheel_holds_exactly_the_files_of_the_tree(wheel: Path) -> None:
    expected = {
        str(PurePosixPath(INSTALLED[name.parts[0]], *name.parts[1:]))
        for name in tree()
        if name.parts[0] in INSTALLED and not name.is_relative_to(MEASURED)
    }
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if not name.endswith("/")}
    installed = {name for name in found if not name.startswith(f"fewstep-{version()}.dist-info/")}
    assert sorted(expected - installed) == [], "not in the wheel: name them in pyproject.toml"
    assert sorted(installed - expected) == [], "in the wheel, but not in the tree"


def test_the_sdist_holds_the_documents(wheel: Path) -> None:
    (path,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        found = {PurePosixPath(*PurePosixPath(name).parts[1:]) for name in archive.getnames()}
    documents = {name for name in tree() if name.parts[0] == "docs" or (len(name.parts) == 1 and name.suffix == ".md")}
    assert PurePosixPath("docs/architecture.md") in documents
    assert sorted(documents - found) == [], "not in the sdist: name them in MANIFEST.in"


def version() -> str:
    """The version, as the package states it."""
    match = re.search(r'^__version__ = "(.+)"$', (ROOT / "fewstep" / "version.py").read_text(encoding="utf-8"), re.M)
    assert match is not None
    return match[1]


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = f"fewstep-{version()}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        assert archive.read(f"{info}/entry_points.txt").decode().split() == [
            "[console_scripts]",
            "fewstep",
            "=",
            "fewstep.cli:main",
            "[pytest11]",
            "fewstep",
            "=",
            "fewstep.pytest_plugin",
        ]
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata
    assert wheel.name.endswith("-py3-none-any.whl")


def test_every_module_of_the_wheel_can_be_imported(unpacked: Path, tmp_path: Path) -> None:
    code = """
import fewstep, importlib, pkgutil
def stop(name): raise ImportError(name)
names = ["fewstep", *(m.name for m in pkgutil.walk_packages(fewstep.__path__, "fewstep.", onerror=stop))]
modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
print(*{module.__file__ for module in modules}, sep="\\n")
"""
    files = [Path(line) for line in run(code, unpacked, tmp_path).splitlines()]
    inside = {path.relative_to(unpacked).as_posix() for path in files}
    expected = {path.relative_to(unpacked).as_posix() for path in unpacked.glob("fewstep/**/*.py")}
    assert inside == {name for name in expected if not name.endswith("__main__.py")}


def test_beside_a_checkout_the_checkout_is_whole(unpacked: Path) -> None:
    """In a checkout ``import fewstep`` finds its folder first, and so must ``fewstep.trainers`` and the others."""
    code = "import importlib.util as u\nfor n in {}: print(u.find_spec('fewstep.' + n).origin)"
    names = ["trainers", "pipelines", "eval", "trainers.dmd2"]
    found = run(code.format(names), unpacked, ROOT).splitlines()
    assert [Path(path) for path in found] == [
        ROOT / "trainers" / "__init__.py",
        ROOT / "pipelines" / "__init__.py",
        ROOT / "eval" / "__init__.py",
        ROOT / "trainers" / "dmd2.py",
    ]


def test_no_source_file_is_ignored_by_git() -> None:
    """An ignore pattern such as ``build/`` also hides a package of that name, and nobody would commit it."""
    git = subprocess.run(
        ["git", "ls-files", "--others", "--ignored", "--exclude-standard", "--", *INSTALLED, "tests"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert [name for name in git.stdout.splitlines() if name.endswith((".py", ".yaml"))] == []


def test_no_module_hides_another_library() -> None:
    """Python puts the folder of a script first on its path: ``eval/profile.py`` would break ``import cProfile``."""
    taken = set(sys.stdlib_module_names) | {import_name(requirement) for requirement in PROJECT["dependencies"]}
    stems = {path: path.stem for path in sources() if path.parent.name in ("trainers", "pipelines", "eval")}
    assert [str(path) for path, stem in stems.items() if stem in taken] == []


def import_name(requirement: str) -> str:
    """What the distribution of a requirement such as ``torch>=2.6`` is imported as."""
    distribution = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower()
    return IMPORT_NAMES.get(distribution, distribution.replace("-", "_"))


def test_every_import_is_a_declared_dependency() -> None:
    """At the top of a module: a dependency. Inside a function, where it is optional: of an extra at least."""
    always = {import_name(requirement) for requirement in PROJECT["dependencies"]} | {"fewstep"}
    extras = PROJECT["optional-dependencies"]
    optional = always | {import_name(requirement) for extra in extras.values() for requirement in extra}
    missing = []
    for path in sources():
        module = ast.parse(path.read_text(encoding="utf-8"))
        required = {name for node in module.body for name in imported(node)}
        anywhere = {name for node in ast.walk(module) for name in imported(node)}
        # The room of Triton kernels is imported where one is about to run, and torch's own wheels bring Triton there.
        brought = {"triton"} if path.parent.name == "fused" else set()
        undeclared = (required - always - brought) | (anywhere - optional - brought)
        missing += [f"{path.relative_to(ROOT)}: {name}" for name in sorted(undeclared - set(sys.stdlib_module_names))]
    assert missing == []


def imported(node: ast.AST) -> set[str]:
    """The top-level packages that one import statement names."""
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return {(node.module or "").partition(".")[0]}
    return set()
