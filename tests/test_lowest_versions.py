"""The oldest versions that are tested are those that pyproject.toml admits, all of them."""

import importlib.util
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("lowest_versions", ROOT / ".ci" / "lowest_versions.py")
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)


def test_every_dependency_is_held_at_the_lowest_version_it_admits():
    wanted = [
        Requirement(text) for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ]
    held = dict(line.split("==") for line in script.lowest_versions(ROOT / "pyproject.toml"))
    assert list(held) == [one.name for one in wanted]
    for one in wanted:
        assert held[one.name] in one.specifier
        assert [specifier.operator for specifier in one.specifier] == [">="]


@pytest.mark.parametrize("wanted", ["torch", "torch==2.6", "torch>=2.6,<3", "torch>2.6"])
def test_a_dependency_without_a_floor_is_an_error(wanted: str, tmp_path: Path):
    path = tmp_path / "pyproject.toml"
    path.write_text(f'[project]\ndependencies = ["{wanted}"]\n')
    with pytest.raises(ValueError, match="has no floor"):
        script.lowest_versions(path)


def test_what_runs_with_them_is_there_and_continuous_integration_runs_it():
    makefile = (ROOT / "Makefile").read_text()
    paths = makefile.partition("ON_THE_PATH := ")[2].partition("\n\n")[0].replace("\\\n", " ").split()
    assert paths and all((ROOT / path).exists() for path in paths)
    assert "make test-lowest" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()
