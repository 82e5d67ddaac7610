"""What all settings share: of which kind each is, and checks that refuse by the flag's name what cannot be meant."""

from __future__ import annotations

from dataclasses import MISSING, field, fields
from typing import Any, Literal, TypeVar, get_args

from fewstep.config.values import refuse_misfits
from fewstep.errors import UserError

#: What a setting is about. It decides what a resumed run may change, what is published with a student, and what makes
#: an evaluated cell stale:
#:
#: - result: what the student comes to be; every plain field is of this kind
#: - source: where an input of the run lies, which says something of a machine
#: - length: how long the student is trained
#: - export: in which forms the student is written
#: - watching: how often a run is logged, pictured and kept
#: - machine: where a run is made and what becomes of it
Kind = Literal["result", "source", "length", "export", "watching", "machine"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Value = TypeVar("Value")


def setting(kind: Kind, default: Any = MISSING) -> Any:
    """A field of a dataclass of settings, where it is of another kind than ``result``."""
    return field(default=default, metadata={"kind": kind})


def names_of(config_class: type, *kinds: Kind) -> frozenset[str]:
    """The settings of these kinds in a dataclass of settings."""
    return frozenset(one.name for one in fields(config_class) if one.metadata.get("kind", "result") in kinds)


def settled(value: Value | None) -> Value:
    """A setting that may be left out, once :meth:`fewstep.config.run.RunConfig.resolved` has filled it in.

    Raises:
        ValueError: it is not there: the settings were not resolved.
    """
    if value is None:
        raise ValueError("this setting follows from others: resolve the settings first")
    return value


class Settings:
    """Base of the dataclasses that the command line fills; every check raises :class:`UserError`."""

    def _refuse_misfits(self, *required: str) -> None:
        """Values of another type than their settings', numbers that are none or too large, texts that no file holds.

        Those that are ``required`` must not be empty where they are given.
        """
        refuse_misfits(self, frozenset(required))

    def _refuse_below_one(self, *names: str) -> None:
        """Settings that must be numbers of at least 1, where they are set."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, not {value}")

    def _refuse_negative(self, *names: str) -> None:
        """Settings that must be numbers of at least 0, where they are set."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not value >= 0:  # so that not-a-number is refused too
                raise UserError(f"--{name} must not be negative, and it is {value}")

    def _refuse_not_positive(self, *names: str) -> None:
        """Settings that must be numbers above 0, where they are set."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name} must be positive, not {value}")

    def _refuse_unknown(self, name: str, *known: str) -> None:
        """A setting that must be one of these words."""
        if getattr(self, name) not in known:
            raise UserError(f"--{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")

    def _refuse_set(self, reason: str, *names: str) -> None:
        """Settings that must be left at their defaults, as they would change nothing."""
        defaults = {one.name: one.default for one in fields(type(self))}  # type: ignore[arg-type]
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise UserError(f"leave out --{name}: it {reason}")
