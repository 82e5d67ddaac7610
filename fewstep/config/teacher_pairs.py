"""Settings of methods that train on noise-sample pairs of their teacher."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.config.checks import setting
from fewstep.config.pairs import PairsWanted
from fewstep.config.run import RunConfig
from fewstep.diffusion.ode import SOLVERS
from fewstep.errors import UserError


@dataclass(kw_only=True)
class TeacherPairsConfig(RunConfig):
    """A run that may train on samples of its teacher, made ahead or at its start.

    Args:
        pairs: folder that fewstep pairs made, whose samples are trained on; default: --num_pairs are made at the start,
            into out/pairs.
        num_pairs: how many samples of the teacher there are; of them those are made that the run will use.
        pair_steps: steps of the teacher's ODE for each.
        pair_solver: euler (DDIM for tables) or heun (two network calls a step).
    """

    pairs: str | None = setting("source", None)
    num_pairs: int = 8192
    pair_steps: int = 25
    pair_solver: str = "euler"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_below_one("num_pairs", "pair_steps")
        self._refuse_unknown("pair_solver", *SOLVERS)

    def _refuse_data_beside_pairs(self) -> None:
        if self.data is not None and self.pairs is not None:
            raise UserError("give --data or --pairs, not both: one of them is what is trained on")

    def _samples_wanted(self, *, guided: bool) -> PairsWanted:
        """Pairs whose samples alone are asked for; ``guided`` as in :class:`PairsWanted`."""
        return PairsWanted(self.num_pairs, self.pair_steps, self.pair_solver, self.pairs, guided=guided)
