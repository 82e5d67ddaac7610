"""What a rectified-flow run is told (:mod:`fewstep.trainers.rectified_flow`)."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.config.checks import setting
from fewstep.config.pairs import PairsWanted
from fewstep.config.teacher_pairs import TeacherPairsConfig
from fewstep.errors import UserError


@dataclass(kw_only=True)
class RectifiedFlowConfig(TeacherPairsConfig):
    """Rectified flow (Liu et al. 2022) and 2-rectified flow++ (Lee et al. 2024).

    Args:
        inverted_pairs: folder of real images with the noise that the ODE leads them to (fewstep pairs --data); with
            --data they are made at the start, of at most --num_pairs images, into out/inverted_pairs.
        inverted_share: share of the samples that are real images, where there are any.
        renoise: a rectified flow is an ODE; there is no other choice.
        times: where on the line the student learns: u_shaped (2-rectified flow++), uniform (rectified flow),
            logit_normal, or grid (only the student's own steps: distillation).
        u_steepness: a of the U shape (paper: 4).
        time_min: the cleanest time, where a velocity is hardly to be seen in x0.
        loss: distance of the velocities: huber (pseudo-Huber, 2-rectified flow++) or l2 (rectified flow).
        huber_factor: c of the pseudo-Huber distance is this times the root of the number of entries.
        huber_scaling: sqrt, or released for the released code's c, which has no root.
        time_weight: weight of that distance: uniform, or 1-t (2-rectified flow++ with LPIPS).
        perceptual_weight: weight of LPIPS between the images of both x0; needs the lpips package. With l2 and grid
            times it is the distillation of rectified flow, with huber and 1-t the loss of 2-rectified flow++.
        perceptual_over_t: divide the LPIPS term by t (2-rectified flow++, CIFAR-10).
    """

    inverted_pairs: str | None = setting("source", None)
    inverted_share: float = 0.5
    renoise: str = "ode"
    times: str = "u_shaped"
    u_steepness: float = 4.0
    time_min: float = 1e-3
    loss: str = "huber"
    huber_factor: float = 0.00054
    huber_scaling: str = "sqrt"
    time_weight: str = "uniform"
    perceptual_weight: float = 0.0
    perceptual_over_t: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_negative("huber_factor", "perceptual_weight")
        if self.renoise != "ode":
            raise UserError(f"--renoise must be ode for a rectified flow, not {self.renoise!r}")
        self._refuse_unknown("times", "u_shaped", "uniform", "logit_normal", "grid")
        self._refuse_unknown("loss", "huber", "l2")
        self._refuse_unknown("huber_scaling", "sqrt", "released")
        self._refuse_unknown("time_weight", "uniform", "1-t")
        for name in ("time_min", "inverted_share"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"--{name} must be between 0 and 1, not {getattr(self, name)}")
        if self.times != "u_shaped":
            self._refuse_set("belongs to --times u_shaped", "u_steepness")
        if self.loss != "huber":
            self._refuse_set("belongs to --loss huber", "huber_factor", "huber_scaling")
        if self.data is None and self.inverted_pairs is None:
            self._refuse_set("is that of real images: give --data or --inverted_pairs", "inverted_share")
        if not self.u_steepness > 0:
            raise UserError(f"--u_steepness must be positive, not {self.u_steepness}")
        if self.perceptual_over_t and not self.perceptual_weight:
            raise UserError("--perceptual_over_t belongs to LPIPS: give --perceptual_weight, or leave it out")
        if self.times == "grid" and self.time_weight == "1-t" and not self.perceptual_weight:
            raise UserError("--time_weight 1-t leaves nothing to learn at the grid's first time; use uniform")
        if self.data is not None and self.inverted_pairs is not None:
            raise UserError("--inverted_pairs are made of real images already: leave out --data")

    @property
    def pairs_wanted(self) -> PairsWanted | None:
        return PairsWanted(
            self.num_pairs,
            self.pair_steps,
            self.pair_solver,
            self.pairs,
            self.inverted_pairs,
            invert_real=self.data is not None,
            inverted_share=self.inverted_share,
        )
