"""What a run of continuous-time consistency is told (:mod:`fewstep.trainers.continuous_consistency`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fewstep.config.checks import setting, settled
from fewstep.config.critic import ScoreConfig
from fewstep.config.pairs import PairsWanted
from fewstep.config.teacher_pairs import TeacherPairsConfig
from fewstep.errors import UserError
from fewstep.losses.consistency import DISTANCES, WEIGHTINGS
from fewstep.losses.trig_flow import NORMALIZATIONS
from fewstep.networks.trig_flow import DERIVATIVES

#: The papers' choices by variant.
PAPERS: dict[str, dict[str, Any]] = {
    "scm": {
        "weighting": "1/sigma",
        "log_variance": True,
        "level_mean": -1.0,
        "level_std": 1.4,
        "tangent_normalization": "norm/sqrt(dim)",
        "tangent_warmup": 10000,
        "consistency_weight": 1.0,
        "matching_weight": 0.0,
    },
    "rcm": {
        "weighting": "uniform",
        "log_variance": False,
        "level_mean": 0.7,
        "level_std": 1.6,
        "tangent_normalization": "norm",
        "tangent_warmup": 1000,
        "consistency_weight": 100.0,
        "matching_weight": 1.0,
    },
    "tcm": {
        "weighting": "1/(t-r)",
        "log_variance": False,
        "level_mean": 0.0,
        "level_std": 0.2,
        "consistency_weight": 1.0,
        "matching_weight": 0.0,
    },
}
#: What only some variants know, and which these are; what recipes say of rCM's critic may stand beside any.
_OWN = {
    "velocity": ("scm", "rcm"),
    "pairs": ("scm", "rcm"),
    "sigma_data": ("scm", "rcm"),
    "tangent_normalization": ("scm", "rcm"),
    "tangent_warmup": ("scm", "rcm"),
    "matching_first_step": ("rcm",),
    "normalizer_min": ("rcm",),
    "derivative": ("scm", "rcm"),
    "derivative_step": ("scm", "rcm"),
    "tangent_constant": ("scm", "rcm"),
    "transition": ("tcm",),
    "gap": ("tcm",),
    "mapping_k": ("tcm",),
    "mapping_b": ("tcm",),
    "boundary_share": ("tcm",),
    "boundary_weight": ("tcm",),
    "distance": ("tcm",),
    "huber_c": ("tcm",),
}


@dataclass(kw_only=True)
class ContinuousConsistencyConfig(ScoreConfig, TeacherPairsConfig):
    """Continuous-time consistency: sCM, rCM and the second stage of TCM.

    Args:
        variant: scm, rcm (scm with distribution matching beside it) or tcm (the second, truncated stage of a
            consistency model, whose first is that of --init); what is not given is as in its paper.
        teacher_variant: of the teacher's weights, such as fp16; what other methods call --variant.
        velocity: of the trajectories: teacher (guided; distillation), data (noise and a real image; training), or auto:
            teacher.
        sigma_data: TrigFlow's standard deviation of data and noise; default an EDM teacher's own, else 1.
        level_mean: mean of the logarithm of the noise levels sigma / alpha (scm: -1, rcm: 0.7; tcm: 0).
        level_std: standard deviation of the same (scm: 1.4, rcm: 1.6); tcm: scale of its heavy-tailed law (0.2).
        derivative: of the student along a trajectory: exact (forward mode); by differences semi_continuous, discrete
            (along the ODE; of a table's teacher between entries of its table), backward, central, renoise.
        derivative_step: of such a difference, an angle in (0, pi/2).
        tangent_normalization: norm/sqrt(dim) (scm), norm (rcm), clip or none.
        tangent_constant: c of those norms (paper: 0.1).
        tangent_warmup: steps until the tangent counts in full (scm: 10000, rcm: 1000).
        weighting: of a sample's error: 1/sigma (scm), uniform (rcm), 1/(t-r) (tcm), and what else --variant ect of
            consistency takes.
        log_variance: learn the logarithm of the loss at each time and divide by the loss (scm).
        consistency_weight: of the consistency in the student's loss (rcm: 100), a mean over a sample's entries.
        matching_weight: rcm: of distribution matching beside it (1).
        matching_first_step: rcm: the step at which that and the critic begin; default the end of the warm-up,
            at the latest half of --max_steps.
        transition: tcm: the noise level above which the student is trained (paper: 1 for CIFAR-10).
        gap: tcm: how far apart the two times are, ect's q^-(stage + 1) at its end (paper: 0.001).
        mapping_k: k of ect's mapping n(t) = 1 + k sigmoid(-b t).
        mapping_b: b of the same.
        boundary_share: tcm: share of samples at the transition, where the first stage says the target (paper: 0.25).
        boundary_weight: of their mean beside that of the others (paper: 0.1).
        distance: tcm: as of consistency (paper: l2_norm).
        huber_c: tcm: c of pseudo-Huber distances.
    """

    steps: int = 2
    variant: str = "scm"
    teacher_variant: str | None = setting("source", None)
    velocity: str = "auto"
    critic_updates: int = 4
    normalizer_min: float = 1e-5
    sigma_data: float | None = None
    level_mean: float | None = None
    level_std: float | None = None
    derivative: str = "exact"
    derivative_step: float = 1e-4
    tangent_normalization: str | None = None
    tangent_constant: float = 0.1
    tangent_warmup: int | None = None
    weighting: str | None = None
    log_variance: bool | None = None
    consistency_weight: float | None = None
    matching_weight: float | None = None
    matching_first_step: int | None = None
    transition: float = 1.0
    gap: float = 1e-3
    mapping_k: float = 8.0
    mapping_b: float = 1.0
    boundary_share: float = 0.25
    boundary_weight: float = 0.1
    distance: str = "l2_norm"
    huber_c: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unknown("variant", *PAPERS)
        self._refuse_unknown("velocity", "auto", "data", "teacher")
        self._refuse_unknown("derivative", *DERIVATIVES)
        self._refuse_unknown("distance", *DISTANCES)
        self._refuse_negative("tangent_warmup", "consistency_weight", "matching_weight")
        self._refuse_negative("matching_first_step", "mapping_k", "boundary_weight", "huber_c")
        self._refuse_not_positive("sigma_data", "level_std", "derivative_step", "tangent_constant", "transition")
        if not self.derivative_step < math.pi / 2:
            raise UserError(f"--derivative_step is an angle below pi/2, where noise is, not {self.derivative_step}")
        if not 0 <= self.boundary_share < 1:
            raise UserError(f"--boundary_share must be in [0, 1), not {self.boundary_share}")
        for name, variants in _OWN.items():
            if self.variant not in variants:
                self._refuse_set(f"belongs to --variant {' or '.join(variants)}", name)
        if self.derivative == "exact":
            self._refuse_set("belongs to differences, and --derivative exact takes none", "derivative_step")
        if self.variant != "rcm" and self.matching_weight:
            raise UserError("--matching_weight belongs to --variant rcm: take that, or leave it out")
        self.resolved()._check_resolved()

    def consequences(self) -> dict[str, Any]:
        """What the variant's paper says, whose velocity it is, and how such a student is sampled."""
        follows = {name: value for name, value in PAPERS[self.variant].items() if getattr(self, name) is None}
        if self.velocity == "auto":
            follows["velocity"] = "data" if self.variant == "tcm" else "teacher"
        if self.steps > 1 and self.renoise == "auto":
            follows["renoise"] = "fresh"
        if self.matching_first_step is None and self.variant == "rcm":
            warmup = PAPERS["rcm"]["tangent_warmup"] if self.tangent_warmup is None else self.tangent_warmup
            follows["matching_first_step"] = min(warmup, self.max_steps // 2)
        return super().consequences() | follows

    def _check_resolved(self) -> None:
        self._refuse_unknown("weighting", *WEIGHTINGS)
        if self.tangent_normalization is not None:
            self._refuse_unknown("tangent_normalization", *NORMALIZATIONS)
        if self.weighting in ("1/(t-r)", "1/sqrt(t-r)") and self.variant != "tcm":
            raise UserError(f"--weighting {self.weighting} needs two times, which --variant {self.variant} has not")
        if self.velocity == "data" and self.data is None:
            what = "--variant tcm" if self.variant == "tcm" else "--velocity data"
            raise UserError(f"{what} trains on real images: give --data")
        self._refuse_data_beside_pairs()
        if self.variant == "tcm" and self.init is None:
            raise UserError("--variant tcm is a second stage: give --init, a run of consistency with --variant ect")
        if self.matching and self.velocity == "data":
            raise UserError("--variant rcm matches the teacher's distribution: leave out --velocity data")
        if self.matching and settled(self.matching_first_step) >= self.max_steps:
            raise UserError(
                f"--variant rcm begins to match at step {self.matching_first_step} (--matching_first_step), and the "
                f"run ends at --max_steps {self.max_steps}; begin earlier, or take --variant scm"
            )
        self._refuse_kept_noise()

    @property
    def matching(self) -> bool:
        """Whether the student's distribution is matched, which takes a critic."""
        return settled(self.resolved().matching_weight) > 0

    @property
    def follows_max_steps(self) -> bool:
        """Where rCM's matching begins, if that is not given and comes before the warm-up's end."""
        if self.variant != "rcm" or self.matching_first_step is not None:
            return False
        return settled(self.resolved().matching_first_step) < settled(self.resolved().tangent_warmup)

    @property
    def differentiates(self) -> bool:
        """Whether any step takes a forward derivative."""
        return self.variant != "tcm" and self.derivative in ("exact", "semi_continuous")

    @property
    def pairs_wanted(self) -> PairsWanted | None:
        if self.data is not None:
            return None
        return self._samples_wanted(guided=True)

    def share(self, step: int) -> float:
        """How much of the tangent counts, q of the papers."""
        warmup = settled(self.tangent_warmup)
        return min(1.0, step / warmup) if warmup else 1.0
