"""What the commands' parsers share: errors in one line, switches that may stand alone, lists of step counts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader

from fewstep.config.values import MOST, number_within, shown, takes
from fewstep.errors import UserError
from fewstep.reading import check_yaml

_LONGEST = 500  # characters of a message that quotes what was given


#: The name of the reader of :class:`Parser`.
_MODE = "fewstep"
#: How jsonargparse begins and ends its words on a value that does not fit, and the types that it lists between.
_MISFIT = re.compile(r'^Parser key "([\w.]+)":\s(.*)(?:Got|Given) value: ?(.*)$', re.S)
_EXPECTED = re.compile(r"Expected (?:a )?<class '(\w+)'>")
_KINDS: dict[str, type] = {kind.__name__: kind for kind in (int, float, str, bool, dict, list)}


def _load(text: str) -> Any:
    """The value of a flag, or the content of a ``--config`` file, where it is bounded YAML."""
    check_yaml(text)
    return get_loader("yaml")(text)


set_loader(_MODE, _load, (yaml.YAMLError,))


class Parser(ArgumentParser):
    """A parser whose errors are one line and exit code 2, and which reads no YAML that is out of all bounds."""

    def __init__(self, **words: Any) -> None:
        super().__init__(parser_mode=_MODE, **words)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if (found := _MISFIT.match(str(message))) is not None:
            kinds = [_KINDS[name] for name in dict.fromkeys(_EXPECTED.findall(found[2])) if name in _KINDS]
            if kinds:
                value = "null" if found[3] == "None" else shown(found[3])
                raise UserError(f"--{found[1]} takes {takes(kinds)}, not {value}")
        said, _, _ = str(message).partition("; use sys.set_int_max_str_digits")  # which no flag can do
        raise UserError(" ".join(said.split())[:_LONGEST])


def parse(parser: ArgumentParser, words: Sequence[str], *, defaults: bool = True) -> Namespace:
    """What ``words`` say, by ``parser``.

    Args:
        parser: that knows the flags.
        words: of the command line.
        defaults: also the values of flags that were not given.

    Raises:
        UserError: they do not fit, or the file of ``--config`` is not text.
    """
    try:
        return parser.parse_args(list(words), defaults=defaults)
    except UnicodeDecodeError as error:
        raise UserError("the file of --config is not UTF-8 text") from error


def with_values(words: Sequence[str], switches: type | set[str]) -> list[str]:
    """Give a bare ``--resume`` its value: switches may stand alone, as everywhere in the Hugging Face world.

    Args:
        words: of the command line.
        switches: their names, or a dataclass whose bool fields they are.
    """
    if isinstance(switches, type):
        switches = {field.name for field in dataclasses.fields(switches) if field.type in ("bool", bool)}
    full: list[str] = []
    for word, following in zip(words, [*words[1:], "--"]):
        full.append(word)
        if word.startswith("--") and word[2:] in switches and following.startswith("-"):
            full.append("true")
    return full


def step_counts(flag: str, text: str) -> tuple[int, ...]:
    """``1,2,4`` as numbers.

    Raises:
        UserError: it is no such list; ``flag`` is named.
    """
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"{flag} takes step counts such as 1,2,4, not {shown(text)}") from error
    return tuple(number_within(f"a count of {flag}", count, MOST["steps"]) for count in counts)
