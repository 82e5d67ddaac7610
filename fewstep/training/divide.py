"""Where a network can be divided into units whose weights come and go together, found by watching one pass of it.

A unit is a module that is called, so that it is known when its weights are needed. The family is of no importance: the
units are the largest modules that are small beside the network, and whatever is called while the unit that it lies in
is not (DiT's embedding of time and label lies in its first block and is asked again behind the last one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from fewstep.recording.watch.hooks import hooked

#: A unit is no larger than one part in so many of its network; a block that the network's class names as one, in fewer.
_PARTS, _PARTS_OF_BLOCKS = 16, 2

#: Module name -> the names of the modules that were running when it was called, once for each call.
Calls = dict[str, list[frozenset[str]]]


def watch(network: nn.Module, run: Callable[[], Any]) -> Calls:
    """What ``run`` calls of a network's modules; the network itself has the name ""."""
    calls: Calls = {}
    running: list[str] = []

    def begin(name: str, *_: Any) -> None:
        calls.setdefault(name, []).append(frozenset(running))
        running.append(name)

    def end(*_: Any) -> None:
        running.pop()

    with hooked(dict(network.named_modules()), before=begin, after=end):
        run()
    return calls


def divide(network: nn.Module, calls: Calls) -> list[str]:
    """The names of a network's units, inner ones first, the network itself ("") last.

    Args:
        network: whole, as it was watched.
        calls: from :func:`watch`.
    """
    blocks = _blocks(network)
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in network.named_modules()}
    units: set[str] = set()

    def divide_below(name: str, module: nn.Module) -> None:
        for child_name, child in module.named_children():
            path = f"{name}.{child_name}" if name else child_name
            parts = _PARTS_OF_BLOCKS if child in blocks else _PARTS
            if path in calls and sizes.get(path, 0) * parts <= sizes[""]:
                units.add(path)
                continue
            divide_below(path, child)
            if path in calls and _has_more(child, path, units):
                units.add(path)

    divide_below("", network)
    units.discard("")
    for name in sizes:  # parents come first
        own = _unit_of(name, units)
        if name and name not in units and sizes[name] and own and any(own not in call for call in calls.get(name, ())):
            units.add(name)
    # In the network's own order: a set's would be another one on every process, and so would the collectives'.
    used = [name for name in sizes if name in units and sizes[name]]
    return [*sorted(used, key=lambda name: -name.count(".")), ""]


def tied(network: nn.Module, units: list[str]) -> list[nn.Parameter]:
    """The parameters that modules of several units share."""
    owners: dict[int, set[str]] = {}
    found: dict[int, nn.Parameter] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        owner = name.rpartition(".")[0]
        owners.setdefault(id(parameter), set()).add(owner if owner in units else _unit_of(owner, set(units)))
        found[id(parameter)] = parameter
    return [found[key] for key, of in owners.items() if len(of) > 1]


def _blocks(network: nn.Module) -> set[nn.Module]:
    """The modules that a network's class does not want split, those that hold others of them apart."""
    names = set(getattr(network, "_no_split_modules", None) or ())
    found = {module for module in network.modules() if type(module).__name__ in names}
    return {module for module in found if not any(inner in found for inner in module.modules() if inner is not module)}


def _has_more(module: nn.Module, path: str, units: set[str]) -> bool:
    """Whether a module has parameters outside of its units."""
    names = (f"{path}.{name}" for name, _ in module.named_parameters())
    return any(not any(name.startswith(f"{unit}.") for unit in units) for name in names)


def _unit_of(name: str, units: set[str]) -> str:
    """The innermost unit that a module lies in, "" for none but the network."""
    return next((parent for parent in _parents(name) if parent in units), "")


def _parents(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name
