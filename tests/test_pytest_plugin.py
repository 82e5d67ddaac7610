"""The suite's options reach pytest in time in this checkout, and no other project's pytest."""

import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INI = ROOT.joinpath("pyproject.toml").read_text(encoding="utf-8").partition("[tool.pytest.ini_options]")[2]
TEST = """
import pytest

@pytest.mark.gpu
def test_golden(pytestconfig):
    print("folder", pytestconfig.getoption("golden"), "root", pytestconfig.rootpath)

@pytest.mark.soak
def test_golden_for_long():
    assert False

@pytest.mark.{marker}
def test_other():
    import warnings
    warnings.warn("old", DeprecationWarning)
"""


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """pytest as a process; a package that was installed before it had the entry point gets the plugin by name."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if "fewstep" not in entry_points(group="pytest11").names:
        environment["PYTEST_PLUGINS"] = "fewstep.pytest_plugin"
    command = [sys.executable, "-m", "pytest", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def checkout(folder: Path, name: str = "fewstep", marker: str = "gpu") -> Path:
    """A project with this checkout's pytest settings and one test file."""
    (folder / "tests" / "golden").mkdir(parents=True)
    settings = INI.partition("\n[")[0]
    (folder / "pyproject.toml").write_text(f'[project]\nname = "{name}"\n[tool.pytest.ini_options]{settings}')
    (folder / "tests" / "golden" / "test_golden.py").write_text(TEST.format(marker=marker))
    (folder / "test_outside.py").write_text("def test_golden_outside_of_testpaths(): assert False")
    return folder


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    """A folder outside the checkout."""
    folder = tmp_path / "numbers"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("form", ["two words", "one word"])
def test_a_folder_given_to_an_option_is_no_test_path(tmp_path: Path, numbers: Path, form: str):
    root = checkout(tmp_path / "checkout")
    option = ["--golden", numbers] if form == "two words" else [f"--golden={numbers}"]
    done = run(root, "-s", "-k", "golden", *option)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"folder {numbers} root {root}" in done.stdout
    # Its own settings hold: tests/ alone is collected, soak is left out, DeprecationWarning is silent.
    assert re.search(r"1 passed|^\.", done.stdout, re.M)
    assert "warning" not in done.stdout
    assert list(numbers.iterdir()) == []  # no cache folder


def test_an_unknown_marker_is_still_refused(tmp_path: Path, numbers: Path):
    done = run(checkout(tmp_path / "checkout", marker="unheard"), "-k", "golden", "--golden", numbers)
    assert done.returncode != 0
    assert "'unheard' not found in `markers`" in done.stdout


def test_in_another_project_nothing_is_added(tmp_path: Path, numbers: Path):
    done = run(checkout(tmp_path / "other", name="other"), "--golden", numbers)
    assert done.returncode == 4
    assert "unrecognized arguments: --golden" in done.stderr
