"""Settings of methods whose teacher has another guidance for each sample."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.config.run import RunConfig
from fewstep.errors import UserError


@dataclass(kw_only=True)
class DrawnGuidanceConfig(RunConfig):
    """A run whose teacher's guidance may be drawn.

    Args:
        guidance_min: with guidance_max: the teacher's guidance is drawn for each sample, in diffusers' convention, in
            the place of guidance_scale.
        guidance_max: see guidance_min.
    """

    guidance_min: float | None = None
    guidance_max: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_negative("guidance_min", "guidance_max")
        drawn, ends = self.guidance_range, (self.guidance_min, self.guidance_max)
        if (drawn is None and ends != (None, None)) or (drawn is not None and not drawn[0] <= drawn[1]):
            raise UserError(f"--guidance_min and --guidance_max must be a range, not {ends[0]}, {ends[1]}")

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """Of the teacher's guidance, where it is drawn for each sample."""
        low, high = self.guidance_min, self.guidance_max
        return None if low is None or high is None else (low, high)

    def refuse_unguided(self, guided: bool) -> None:
        """Raise ``UserError`` where guidance is drawn for a teacher that cannot be guided."""
        if self.guidance_range is not None and not guided:
            raise UserError("--guidance_min needs a teacher with classifier-free guidance, which this one lacks")
