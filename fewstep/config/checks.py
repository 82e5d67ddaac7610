"""Checks that all settings share: a value that cannot be meant is refused by the name of its flag."""

from __future__ import annotations

import math

from fewstep.errors import UserError


class Settings:
    """Base of the dataclasses that the command line fills; every check raises :class:`UserError`."""

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

    def _refuse_not_finite(self, *names: str) -> None:
        """Settings that must be numbers of any sign, where they are set."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise UserError(f"--{name} must be a number, not {value}")

    def _refuse_unknown(self, name: str, *known: str) -> None:
        """A setting that must be one of these words."""
        if getattr(self, name) not in known:
            raise UserError(f"--{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")

    def _refuse_set(self, reason: str, *names: str) -> None:
        """Settings that must be left at None, which stands for what goes without saying."""
        for name in names:
            if getattr(self, name) is not None:
                raise UserError(f"leave out --{name}: it {reason}")
