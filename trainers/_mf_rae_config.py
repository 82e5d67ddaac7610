"""What an MF-RAE run is told (:mod:`fewstep.trainers.mf_rae`)."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

from fewstep.config.pairs import PairsWanted
from fewstep.config.stages import read_stages
from fewstep.diffusion.ode import SOLVERS
from fewstep.diffusion.trajectories import LABEL_TIMES
from fewstep.errors import UserError
from fewstep.trainers._mean_flow_config import MeanFlowConfig

#: In their order.
STAGES = ("cmt", "mfd", "mft")


@dataclass(kw_only=True)
class MfRaeConfig(MeanFlowConfig):
    """MF-RAE (arXiv 2511.13019).

    Args:
        stages: which there are, each with its number of steps but the last, which lasts until --max_steps: cmt
            (mid-training on the teacher's trajectories), mfd (its velocity), mft (that of --data); default cmt for a
            fifth of --max_steps, then mfd.
        walk_steps: cmt: steps of the teacher's ODE (paper: 16).
        walk_solver: and its solver, euler or heun.
        pairs_per_walk: cmt: samples of a micro-batch that share one walk (paper: 64 at 256 pixels, 8 at 512).
        label_times: cmt: what times the states of a walk are told to be at: solver_times, or uniform_grid as in the
            released code, which does not meet the states of a shifted walk.
        cmt_distance: mse or l1.
        times: uniform, as in the paper, or logit_normal.
        time_max: highest uniform time, before the shift.
        time_shift: of all times; default the root of the sample's entries / 4096, at least 1 (768x16x16: 6.93).
        derivative: as for mean_flow.
        weighting: as for mean_flow (paper: sum_squared, with power 1).
    """

    stages: str | None = None
    walk_steps: int = 16
    walk_solver: str = "euler"
    pairs_per_walk: int = 8
    label_times: str = "solver_times"
    cmt_distance: str = "mse"
    times: str = "uniform"
    time_max: float = 0.999
    time_shift: float | None = None
    derivative: str = "central"
    weighting: str = "sum_squared"

    def __post_init__(self) -> None:
        if self.variant != "mean_flow":
            raise UserError(
                f"--variant {self.variant} belongs to mean_flow; mf_rae learns the identity by its stages (files of "
                "the teacher: --teacher_variant)"
            )
        if self.velocity != "auto":
            raise UserError("leave out --velocity: mfd learns the teacher's, mft that of --data")
        super().__post_init__()
        self._refuse_unknown("walk_solver", *SOLVERS)
        self._refuse_unknown("label_times", *LABEL_TIMES)
        self._refuse_unknown("cmt_distance", "mse", "l1")
        self._refuse_below_one("walk_steps", "pairs_per_walk")
        starts = self.starts()
        if "mft" in starts and self.data is None:
            raise UserError("stage mft learns from real images: give --data, or leave it out of --stages")
        if "cmt" not in starts:
            names = ("walk_solver", "label_times", "cmt_distance")
            self._refuse_set("belongs to stage cmt: add it to --stages", *names)
        if "mft" not in starts and (self.kappa is not None or self.omega is not None):
            raise UserError("--kappa and --omega are the guidance of stage mft: add it to --stages, or leave them out")

    def consequences(self) -> dict[str, Any]:
        """As in MeanFlow; whose velocity is averaged is the stage's to say."""
        return {name: value for name, value in super().consequences().items() if name != "velocity"}

    def starts(self) -> dict[str, int]:
        """The first step of each stage, in their order.

        Raises:
            UserError: the stages are none, in another order, or one of them has no step.
        """
        if self.stages is None:
            return {"cmt": 0, "mfd": self.max_steps // 5} if self.max_steps >= 5 else {"mfd": 0}
        return read_stages(self.stages, STAGES, self.max_steps, "cmt:2000,mfd:8000,mft")

    def stage_at(self, step: int) -> tuple[str, int]:
        """The stage of a step, and the first step of that stage."""
        return next((name, first) for name, first in reversed(self.starts().items()) if first <= step)

    def of_stage(self, stage: str, entries: int) -> MeanFlowConfig:
        """MeanFlow's settings in a stage; ``entries``: those of a sample."""
        settings = copy.copy(self.resolved())
        own = {"velocity": "teacher", "kappa": None, "omega": None} if stage == "mfd" else {"velocity": "data"}
        shift = max(1.0, math.sqrt(entries / 4096)) if self.time_shift is None else self.time_shift
        vars(settings).update({**own, "time_shift": shift})
        return settings

    @property
    def pairs_wanted(self) -> PairsWanted | None:
        return super().pairs_wanted if "mfd" in self.starts() else None

    @property
    def follows_max_steps(self) -> bool:
        """Where the stages are not given."""
        return self.stages is None

    @property
    def couples_samples(self) -> bool:
        """Those that share a walk."""
        return self.pairs_per_walk > 1 and "cmt" in self.starts()

    @property
    def differentiates(self) -> bool:
        """Whether any step takes the exact derivative."""
        return super().differentiates and list(self.starts()) != ["cmt"]
