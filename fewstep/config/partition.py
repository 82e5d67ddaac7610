"""Which part of its prompts or labels a run trains for, of a method whose students share them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PartitionWanted:
    """How conditions are divided among several students, and which of these is trained.

    Attributes:
        students: how many there are.
        by: ``consecutive``, ``clusters`` or ``lists``.
        lists: of ``lists``: the labels of each student, or its file of prompts.
        only: the student that the run trains, from 1; None for all of them, one after the other.
        seed: of the clusters.
    """

    students: int
    by: str
    lists: tuple[str, ...] = ()
    only: int | None = None
    seed: int = 0

    @property
    def runs(self) -> int:
        """How many trainings the run consists of."""
        return self.students if self.only is None else 1
