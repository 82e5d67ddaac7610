"""What a DisBack run is told (:mod:`fewstep.trainers.disback`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fewstep.errors import UserError
from fewstep.trainers._dmd2_config import Dmd2Config

#: Nodes of the published path.
NODES = 10


@dataclass(kw_only=True)
class DisbackConfig(Dmd2Config):
    """DisBack (arXiv 2408.15991); what it is told of distribution matching is DMD2's.

    Args:
        degradation_steps: first steps, in which the critic alone is trained, on what the student makes before any
            distillation; default a tenth of all (paper: 1000 of SDXL's about 11000). 0 is DMD2.
        record_steps: after which of them the critic is kept as a node of the path, ascending, the last one after all of
            them; default ten at equal distances (paper: every 100).
        node_steps: training steps with each node as the target, before the teacher is it (paper: 1000); default equal
            shares of nodes and teacher.
        node_guidance_scale: guidance of a node where it is the target; default the teacher's.
        recorded: the path is that of --init's run, which has to have as many nodes: nothing is recorded here, and the
            first step has the first node as its target.
    """

    degradation_steps: int | None = None
    record_steps: list[int] | None = None
    node_steps: int | None = None
    node_guidance_scale: float | None = None
    recorded: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_negative("degradation_steps", "node_guidance_scale")
        steps, path = self.of_degradation, self.path
        if any(a >= b for a, b in zip([0, *path], path, strict=False)) or (path[-1] if path else 0) != steps:
            raise UserError(
                f"--record_steps {path} must ascend from 1 or more to the last of --degradation_steps {steps}"
            )
        if not path:
            names = ("record_steps", "node_steps", "node_guidance_scale")
            self._refuse_set("belongs to a path: give --degradation_steps, or leave it out", *names)
        if self.recorded and (self.init is None or not path):
            raise UserError("--recorded takes the path of another run: give that run as --init, and its --record_steps")
        if self.node_steps is not None:
            self._refuse_below_one("node_steps")
        self._refuse_short()

    def _refuse_short(self) -> None:
        left = self.max_steps - self.degradation
        if left == 0 and not self.recorded:
            return  # a run that records the path, and nothing else
        if left <= self.of_each * (len(self.path) - 1) or (self.path and self.of_each < 1):
            raise UserError(
                f"--max_steps {self.max_steps} end before the teacher is the target: give more, fewer "
                "--degradation_steps, shorter --node_steps or fewer --record_steps (or as many as --degradation_steps, "
                "to record a path alone)"
            )

    def consequences(self) -> dict[str, Any]:
        """The path: a run that is to go on with more steps is told the one that it had."""
        own: dict[str, Any] = {"degradation_steps": self.of_degradation}
        if self.path:
            own |= {"record_steps": self.path, "node_steps": self.of_each}
        return super().consequences() | own

    @property
    def of_degradation(self) -> int:
        """Steps of the run that records the path."""
        return max(1, self.max_steps // 10) if self.degradation_steps is None else self.degradation_steps

    @property
    def degradation(self) -> int:
        """Steps of this run in which the critic alone is trained."""
        return 0 if self.recorded else self.of_degradation

    @property
    def path(self) -> list[int]:
        """The steps after which nodes are kept, from the teacher's side to the student's."""
        if self.record_steps is not None:
            return self.record_steps
        steps = self.of_degradation
        return sorted({max(1, round(steps * k / NODES)) for k in range(1, NODES + 1)} if steps else set())

    @property
    def of_each(self) -> int:
        """Training steps with each node as the target; the last node is where the critic starts, and no target."""
        if self.node_steps is not None:
            return self.node_steps
        return max(0, self.max_steps - self.degradation) // max(1, len(self.path))
