"""The test suite's own options, where pytest knows them before it reads a path: ``pytest -k golden --golden DIR``.

pytest takes the word after an option that it does not know for a test path, and looks for its configuration there. The
options of a conftest come too late; those of a ``pytest11`` entry point come in time to notice, and to start over with
the right configuration. In every project but this checkout the plugin adds nothing.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

_OPTIONS = {"golden": "numbers computed by the methods' authors' code", "zoo": "tiny pipelines"}


def add_options(parser: pytest.Parser) -> None:
    """Declare ``--golden`` and ``--zoo``; twice is once."""
    for name, content in _OPTIONS.items():
        try:
            parser.addoption(
                f"--{name}", metavar="DIR", help=f"folder of {content} (default: ../shared/{name} if there)"
            )
        except ValueError:  # pytest's word for an option that is there already
            continue


def pytest_addoption(parser: pytest.Parser) -> None:
    """Only in this checkout; other projects' options are their own."""
    if _is_checkout(Path.cwd()):
        add_options(parser)


def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Start over with this checkout's configuration, where a folder given to an option has led pytest away from it."""
    import pytest

    root = config.invocation_params.dir
    led_away = any(config.getoption(name, None) for name in _OPTIONS) and config.inipath != root / "pyproject.toml"
    if not _is_checkout(root) or not led_away or config.getoption("inifilename"):
        return None
    return pytest.main(["-c", str(root / "pyproject.toml"), *config.invocation_params.args])


def _is_checkout(folder: Path) -> bool:
    """Whether ``folder`` is the root of fewstep's own tree."""
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"]
    except (OSError, ValueError, KeyError, TypeError):  # no such file, or one that is none of ours
        return False
    return project == "fewstep" and (folder / "tests" / "golden" / "test_golden.py").is_file()
