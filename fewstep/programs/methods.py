"""The methods that there are: each file of ``fewstep.trainers`` holds one, but for those that begin with ``_``."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from fewstep.errors import UserError


def methods() -> list[str]:
    """The names of all methods: the files of ``fewstep.trainers``."""
    package = importlib.import_module("fewstep.trainers")
    names = (module.name for module in pkgutil.iter_modules(package.__path__))
    return sorted(name for name in names if not name.startswith("_"))


def method_class(name: str) -> type[Any]:
    """The class of a method, by the name of its file. It has `Config`, the class of its settings.

    Raises:
        UserError: there is no such method.
    """
    if name not in methods():
        raise UserError(f"there is no method {name!r}; there are: {', '.join(methods())}")
    module = importlib.import_module(f"fewstep.trainers.{name}")
    return next(c for c in vars(module).values() if hasattr(c, "turns") and c.__module__ == module.__name__)
