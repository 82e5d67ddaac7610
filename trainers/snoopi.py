"""SNOOPI (Nguyen et al. 2024, arXiv 2412.02687), its training part: PG-SB, SwiftBrush under a random guidance.

Variational score distillation is unstable where its one guidance scale does not suit the model. So the scale is drawn
for each sample, and teacher and critic are guided by the same one.

    accelerate launch -m fewstep.trainers.snoopi --teacher DIR --prompts FILE --steps 1 --out OUT

The other part, NASA, needs no training and is for any student: ``fewstep.nasa`` (docs/sample.md).

Departures: the paper's text does not say whether a scale is drawn for a sample or for a batch, nor by which convention:
ours are diffusers' (1 is off), one for each sample. The paper's critic is a LoRA beside a full student; here both are
full, or both LoRAs on one frozen network (``--lora_rank``). Without SwiftBrush v2's CLIP loss and its fused models, and
without NASA-T, the paper's third version's training of a student that always steers. Any number of steps, by DMD2's
backward simulation. What is left is SwiftBrush as :mod:`fewstep.trainers.dmd2` has it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewstep.cli.distill import main
from fewstep.config.guidance import DrawnGuidanceConfig
from fewstep.data.batch import Batch
from fewstep.diffusion.timesteps import uniform_times
from fewstep.errors import UserError
from fewstep.trainers._dmd2_config import Dmd2Config
from fewstep.trainers.dmd2 import Dmd2
from fewstep.training.method import Bench


@dataclass(kw_only=True)
class SnoopiConfig(DrawnGuidanceConfig, Dmd2Config):
    """PG-SB (Nguyen et al. 2024).

    Args:
        guidance_min: the guidance of teacher and critic is drawn for each sample, in diffusers' convention, from here
            (paper: 0.5).
        guidance_max: to here (paper: 4, PixArt-alpha 3).
        critic_updates: critic updates for each student update (paper: 1).
        swiftbrush: its gradient and critic, of which this is a variant.
    """

    guidance_min: float | None = 0.5
    guidance_max: float | None = 4.0
    critic_updates: int = 1
    swiftbrush: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.swiftbrush:
            raise UserError("snoopi is SwiftBrush under a random guidance: leave --swiftbrush out, or take dmd2")
        if self.guidance_range is not None:
            self._refuse_set("is drawn from --guidance_min to --guidance_max", "guidance_scale")


class Snoopi(Dmd2):
    """The method; see the module. Roles: student, teacher, critic, and ema if asked for."""

    Config = SnoopiConfig
    config: SnoopiConfig

    @classmethod
    def prepare(cls, config: Dmd2Config, bench: Bench) -> Snoopi:
        """Make the roles: student and critic start as the teacher, or as in --init."""
        assert isinstance(config, SnoopiConfig)  # the command line makes it of cls.Config
        method = super().prepare(config, bench)
        config.refuse_unguided(method.teacher.further > 0)
        assert isinstance(method, Snoopi)
        return method

    def drawn_guidance(self, batch: Batch) -> Tensor | None:
        """The scale (B,) of teacher and critic alike."""
        drawn = self.config.guidance_range
        return None if drawn is None else uniform_times(batch.draws.uniform("guidance_scale"), *drawn)


if __name__ == "__main__":
    main("snoopi")
