"""Reading JSON and YAML that somebody else wrote: of bounded size and depth, each name once, and nothing that is run.

A file that nests a thousand lists stops a parser at Python's own limit, and one whose aliases repeat each other fills
the memory when somebody looks at it. Here both are a ``ValueError`` that says so, as is any other text that is none.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import yaml

#: The type, or types, of each value of a table by its name.
Kinds = Mapping[str, type | tuple[type, ...]]

_MOST_BYTES = 2**28  # of a file: the largest of ours, an index of a million shards, has half of it
_MOST_LEVELS = 100  # lists and tables inside each other
_MOST_NODES = 10**6  # of a YAML text once its aliases are followed


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, is too large, nests too deep, or has a name twice in one table.
    """
    return parse_json(_text(path))


def parse_json(text: str) -> Any:
    """What a JSON text holds; errors as :func:`read_json`."""
    try:
        value = json.loads(text, object_pairs_hook=_table)
    except RecursionError as error:
        raise ValueError("it nests too deep") from error
    _refuse_deep(value)
    return value


def read_yaml(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no YAML, names a type of Python, is too large or nests too deep, also by its aliases, or has a
            name twice in one table.
    """
    text = _text(path)
    try:
        check_yaml(text)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def check_yaml(text: str) -> None:
    """Raise ``yaml.YAMLError`` for a YAML text that nests too deep, grows too large, or has a name twice in a table."""
    open_nodes: list[_Open] = []
    sizes: dict[str, int] = {}
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append(_Open(event.anchor, isinstance(event, yaml.MappingStartEvent)))
            if len(open_nodes) > _MOST_LEVELS:
                raise yaml.YAMLError("it nests too deep")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            node = open_nodes.pop()
            size, anchor = node.size, node.anchor
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:  # it is unknown, or its node is still open: a list that holds itself
                raise yaml.YAMLError(f"its alias {event.anchor} stands for nothing, or for what it lies in")
            size, anchor = sizes[event.anchor], None
        elif isinstance(event, yaml.ScalarEvent):
            size, anchor = 1, event.anchor
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        if size > _MOST_NODES:
            raise yaml.YAMLError("its aliases grow too large")
        if open_nodes:
            open_nodes[-1].take(size, event.value if isinstance(event, yaml.ScalarEvent) else None)


@dataclass
class _Open:
    """A list or a table of a YAML text whose end was not seen yet."""

    anchor: str | None
    is_table: bool
    size: int = 1
    names: set[str] = field(default_factory=set)
    name_next: bool = True

    def take(self, size: int, text: str | None) -> None:
        """A node inside it, with the number of nodes that it stands for; ``text``: of a scalar."""
        self.size += size
        if not self.is_table:
            return
        if self.name_next and text is not None and text != "<<":  # which merges tables, and may do so again
            if text in self.names:
                raise yaml.YAMLError(f"{text!r} is there twice")
            self.names.add(text)
        self.name_next = not self.name_next


def inside(folder: Path, name: Any) -> Path:
    """The path of a file that another file names, below its folder.

    Raises:
        ValueError: it is no name, or leads out of the folder.
    """
    path = PurePath(name) if isinstance(name, str) else PurePath()
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in str(path):
        raise ValueError(f"{name!r} is no file in this folder")
    return folder / path


def misfit(table: Any, kinds: Kinds, optional: Iterable[str] = ()) -> str | None:
    """What of a table is not as it should be, in words; None where all is.

    Args:
        table: what a file holds.
        kinds: the type of each value that has to be there, by its name; a whole number is no bool.
        optional: the names that may be absent.
    """
    if not isinstance(table, dict):
        return "it is no table"
    may_lack = set(optional)
    for name, kind in kinds.items():
        if name not in table:
            if name not in may_lack:
                return f"it has no {name}"
            continue
        value = table[name]
        allowed = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            return f"its {name} is no {' or '.join(_WORDS.get(one, one.__name__) for one in allowed)}"
    return None


_WORDS = {dict: "table", list: "list", str: "text", int: "whole number", float: "number", type(None): "null"}


def _text(path: Path) -> str:
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES} bytes")
    return path.read_text(encoding="utf-8")


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} is there twice")
    return table


def _refuse_deep(value: Any) -> None:
    layer = [value]
    for _ in range(_MOST_LEVELS + 1):
        layer = [child for node in layer for child in _inside(node)]
    if layer:
        raise ValueError("it nests too deep")


def _inside(node: Any) -> Iterable[Any]:
    """The lists and tables among what a list or a table holds."""
    children: Iterable[Any] = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return (child for child in children if isinstance(child, dict | list))
