"""What a PeRFlow run is told (:mod:`fewstep.trainers.perflow`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fewstep.config.checks import settled
from fewstep.config.pairs import PairsWanted
from fewstep.config.teacher_pairs import TeacherPairsConfig
from fewstep.diffusion.ode import SOLVERS
from fewstep.diffusion.schedule import NoiseSchedule, TableSchedule
from fewstep.diffusion.windows import FORMS
from fewstep.errors import UserError
from fewstep.losses.consistency import DISTANCES


@dataclass(kw_only=True)
class PerFlowConfig(TeacherPairsConfig):
    """PeRFlow (Yan et al. 2024): piecewise rectified flow.

    Args:
        windows: in how many windows of the time the student's paths are straight (paper: 4); they divide its steps.
            Default: as many as steps.
        solver_steps: steps of the teacher's ODE through one window (paper: 8 to 10 where there are four).
        solver: of that ODE: euler (DDIM for tables) or heun (twice the network calls).
        form: what the student learns of a window: velocity, or ddim_eps or diff_eps of a table's teacher, with as many
            steps as windows.
        guidance: of the teacher in the student: baked in, or kept: the teacher is asked without guidance, some samples
            lose their condition, and the student is guided when it is sampled.
        label_drop: share of samples without condition where the guidance is kept.
        first_window: where the first window begins: noise, as the student's sampler does, or data, noised as in the
            other windows (the released code); under flow matching that is the same.
        times: where in a window the student learns: uniform, or grid, only at its own steps.
        distance: of its answers: mse, l1, l2_norm, l2_norm_squared, pseudo_huber_norm or pseudo_huber_elementwise.
        huber_c: of the last two; default 0.00054 times the root of the number of entries.
        weighting: of the distance: uniform, or noisy for 1 / (2.3 max(1 - t, 0.1)).
        renoise: windows are walked by an ODE; there is no other choice.
    """

    windows: int | None = None
    solver_steps: int = 8
    solver: str = "euler"
    form: str = "velocity"
    guidance: str = "baked"
    label_drop: float = 0.1
    first_window: str = "noise"
    times: str = "uniform"
    distance: str = "mse"
    huber_c: float | None = None
    weighting: str = "uniform"
    renoise: str = "ode"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_below_one("windows", "solver_steps")
        self._refuse_negative("huber_c")
        self._refuse_unknown("solver", *SOLVERS)
        self._refuse_unknown("form", *FORMS)
        self._refuse_unknown("guidance", "baked", "kept")
        self._refuse_unknown("first_window", "noise", "data")
        self._refuse_unknown("times", "uniform", "grid")
        self._refuse_unknown("distance", *DISTANCES)
        self._refuse_unknown("weighting", "uniform", "noisy")
        if self.renoise != "ode":
            raise UserError(f"--renoise must be ode for windows, not {self.renoise!r}")
        if not 0 <= self.label_drop < 1:
            raise UserError(f"--label_drop must be in [0, 1), not {self.label_drop}")
        if self.guidance == "baked":
            self._refuse_set("belongs to a guidance that is kept (--guidance kept)", "label_drop")
        if "huber" not in self.distance:
            self._refuse_set("belongs to the pseudo-Huber distances", "huber_c")
        self._refuse_data_beside_pairs()
        windows = settled(self.resolved().windows)
        if self.steps < windows:
            raise UserError(f"--windows {windows} need a step each: give --steps {windows}, or fewer windows")
        if self.steps % windows:
            raise UserError(
                f"--windows {windows} do not divide --steps {self.steps}: give steps that are a multiple of them"
            )
        if self.form != "velocity" and self.steps != windows:
            raise UserError(
                f"--form {self.form} has one step in each window: give --steps {windows}, or --form velocity"
            )
        if self.guidance == "kept" and self.guidance_scale is not None:
            raise UserError(
                "--guidance kept asks the teacher without guidance: leave out --guidance_scale, which is for sampling"
            )

    def consequences(self) -> dict[str, Any]:
        """As many windows as steps."""
        return super().consequences() | ({"windows": self.steps} if self.windows is None else {})

    @property
    def pairs_wanted(self) -> PairsWanted | None:
        if self.data is not None:
            return None
        guided = self.guidance == "baked"
        return self._samples_wanted(guided=guided)

    def refuse_teacher(self, schedule: NoiseSchedule, top: float, guided: bool) -> None:
        """Raise for a teacher that these settings do not fit.

        Args:
            schedule: of the teacher.
            top: the time at which the student starts.
            guided: whether the teacher has a negative to be guided away from.

        Raises:
            UserError: it does not fit.
        """
        if self.form != "velocity":
            if not isinstance(schedule, TableSchedule):
                raise UserError(
                    f"--form {self.form} is of a teacher with a table of noise levels; take --form velocity"
                )
            if float(schedule.alphas_cumprod[round(top * schedule.num_train_timesteps) - 1]) <= 0:
                raise UserError(
                    f"--form {self.form} divides by the signal of the first time, and this table leaves none there; "
                    "take --form velocity, or start lower (--first_timestep)"
                )
        if self.guidance == "kept" and not guided:
            raise UserError("--guidance kept needs a teacher with classifier-free guidance; take --guidance baked")
        if schedule.num_train_timesteps is None:
            return
        entries, windows = round(top * schedule.num_train_timesteps), settled(self.resolved().windows)
        if windows * self.solver_steps > entries:
            raise UserError(
                f"--solver_steps {self.solver_steps} in each of {windows} windows are more than the {entries} "
                "times of the teacher's table; take fewer"
            )
