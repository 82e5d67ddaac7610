"""What the commands' parsers share: errors in one line, switches that may stand alone, lists of step counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NoReturn

from jsonargparse import ArgumentParser, Namespace

from fewstep.errors import UserError


class Parser(ArgumentParser):
    """A parser whose errors are one line and exit code 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(" ".join(str(message).split()))


def parse(parser: ArgumentParser, words: Sequence[str]) -> Namespace:
    """What ``words`` say, by ``parser``.

    Raises:
        UserError: they do not fit, or the file of ``--config`` is not text.
    """
    try:
        return parser.parse_args(list(words))
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
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"{flag} takes step counts such as 1,2,4, not {text!r}") from error
