"""What one of a report's numbers is: how it reads, what it was made with, and what its floor is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

#: Groups whose numbers are Fréchet distances: none of them stands without its floor, or why it has none.
FRECHET = ("fd_test", "fd", "fid", "fd_dino", "fd_infinity", "patch_fid")

# What a format may be: a file's own text would else reach into Python, or print a number of a million digits.
_FORMAT = re.compile(r"\{:,?\.[0-9][efg%]\}")


@dataclass(frozen=True)
class Measure:
    """What the numbers of one name in ``Report.rows[...]["metrics"]`` are.

    Attributes:
        title: of its column.
        group: as ``--metrics`` calls what makes it.
        format: how a number is printed, such as "{:.3f}".
        better: "lower", "higher", "near" (to the teacher's), or None where it says nothing of quality.
        extractor: name of the network whose features it compares, or None.
        scorer: name of what gives every sample a number, or None.
        weights_sha256: of the extractor's or scorer's file; None where it has no weights.
        verified: whether that is a published hash; True without weights.
        resize: what happens to a picture before the network sees it, in words.
        reference: what the samples are compared with, in words.
        n_ref: how many samples that are.
        floor: what it is for samples that could not be better, such as real images against real images.
        floor_of: what the floor was measured on, in words; without a floor, why there is none.
    """

    title: str
    group: str
    format: str = "{:.3f}"
    better: Literal["lower", "higher", "near"] | None = None
    extractor: str | None = None
    scorer: str | None = None
    weights_sha256: str | None = None
    verified: bool = True
    resize: str | None = None
    reference: str | None = None
    n_ref: int | None = None
    floor: float | None = None
    floor_of: str | None = None

    def problem(self) -> str | None:
        """What of it cannot be, in words; None where all can."""
        if not self.title.strip() or not self.group:
            return "has no title or no group"
        if _FORMAT.fullmatch(self.format) is None:
            return f"has the format {self.format!r}, which is not of the form {{:.3f}}"
        if self.better not in ("lower", "higher", "near", None):
            return f"is better {self.better!r}: that is lower, higher, near or null"
        if self.floor is not None and self.floor_of is None:
            return "does not say what its floor was measured on"
        if self.group in FRECHET and self.floor_of is None:
            return "is a Fréchet distance with neither a floor nor a reason why it has none"
        if self.weights_sha256 is not None and re.fullmatch("[0-9a-f]{4,64}", self.weights_sha256) is None:
            return "has a weights_sha256 that is no hexadecimal number"
        return None

    @property
    def has_floor(self) -> bool:
        """Whether a floor belongs beside it, be it known or not."""
        return self.floor_of is not None

    @property
    def heading(self) -> str:
        """The title, marked where the weights are not known by a published hash."""
        return self.title if self.verified else f"{self.title} †"

    def printed(self, value: float, spread: float | None = None) -> str:
        """A number, with its standard error where it is known."""
        beside = "" if spread is None else f" ±{self.format.format(spread)}"
        return self.format.format(value) + beside

    @property
    def made_with(self) -> str:
        """Extractor or scorer with weights and resize, and the reference, in words."""
        words = self.extractor or self.scorer or "no network"
        inner = [f"weights sha256 {self.weights_sha256[:12]}"] if self.weights_sha256 else []
        inner += [f"resize {self.resize}"] if self.resize else []
        words += f" ({', '.join(inner)})" if inner else ""
        if self.reference is not None:
            words += f" against {self.reference}"
            words += f", n = {self.n_ref:,}" if self.n_ref is not None else ""
        return words
