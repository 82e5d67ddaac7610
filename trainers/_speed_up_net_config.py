"""What a SpeedUpNet run is told (:mod:`fewstep.trainers.speed_up_net`)."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.config.guidance import DrawnGuidanceConfig
from fewstep.config.pairs import PairsWanted
from fewstep.config.teacher_pairs import TeacherPairsConfig
from fewstep.diffusion.ode import SOLVERS
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.errors import UserError
from fewstep.losses.consistency import DISTANCES


@dataclass(kw_only=True)
class SpeedUpNetConfig(DrawnGuidanceConfig, TeacherPairsConfig):
    """SpeedUpNet (arXiv 2312.08887).

    Args:
        solver_steps: steps of the guided teacher's ODE in one of the student's (4 of the student for 25: 6).
        solver: of that ODE: euler (DDIM for tables) or heun (twice the network calls).
        offset_weight: of the distance to what the guided teacher says of the same sample.
        consistency_weight: of the distance to where its steps lead.
        negative_share: share of the samples whose negative prompt is another prompt of the run in the place of the
            usual one; with the negatives that a user may name, the adapter has seen some. None where samples are told
            pictures.
        distance: of velocities: mse, l1, l2_norm or l2_norm_squared.
        lora_rank: of what is added to the network's own keys and values, for the adapter's; 0: keys and values of the
            adapter's own, which begin as those. The network itself is never trained.
        renoise: the student walks by an ODE; there is no other choice.
    """

    solver_steps: int = 6
    solver: str = "euler"
    offset_weight: float = 1.0
    consistency_weight: float = 1.0
    negative_share: float = 0.5
    distance: str = "mse"
    lr: float = 1e-4
    renoise: str = "ode"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_below_one("solver_steps")
        self._refuse_negative("offset_weight", "consistency_weight")
        self._refuse_unknown("solver", *SOLVERS)
        self._refuse_unknown("distance", *(kind for kind in DISTANCES if "huber" not in kind))
        if not self.offset_weight and not self.consistency_weight:
            raise UserError("--offset_weight and --consistency_weight are both 0, so there is nothing to train")
        if not self.consistency_weight:
            self._refuse_set(
                "belongs to the consistency, which --consistency_weight 0 leaves out", "solver", "solver_steps"
            )
        if not 0 <= self.negative_share <= 1:
            raise UserError(f"--negative_share must be in [0, 1], not {self.negative_share}")
        if self.renoise != "ode":
            raise UserError(f"--renoise must be ode for SpeedUpNet, not {self.renoise!r}")
        if self.merge or self.full_critic:
            raise UserError("--merge and --full_critic are of adapters that weights take up, which this one is not")
        if self.quantization is not None or self.sharding != "none":
            what = "quantization" if self.quantization is not None else "sharding"
            raise UserError(f"--{what} is not for SpeedUpNet, whose network is frozen and whole; leave it out")
        self._refuse_data_beside_pairs()
        if self.guidance_range is not None:
            self._refuse_set("is drawn from --guidance_min to --guidance_max", "guidance_scale")

    @property
    def asked_calls(self) -> int:
        """How often the teacher is asked about a sample, unguided: all of its steps, or the first alone."""
        return self.solver_steps * {"euler": 1, "heun": 2}[self.solver] if self.consistency_weight else 1

    @property
    def pairs_wanted(self) -> PairsWanted | None:
        return None if self.data is not None else self._samples_wanted(guided=True)

    def refuse_teacher(self, schedule: NoiseSchedule, top: float, scale: object) -> None:
        """Raise ``UserError`` for a teacher that is not guided at its ``scale``, or whose table has too few times."""
        if self.guidance_range is None and scale == 1.0:
            raise UserError(
                "SpeedUpNet's adapter stands for guidance, and --guidance_scale 1 is none: give a higher one, or "
                "--guidance_min and --guidance_max"
            )
        if schedule.num_train_timesteps is None:
            return
        entries = round(top * schedule.num_train_timesteps)
        if self.steps * self.solver_steps > entries:
            raise UserError(
                f"--solver_steps {self.solver_steps} in each of {self.steps} steps are more than the {entries} times "
                "of the teacher's table; take fewer"
            )
