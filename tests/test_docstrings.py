"""The functions that everything is written in say which shapes they take and give."""

import importlib
import inspect
import pkgutil
import re

import pytest

import fewstep.losses

MODULES = (
    "fewstep.diffusion.schedule",
    "fewstep.diffusion.prediction",
    *(f"fewstep.losses.{module.name}" for module in pkgutil.iter_modules(fewstep.losses.__path__)),
)


def public_functions(module_name: str) -> list[tuple[str, object]]:
    """Functions and methods that take or give tensors."""
    module = importlib.import_module(module_name)
    found: list[tuple[str, object]] = []
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module_name:
            continue
        if inspect.isfunction(value):
            found.append((name, value))
        elif inspect.isclass(value):
            methods = inspect.getmembers(value, inspect.isfunction)
            own = [(method, function) for method, function in methods if function.__module__ == module_name]
            found += [(f"{name}.{method}", function) for method, function in own if not method.startswith("_")]
    return [(name, function) for name, function in found if "Tensor" in str(inspect.signature(function))]


@pytest.mark.parametrize("module_name", MODULES)
def test_every_public_function_says_its_shapes(module_name: str):
    functions = public_functions(module_name)
    assert functions
    silent = []
    for name, function in functions:
        owner = getattr(importlib.import_module(module_name), name.partition(".")[0])
        # A schedule's method may leave the words to the abstract one that it implements.
        text = inspect.getdoc(getattr(owner, name.partition(".")[2])) if "." in name else inspect.getdoc(function)
        if not re.search(r"\((B|K|N)?,|\(\)|\(B\)", text or ""):
            silent.append(name)
    assert not silent, f"{module_name}: no shape in the docstrings of {', '.join(silent)}"
