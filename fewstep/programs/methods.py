"""The methods that there are: each file of ``fewstep.trainers`` holds one, but for those that begin with ``_``."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
from pathlib import Path
from typing import Any

from fewstep.errors import UserError


def methods() -> list[str]:
    """The names of all methods: the files of ``fewstep.trainers``."""
    package = importlib.import_module("fewstep.trainers")
    names = (module.name for module in pkgutil.iter_modules(package.__path__))
    return sorted(name for name in names if not name.startswith("_"))


def in_one_line(name: str) -> str:
    """What a method is: the first line of its file, which is not imported for it."""
    spec = importlib.util.find_spec(f"fewstep.trainers.{name}")
    assert spec is not None and spec.origin is not None, name
    said = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8")))
    assert said, name
    return said.splitlines()[0]


def method_class(name: str) -> type[Any]:
    """The class of a method, by the name of its file. It has `Config`, the class of its settings.

    Raises:
        UserError: there is no such method.
    """
    if name not in methods():
        raise UserError(f"there is no method {name!r}; there are: {', '.join(methods())}")
    module = importlib.import_module(f"fewstep.trainers.{name}")
    return next(c for c in vars(module).values() if hasattr(c, "turns") and c.__module__ == module.__name__)
